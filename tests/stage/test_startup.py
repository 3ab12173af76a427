"""Which device a script takes, and what is set before it is used. No GPU is needed: nvidia-smi is a stub."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script
from helpers_pipeline import run_pipeline

import utils
from ads import cpu, loading
from ads.stage.machine import gpus_of_driver, num_gpus, wants_cpu
from ads.trials import is_out_of_memory

NVIDIA_SMI = """#!/bin/sh
[ "$1" = -L ] || { echo "| NVIDIA-SMI 550.54   Driver Version: 550.54   CUDA Version: 12.4 |"; exit; }
echo "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)"
echo "  MIG 3g.40gb     Device  0: (UUID: MIG-0)"
echo "GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-1)"
"""
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use this machine's GPUs")


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """Puts an nvidia-smi first on PATH, by which this machine has two GPUs; returns the value of PATH."""
    add_program(tmp_path / "bin", "nvidia-smi", NVIDIA_SMI)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    for name in ("ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return os.environ["PATH"]


def add_program(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


@without_cuda
def test_gpus_that_torch_cannot_use_are_an_error(gpus):
    """With an old driver, or wheels for CPUs, everything once ran on the CPU without a word, for days."""
    with pytest.raises(ValueError, match=r"has 2 GPUs \(driver for CUDA 12.4\), but torch .*cannot use them"):
        num_gpus()
    built = "built without CUDA" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
    with pytest.raises(ValueError, match=f"{torch.__version__.replace('+', '.')} .{built}.*CUDA 12.6 wheels"):
        num_gpus()


@without_cuda
@pytest.mark.parametrize(
    "name,value",
    (
        ("ACCELERATE_USE_CPU", "true"),
        ("CUDA_VISIBLE_DEVICES", ""),
        ("CUDA_VISIBLE_DEVICES", "-1"),
        ("CUDA_VISIBLE_DEVICES", "NoDevFiles"),
    ),
)
def test_unless_the_cpu_was_asked_for(gpus, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert num_gpus() == 0


@pytest.mark.parametrize("value", ("0", "1,0", "GPU-1f2e", "MIG-3,MIG-4", " 2"))
def test_naming_gpus_is_not_asking_for_the_cpu(gpus, monkeypatch, value):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert not wants_cpu()


@without_cuda
def test_a_machine_without_gpus_is_a_cpu(tmp_path, monkeypatch):
    """nvidia-smi may be missing, or there and say that it finds no devices."""
    for name in ("ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert num_gpus() == 0
    add_program(tmp_path / "bin", "nvidia-smi", "#!/bin/sh\necho No devices were found\nexit 6\n")
    assert gpus_of_driver() == "" and num_gpus() == 0


@without_cuda
def test_a_stage_and_the_pipeline_say_so_before_a_model_is_loaded(
    gpus, model_folders, problem_folder, tmp_path
):
    teacher, split = f"teacher={model_folders['teacher']}", f"data_split={problem_folder}_test"
    words = [f"exp_dir={tmp_path}/x", teacher, split]
    stage = run_script("gentraces.py", *words, check=False)
    for settings in ({"NPROC": ""}, {"NPROC": "2"}):
        pipeline = run_pipeline(
            model_folders, problem_folder, tmp_path / "y", check=False, **settings, PATH=with_python(gpus)
        )
        assert pipeline.stderr.splitlines()[-1] == stage.stderr.splitlines()[-1]
        assert pipeline.returncode == stage.returncode == 2 and "Traceback" not in pipeline.stderr
    assert stage.stderr.splitlines()[-1].startswith("error: this machine has 2 GPUs")
    assert "loading" not in stage.stdout and not (tmp_path / "y").exists()


def with_python(path):
    return f"{path.split(os.pathsep)[0]}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{path}"


def test_the_pipeline_counts_gpus_by_torch(gpus, model_folders, problem_folder, tmp_path):
    """nvidia-smi lists whole GPUs, of which each may be cut up, or hidden by the environment."""
    stub = f'#!/bin/sh\ncase "$*" in *num_gpus*) echo 1;; *) exec {sys.executable} "$@";; esac\n'
    add_program(tmp_path / "bin", "python", stub)
    dry = "--dry-run", "--points 0.8,0,0"
    settings = {"PATH": with_python(gpus), "GRID_ARGS": dry[1]}
    one = run_pipeline(model_folders, problem_folder, tmp_path / "x", dry[0], NPROC="", **settings)
    assert one.stdout.count("to do   ") == 7 and one.stdout.count(": python ") == 7
    more = run_pipeline(
        model_folders, problem_folder, tmp_path / "x", dry[0], NPROC="2", check=False, **settings
    )
    assert more.returncode == 2 and "NPROC=2: torch can use 1 of the GPUs here" in more.stderr
    jobs = settings | {"JOBS": "3", "NPROC": "1", "GEN_ARGS": "max_length=64"}
    many = run_pipeline(model_folders, problem_folder, tmp_path / "x", dry[0], check=False, **jobs)
    assert many.returncode == 2 and "JOBS=3: jobs share the GPU, and batch_size=auto" in many.stderr
    jobs["GEN_ARGS"] = "max_length=64\nbatch_size=8"
    many = run_pipeline(model_folders, problem_folder, tmp_path / "x", dry[0], **jobs)
    assert many.stdout.count(": python ") == 7
    add_program(tmp_path / "bin", "python", stub.replace("echo 1", "echo 2"))
    two = run_pipeline(model_folders, problem_folder, tmp_path / "x", dry[0], NPROC="", **settings)
    assert two.stdout.count("accelerate launch") == 7 and "--num_processes 2" in two.stdout


def test_who_builds_models_gets_the_settings_for_cuda():
    """cuDNN's attention would make a plan for each of the many shapes, 0.4 to 1 s each."""
    assert loading.load_model and not torch.backends.cuda.cudnn_sdp_enabled()
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction


@pytest.mark.parametrize(
    "given,found",
    (
        ({}, "expandable_segments:True None"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native None"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "None backend:native"),
    ),
)
def test_the_allocator_s_settings_are_there_before_torch(given, found):
    """Those of the user stay: of the two names torch reads, the older one goes first."""
    code = "import os, sys, utils; assert 'torch' not in sys.modules; e = os.environ.get\n"
    code += "print(e('PYTORCH_ALLOC_CONF'), e('PYTORCH_CUDA_ALLOC_CONF'))"
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_ALLOC_CONF")}
    command = [sys.executable, "-c", code]
    output = subprocess.check_output(command, cwd=ROOT, env=environment | given, text=True)
    assert output.strip() == found


def test_freed_memory_is_kept_on_cpus_alone(monkeypatch):
    """On the host of a GPU it would keep the room that a model took on its way there."""
    called = []
    monkeypatch.setattr(ctypes, "CDLL", lambda _: called.append(1) or object())
    cpu.keep_freed_memory("cuda:0")
    assert not called
    cpu.keep_freed_memory("cpu")
    assert called or sys.platform != "linux"


@pytest.mark.parametrize(
    "text",
    (
        # on a part of a GPU (MIG) the allocator cannot ask what to put into its error, and says that instead
        'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "CUDACachingAllocator.cpp":1165',
        # seen on an H100 that other processes had filled: torch.AcceleratorError, a RuntimeError
        "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    ),
)
def test_an_allocator_that_fails_otherwise_is_understood(text):
    error = RuntimeError(text)
    assert is_out_of_memory(error) and utils.explain_fault(error).startswith("out of memory (")


def test_other_faults_of_a_gpu_are_not_taken_for_lack_of_memory():
    error = RuntimeError("CUDA driver error: operation not supported")
    assert "expandable_segments:False" in utils.explain_fault(error) and not is_out_of_memory(error)
