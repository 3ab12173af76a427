"""The processes of a stage: what their launcher says of them, and how they meet and talk."""

import atexit
import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ads.stage import errors, files
from ads.stage.errors import UserError
from ads.stage.machine import limit_threads, num_gpus

HOW_TO_LAUNCH = "start several processes with torchrun or accelerate launch, or unset WORLD_SIZE to run one"
JOIN_SECONDS = 600  # between the first process of a stage and the last
# Ranks meet again when the slowest has sampled its last trace, which may be hours after the first.
PATIENCE = timedelta(days=2)
# By these accelerate would take a single process for one of several, or change what it computes.
OF_OTHER_LAUNCHERS = ("LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def world_size() -> int:
    """How many processes make the stage, as their launcher says (WORLD_SIZE); 1 without one."""
    text = os.environ.get("WORLD_SIZE") or "1"
    if not text.isdecimal() or int(text) < 1:
        raise UserError(
            f"WORLD_SIZE={text!r} in the environment: must be a whole number from 1; unset it to run alone"
        )
    return int(text)


def is_main_process() -> bool:
    """Whether this process should speak for all (known before start_world)."""
    return world_size() == 1 or os.environ.get("RANK", "0") == "0"


def print0(*values: object, **keywords: Any) -> None:
    """Print on the main process only, at once."""
    if is_main_process():
        print(*values, flush=True, **keywords)


@dataclass(frozen=True)
class World:
    """This process among all processes of the stage."""

    rank: int
    size: int
    device: str

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            import torch

            torch.distributed.barrier()

    def gather(self, value: Any) -> list[Any]:
        """What each process gives here, by rank."""
        if self.size == 1:
            return [value]
        import torch

        found = [None] * self.size
        torch.distributed.all_gather_object(found, value)
        return found

    def share(self, value: Any) -> Any:
        """What the main process gives here, on all processes."""
        if self.size == 1:
            return value
        import torch

        shared = [value]
        torch.distributed.broadcast_object_list(shared)
        return shared[0]

    def sum(self, value: float) -> float:
        """The sum of a number over all processes."""
        return value if self.size == 1 else float(sum(self.gather(value)))

    def least(self, value: float) -> float:
        """The least of a number over all processes."""
        return min(self.gather(value))

    def ask_main(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function gives on the main process, on all; where it raises a ValueError, all do."""
        found = error = None
        if self.is_main:
            try:
                found = function(*arguments)
            except ValueError as raised:
                error = raised
        found, error = self.share((found, error))
        if error is not None:
            self.barrier()  # no process may leave before all have heard why
            raise error
        return found

    def check_same(self, inputs: dict[str, Any]) -> None:
        """UserError unless all processes have the same inputs: caches of several nodes may differ."""
        first, *others = self.gather(inputs)
        for rank, found in enumerate(others, start=1):
            if differences := files.differing_keys(first, found):
                raise UserError(f"process {rank} has other inputs than process 0: {'; '.join(differences)}")


@functools.cache  # the stages of one process are made by the same processes
def start_world() -> World:
    """Join the processes that a launcher started (or be the only one) and choose the device."""
    num_started = world_size()
    if num_started == 1:
        forget_launchers()
    device = "cuda" if num_gpus() else "cpu"
    if num_started == 1:
        limit_threads(1)
        return World(0, 1, device)
    from accelerate import PartialState

    with python_handlers_off():
        join_processes("gloo" if device == "cpu" else "nccl")
    state = PartialState(cpu=device == "cpu")
    assert state.num_processes == num_started, f"{state.num_processes} of {num_started} processes joined"
    limit_threads(int(os.environ.get("LOCAL_WORLD_SIZE") or num_started))
    return World(state.process_index, state.num_processes, "cpu" if device == "cpu" else str(state.device))


def check_launcher() -> None:
    """UserError if this is one of several processes and what they need to meet is not there."""
    num_processes = world_size()
    if num_processes == 1:
        return
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        value = os.environ.get(name, "")
        if not value or (name != "MASTER_ADDR" and not value.isdecimal()):
            raise UserError(f"WORLD_SIZE={num_processes}, but {name}={value!r}: {HOW_TO_LAUNCH}")
    if int(os.environ["RANK"]) >= num_processes:
        raise UserError(f"WORLD_SIZE={num_processes}, but RANK={os.environ['RANK']}: {HOW_TO_LAUNCH}")


def forget_launchers() -> None:
    """Take from the environment what a scheduler or an outer launcher left there: this process is alone."""
    # one process, one GPU: the trainer would spread its batches over all it sees
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    accelerate = [name for name in os.environ if name.startswith("ACCELERATE_")]
    for name in {*OF_OTHER_LAUNCHERS, *accelerate} - {"ACCELERATE_USE_CPU"}:
        os.environ.pop(name, None)


def join_processes(backend: str) -> None:
    """Meet the other processes of the stage; UserError if they do not come within JOIN_SECONDS."""
    import torch

    try:
        store, rank, size = next(
            torch.distributed.rendezvous("env://", timeout=timedelta(seconds=JOIN_SECONDS))
        )
        store.set_timeout(PATIENCE)
        torch.distributed.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=PATIENCE
        )
    except RuntimeError as error:  # DistError among them
        raise UserError(
            f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} did not meet the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({errors.reason(error)}): "
            f"{HOW_TO_LAUNCH}"
        ) from error


@contextlib.contextmanager
def python_handlers_off() -> Iterator[None]:
    """Signals end the process at once: handlers written in Python do not run while C++ waits."""
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    ours = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in ours:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


def has_joined() -> bool:
    """Whether this process has met the others of its stage and not left them."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized()


def leave_world() -> None:
    """Take leave of the other processes; without it their last messages may find nobody."""
    import torch

    torch.distributed.destroy_process_group()


def exit_at_once(code: int) -> None:
    """End one of several processes that has nothing left to do, without taking the libraries apart.

    Threads of a process group may still run then, and one process in hundreds would abort after all was done
    ("terminate called without an active exception"), which its launcher takes for a failure.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
