"""Every command of README.md and the pages of docs, run in a fresh clone as a new user would.

What is there is what has been committed. Where a command needs GPUs, the hub or hours, something smaller is
substituted: WAYS says which, and why. A command that no line of WAYS speaks of is run as it stands.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from helpers_docs import PAGES, blocks, commands
from helpers_pipeline import places_of_packages

README = ROOT / "README.md"
# models of the hub, of which a fresh machine has none -> those of the demo
MODELS = {
    r"deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B|Qwen/Qwen2.5-1.5B-Instruct": "demo/models/teacher",
    r"Qwen/Qwen2.5-0.5B": "demo/models/proxy",
    r"(?:meta-llama|HuggingFaceTB)/[\w.-]+": "demo/models/student",
}
ROOM = "max_length=200 max_prompt_length=100"
TINY = f"max_samples=8 {ROOM} answer_force=false"
# for every command that does not set them itself
SETTINGS = {
    "SKIP_SETUP": "1",  # the install lines and test_setup.py are about that
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "ACCELERATE_USE_CPU": "true",
    "NPROC": "1",
    "DATASET": "arithmetic",
    "TEACHER": "demo/models/teacher",
    "PROXY_STUDENT": "demo/models/proxy",
    "STUDENT": "demo/models/student",
    "GEN_ARGS": f"{TINY} batch_size=8",
    "TRAIN_ARGS": "lora=false num_epochs=1 per_device_batch_size=4",
    "GRAD_ARGS": "num_diagnosed=1",
    "TRACE_ARGS": "num_contrasts=2",
    "GRID_ARGS": "--points 0.6,0.5,0",
    "SLURM_SUBMIT_DIR": ".",
    "SLURM_ARRAY_TASK_ID": "0",
    "SLURM_ARRAY_TASK_COUNT": "33",
}
NOT_RUN = "not run"
# (what the command looks like, how it is rewritten, why); the first that fits
WAYS = (
    (r"^#!/bin/bash\n#SBATCH --nodes", "bash -n", "needs Slurm and two machines"),
    (r"^sbatch ", NOT_RUN, "needs Slurm; the script that it submits is run"),
    (r"^hf auth login", (r"$", " --help"), "asks for a token"),
    (r"^accelerate launch", (r"(?s)launch .*", "launch --help"), "needs two machines"),
    (r"^uv (?:venv|sync)$", NOT_RUN, "no instruction: what setup.sh may find, which test_setup.py tries"),
    (r"^pip install timm", NOT_RUN, "no instruction: the words in which one family of models is refused"),
    (r"^pip install pre-commit", NOT_RUN, "installs hooks into the clone from a package index, optional"),
    (r"^pip install '.\[flash\]'", NOT_RUN, "compiles for minutes, needs CUDA"),
    (r"^bash \.ci/run", "bash -n", "runs all the tests"),
    (r"^(?:ADS_NATIVE=0 )?bash run_tests.sh", (r"$", " --collect-only -q"), "runs the tests"),
    (r"^python tests/chaos\.py", (r"\.py.*", ".py --help"), "half an hour"),
    (r"^python tests/test_families\.py", (r"python ", "python -m py_compile "), "half an hour"),
    (r"^python demo/pretrain\.py$", (r"$", " out=runs/models scale=0.005"), "ten minutes"),
    (
        r"^make (?:test|slow|demo|bench|lint|types)",
        ("make", "make -n"),
        "what it starts is run by its own name",
    ),
    (r"^bash bench/gpu\.sh$", (r"$", " --tiny"), "needs a GPU"),
    (
        r"^python search\.py .* -- ",
        (
            " -- ",
            f" data_split=arithmetic_train max_samples=8 max_evaluations=1 -- {ROOM} ",
        ),
        "an hour",
    ),
    (
        r"--file runs/x/matched\.txt",
        ('--file [^"]*', "--points 0.6,0.5,0"),
        "the shortened search finds none",
    ),
    (r"pipeline_small\.sh", (r"(?s)^.*", "bash pipeline_small.sh --help"), "needs models of the hub, hours"),
    (
        r"^python distill\.py solutions=",
        (r"6000 (.*)student=models/a", r"16 num_epochs=1 \1student=demo/models/student"),
        "hours",
    ),
    (r"^python gentraces\.py .*gsm8k", (r"gsm8k_(\w+)(.*)", rf"arithmetic_\1\2 {TINY}"), "needs the hub"),
)
MAY_FAIL = {r"^python search\.py": 1}  # some target was not hit, which is what the exit code says


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone with what the commands take for granted: models and experiments of the names that they use."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout of git")
    place = tmp_path_factory.mktemp("new user") / "checkout"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(place)], check=True)
    for name, model in {
        "T": "teacher",
        "P": "proxy",
        "TEACHER": "teacher",
        "PROXY": "proxy",
        "STUDENT": "student",
        "models/small": "teacher",
    }.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).symlink_to(place / "demo" / "models" / model)
    (place / "my_attack.yaml").write_text(blocks(README, "yaml")[0])
    (place / "my").mkdir()
    (place / "my" / "attack.yaml").write_text(blocks(README, "yaml")[0])
    write_problems(place)
    make_experiment(place)
    return place


def write_problems(place):
    """my_data, of the README's one problem; my_rewriter, traces made elsewhere."""
    (place / "my_data").mkdir()
    (place / "my_rewriter").mkdir()
    for split in ("train", "holdout", "test"):
        lines = [re.sub(r"\b3\b", str(i), blocks(README, "json")[0]) for i in range(10, 18)]
        (place / "my_data" / f"{split}.jsonl").write_text("".join(lines))
    row = '{"problem": "start with 2 . add 2 .", "trace": "\\\\boxed{ 4 }", "answer": "4"}\n'
    for split in ("train", "test"):
        (place / "my_rewriter" / f"{split}.jsonl").write_text(row)


def make_experiment(place):
    """runs/x and what else is read: one point of the pipeline, with the traces that attackers read."""
    run(place, "EXP_DIR=runs/x GRID_ARGS='--points 0.6,0,0' bash pipeline.sh")
    traces = "python gentraces.py exp_dir=runs/x teacher=T data_split=arithmetic_train " + TINY
    for words in ("train tau=0.6", "train_clean", "samples tau=0.6 num_samples=4"):
        run(place, f"{traces} trace_name={words}")
    run(
        place,
        f"{traces} trace_name=solo_own is_teacher=false tau=1 num_samples=4 teacher=demo/models/student",
    )
    for name in ("gsm8k", "seed42", "seed43", "demo"):
        shutil.copytree(place / "runs" / "x", place / "runs" / name)
    for name in ("a", "b"):
        for suffix in (".yaml", ".parquet"):
            found = next((place / "runs" / "x" / "traces").glob(f"eval_student_*{suffix}"))
            shutil.copy(found, place / "runs" / "x" / "traces" / f"eval_student_{name}{suffix}")


def run(place, text, codes=(0,), **more):
    """A command in the clone, by bash; what it says where it fails."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    environment = {**kept, **SETTINGS, "PATH": path, "PYTHONPATH": "", **more}
    command = ["bash", "-euo", "pipefail", "-c", text]
    result = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=1800)
    assert result.returncode in codes, f"{text}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result


def smaller(command, number):
    """The command as it is run here, and why it is another one; None where it is not run."""
    text = command.text.split("  #")[0].rstrip()
    for pattern, way, reason in WAYS:
        if re.search(pattern, text):
            if way == NOT_RUN:
                return None, reason
            if way == "bash -n":
                return (
                    f"bash -n <<'END'\n{text}\nEND" if "\n" in text else f"bash -n {text.split()[1]}",
                    reason,
                )
            text = re.sub(way[0], lambda found, way=way: found.expand(way[1]), text, count=1)
            break
    text = command.before + text
    for pattern, model in MODELS.items():
        text = re.sub(pattern, model, text)
    text = text.replace("/shared/runs/", "runs/shared/")
    if "bash pipeline" in text and "EXP_DIR" not in text:
        text = text.replace("bash pipeline", f"EXP_DIR=runs/docs{number} bash pipeline", 1)
    return text, ""


COMMANDS = [command for page in PAGES for command in commands(page)]
UNIQUE = list(
    {(command.before, command.text.split("  #")[0].rstrip()): command for command in COMMANDS}.values()
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", range(len(UNIQUE)), ids=lambda number: f"{UNIQUE[number].page}: {UNIQUE[number].text[:70]}"
)
def test_command_runs_in_a_fresh_clone(clone, number, tmp_path):
    command = UNIQUE[number]
    text, reason = smaller(command, number)
    if text is None:
        assert reason
        return
    if re.search(r"\.venv|^uv ", text):
        install(clone, tmp_path, text)
        return
    codes = {0, *(code for pattern, code in MAY_FAIL.items() if re.search(pattern, command.text))}
    run(clone, text, codes)


def install(clone, tmp_path, text):
    """In a clone of its own without an environment, from the package index that pip is set up for."""
    place = tmp_path / "checkout"
    subprocess.run(["git", "clone", "--quiet", str(clone), str(place)], check=True)
    if text.startswith("uv") and not shutil.which(
        "uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ):
        pytest.skip("uv is not installed (extra test)")
    check = ".venv/bin/python -c 'import torch, transformers, gentraces'"
    try:
        run(place, f"{text} && {check}", **places_of_packages())
    except AssertionError as error:
        if re.search("Failed to fetch|Could not find a version|NewConnectionError", str(error)):
            pytest.skip(f"no package index can be reached: {str(error)[-200:]}")
        raise


def test_each_way_to_run_something_else_says_why_and_is_used():
    """No line of WAYS is left over from a command that is gone."""
    for pattern, _, reason in WAYS:
        assert reason and any(re.search(pattern, command.text) for command in UNIQUE), pattern
