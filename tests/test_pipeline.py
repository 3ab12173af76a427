"""pipeline.sh as a user runs it, on tiny models and a data set of one's own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from ads import store

POINTS = "--points 0.8,0,0 0.8,0.05,1e-3"
GEN = "max_length=120 max_prompt_length=115 batch_size=5"


def run_pipeline(models, problems, exp_dir, *options, script="pipeline.sh", check=True, **settings):
    environment = {
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
