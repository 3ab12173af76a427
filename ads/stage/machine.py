"""The GPUs and CPUs that a process may use."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

from ads.stage.errors import UserError


def num_gpus() -> int:
    """How many GPUs this process may use, as torch counts them; 0 where the CPU was asked for.

    UserError where the machine has GPUs that this torch cannot use: a stage meant for them would otherwise
    run for days on the CPU.
    """
    if wants_cpu():
        return 0
    import torch

    if torch.cuda.is_available():
        # Not torch.cuda.device_count(): it asks the driver for whole GPUs, also where they are cut up (MIG)
        # and a process may use one piece.
        return torch._C._cuda_getDeviceCount()
    if seen := gpus_of_driver():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        version = torch.__version__.split("+")[0]
        raise UserError(
            f"this machine has {seen}, but torch {torch.__version__} ({built}) cannot use them: install one "
            "built for the driver's CUDA or an older one (for drivers of CUDA 12 the CUDA 12.6 wheels: pip "
            f"uninstall torch, then pip install torch=={version} with the --index-url that "
            "pytorch.org/get-started names), or update the driver; ACCELERATE_USE_CPU=true runs on the CPU"
        )
    return 0


def wants_cpu() -> bool:
    """Whether the environment asks for the CPU: in words, or by naming no GPU among those to be seen."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return True
    # CUDA sees none from the first entry on that is none: "", "-1", Slurm's "NoDevFiles"
    return not re.match(r"\s*(\d|GPU-|MIG-)", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))


def gpus_of_driver() -> str:
    """'2 GPUs (driver for CUDA 12.4)' as nvidia-smi tells; empty where it is missing or sees none."""
    try:
        listed, shown = (
            subprocess.run(["nvidia-smi", *option], capture_output=True, text=True, timeout=60).stdout
            for option in (["-L"], [])
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    count = len(re.findall("^GPU ", listed, re.MULTILINE))
    version = re.search(r"CUDA[A-Za-z ]* Version: *([\d.]+)", shown)
    known = f"for CUDA {version[1]}" if version else "of unknown version"
    return f"{count} GPU{'s' * (count > 1)} (driver {known})" if count else ""


def limit_threads(num_local: int) -> None:
    """Give torch no more threads than each of `num_local` processes on this machine has CPUs."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), num_cpus() // num_local)))


def num_cpus() -> int:
    """How many CPUs this process may use: by its affinity, and by the quotas of its control groups."""
    if sys.platform != "linux":
        return os.cpu_count() or 1
    return int(max(1, min(len(os.sched_getaffinity(0)), *cpu_quotas(Path("/sys/fs/cgroup")))))


def cpu_quotas(root: Path, groups: Path = Path("/proc/self/cgroup")) -> list[float]:
    """CPUs' worth of time that each control group above this process may take, rounded up."""
    lines = groups.read_text().splitlines() if groups.is_file() else []
    own = [root / line.split(":", 2)[2].lstrip("/") for line in lines if line.startswith("0::")]
    folders = {path for group in own for path in (group, *group.parents)} | {root, root / "cpu"}
    return [math.inf, *(quota for folder in folders for quota in read_quota(folder))]


def read_quota(folder: Path) -> list[int]:
    """[the quota of one control group], or nothing where it has none. Version 2 of the files goes first."""
    for names in ("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"):
        if all((folder / name).is_file() for name in names):
            words = [word for name in names for word in (folder / name).read_text().split()]
            return [math.ceil(int(words[0]) / int(words[1]))] if words[0] not in ("max", "-1") else []
    return []
