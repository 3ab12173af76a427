"""What README.md says is there: files, keys, settings, stages."""

import dataclasses
import re

import pytest
from conftest import ROOT, run_script

from ads.attacks.rows import ATTACKS
from ads.stage.settings import AttackConfig, GenConfig, GradConfig, TrainConfig

README = (ROOT / "README.md").read_text()
MADE_BY_RUNS = {"EXP_DIR/hub.yaml", "EXP_DIR/matched.txt", "NAME.yaml", "report.md"}
SCRIPTS = {"gentraces.py": GenConfig, "save_grad.py": GradConfig, "distill.py": TrainConfig}
ATTACKERS = (ROOT / "docs" / "attackers.md").read_text()


def keys(*classes):
    return {field.name for cls in classes for field in dataclasses.fields(cls)}


def test_every_file_it_names_exists_and_every_script_is_named():
    """`ads/native.c` had moved into a folder and was named where it had been."""
    suffixes = r"(?:c|md|py|sh|yaml|txt)"
    names = set(re.findall(rf"(?<![\w/.])((?:[\w-]+/)*[\w-]+\.{suffixes})\b", README)) - MADE_BY_RUNS
    assert len(names) > 20 and [name for name in sorted(names) if not (ROOT / name).exists()] == []
    paths = [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), *ROOT.glob("[a-z]*.yaml")]
    assert [path.name for path in paths if path.name not in names] == []
    assert [path.name for path in ROOT.glob("ads/[a-z]*/") if f"ads/{path.name}/ " not in README] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_key_of_a_stage_command_exists(script):
    commands = re.findall(rf"`{script} ([^`]+)`", README)
    assert commands or script in ("save_grad.py", "distill.py")
    for command in commands:
        assert {pair.split("=")[0] for pair in command.split()} <= keys(SCRIPTS[script])


def test_the_commands_and_names_of_attackers_are_right():
    commands = re.findall(r"python attack.py (.*)", ATTACKERS)
    names = [re.search(r"attack=(\w+)", command)[1] for command in commands]
    assert sorted(names) == sorted(ATTACKS)
    for command in commands:
        found = dict(re.findall(r"(\w+)=(\S+)", command))
        assert found.keys() <= keys(AttackConfig) and found.keys() >= {
            "attack",
            *ATTACKS[found["attack"]].keys,
        }
    listed = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`[^|]*`) \|", ATTACKERS, re.MULTILINE)))
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "attacks").glob("*.yaml"))


def test_every_setting_of_the_pipeline_is_known_to_it():
    pipeline = (ROOT / "pipeline.sh").read_text() + (ROOT / "pipeline_demo.sh").read_text()
    named = set(re.findall(r"\b([A-Z]+(?:_[A-Z]+)*)=", README)) | set(
        re.findall(r"`([A-Z]+(?:_[A-Z]+)*)`", README)
    )
    assert '"ADS_NATIVE"' in (ROOT / "ads" / "stage" / "config.py").read_text()
    named -= {"POINT", "NAME", "ADS", "ADS_NATIVE", "SKIP_SETUP", "HF_HUB_OFFLINE"}
    assert len(named) > 12
    assert [name for name in named if f"${{{name}:-" not in pipeline] == []
    settings = set(re.findall(r'^ *([A-Z_]+)="\$\{', pipeline, re.MULTILINE))
    assert settings <= named
    for words in re.findall(r'_ARGS="([^"-][^"]*)"', README):
        assert {word.split("=")[0] for word in words.split()} <= keys(*SCRIPTS.values())


def test_its_grid_arguments_are_understood():
    for words in re.findall(r'GRID_ARGS="([^"$]+)"', README):
        words = words.replace("i/n", "0/4").split()
        assert run_script("grid.py", *words).stdout


def test_default_grid_is_the_paper_s():
    """A temperature ladder and 20 values of lam up to 0.06 at tau 0.6; shards part it without loss."""
    points = run_script("grid.py").stdout.splitlines()
    arms = [line.split() for line in points]
    assert sorted({float(lam) for _, lam, _ in arms}) == pytest.approx([0.003 * i for i in range(21)])
    assert {float(tau) for tau, lam, _ in arms if float(lam)} == {0.6}
    temperatures = sorted(float(tau) for tau, lam, _ in arms if not float(lam))
    assert temperatures[0] == 0.6 and temperatures[-1] == 3.0 and len(temperatures) == 13
    shards = [run_script("grid.py", "--shard", f"{i}/4").stdout.splitlines() for i in range(4)]
    assert sorted(line for shard in shards for line in shard) == sorted(points)
    assert len(set(points)) == len(points) == 33


def test_nothing_in_the_tree_depends_on_where_it_was_made():
    """No absolute path of a machine, no package index."""
    code = [path for folder in ("ads", "bench", "demo", "tests") for path in ROOT.glob(f"{folder}/**/*.py")]
    for path in [*ROOT.glob("*.*"), *ROOT.glob("docs/*.md"), *code, *ROOT.glob(".ci/*")]:
        # in a worktree of git .git is a file that names a folder
        if path.is_file() and path.name not in ("test_readme.py", ".git"):
            text = path.read_text(errors="ignore")
            assert not re.search(r"(?<![\w.])/(?:work|root|home|opt)/|files\.pythonhosted|pypi\.org", text), (
                path
            )
