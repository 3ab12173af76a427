"""native.c as a shared library, built at first use and kept in the user's cache.

There is none, and torch decodes instead, where there is no C compiler (CC, else cc) or no AVX-512, and with
ADS_NATIVE=0. ADS_NATIVE=avx512 builds it without the matrix registers (AMX) of newer CPUs.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from ads.stage.config import native_setting

SOURCE = Path(__file__).with_name("native.c")
FLAGS = "-std=gnu11 -O3 -march=native -fopenmp -fno-math-errno -fno-trapping-math -shared -fPIC"
WITHOUT_TILES = "-U__AMX_BF16__"
BUILD_SECONDS = 120


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled code, or None where it cannot be had; if that is a fault, one line says which."""
    if native_setting() == "0" or "avx512f" not in cpu_flags():
        return None
    try:
        return load()
    except (OSError, RuntimeError, ValueError, AttributeError, subprocess.SubprocessError) as error:
        print(f"native.c cannot be used, torch decodes instead: {first_error(error)}", file=sys.stderr)
        return None


def other_ways() -> list[str]:
    """The values of ADS_NATIVE by which this machine would compute in another way than by default."""
    if library() is None:
        return []
    return ["0", "avx512"] if library().ads_has_tiles() else ["0"]


def cpu_flags() -> list[str]:
    """What the CPU can do, as Linux says it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return sorted({word for line in lines if line.startswith("flags") for word in line.split()})


def load() -> ctypes.CDLL:
    path = build()
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # damaged, or made for another C library
        path.unlink()
        return ctypes.CDLL(str(build()))


def build() -> Path:
    """The shared library's path; made once per source, command and kind of CPU."""
    command = [*shlex.split(os.environ.get("CC") or "cc"), *FLAGS.split()]
    if native_setting() == "avx512":
        command.append(WITHOUT_TILES)
    # home directories are shared between unlike machines, and -march=native depends on the machine
    made_of = repr([SOURCE.read_text(), command, platform.machine(), cpu_flags()])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "antidistillation-sampling"
    path = cache / f"native-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        compile_into(path, command)
    for owned in (cache, path):
        found = owned.stat()
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise PermissionError(f"{owned} can be written by others")
    return path


def compile_into(path: Path, command: list[str]) -> None:
    """Atomically: processes of one run, and runs on other machines, build at the same time."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        subprocess.run(
            [*command, str(SOURCE), "-o", str(made), "-lm"],
            check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=BUILD_SECONDS,
        )  # fmt: skip
        made.chmod(0o700)
        with made.open("rb") as file:
            os.fsync(file.fileno())
        made.replace(path)


def first_error(error: Exception) -> str:
    """One line; of a compiler its first error."""
    lines = getattr(error, "stderr", None) or b""
    errors = [line for line in lines.decode(errors="replace").splitlines() if "error" in line]
    return errors[0] if errors else " ".join(str(error).split())
