"""The processes of a stage: joining them, what each may use, how they stop."""

import contextlib
import functools
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from ads.stage import errors, files
from ads.stage.errors import UserError


def world_size():
    """How many processes make the stage, as their launcher says (WORLD_SIZE); 1 without one."""
    text = os.environ.get("WORLD_SIZE") or "1"
    if not text.isdecimal() or int(text) < 1:
        raise UserError(
            f"WORLD_SIZE={text!r} in the environment: must be a whole number from 1; unset it to run alone"
        )
    return int(text)


HOW_TO_LAUNCH = "start several processes with torchrun or accelerate launch, or unset WORLD_SIZE to run one"
JOIN_SECONDS = 600  # between the first process of a stage and the last
STOP_SECONDS = 10  # within which a second signal does not cut short what the first one makes us write
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # by the last, schedulers warn
# By these accelerate would take a single process for one of several, or change what it computes.
OF_OTHER_LAUNCHERS = ("LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class World:
    """This process among all processes of the stage."""

    rank: int
    size: int
    device: str

    @property
    def is_main(self):
        return self.rank == 0

    def barrier(self):
        if self.size > 1:
            import torch

            torch.distributed.barrier()

    def sum(self, value):
        """The sum of a number over all processes."""
        if self.size == 1:
            return value
        import torch

        total = torch.tensor([value], dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.item()

    def ask_main(self, function, *arguments):
        """What a function gives on the main process, on all; where it raises a ValueError, all do."""
        found = error = None
        if self.is_main:
            try:
                found = function(*arguments)
            except ValueError as raised:
                error = raised
        found, error = self.share((found, error))
        if error is not None:
            raise error
        return found

    def least(self, value):
        """The least of a number over all processes."""
        return value if self.size == 1 else min(self.gather(value))

    def gather(self, value):
        """A list of what each process has."""
        import torch

        found = [None] * self.size
        torch.distributed.all_gather_object(found, value)
        return found

    def share(self, value):
        """What the main process gives here, on all processes."""
        if self.size == 1:
            return value
        import torch

        shared = [value]
        torch.distributed.broadcast_object_list(shared)
        return shared[0]

    def check_same(self, inputs):
        """ValueError unless all processes have the same inputs: caches of several nodes may differ."""
        if self.size == 1:
            return
        found = self.gather(inputs)
        for rank, others in enumerate(found):
            if differences := files.differing_keys(found[0], others):
                raise UserError(f"process {rank} has other inputs than process 0: {'; '.join(differences)}")


@functools.cache  # the stages of one process are made by the same processes
def start_world():
    """Join the processes that a launcher started (or be the only one) and choose the device."""
    num_started = world_size()
    if num_started == 1:
        forget_launchers()
    use_cpu = num_gpus() == 0
    if num_started == 1:
        limit_threads(1)
        return World(0, 1, "cpu" if use_cpu else "cuda")
    from accelerate import PartialState

    join_processes("gloo" if use_cpu else "nccl")
    state = PartialState(cpu=use_cpu)
    assert state.num_processes == num_started, f"{state.num_processes} of {num_started} processes joined"
    limit_threads(int(os.environ.get("LOCAL_WORLD_SIZE") or num_started))
    return World(state.process_index, state.num_processes, "cpu" if use_cpu else str(state.device))


def num_gpus():
    """How many GPUs this process may use, as torch counts them; 0 where the CPU was asked for.

    ValueError where the machine has GPUs that this torch cannot use: what was meant for them would go on on
    the CPU, for days.
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


def wants_cpu():
    """Whether the environment asks for the CPU: in words, or by naming no GPU among those to be seen."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return True
    # CUDA sees none from the first entry on that is none: "", "-1", Slurm's "NoDevFiles"
    return not re.match(r"\s*(\d|GPU-|MIG-)", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))


def gpus_of_driver():
    """'2 GPUs (driver for CUDA 12.4)' as nvidia-smi tells, or nothing where it is missing or sees none."""
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


def forget_launchers():
    """Take from the environment what a scheduler or an outer launcher left there: this process is alone."""
    # one process, one GPU: the trainer would spread its batches over all it sees
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    accelerate = [name for name in os.environ if name.startswith("ACCELERATE_")]
    for name in (*OF_OTHER_LAUNCHERS, *accelerate):
        if name != "ACCELERATE_USE_CPU":
            os.environ.pop(name, None)


def check_launcher():
    """ValueError if this is one of several processes and what they need to meet is not there."""
    num_processes = world_size()
    if num_processes == 1:
        return
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        value = os.environ.get(name, "")
        if not value or (name != "MASTER_ADDR" and not value.isdecimal()):
            raise UserError(f"WORLD_SIZE={num_processes}, but {name}={value!r}: {HOW_TO_LAUNCH}")
    if int(os.environ["RANK"]) >= num_processes:
        raise UserError(f"WORLD_SIZE={num_processes}, but RANK={os.environ['RANK']}: {HOW_TO_LAUNCH}")


def join_processes(backend):
    """Meet the other processes of the stage; ValueError if they do not come within JOIN_SECONDS."""
    import torch

    # Python's handlers do not run while C++ waits, and there is nothing yet to be written at a signal.
    ours = [number for number in STOPPING if signal.getsignal(number) == stop]
    for number in ours:
        signal.signal(number, signal.SIG_DFL)
    try:
        meeting = torch.distributed.rendezvous("env://", timeout=timedelta(seconds=JOIN_SECONDS))
        place, rank, size = next(meeting)
        # Ranks meet again when the slowest has sampled its last trace, which may be hours after the first.
        patience = timedelta(days=2)
        place.set_timeout(patience)
        torch.distributed.init_process_group(
            backend, store=place, rank=rank, world_size=size, timeout=patience
        )
    except RuntimeError as error:  # DistError among them
        reason = errors.reason(error)
        raise UserError(
            f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} did not meet the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({reason}): {HOW_TO_LAUNCH}"
        ) from error
    finally:
        for number in ours:
            signal.signal(number, stop)


def limit_threads(num_local):
    """No more threads than the CPUs that each of the processes on this machine may use."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), num_cpus() // num_local)))


def num_cpus():
    """How many CPUs this process may use: by its affinity, and by the quotas of its control groups."""
    if sys.platform != "linux":
        return os.cpu_count()
    return max(1, min(len(os.sched_getaffinity(0)), *cpu_quotas(Path("/sys/fs/cgroup"))))


def cpu_quotas(root, groups=Path("/proc/self/cgroup")):
    """CPUs' worth of time that each control group above this process may take, rounded up."""
    lines = groups.read_text().splitlines() if groups.is_file() else []
    own = [root / line.split(":", 2)[2].lstrip("/") for line in lines if line.startswith("0::")]
    quotas = [math.inf]
    for folder in {path for group in own for path in (group, *group.parents)} | {root, root / "cpu"}:
        quotas += read_quota(folder)
    return quotas


def read_quota(folder):
    """[the quota of one control group] (version 2, else 1), or nothing where it has none."""
    files = ("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    for names in files:
        if all((folder / name).is_file() for name in names):
            words = [word for name in names for word in (folder / name).read_text().split()]
            return [math.ceil(int(words[0]) / int(words[1]))] if words[0] not in ("max", "-1") else []
    return []


def leave_world():
    """Take leave of the other processes; without it their last messages may find nobody."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def is_main_process():
    """Whether this process should speak for all (known before start_world)."""
    return world_size() == 1 or os.environ.get("RANK", "0") == "0"


def print0(*values, **keywords):
    """Print on the main process only, at once."""
    if is_main_process():
        print(*values, flush=True, **keywords)


def stop(number, frame):
    """Leave at a signal; what is finished is written on the way out (by `finally`)."""
    again = functools.partial(stop_again, time.monotonic())
    for other in STOPPING:
        if signal.getsignal(other) == stop:
            signal.signal(other, again)
    name = signal.Signals(number).name
    if is_main_process():
        line = f"stopped by {name}: what is finished is kept; the same command goes on from there\n"
        with contextlib.suppress(OSError):  # of a terminal that is gone; a print within a print would fail
            os.write(sys.stdout.fileno(), line.encode())
    sys.exit(exit_code(number))


def stop_again(since, number, frame):
    """Leave at once, as something hangs; a signal shortly after the first is another of the same stop."""
    if time.monotonic() - since > STOP_SECONDS:
        os._exit(exit_code(number))


def exit_code(number):
    return 128 + (signal.SIGTERM if number == signal.SIGUSR1 else number)
