"""Stages in one process against the same stages in one process each."""

import pytest
from conftest import run_script
from helpers_scripts import SMALL, TIMING, ads_arguments, rows_of

import chain
from ads.stage.sidecar import read_sidecar


def stages(models, problems, exp, exp_dir):
    """{name: words} of a grid point."""
    given = [f"exp_dir={exp_dir}", *SMALL]
    teacher = [*given, f"teacher={models['teacher']}", *ads_arguments(models, exp)]
    traces = f"{exp_dir}/traces/train.parquet"
    taught = [*given, "tau=0", "is_teacher=false", f"teacher={exp_dir}/models/student/final"]
    recipe = ["num_epochs=1", "batch_size=4", "lora_r=4", "max_length=140", "do_eval=false"]
    return {
        "train": ["gentraces.py", *teacher, f"data_split={problems}_train", "trace_name=train"],
        "test": ["gentraces.py", *teacher, f"data_split={problems}_test", "trace_name=test"],
        "student": [
            "distill.py",
            given[0],
            f"student={models['student']}",
            f"train_traces={traces}",
            *recipe,
        ],
        "taught": ["gentraces.py", *taught, f"data_split={problems}_test", "trace_name=taught"],
    }


def chained(words, **keywords):
    arguments = []
    for name, stage in words.items():
        arguments += ["--", name, *stage] if arguments else [name, *stage]
    return run_script("chain.py", *arguments, **keywords)


@pytest.mark.parametrize("num_processes", (1, 2))
def test_a_chain_makes_what_its_stages_make(num_processes, model_folders, problem_folder, exp, tmp_path):
    """To the last bit, with the teacher and the proxy loaded once for two stages; again, nothing is done.

    With two processes the student is trained by them, and differs by rounding.
    """
    folders = tmp_path / "alone", tmp_path / "chain"
    for script, *words in stages(model_folders, problem_folder, exp, folders[0]).values():
        run_script(script, *words)
    words = stages(model_folders, problem_folder, exp, folders[1])
    done = chained(words, num_processes=num_processes)
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("run ")] == list(words)
    assert done.stdout.count(f"loading {model_folders['teacher']}") == 1
    for name in ("train", "test", "taught")[: 4 - num_processes]:
        assert rows_of(folders[0], name) == rows_of(folders[1], name)
    sidecars = [read_sidecar(folder / "models" / "student.yaml") for folder in folders]
    assert [s["command"][0] for s in sidecars] == ["distill.py", "distill.py"]
    if num_processes == 1:
        assert sidecars[0]["outputs"] == sidecars[1]["outputs"]
        stats = [{k: v for k, v in s["stats"].items() if k not in TIMING} for s in sidecars]
        assert stats[0] == stats[1]
    again = chained(words)
    assert again.stdout.count("nothing to do") == 4 and "loading" not in again.stdout


def test_a_stage_that_fails_ends_the_chain_with_its_exit_code(model_folders, problem_folder, exp, tmp_path):
    words = stages(model_folders, problem_folder, exp, tmp_path)
    words["test"].append("top_p=2")
    done = chained(words, check=False)
    assert done.returncode == 2 and "top_p=2" in done.stderr.splitlines()[-1]
    assert (tmp_path / "traces" / "train.yaml").exists() and not (tmp_path / "models").exists()


def test_what_is_no_stage_is_refused():
    given = ["a", "gentraces.py", "x=1", "--", "b", "/x/distill.py"]
    assert chain.groups_of(given) == [[["a", "gentraces.py", "x=1"], ["b", "/x/distill.py"]]]
    assert chain.groups_of([*given, "==", "c", "attack.py"])[1] == [["c", "attack.py"]]
    for words in ([], ["a"], ["a", "report.py"], ["a", "gentraces.py", "--"]):
        with pytest.raises(ValueError, match="is not NAME SCRIPT"):
            chain.groups_of(words)


def test_check_tells_what_there_is_to_do(model_folders, problem_folder, exp, tmp_path):
    """A line a stage; what follows a stage that left no row is not asked; the first refusal ends it."""
    words = list(stages(model_folders, problem_folder, exp, tmp_path).values())
    correct = ["attack.py", f"exp_dir={exp}", "attack=correct", f"traces={exp}/traces/holdout.parquet"]
    assert run_script(*correct, "trace_name=emptied", check=False).returncode == 4
    emptied = ["emptied", *correct, "trace_name=emptied", "--", "taught", *words[2], "lr=-1"]
    given = ["train", *words[0], "==", *emptied, "==", "wrong", *words[2], "lr=-1", "==", "test", *words[1]]
    for option, num_lines in (("--check", 4), ("--check-all", 5)):
        result = run_script("chain.py", option, *given, check=False)
        lines = [line.split()[:2] for line in result.stdout.splitlines()]
        told = [["3", "train"], ["4", "emptied"], ["4", "taught"], ["2", "wrong"], ["3", "test"]]
        assert lines == told[:num_lines] and result.returncode == 2
        assert result.stderr.count("error: ") == 1 and "lr=-1" in result.stderr
