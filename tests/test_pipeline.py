"""pipeline.sh as a user runs it, on tiny models and a data set of one's own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from ads import store

POINTS = "--points 0.8,0,0 0.8,0.05,1e-3"
GEN = "max_length=120 max_prompt_length=115 batch_size=5"


def pipeline_environment(models, problems, exp_dir, **settings):
    return {
        **os.environ,
        "EXP_DIR": str(exp_dir),
        "DATASET": problems,
        "TEACHER": models["teacher"],
        "PROXY_STUDENT": models["proxy"],
        "STUDENT": models["student"],
        "NPROC": "1",
        "GEN_ARGS": GEN,
        "TRAIN_ARGS": "num_epochs=1 lora_r=4 batch_size=4",
        "GRID_ARGS": POINTS,
        "SKIP_SETUP": "1",
        "OMP_NUM_THREADS": "2",
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        **settings,
    }


def run_pipeline(models, problems, exp_dir, *options, script="pipeline.sh", check=True, **settings):
    environment = pipeline_environment(models, problems, exp_dir, **settings)
    command = ["bash", str(ROOT / script), *options]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result


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
        assert store.read_yaml(exp_dir / "traces" / f"{name}.yaml")["stats"]["n"] > 0
        assert (exp_dir / "traces" / name / "dataset_info.json").exists()
    assert (exp_dir / "student_grads.yaml").exists()
    for point in points:
        assert (exp_dir / "models" / f"student_{point}" / "final" / "model.safetensors").exists()
        assert (exp_dir / "logs" / f"train_{point}.log").stat().st_size > 0
    assert "total time" in output and "point 2/2" in output
    assert (exp_dir / "report" / "results.csv").exists()
    assert not list((exp_dir / "parts").iterdir())


def test_run_again_skips_everything_at_once(experiment, model_folders, problem_folder):
    exp_dir, _ = experiment
    before = {path: path.stat().st_mtime_ns for path in exp_dir.rglob("*.parquet")}
    start = time.time()
    again = run_pipeline(model_folders, problem_folder, exp_dir)
    assert time.time() - start < 10
    assert again.stdout.count("done    ") == 11 and "run     " not in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in exp_dir.rglob("*.parquet")}


def test_dry_run_says_what_is_done_and_writes_nothing(experiment, model_folders, problem_folder, tmp_path):
    exp_dir, _ = experiment
    found = run_pipeline(
        model_folders, problem_folder, exp_dir, "--dry-run", GRID_ARGS=POINTS + " 1.2,0,0"
    ).stdout
    lines = found.splitlines()
    assert sum(line.startswith("done    ") for line in lines) == 11
    assert [line.split()[2] for line in lines if line.startswith("to do")] == [
        f"{stage}_tau1.2_lam0_eps0:" for stage in ("train", "student", "eval_student", "eval_teacher")
    ]
    fresh = run_pipeline(model_folders, problem_folder, tmp_path / "new", "--dry-run", NPROC="").stdout
    assert fresh.count("to do   ") == 11 and "gentraces.py" in fresh and "waits: " in fresh
    assert not (tmp_path / "new").exists()


def test_dry_run_in_an_environment_that_is_set_up(model_folders, problem_folder, tmp_path):
    """setup.sh once took the pipeline's own --dry-run for its extras."""
    stamp = (ROOT / "pyproject.toml").read_bytes() + (ROOT / "constraints.txt").read_bytes()
    checksum = subprocess.run(["cksum"], input=stamp, capture_output=True, check=True).stdout.decode().strip()
    (tmp_path / ".ads_setup_base").write_text(f"{checksum} {ROOT}")
    settings = {"SKIP_SETUP": "0", "VIRTUAL_ENV": str(tmp_path), "GRID_ARGS": "--points 0.6,0,0"}
    found = run_pipeline(model_folders, problem_folder, tmp_path / "new", "--dry-run", **settings)
    assert found.stdout.count("to do   ") == 7 and "installing" not in found.stderr


def test_other_settings_are_refused_by_name(experiment, model_folders, problem_folder):
    exp_dir, _ = experiment
    result = run_pipeline(model_folders, problem_folder, exp_dir, SEED="43", check=False)
    assert result.returncode == 2 and "seed was 42, now 43" in result.stderr


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
    points = "--points 0.8,0.1,0 0.8,0,0"
    result = run_pipeline(model_folders, problem_folder, exp_dir, GRID_ARGS=points, check=False)
    assert result.returncode == 1
    assert "eps=0.0: the central difference needs a step above 0" in result.stderr
    assert "FAILED (1 of 2 points" in result.stderr and "tau0.8_lam0.1_eps0" in result.stderr.splitlines()[-1]
    assert result.stdout.count("done    ") == 7 and "total time" in result.stdout


def test_an_interrupted_pipeline_stops_with_130(model_folders, problem_folder, tmp_path):
    """Ctrl-C reaches the whole process group."""
    environment = pipeline_environment(model_folders, problem_folder, tmp_path)
    command = ["bash", str(ROOT / "pipeline.sh")]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **quiet)
    while not (tmp_path / "locks").exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=20) == 130
