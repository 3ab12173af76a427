"""Starting pipeline.sh in tests, and waiting for what it does."""

import os
import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT

POINTS = "--points 0.8,0,0 0.8,0.05,1e-3"

GEN = "max_length=120 max_prompt_length=115 batch_size=5"

MOST_SECONDS = 300


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
        "OMP_NUM_THREADS": "1",
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


def imported(report, module):
    """Whether a module is in what PYTHONPROFILEIMPORTTIME reports."""
    return any(line.split("|")[-1].strip() == module for line in report.splitlines())


def has_ended(exp_dir):
    """Whether no process has the experiment's folder on its command line."""
    lines = [read_command_line(path) for path in Path("/proc").glob("[0-9]*/cmdline")]
    return not any(str(exp_dir) in line for line in lines)


def read_command_line(path):
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:  # it has just ended
        return ""


def wait_until(holds, seconds=MOST_SECONDS):
    """Return once it holds; the seconds are for what never comes, and no measure of speed."""
    for _ in range(seconds * 20):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError(holds)


def places_of_packages():
    """What pip is told of folders of packages, for uv, which does not read pip's settings."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True
    ).stdout
    found = {line.split("=", 1)[1].strip("'\"") for line in listed.splitlines() if ".find-links=" in line}
    return {"UV_FIND_LINKS": ",".join(sorted(found))}
