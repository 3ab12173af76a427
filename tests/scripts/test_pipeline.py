"""pipeline.sh as a user runs it, on tiny models and a data set of one's own."""

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from helpers_pipeline import (
    MOST_SECONDS,
    POINTS,
    has_ended,
    imported,
    pipeline_environment,
    run_pipeline,
    wait_until,
)
from helpers_scripts import free_port

from ads.data.tables import read_parquet
from ads.stage import files
from ads.stage.inputs import delete_student

ONE_POINT = "--points 0.8,0,0"
# What schedulers and outer launchers leave in the environment of a process that is alone.
LEFT_BY_OTHERS = {
    **{"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"},
    **{"OMPI_COMM_WORLD_SIZE": "2", "PMI_SIZE": "2", "MV2_COMM_WORLD_SIZE": "2", "PET_NNODES": "2"},
    **{"ACCELERATE_USE_FSDP": "true", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "SLURM_PROCID": "1"},
}


@pytest.fixture(scope="module")
def experiment(model_folders, problem_folder, tmp_path_factory):
    """A finished experiment of two points: (folder with a space in its name, output)."""
    exp_dir = tmp_path_factory.mktemp("runs") / "an experiment"
    return exp_dir, run_pipeline(model_folders, problem_folder, exp_dir).stdout


def test_all_six_stages_ran(experiment):
    exp_dir, output = experiment
    points = ("tau0.8_lam0_eps0", "tau0.8_lam0.05_eps1e-3")
    traces = [
        "holdout",
        "student_base",
        *(f"{s}_{p}" for s in ("train", "eval_student", "eval_teacher") for p in points),
    ]
    for name in traces:
        assert files.read_yaml(exp_dir / "traces" / f"{name}.yaml")["stats"]["n"] > 0
        assert (exp_dir / "traces" / name / "dataset_info.json").exists()
    assert (exp_dir / "student_grads.yaml").exists()
    for point in points:
        assert (exp_dir / "models" / f"student_{point}" / "final" / "model.safetensors").exists()
        assert (exp_dir / "logs" / f"{point}.log").stat().st_size > 0
    assert "total time" in output and "--- 2 of 2 points" in output
    assert (exp_dir / "report" / "results.csv").exists()
    assert not list((exp_dir / "parts").iterdir())


def test_run_again_skips_everything_at_once(experiment, model_folders, problem_folder):
    """No stage runs and no model is loaded, for which torch would be imported."""
    exp_dir, _ = experiment
    before = {path: path.stat().st_mtime_ns for path in exp_dir.rglob("*.parquet")}
    again = run_pipeline(model_folders, problem_folder, exp_dir, PYTHONPROFILEIMPORTTIME="1")
    assert again.stdout.count("done    ") == 11 and "run     " not in again.stdout
    assert imported(again.stderr, "yaml") and not imported(again.stderr, "torch")
    assert before == {path: path.stat().st_mtime_ns for path in exp_dir.rglob("*.parquet")}


def made_by_other_code(sidecar):
    record = sidecar.read_text()
    code = files.read_yaml(sidecar)["code"]
    assert record.count(f"code: {code}\n") == 1
    sidecar.write_text(record.replace(f"code: {code}\n", "code: 0123456789abcdef\n"))


def test_dry_run_says_what_is_done_and_writes_nothing(experiment, model_folders, problem_folder, tmp_path):
    """Of a stage that other code made, that is said: once cut out of a sentence at a word of it."""
    exp_dir, _ = experiment
    made_by_other_code(exp_dir / "traces" / "holdout.yaml")
    found = run_pipeline(
        model_folders, problem_folder, exp_dir, "--dry-run", GRID_ARGS=POINTS + " 1.2,0,0"
    ).stdout
    lines = found.splitlines()
    assert lines[0].startswith("done    holdout (made by other code: commit ") and lines[0].endswith(")")
    assert lines[1] == "done    student_grads"
    assert sum(line.startswith("done    ") for line in lines) == 11
    assert [line.split()[2] for line in lines if line.startswith("to do")] == [
        f"{stage}_tau1.2_lam0_eps0:" for stage in ("train", "eval_teacher", "student", "eval_student")
    ]
    fresh = run_pipeline(model_folders, problem_folder, tmp_path / "new", "--dry-run", NPROC="").stdout
    assert fresh.count("to do   ") == 11 and "gentraces.py" in fresh and "waits: " in fresh
    assert not (tmp_path / "new").exists()


def test_dry_run_in_an_environment_that_is_set_up(model_folders, problem_folder, tmp_path):
    """setup.sh once took the pipeline's own --dry-run for its extras; and an active environment's python was
    not the one that ran where another came first on PATH."""
    stamp = (ROOT / "pyproject.toml").read_bytes() + (ROOT / "constraints.txt").read_bytes()
    checksum = subprocess.run(["cksum"], input=stamp, capture_output=True, check=True).stdout.decode().strip()
    (tmp_path / ".ads_setup_base").write_text(f"{checksum} {ROOT}")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(
        f'#!/bin/sh\necho "$1" >>"{tmp_path}/ran"\nexec {sys.executable} "$@"\n'
    )
    (tmp_path / "bin" / "python").chmod(0o755)
    settings = {"SKIP_SETUP": "0", "VIRTUAL_ENV": str(tmp_path), "GRID_ARGS": "--points 0.6,0,0"}
    found = run_pipeline(model_folders, problem_folder, tmp_path / "new", "--dry-run", **settings)
    assert found.stdout.count("to do   ") == 7 and "installing" not in found.stderr
    assert "chain.py" in (tmp_path / "ran").read_text()


def test_the_error_of_a_stage_is_the_last_line(model_folders, problem_folder, tmp_path):
    """torchrun's report of 30 lines once stood below it, and its exit code 1 for the stage's own."""
    settings = {"NPROC": "2", "HOLDOUT_ARGS": "max_length=100000000000"}
    environment = pipeline_environment(model_folders, problem_folder, tmp_path, **settings)
    result = subprocess.run(
        ["bash", str(ROOT / "pipeline.sh")], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600,
    )  # fmt: skip
    assert result.stdout.splitlines()[-1].startswith("error: out of memory with batch_size=1")
    assert result.returncode == 2


FAILS = """
import os, sys, time
sys.path.insert(0, {root!r})
import utils
from ads.stage.world import start_world

def main(_):
    world = start_world()
    print("error-free so far")
    if world.rank == 1:
        {fault}
    time.sleep(60)

utils.run_script(main)
"""
FAULTS = (
    (
        "raise RuntimeError('boom') from KeyError('cause')",
        "error: RuntimeError: boom (unexpected: its traceback is above, and in the log)",
        1,
    ),
    ("os.kill(os.getpid(), 9)", "error: Signal 9 (SIGKILL) received by PID ", 137),
)


@pytest.mark.parametrize("fault,line,code", FAULTS)
def test_the_process_that_failed_first_has_the_last_word(
    model_folders, problem_folder, tmp_path, fault, line, code
):
    """The launcher's own traceback and report once were the end of what one saw."""
    (tmp_path / "fails.py").write_text(FAILS.format(root=str(ROOT), fault=fault))
    launch = f"torchrun --standalone --nproc_per_node 2 {tmp_path}/fails.py"
    settings = {"LAUNCH": launch, "ACCELERATE_USE_CPU": "true", "NPROC": "2"}
    result = run_pipeline(model_folders, problem_folder, tmp_path / "x", check=False, **settings)
    assert result.stderr.splitlines()[-1].startswith(line)
    assert result.returncode == code


def test_students_are_deleted_on_request_and_count_as_done(
    experiment, model_folders, problem_folder, tmp_path
):
    """The 33 students of the paper's grid take 212 GB."""
    exp_dir = Path(shutil.copytree(experiment[0], tmp_path / "copy"))
    run = functools.partial(run_pipeline, model_folders, problem_folder, exp_dir)
    student = exp_dir / "models" / "student_tau0.8_lam0_eps0"
    before = responses(exp_dir, "eval_student_tau0.8_lam0_eps0")
    for options, num_left in ((["--dry-run"], 2), ([], 0), (["--dry-run"], 0)):
        again = run(*options, KEEP_STUDENTS="0")
        assert again.stdout.count("done    ") == 11 and "run     " not in again.stdout
        assert len(list((exp_dir / "models").glob("*/final"))) == num_left
    results = [(top / "report" / "results.csv").read_text() for top in (exp_dir, experiment[0])]
    assert results[0] == results[1]
    (exp_dir / "traces" / f"eval_{student.name}.yaml").unlink()
    plan = run("--dry-run", check=False)
    assert plan.stdout.count("refused ") == 1 and f"delete {student}.yaml and run again" in plan.stderr
    Path(f"{student}.yaml").unlink()
    assert run(KEEP_STUDENTS="0", GRID_ARGS=ONE_POINT).stdout.count("run     ") == 2
    assert responses(exp_dir, "eval_student_tau0.8_lam0_eps0") == before
    assert not (student / "final").exists()


def test_a_student_that_was_not_evaluated_is_not_deleted(experiment, model_folders, problem_folder, tmp_path):
    """A launcher may hide that a stage failed: some leave with 0 whatever becomes of their processes."""
    exp_dir = Path(shutil.copytree(experiment[0], tmp_path / "copy"))
    (exp_dir / "traces" / "eval_student_tau0.8_lam0_eps0.yaml").unlink()
    settings = {"KEEP_STUDENTS": "0", "GRID_ARGS": ONE_POINT, "LAUNCH": "true"}
    run_pipeline(model_folders, problem_folder, exp_dir, check=False, **settings)
    assert (exp_dir / "models" / "student_tau0.8_lam0_eps0" / "final" / "config.json").is_file()


def test_nothing_but_a_student_is_deleted(tmp_path):
    (tmp_path / "final").mkdir()
    with pytest.raises(ValueError, match="is no student"):
        delete_student(str(tmp_path / "final"))


@pytest.mark.parametrize(
    "exp_dir,words",
    (("", "EXP_DIR is empty"), ("~someone/x", "EXP_DIR='~someone/x': write that home")),
)
@pytest.mark.parametrize("script", ("pipeline.sh", "pipeline_math.sh", "pipeline_demo.sh"))
def test_a_folder_without_a_name_is_refused(model_folders, problem_folder, script, exp_dir, words):
    """EXP_DIR=$UNSET once meant the default folder."""
    result = run_pipeline(model_folders, problem_folder, exp_dir, "--dry-run", script=script, check=False)
    assert result.returncode == 2 and words in result.stderr and "to do" not in result.stdout


def test_home_folders_are_known_by_their_sign(model_folders, problem_folder, tmp_path):
    """Quoted, or in a shell that leaves it in key=~/value, ~ once became a folder of that name."""
    (tmp_path / "sums").symlink_to(problem_folder)
    (tmp_path / "model").symlink_to(model_folders["teacher"])
    settings = {
        "HOME": str(tmp_path),
        "DATASET": "~/sums",
        "TEACHER": "~/model",
        "GRID_ARGS": "--points 1,0,0",
    }
    found = run_pipeline(model_folders, problem_folder, "~/x", "--dry-run", **settings)
    assert f"exp_dir={tmp_path}/x" in found.stdout and found.stdout.count("to do   ") == 7


@pytest.mark.slow
def test_an_experiment_may_have_any_name(model_folders, problem_folder, tmp_path, monkeypatch):
    """No part of it is taken for an option or run by a shell."""
    monkeypatch.chdir(tmp_path)
    name = "-n 'a' \"b\" $(touch pwned) `touch pwned`; touch pwned & | * ? \\ \n--help=1"
    found = run_pipeline(model_folders, problem_folder, name, GRID_ARGS="--points 0.8,0,0")
    assert "--- 1 of 1 points" in found.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]
    assert (tmp_path / name / "report" / "report.html").exists()


@pytest.mark.slow
def test_the_same_pipeline_twice_at_once(experiment, model_folders, problem_folder, tmp_path):
    """One makes a stage, the other waits for it: each is made once, and as by one alone."""
    environment = pipeline_environment(model_folders, problem_folder, tmp_path / "twice")
    command, quiet = ["bash", str(ROOT / "pipeline.sh")], {"stdout": subprocess.DEVNULL}
    both = [subprocess.Popen(command, env=environment, **quiet) for _ in range(2)]
    assert [process.wait(timeout=900) for process in both] == [0, 0]
    registry = (tmp_path / "twice" / "metadata" / "trace_registry.jsonl").read_text().splitlines()
    names = [json.loads(line)["name"] for line in registry]
    alone = sorted(path.stem for path in (experiment[0] / "traces").glob("*.yaml"))
    assert sorted(names) == alone
    for name in alone:
        assert responses(tmp_path / "twice", name) == responses(experiment[0], name)


ON_TWO_MACHINES = """#!/bin/sh
"$@" & "$@"
status=$?
wait $! || status=$?
exit $status
"""


@pytest.mark.slow
def test_two_machines_make_what_one_makes(experiment, model_folders, problem_folder, tmp_path):
    """As two launchers on this one, which meet as those of two machines do (docs/scaling.md)."""
    (tmp_path / "on_both").write_text(ON_TWO_MACHINES)
    launch = f"sh {tmp_path}/on_both torchrun --nnodes 2 --nproc_per_node 1\n --rdzv_id x --rdzv_backend c10d"
    settings = {"ACCELERATE_USE_CPU": "true", "NPROC": "2", "GRID_ARGS": ONE_POINT}
    settings["LAUNCH"] = f"{launch} --rdzv_endpoint 127.0.0.1:{free_port()}"
    found = run_pipeline(model_folders, problem_folder, tmp_path / "two", **settings)
    assert found.stdout.count("run     ") == 7
    for name in ("holdout", "student_base", "train_tau0.8_lam0_eps0", "eval_teacher_tau0.8_lam0_eps0"):
        assert files.read_yaml(tmp_path / "two" / "traces" / f"{name}.yaml")["world_size"] == 2
        assert responses(tmp_path / "two", name) == responses(experiment[0], name)


def test_other_settings_are_refused_by_name(experiment, model_folders, problem_folder):
    exp_dir, _ = experiment
    result = run_pipeline(model_folders, problem_folder, exp_dir, SEED="43", check=False)
    assert result.returncode == 2 and "seed was 42, now 43" in result.stderr
    plan = run_pipeline(model_folders, problem_folder, exp_dir, "--dry-run", SEED="43", check=False)
    assert plan.returncode == 2 and plan.stdout.count("refused ") == 11, "a dry run shows all of it"


@pytest.mark.parametrize(
    "settings,words",
    (
        ({"TRAIN_ARGS": "num_epoch=3"}, "unknown key 'num_epoch' in the command line"),
        ({"NPROC": "3"}, "batch_size=4: must be a multiple of the 3 processes"),
        ({"GEN_ARGS": "max_samples=4 tau=0.5x"}, "tau='0.5x' in the command line"),
    ),
)
def test_settings_of_late_stages_are_checked_before_the_first_runs(
    model_folders, problem_folder, tmp_path, settings, words
):
    """A typo in TRAIN_ARGS once showed after the first point's traces had been sampled."""
    result = run_pipeline(model_folders, problem_folder, tmp_path, check=False, **settings)
    assert result.returncode == 2 and words in result.stderr and "run     " not in result.stdout


def test_a_failing_point_does_not_stop_the_sweep(experiment, model_folders, problem_folder):
    """It is named at the end, and the exit code is 1."""
    exp_dir, _ = experiment
    points = "--points 0.8,0.1,1e30 0.8,0,0"
    result = run_pipeline(model_folders, problem_folder, exp_dir, GRID_ARGS=points, check=False)
    assert result.returncode == 1
    assert "the proxy's scores are not finite" in result.stderr + result.stdout
    assert (
        "FAILED (1 of 2 points" in result.stderr and "tau0.8_lam0.1_eps1e30" in result.stderr.splitlines()[-1]
    )
    assert result.stdout.count("done    ") == 7 and "total time" in result.stdout


def test_grid_points_in_parallel_with_controls_and_diagnostics(
    experiment, model_folders, problem_folder, tmp_path
):
    """Two jobs make what one makes; each control samples traces of its own.

    With WORLD_SIZE=2 RANK=0 of a scheduler every stage once waited for a process that never came, and only
    SIGKILL ended it.
    """
    settings = {"JOBS": "2", "TRACE_ARGS": "num_contrasts=2 one_step=0.1", **LEFT_BY_OTHERS}
    points = "--points 0.8,0,0 0.8,-0.05,1e-3,random 0.8,0.05,1e-3,permuted"
    found = run_pipeline(model_folders, problem_folder, tmp_path, GRID_ARGS=points, **settings)
    assert "--- 3 of 3 points" in found.stdout and found.stdout.count("run     ") == 15
    names = ["tau0.8_lam0_eps0", "tau0.8_lam-0.05_eps1e-3_random", "tau0.8_lam0.05_eps1e-3_permuted"]
    traces = {name: responses(tmp_path, f"train_{name}") for name in names}
    traces["ADS"] = responses(experiment[0], "train_tau0.8_lam0.05_eps1e-3")
    assert len({str(ids) for ids in traces.values()}) == 4
    for stage in ("train", "eval_student", "eval_teacher"):
        name = f"{stage}_{names[0]}"
        assert responses(tmp_path, name) == responses(experiment[0], name)
    for name in names:
        sidecar = files.read_yaml(tmp_path / "traces" / f"train_{name}.yaml")
        assert sidecar["stats"]["one_step"]["n"] == 12 and sidecar["stats"]["one_step"]["change"] != 0
        contrast = tmp_path / "traces" / f"train_{name}.contrast.json"
        assert contrast.exists() == (name != names[0])
    sides = json.loads(contrast.read_text())["problems"]
    assert len(sides) == 2 and all(problem["defended"]["tokens"] for problem in sides)
    assert not list((tmp_path / "locks").glob("sweep*"))


def responses(exp_dir, name):
    return [row["response_ids"] for row in read_parquet(exp_dir / "traces" / f"{name}.parquet")]


def test_term_during_the_sweep_stops_every_worker(experiment, model_folders, problem_folder, tmp_path):
    exp_dir = tmp_path / "copy"
    shutil.copytree(experiment[0], exp_dir)
    points = "--points 1.1,0,0 1.2,0,0 1.3,0,0"
    environment = pipeline_environment(model_folders, problem_folder, exp_dir, JOBS="2", GRID_ARGS=points)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(["bash", str(ROOT / "pipeline.sh")], env=environment, **quiet)
    wait_until((exp_dir / "logs" / "tau1.2_lam0_eps0.log").exists)
    process.terminate()
    assert process.wait(timeout=MOST_SECONDS) == 143
    wait_until(functools.partial(has_ended, exp_dir))
    assert not (exp_dir / "traces" / "train_tau1.3_lam0_eps0.yaml").exists()
