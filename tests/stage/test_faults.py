"""Faults of machines and files: what is said, the exit code, and that nothing corrupt counts as finished."""

import errno
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_script
from helpers_pipeline import has_ended, wait_until
from helpers_scripts import free_port

from ads.data.tables import read_parquet
from ads.stage import files
from ads.stage.machine import cpu_quotas

GEN = ["max_length=140", "max_prompt_length=115", "tau=0.8", "batch_size=2", "trace_name=t"]


def arguments(models, problems, exp_dir, *more):
    model, split = f"teacher={models['teacher']}", f"data_split={problems}_train"
    return [f"exp_dir={exp_dir}", model, split, *GEN, *more]


def traces(exp_dir):
    rows = read_parquet(Path(exp_dir) / "traces" / "t.parquet")
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


def refused(script, words, *parts, code=2, **environment):
    """The script ends with one line that has all the parts, and no traceback."""
    result = run_script(script, *words, check=False, **environment)
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


def start(script, words, environment=(), **more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **dict(environment)}
    command = [sys.executable, str(ROOT / script), *words]
    return subprocess.Popen(command, env=environment, text=True, **more)


def parts(exp_dir):
    return list(Path(exp_dir).glob("parts/t/traces/[0-9]*.jsonl"))


@pytest.mark.parametrize(
    "number,code", ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGHUP, 129))
)
def test_signals_stop_a_stage_soon_and_keep_what_is_finished(
    model_folders, problem_folder, finished, tmp_path, number, code
):
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("ignored here, as under nohup, and so by what is started from here")
    words = arguments(model_folders, problem_folder, tmp_path)
    process = start("gentraces.py", words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_until(lambda: parts(tmp_path))
    process.send_signal(number)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == code
    assert f"stopped by {number.name}" in output and "Traceback" not in errors
    assert not (tmp_path / "traces" / "t.yaml").exists()
    kept = files.read_parts(tmp_path / "parts" / "t" / "traces")
    again = run_script("gentraces.py", *words)
    assert f"{len(kept)} of 12 rows are there" in again.stdout
    assert traces(tmp_path) == traces(finished)


def mixed_problems(folder, num_rows=300):
    """A data set whose rows end one after another, as their prompts are of many lengths."""
    rows = [{"problem": f"{i}{'+1' * (i % 40)}", "solution": f"#### {i + i % 40}"} for i in range(num_rows)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def num_reported(log):
    """How many rows the progress bar last said are finished."""
    found = re.findall(r"(\d+)/\d+ ", log.read_text(errors="replace"))
    return int(found[-1]) if found else 0


def test_a_stopped_stage_keeps_every_row_that_it_reported(model_folders, tmp_path):
    """It once lost all since the last part, which was as large as the batch: of 920 rows it kept 512.

    A second signal, of the pipeline that was told to stop as well, must not cut the writing short.
    """
    (tmp_path / "sums").mkdir()
    problems = mixed_problems(tmp_path / "sums", num_rows=3000)  # 300 once were done before the signal came
    lengths = ["max_prompt_length=200", "max_length=240"]
    words = arguments(model_folders, problems, tmp_path, "batch_size=40", *lengths)
    log = tmp_path / "log"
    with log.open("w") as file:
        process = start("gentraces.py", words, stdout=subprocess.DEVNULL, stderr=file)
        wait_until(lambda: num_reported(log) or process.poll())
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == 143
    kept = files.read_parts(tmp_path / "parts" / "t" / "traces")
    assert 0 < len(kept) == num_reported(log) < 3000
    assert max(len(path.read_text().splitlines()) for path in parts(tmp_path)) <= 32


NO_FLOCK = """
#include <errno.h>
#include <stdlib.h>
int flock(int file, int operation) { errno = atoi(getenv("ERRNO_OF_FLOCK")); return -1; }
"""


@pytest.fixture(scope="module")
def no_flock(tmp_path_factory):
    """A library that makes every file system one without locks; skips the test where there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs cc and LD_PRELOAD")
    folder = tmp_path_factory.mktemp("no_flock")
    (folder / "no_flock.c").write_text(NO_FLOCK)
    library = str(folder / "no_flock.so")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, folder / "no_flock.c"], check=True)
    return library


TAKE_LOCK = "import sys; from ads.stage import files\nwith files.stage_lock(sys.argv[1], 'x'): print('held')"


@pytest.mark.parametrize("number", (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP))
def test_a_file_system_without_locks_is_said_and_the_stage_goes_on(tmp_path, no_flock, number):
    """Network file systems are mounted so; every stage once ended in a traceback there."""
    environment = {**os.environ, "LD_PRELOAD": no_flock, "ERRNO_OF_FLOCK": str(number)}
    command = [sys.executable, "-c", TAKE_LOCK, tmp_path]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    warning, held = result.stdout.splitlines()
    assert warning.startswith(f"WARNING: no locks on the file system of {tmp_path}/locks/x.lock")
    assert "two runs at once on this experiment are not kept apart" in warning and held == "held"


def test_a_lock_that_fails_otherwise_is_an_error(tmp_path, no_flock):
    environment = {**os.environ, "LD_PRELOAD": no_flock, "ERRNO_OF_FLOCK": str(errno.EIO)}
    command = [sys.executable, "-c", TAKE_LOCK, tmp_path]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and "held" not in result.stdout and "Input/output error" in result.stderr


def test_a_terminal_that_cannot_show_a_trace_stops_nothing(model_folders, problem_folder, tmp_path):
    """The first trace once ended the stage with UnicodeEncodeError, after all of them had been sampled."""
    words = arguments(model_folders, problem_folder, tmp_path, "max_samples=2", "answer_force=false")
    result = run_script("gentraces.py", *words, PYTHONIOENCODING="ascii")
    assert "first trace:" in result.stdout and "\\ufffd" in result.stdout


WORLD = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    "environment,words",
    (
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' in the environment: must be a whole number from 1"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2, but LOCAL_RANK='': start several processes with"),
        (WORLD, "WORLD_SIZE=2, but MASTER_PORT='': start several processes with torchrun"),
        ({**WORLD, "RANK": "2", "MASTER_PORT": "1"}, "WORLD_SIZE=2, but RANK=2: start several processes"),
    ),
)
def test_half_of_what_a_launcher_says_is_refused(model_folders, problem_folder, tmp_path, environment, words):
    refused("gentraces.py", arguments(model_folders, problem_folder, tmp_path), words, **environment)


LEAVE_EARLY = """\
import gentraces, utils
from ads.stage import world
world.JOIN_SECONDS = 1
utils.run_script(gentraces.main)
"""


@pytest.mark.parametrize("rank", ("0", "1"))
def test_processes_that_nobody_joins_say_so(model_folders, problem_folder, tmp_path, rank):
    """They once waited for two days."""
    environment = {**os.environ, **WORLD, "RANK": rank, "MASTER_PORT": free_port()}
    words = arguments(model_folders, problem_folder, tmp_path)
    command = [sys.executable, "-c", LEAVE_EARLY, *words]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.splitlines()[-1].startswith(f"error: process {rank} of 2 did not meet the others at")


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_process_that_waits_for_others_can_be_stopped(model_folders, problem_folder, tmp_path, number):
    """Only SIGKILL once ended it: no handler of Python's runs while C++ waits."""
    port = free_port()
    words = arguments(model_folders, problem_folder, tmp_path)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = start("gentraces.py", words, {**WORLD, "MASTER_PORT": port}, **quiet)
    wait_until(functools.partial(listens, int(port)))
    process.send_signal(number)
    assert process.wait(timeout=300) == -number


def listens(port):
    """Whether a process of this machine waits at the port."""
    with socket.socket() as place:
        return place.connect_ex(("127.0.0.1", port)) == 0


def test_the_number_of_cpus_is_by_affinity_and_quota(tmp_path):
    """A job of 2 CPUs on a machine of 64 once ran 64 processes."""
    code = "import torch; from ads.stage.machine import limit_threads, num_cpus; limit_threads(1)"
    code += "; print(num_cpus(), torch.get_num_threads())"
    one = f"import os; os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}}); {code}"
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", one]
    assert subprocess.check_output(command, cwd=ROOT, env=environment, text=True) == "1 1\n"
    (tmp_path / "groups").write_text("0::/a/b\n")
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "cpu.max").write_text("max 100000\n")
    (tmp_path / "a" / "cpu.max").write_text("150000 100000\n")
    assert min(cpu_quotas(tmp_path, tmp_path / "groups")) == 2
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert min(cpu_quotas(tmp_path, tmp_path / "none")) == float("inf")
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("50000\n")
    assert min(cpu_quotas(tmp_path, tmp_path / "none")) == 1


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
    assert process.wait(timeout=300) != 0
    wait_until(functools.partial(has_ended, tmp_path))
    kept = files.read_parts(tmp_path / "parts" / "t" / "traces")
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
