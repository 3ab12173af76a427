"""Faults of machines and files: what is said, the exit code, and that nothing corrupt counts as finished."""

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, run_script
from test_pipeline import has_ended, wait_until

import utils
from ads import store

GEN = ["max_length=140", "max_prompt_length=115", "tau=0.8", "batch_size=2", "trace_name=t"]


def arguments(models, problems, exp_dir, *more):
    model, split = f"teacher={models['teacher']}", f"data_split={problems}_train"
    return [f"exp_dir={exp_dir}", model, split, *GEN, *more]


def traces(exp_dir):
    rows = utils.read_parquet(Path(exp_dir) / "traces" / "t.parquet")
    return [(row["id"], row["response_ids"], row["trace_af"]) for row in rows]


@pytest.fixture(scope="module")
def finished(model_folders, problem_folder, tmp_path_factory):
    """An experiment with traces, a gradient and a student."""
    exp_dir = tmp_path_factory.mktemp("finished")
    run_script("gentraces.py", *arguments(model_folders, problem_folder, exp_dir))
    run_script("save_grad.py", *gradient_arguments(model_folders, exp_dir))
    run_script("distill.py", *student_arguments(model_folders, exp_dir))
    return exp_dir


def gradient_arguments(models, exp_dir):
    proxy, holdout = f"proxy_student={models['proxy']}", f"holdout_traces={exp_dir}/traces/t.parquet"
    return [f"exp_dir={exp_dir}", proxy, holdout, "num_diagnosed=0"]


def student_arguments(models, exp_dir):
    student, train = f"student={models['student']}", f"train_traces={exp_dir}/traces/t.parquet"
    small = ["do_eval=false", "lora_r=4", "batch_size=4", "num_epochs=1", "model_name=s"]
    return [f"exp_dir={exp_dir}", student, train, *small]


@pytest.fixture
def copy(finished, tmp_path):
    """The finished experiment in a place of its own, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def flip_a_byte(path, place=0.5):
    content = bytearray(Path(path).read_bytes())
    content[int(len(content) * place)] ^= 1
    Path(path).write_bytes(content)


def refused(script, words, *parts, code=2):
    """The script ends with one line that has all the parts, and no traceback."""
    result = run_script(script, *words, check=False)
    assert result.returncode == code, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    assert all(part in lines[0] for part in parts), lines[0]


def test_outputs_that_changed_after_their_stage_are_refused(model_folders, problem_folder, copy):
    """By the stage itself, and by whoever reads them."""
    gen = arguments(model_folders, problem_folder, copy)
    dataset, grads, student = (
        copy / "traces" / "t.parquet", copy / "student_grads.safetensors", copy / "models" / "s" / "final",
    )  # fmt: skip
    flip_a_byte(dataset)
    changed = "t.parquet is damaged or changed since, by", "t.yaml to redo the stage"
    refused("gentraces.py", gen, *changed)
    refused("save_grad.py", gradient_arguments(model_folders, copy), *changed)
    refused("distill.py", student_arguments(model_folders, copy), *changed)
    dataset.unlink()
    refused("gentraces.py", gen, "t.parquet is missing, by")
    flip_a_byte(grads)
    ads = ["lam=0.1", f"grad_path={grads}", f"proxy_student={model_folders['proxy']}", "trace_name=ads"]
    refused("gentraces.py", [*gen, *ads], "student_grads.safetensors is damaged or changed since")
    flip_a_byte(student / "model.safetensors")
    sampled = [*gen, f"teacher={student}", "trace_name=eval"]
    refused("gentraces.py", sampled, "final is damaged or changed since", "s.yaml to redo")


@pytest.mark.parametrize("share", (0.95, pytest.param(0.3, marks=pytest.mark.slow)))
def test_a_sidecar_that_was_cut_short_does_not_count(model_folders, problem_folder, copy, share):
    sidecar = copy / "traces" / "t.yaml"
    lines = sidecar.read_text().splitlines(keepends=True)
    sidecar.write_text("".join(lines[: int(len(lines) * share)]))
    refused("gentraces.py", arguments(model_folders, problem_folder, copy), str(sidecar), "delete it")
    sidecar.unlink()
    run_script("gentraces.py", *arguments(model_folders, problem_folder, copy))
    assert sidecar.is_file()


def start(script, words, **more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / script), *words]
    return subprocess.Popen(command, env=environment, text=True, **more)


def parts(exp_dir):
    return list(Path(exp_dir).glob("parts/t/traces/[0-9]*.jsonl"))


@pytest.mark.parametrize("number,code", ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)))
def test_signals_stop_a_stage_soon_and_keep_what_is_finished(
    model_folders, problem_folder, finished, tmp_path, number, code
):
    words = arguments(model_folders, problem_folder, tmp_path)
    process = start("gentraces.py", words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_until(lambda: parts(tmp_path))
    process.send_signal(number)
    begin = time.time()
    output, errors = process.communicate(timeout=20)
    assert time.time() - begin < 10 and process.returncode == code
    assert f"stopped by {number.name}" in output and "Traceback" not in errors
    assert not (tmp_path / "traces" / "t.yaml").exists()
    kept = store.read_parts(tmp_path / "parts" / "t" / "traces")
    again = run_script("gentraces.py", *words)
    assert f"{len(kept)} of 12 rows are there" in again.stdout
    assert traces(tmp_path) == traces(finished)


def test_damaged_parts_are_said_and_their_rows_made_again(model_folders, problem_folder, finished, tmp_path):
    """One with a flipped bit, one cut short, one as if the clock had gone back, one gone."""
    words = arguments(model_folders, problem_folder, tmp_path)
    process = start("gentraces.py", words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: len(parts(tmp_path)) >= 4)
    process.kill()
    process.wait()
    flipped, cut, late, lost, *_ = sorted(parts(tmp_path))
    flip_a_byte(flipped)
    cut.write_bytes(cut.read_bytes()[:-20])
    late.rename(late.with_name(f"{0:020d}-7-{late.stem.split('-')[-1]}.jsonl"))
    lost.unlink()
    again = run_script("gentraces.py", *words)
    assert again.stdout.count("is damaged: its rows are made again") >= 2
    assert flipped.name in again.stdout and cut.name in again.stdout
    assert traces(tmp_path) == traces(finished)


def mounted(folder, *options):
    """A small file system in memory; skips the test where this user may not mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    return folder


@pytest.fixture
def small_disk(tmp_path):
    folder = mounted(tmp_path / "disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_loses_nothing_that_was_finished(model_folders, problem_folder, finished, small_disk):
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"0" * 196_000)
    words = arguments(model_folders, problem_folder, small_disk / "exp")
    refused("gentraces.py", words, "the disk is full", "free space and run again", code=1)
    assert not (small_disk / "exp" / "traces" / "t.yaml").exists()
    ballast.unlink()
    run_script("gentraces.py", *words)
    assert traces(small_disk / "exp") == traces(finished)
    ballast.write_bytes(b"0" * 140_000)
    moved = [f"exp_dir={small_disk}/exp", *gradient_arguments(model_folders, finished)[1:]]
    refused("save_grad.py", moved, "the disk is full", code=1)
    assert not list((small_disk / "exp").glob("student_grads.*"))
    moved = [f"exp_dir={small_disk}/exp", *student_arguments(model_folders, finished)[1:]]
    refused("distill.py", moved, "the disk is full", code=1)
    assert not list((small_disk / "exp" / "models").glob("*.yaml"))


def test_an_experiment_that_cannot_be_written_to_is_refused(model_folders, problem_folder, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    words = arguments(model_folders, problem_folder, small_disk / "exp")
    refused("gentraces.py", words, f"exp_dir={small_disk}/exp: cannot be made (Read-only file system)")


def test_too_little_memory_is_said(model_folders, problem_folder, tmp_path):
    words = arguments(model_folders, problem_folder, tmp_path, "max_length=100000000000")
    refused("gentraces.py", words, "out of memory with batch_size=1: lower max_length")


@pytest.mark.slow
def test_a_process_that_dies_takes_the_others_with_it(model_folders, problem_folder, tmp_path):
    """Nobody waits for the dead, and the next run, alone, finds what they all finished."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = arguments(model_folders, problem_folder, tmp_path, "batch_size=1")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(
        [sys.executable, *torchrun, str(ROOT / "gentraces.py"), *words],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_until(lambda: len(parts(tmp_path)) >= 2)
    victims = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(victims[0]), signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    wait_until(functools.partial(has_ended, tmp_path))
    kept = store.read_parts(tmp_path / "parts" / "t" / "traces")
    again = run_script("gentraces.py", *words)
    assert f"{len(kept)} of 12 rows are there" in again.stdout


def test_what_is_written_follows_the_umask_and_names_no_secret(
    finished, model_folders, problem_folder, tmp_path
):
    before = os.umask(0o027)
    try:
        words = arguments(model_folders, problem_folder, tmp_path, "max_samples=2")
        output = run_script("gentraces.py", *words, HF_TOKEN="hf_secret", WANDB_API_KEY="wandb_secret").stdout
        run_script("save_grad.py", *gradient_arguments(model_folders, tmp_path), HF_TOKEN="hf_secret")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 6 and {path.stat().st_mode & 0o777 for path in files} == {0o640}
    assert "_secret" not in output
    assert not any(b"_secret" in path.read_bytes() for path in files)
