"""Files that survive a kill: atomic writes, rows of an unfinished stage, registries, locks."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Collection, Container, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import yaml

try:
    from yaml import CSafeLoader as SafeLoader  # a sweep with attackers has thousands of sidecars to read
except ImportError:  # PyYAML built without its C library
    from yaml import SafeLoader  # type: ignore[assignment]

from ads.stage import layout
from ads.stage.errors import MissingInputError, UserError

UMASK = os.umask(0o077)  # it can only be read by being set
os.umask(UMASK)
PART_ROWS, PART_SECONDS = 32, 60  # finished rows are written by then: what a kill without notice may cost
LATE_SECONDS = 90  # after which a network file system shows what other machines have written
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)  # of a file system without flock


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write to; on success it is flushed to disk and renamed.

    Two processes may not write one path at a time: hold the stage's lock.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # one name: what a kill leaves is overwritten, not collected
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~UMASK)  # safetensors lets nobody else read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling folder to fill; on success it replaces the folder `path`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    for file in temporary.rglob("*"):
        file.chmod((0o777 if file.is_dir() else 0o666) & ~UMASK)
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line to a registry that several processes may be writing to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; UserError when the file holds something else."""
    path = Path(path)
    if not path.is_file():
        raise MissingInputError(f"{path} does not exist")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{path} should hold `key: value` lines, but holds a {type(content).__name__}")
    return content or {}


def differing_keys(before: dict[str, Any], now: dict[str, Any], ignore: Container[str] = ()) -> list[str]:
    """One 'key was before, now after' text for each key in which two mappings differ."""
    keys = [key for key in {**before, **now} if key not in ignore]
    return [
        f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
        for key in keys
        if before.get(key) != now.get(key)
    ]


def write_part(parts_dir: Path, rank: int, rows: Iterable[dict[str, Any]]) -> None:
    """Store finished rows (dicts with an 'id') as one JSON-lines file that no later call touches.

    Its name ends in a checksum of its contents.
    """
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_text(parts_dir / f"{time.time_ns():020d}-{rank}-{checksum(text.encode())}.jsonl", text)


def write_parts(
    parts_dir: Path, rank: int, rows: Iterable[dict[str, Any]], most: int = PART_ROWS
) -> list[dict[str, Any]]:
    """Store rows as they come, at most `most` a part, and return them.

    Where this process is stopped, or making the next row fails, what is finished is stored first.
    """
    found: list[dict[str, Any]] = []
    num_stored, last_write = 0, time.monotonic()
    try:
        for row in rows:
            found.append(row)
            is_full = len(found) - num_stored >= min(PART_ROWS, most)
            if is_full or time.monotonic() - last_write > PART_SECONDS:
                write_part(parts_dir, rank, found[num_stored:])
                num_stored, last_write = len(found), time.monotonic()
    finally:
        if num_stored < len(found):
            write_part(parts_dir, rank, found[num_stored:])
    return found


def read_parts(parts_dir: Path) -> dict[str, dict[str, Any]]:
    """{id: row} of every row stored so far. A damaged part is said and left out: its rows are made again."""
    rows: dict[str, dict[str, Any]] = {}
    for path in sorted(parts_dir.glob("[0-9]*.jsonl")):
        content = path.read_bytes()
        if path.stem.split("-")[-1] != checksum(content):
            print(f"{path} is damaged: its rows are made again", flush=True)
            continue
        rows |= {row["id"]: row for row in map(json.loads, content.splitlines())}
    return rows


def read_all_parts(parts_dir: Path, ids: Collection[str], num_processes: int) -> dict[str, dict[str, Any]]:
    """{id: row} of all rows that the processes have put into parts; UserError when some do not turn up."""
    rows = read_parts(parts_dir)
    last_look = time.monotonic() + (LATE_SECONDS if num_processes > 1 else 0)
    while missing := set(ids) - rows.keys():
        if time.monotonic() > last_look:
            raise UserError(
                f"{parts_dir} lacks {len(missing)} of {len(ids)} rows that were made, such as "
                f"{min(missing)}: exp_dir must be a folder that all machines of a run share; run again"
            )
        time.sleep(2)
        rows = read_parts(parts_dir)
    return rows


def checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@contextlib.contextmanager
def stage_lock(exp_dir: str | Path, name: str) -> Iterator[None]:
    """Hold the lock of one stage, waiting while another process has it; a killed holder lets go."""
    path = layout.path_of("lock", exp_dir, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        take_lock(file, path)
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}")
        file.flush()
        yield


def take_lock(file: TextIO, path: Path) -> None:
    """Lock an open file; where its file system has no locks, say what that means and go on."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        print(f"waiting for {file.read().strip() or 'another run'} (making {path.stem})", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(
            f"WARNING: no locks on the file system of {path} ({error.strerror}): two runs at once on this "
            "experiment are not kept apart and may spoil it; start one at a time",
            flush=True,
        )
