"""What a machine can do, and what a process took: shared by the benchmarks."""

import resource
import statistics
import sys
import threading
import time
from pathlib import Path

import torch


def synchronize(device):
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()


def seconds_of(function, device, repeats=5):
    """Median seconds of a call, after one to warm up."""
    function()
    found = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def bandwidth(device):
    """Bytes per second at which memory is read: the sum of 1 GiB."""
    numbers = torch.ones(2**28, dtype=torch.float32, device=device)
    return numbers.nbytes / seconds_of(numbers.sum, device)


def rate(dtype, device, size=2048):
    """Operations per second (a multiplication and an addition are two) of a product of square matrices."""
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    return 2 * size**3 / seconds_of(lambda: a @ b, device)


def peak_megabytes(device):
    """Most memory this process has held so far: on CUDA what was allocated there, else its resident set."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


class AnonymousPeak:
    """While entered, the most anonymous memory (MB) above what there was: a mapped file does not count."""

    def __enter__(self):
        self.before, self.is_done, self.seen = anonymous_megabytes(), threading.Event(), []
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()
        return self

    def watch(self):
        while not self.is_done.wait(0.002):
            self.seen.append(anonymous_megabytes())

    def __exit__(self, *_):
        self.is_done.set()
        self.watcher.join()
        self.megabytes = max(self.seen, default=self.before) - self.before


def anonymous_megabytes():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024
