"""What glibc does with memory that is freed. With another C library both functions do nothing."""

import ctypes
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def give_back_freed_memory() -> None:
    """To the system: glibc would keep the room of weights that were fused and of prompts that were read."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def keep_freed_memory(device: str | torch.device) -> None:
    """For the next tensors: glibc would unmap each large one, and page faults slow training passes down.

    Nothing is kept where the tensors are on another device than the CPU.
    """
    is_cpu = torch.device(device).type == "cpu"
    if is_cpu and sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
