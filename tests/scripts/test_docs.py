"""README.md and the pages of docs: their commands, settings, files and links are those that there are."""

import dataclasses
import json
import os
import re
import subprocess

import pytest
from conftest import ROOT, run_script
from helpers_docs import ASSIGNMENT, PAGES, PROGRAMS, anchors, blocks, commands, inline_code, links, prose

import grid
import report
from ads.attacks.recipes import print_recipe
from ads.attacks.rows import ATTACKS
from ads.stage.config import check_keys, make_config
from ads.stage.settings import AttackConfig, GenConfig, GradConfig, SearchConfig, TrainConfig

README = ROOT / "README.md"
DOCS = ROOT / "docs"
STAGES = {
    "gentraces.py": GenConfig,
    "save_grad.py": GradConfig,
    "attack.py": AttackConfig,
    "distill.py": TrainConfig,
    "search.py": SearchConfig,
}
# of the variables that hold words: whose words
ARGUMENTS = {
    "GRAD_ARGS": GradConfig,
    "TRAIN_ARGS": TrainConfig,
    "ATTACK_ARGS": AttackConfig,
    **dict.fromkeys(
        ("GEN_ARGS", "HOLDOUT_ARGS", "TRACE_ARGS", "BASE_ARGS", "FEW_SHOT_ARGS", "CLEAN_ARGS", "SOLO_ARGS"),
        GenConfig,
    ),
}
# read by libraries and launchers, or by setup.sh and ads/
OTHER_VARIABLES = {
    "ACCELERATE_USE_CPU",
    "ADS_NATIVE",
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "PYTHON",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "SKIP_SETUP",
}
# programs that are not this project's, by their first words
OTHER_PROGRAMS = (
    "python3 -m venv .venv",
    "source .venv/bin/activate",
    "pip install",
    "uv venv",
    "uv pip install",
    "uv sync",
    "pre-commit install",
    "hf auth login",
    "sbatch sweep.sh",
    "accelerate launch",
)
PIPELINES = ("pipeline.sh", "pipeline_demo.sh", "pipeline_math.sh", "pipeline_mmlu.sh", "pipeline_small.sh")
PYTEST_OPTIONS = {"-m", "-n", "--hypothesis-profile"}
MADE_BY_RUNS = {
    "EXP_DIR/hub.yaml",
    "EXP_DIR/matched.txt",
    "NAME.yaml",
    "report.md",
    "sweep.sh",
    "my_attack.yaml",
}


def settings_of(scripts):
    text = "".join((ROOT / script).read_text() for script in scripts)
    return set(re.findall(r'^ *([A-Z_]+)="\$\{', text, re.MULTILINE))


VARIABLES = settings_of(PIPELINES) | OTHER_VARIABLES


def check_command(words):
    """AssertionError or UserError that says what in a command is not there."""
    while words and (found := re.fullmatch(r"([A-Z_]+)=(.*)", words[0], re.DOTALL)):
        check_variable(*found.groups())
        words = words[1:]
    text = " ".join(words)
    if any(text.startswith(known) for known in OTHER_PROGRAMS):
        if words[0] == "accelerate":
            script = next(word for word in words if word.endswith(".py"))
            check_python(script, words[words.index(script) + 1 :])
        return
    program, name, *more = words
    if program == "bash":
        check_bash(name, more)
    elif program == "python":
        check_python(name, more)
    elif program == "source":
        assert name == "./setup.sh" and all(f"\n{extra} = [" in read("pyproject.toml") for extra in more), (
            text
        )
    elif program == "make":
        assert f"\n{name}:" in read("Makefile"), text
    else:
        raise AssertionError(f"{text}: of no known kind")


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def check_variable(name, value):
    assert name in VARIABLES, f"{name}: no part of the project reads it"
    value = value.replace("$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT", "0/4").replace("$i", "0")
    if name in ARGUMENTS:
        check_words(ARGUMENTS[name], value.split())
    elif name == "GRID_ARGS" and "--file" not in value:
        grid.parse(value.split())
    elif name == "ATTACKS":
        for attack in value.split():
            assert attack.endswith(".yaml") or (ROOT / "attacks" / f"{attack}.yaml").exists(), attack


def check_words(config, words):
    """key=value words as the stage itself reads them; `..` stands for any value."""
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        assert equals, word
        check_keys(config, [key], "the command line")
        if value not in ("..", "...", ""):
            make_config(config, {key: value}, {key: "the command line"})


def check_bash(name, words):
    assert (ROOT / name).exists(), name
    if name in PIPELINES:
        assert set(words) <= {"--dry-run", "--help"}, words
    elif name == "run_tests.sh":
        options = {word.split("=")[0] for word in words if word.startswith("-")}
        assert options <= PYTEST_OPTIONS, words
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/")), words
    else:
        options = read("bench/gpu.py") if name == "bench/gpu.sh" else ""
        assert all(f'"{word}"' in options for word in words), words


def check_python(name, words):
    assert (ROOT / name).exists(), name
    if words in (["--help"], ["--check"]):
        return
    if name == "search.py" and "--" in words:
        check_words(GenConfig, words[words.index("--") + 1 :])
        words = words[: words.index("--")]
    if name in STAGES:
        check_words(STAGES[name], words)
    elif name == "report.py":
        report.parse_arguments(words)
    elif name == "grid.py":
        if "--file" not in words:
            grid.parse(words)
    elif name == "demo/pretrain.py":
        assert {word.split("=")[0] for word in words} <= {"out", "seed", "scale"}, words
    else:
        options = [word for word in words if word.startswith("--")]
        assert all(f'"{word}"' in read(name) for word in options), words


COMMANDS = [command for page in PAGES for command in commands(page)]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.page}: {command.text[:60]}")
def test_every_command_is_known_with_all_its_words(command):
    """A script, key, option or variable that is not there any more, or never was."""
    if command.text.startswith("#!"):
        lines = [
            line.removeprefix("export ") for line in command.text.splitlines() if "bash pipeline.sh" in line
        ]
        assert lines
        for found in re.findall(r"^export (.*)$", command.text, re.MULTILINE):
            assert set(re.findall(r"\b([A-Z]+(?:_[A-Z]+)*)=", found)) <= VARIABLES
        command = dataclasses.replace(command, text=lines[-1])
    for words in command.words():
        check_command(words)


@pytest.mark.parametrize(
    "words",
    (
        "bash pipeline.sh --dryrun",
        "bash pipline.sh",
        "python gentraces.py taus=0.6",
        "python gentraces.py tau=hot",
        "TRAINARGS=lr=1 bash pipeline.sh",
        "TRAIN_ARGS=tau=1 bash pipeline.sh",
        "ATTACKS=naive,correct bash pipeline.sh",
        "python report.py runs/x --pairs a b",
        "python bench/memory.py --card 80",
        "python search.py targets=0.9 -- teach=T",
        "bash run_tests.sh tests/test_gone.py",
        "make tests",
        "wget something",
    ),
)
def test_a_command_that_is_not_there_is_found(words):
    """What the test above rests on."""
    with pytest.raises((AssertionError, ValueError, SystemExit)):
        check_command(words.split())


def test_no_command_is_overlooked():
    """Commands stand in bash blocks or in `code`: in other blocks they would be unseen."""
    assert len(COMMANDS) > 60
    command = re.compile(rf"^ +(?:{ASSIGNMENT} )*(?:{PROGRAMS}) [\w./-]", re.MULTILINE)
    for page in PAGES:
        languages = re.findall(r"^```(\w*)\n.+?^```$", page.read_text(), re.MULTILINE | re.DOTALL)
        assert set(languages) <= {"bash", "yaml", "json", "bibtex", "mermaid"}, page
        assert command.findall(prose(page)) == [], page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_stands_in_code_within_sentences_is_there(page):
    """`NAME=...` is a variable, `script.py key=...` has keys of it, `key=...` is a key of some script."""
    known = {field.name for config in STAGES.values() for field in dataclasses.fields(config)}
    for text in inline_code(page):
        if found := re.fullmatch(r"([A-Z][A-Z_]+)=(\"?)([^`\"]*)\2", text):
            check_variable(found[1], found[3] if found[1] in ARGUMENTS and "..." not in found[3] else "")
        elif found := re.fullmatch(r"(gentraces|save_grad|attack|distill)\.py((?: \S+)*)", text):
            check_words(STAGES[f"{found[1]}.py"], found[2].split())
        elif found := re.fullmatch(r"([a-z][a-z_]+)=[^=\s]\S*", text):
            assert found[1] in known | {"scale", "out", "key"}, f"{page.name}: {text}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page):
    for target, anchor in links(page):
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(there), f"{page.name}: {target}#{anchor}"


def test_every_page_is_listed_and_leads_back_to_the_start():
    pages = {path.name for path in DOCS.glob("*.md")} - {"README.md"}
    listed = [target for target, _ in links(DOCS / "README.md")]
    assert sorted(target for target in listed if "/" not in target) == sorted(pages)
    for name in pages:
        opening = (DOCS / name).read_text().split("\n", 3)[2]
        assert opening.startswith("[Start page](README.md). You learn here "), name


def test_readme_is_short_and_begins_with_what_matters():
    """A newcomer has ten minutes: what, why, a picture, two commands, the figure."""
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) <= 1500
    order = [
        "docs/pipeline.svg",
        "bash pipeline_demo.sh",
        "bash pipeline.sh",
        "docs/demo_tradeoff.png",
        "## The method",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places) and len(text[: places[2]].split()) < 200


def test_every_file_that_is_named_exists_and_every_script_is_named():
    """`ads/native.c` had moved into a folder and was named where it had been."""
    suffixes = r"(?:c|md|py|sh|yaml|txt|svg|png)"
    text = README.read_text() + (DOCS / "reference.md").read_text().replace("](../", "](").replace(
        "](", "](docs/"
    )
    text = re.sub(r"\]\([^)]*\)", "", text)  # links have a test of their own
    names = set(re.findall(rf"(?<![\w/.])((?:[\w-]+/)*[\w-]+\.{suffixes})\b", text)) - MADE_BY_RUNS
    names = {name for name in names if not (DOCS / name).exists()}
    assert len(names) > 20 and [name for name in sorted(names) if not (ROOT / name).exists()] == []
    paths = [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), *ROOT.glob("[a-z]*.yaml")]
    assert [path.name for path in paths if path.name not in names] == []
    assert [path.name for path in ROOT.glob("ads/[a-z]*/") if f"ads/{path.name}/ " not in text] == []


def test_every_setting_of_the_pipeline_is_in_the_reference_and_in_its_help(bash_help):
    reference = (DOCS / "reference.md").read_text()
    small = "pipeline_small.sh"
    settings = settings_of(set(PIPELINES) - {small})
    assert len(settings) > 20
    own = settings_of([small]) - settings
    assert len(own) > 3 and [name for name in own if f"`{name}`" not in (DOCS / "small.md").read_text()] == []
    assert [name for name in settings if not re.search(rf"`{name}`", reference)] == []
    shown = set(re.findall(r"^([A-Z_]+)=", bash_help("pipeline.sh"), re.MULTILINE))
    assert shown - {"SKIP_SETUP"} == settings - {"SEEDS", "FULL", "OMP_NUM_THREADS"}


@pytest.fixture
def bash_help(tmp_path):
    """What `bash SCRIPT --help` prints, on a machine without any environment: it must set up none."""

    def run(script):
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        command = ["bash", str(ROOT / script), "--help"]
        made = set(os.listdir(ROOT))
        result = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60
        )
        assert result.returncode == 0 and result.stderr == "" and set(os.listdir(ROOT)) == made
        return result.stdout

    return run


@pytest.mark.parametrize(
    "script,words",
    (
        ("pipeline.sh", ["EXP_DIR=runs/gsm8k", "--dry-run", "JOBS=1\n    grid points at once"]),
        ("pipeline_demo.sh", ["SEEDS=5 bash", "EXP_DIR=runs/demo\n", "DATASET=arithmetic\n", "NPROC=1\n"]),
        ("pipeline_math.sh", ["EXP_DIR=runs/math\n", "GEN_ARGS=max_samples=2880 max_length=2048"]),
        ("pipeline_mmlu.sh", ["EXP_DIR=runs/mmlu\n", "HOLDOUT_ARGS=max_samples=5120 max_length=1024"]),
    ),
)
def test_help_of_a_pipeline_says_its_settings_and_sets_up_nothing(bash_help, script, words):
    said = bash_help(script)
    assert [each for each in words if each not in said] == []


@pytest.mark.parametrize("script", (*STAGES, "chain.py", "grid.py", "report.py", "demo/pretrain.py"))
def test_help_of_a_script_says_how_it_is_run_and_its_keys(script):
    """`--help` was `argument '--help': write key=value`."""
    said = run_script(script, "--help").stdout
    assert f"python {script} " in said
    if script in STAGES:
        keys = [field.name for field in dataclasses.fields(STAGES[script])]
        assert [key for key in keys if f"\n{key}: " not in said] == []
        assert run_script(script, "-h").stdout == said
        assert run_script(script, "--help", "seed=1", check=False).returncode == 2


def test_the_attacker_and_the_problem_of_the_readme_are_right(tmp_path):
    (recipe,), (problem,) = blocks(README, "yaml"), blocks(README, "json")
    (tmp_path / "my_attack.yaml").write_text(recipe)
    assert "my_attack\tdistill\tlr=1e-4" in print_recipe(str(tmp_path / "my_attack.yaml"))
    assert json.loads(problem).keys() == {"problem", "solution"}


def test_the_commands_and_names_of_attackers_are_right():
    page = DOCS / "attackers.md"
    words = [
        each for command in commands(page) for each in command.words() if each[:2] == ["python", "attack.py"]
    ]
    found = [dict(word.split("=", 1) for word in each[2:]) for each in words]
    assert sorted(each["attack"] for each in found) == sorted(ATTACKS)
    for each in found:
        assert each.keys() >= {"attack", *ATTACKS[each["attack"]].keys}
    text = page.read_text()
    listed = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`[^|]*`) \|", text, re.MULTILINE)))
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "attacks").glob("*.yaml"))


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
    for path in [*ROOT.glob("*.*"), *ROOT.glob("docs/*.*"), *code, *ROOT.glob(".ci/*")]:
        # in a worktree of git .git is a file that names a folder
        if path.is_file() and path.name not in ("test_docs.py", ".git"):
            text = path.read_text(errors="ignore")
            assert not re.search(r"(?<![\w.])/(?:work|root|home|opt)/|files\.pythonhosted|pypi\.org", text), (
                path
            )
