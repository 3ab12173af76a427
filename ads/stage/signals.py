"""How a script stops at a signal: what is finished is written first, and the exit code tells which it was."""

import contextlib
import functools
import os
import signal
import sys
import time
from types import FrameType

from ads.stage.world import is_main_process

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # by the last, schedulers warn
STOP_SECONDS = 10  # within which a second signal does not cut short what the first one makes us write


def handle_signals() -> None:
    """Stop by `stop` from now on, but where a shell has a signal ignored, as it does in the background."""
    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)


def stop(number: int, frame: FrameType | None) -> None:
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


def stop_again(since: float, number: int, frame: FrameType | None) -> None:
    """Leave at once, as something hangs; a signal shortly after the first is another of the same stop."""
    if time.monotonic() - since > STOP_SECONDS:
        os._exit(exit_code(number))


def exit_code(number: int) -> int:
    return 128 + (signal.SIGTERM if number == signal.SIGUSR1 else number)
