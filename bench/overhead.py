"""What it costs a stage of traces that nothing is lost: the share of its time spent on files and checks.

    python bench/overhead.py exp_dir=runs/overhead teacher=demo/models/teacher \\
        proxy_student=demo/models/proxy grad_path=runs/demo/student_grads.safetensors \\
        data_split=arithmetic_train lam=8 tau=0.4 max_length=200 max_prompt_length=100 batch_size=300

Runs gentraces.py with these arguments, in this process, and times what ads/stage/ does on the way: settings
and fingerprints of inputs are compared, finished rows written in parts with checksums and read again, files
flushed to the disk and renamed, outputs fingerprinted. Not counted: writing the dataset itself. Prints a
table and one JSON line.
"""

import contextlib
import functools
import inspect
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gentraces
from ads.stage import files, fingerprint, hub, inputs, sidecar

PROJECT = ("ads", "gentraces", "utils")


class Clock:
    """Seconds by name, of outermost calls alone."""

    def __init__(self):
        self.seconds, self.is_running = {}, False

    @contextlib.contextmanager
    def timed(self, name):
        if self.is_running:
            yield
            return
        self.is_running, start = True, time.perf_counter()
        try:
            yield
        finally:
            self.is_running = False
            self.seconds[name] = self.seconds.get(name, 0) + time.perf_counter() - start


def main():
    clock = Clock()
    ours = files, fingerprint, hub, inputs, sidecar
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] in PROJECT]
    for module in modules:
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ in {of.__name__ for of in ours}:
                is_context = hasattr(function, "__wrapped__")
                wrap = functools.partial(wrap_context if is_context else wrap_call, clock, name, function)
                setattr(module, name, functools.wraps(function)(wrap))
    start = time.perf_counter()
    gentraces.main(sys.argv[1:])
    wall = time.perf_counter() - start
    for name, seconds in sorted(clock.seconds.items(), key=lambda item: -item[1]):
        print(f"{name:24} {1e3 * seconds:9.1f} ms {seconds / wall:8.3%}")
    total = sum(clock.seconds.values())
    print(f"{'all':24} {1e3 * total:9.1f} ms {total / wall:8.3%} of {wall:.1f} s")
    shares = {name: round(seconds / wall, 5) for name, seconds in clock.seconds.items()}
    print(json.dumps({"arguments": sys.argv[1:], "wall": wall, "share": total / wall, "shares": shares}))


def wrap_call(clock, name, function, *arguments, **keywords):
    with clock.timed(name):
        return function(*arguments, **keywords)


@contextlib.contextmanager
def wrap_context(clock, name, function, *arguments, **keywords):
    """What comes before and after the body."""
    context = function(*arguments, **keywords)
    with clock.timed(name):
        value = context.__enter__()
    try:
        yield value
    except BaseException:
        if not context.__exit__(*sys.exc_info()):
            raise
    else:
        with clock.timed(name):
            context.__exit__(None, None, None)


if __name__ == "__main__":
    main()
