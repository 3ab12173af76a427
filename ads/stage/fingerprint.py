"""What identifies a file, a model, the project's code and its libraries: short hashes, versions, a commit."""

import contextlib
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from ads.stage.errors import MissingInputError
from ads.stage.hub import HUB, HUB_FILES, find_folder, locate

ROOT = Path(__file__).resolve().parent.parent.parent
# Weights are fingerprinted by NUM_SAMPLES blocks of SAMPLE_BYTES: a retrained model differs in every one.
WEIGHTS = (".safetensors", ".bin")
MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.jinja", "*.model")
SAMPLE_BYTES = 4096
NUM_SAMPLES = 256
# code that makes no stage: it reads finished ones, or plans them
NO_STAGE = ("grid.py", "report.py", "search.py", "ads/report/")


def versions() -> dict[str, str]:
    """The version of each library that can change a result, of those installed."""
    names = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "math-verify", "numpy")
    found = {name: metadata.version(name) for name in names if importable(name)}
    return {"python": platform.python_version(), **found}


def importable(name: str) -> bool:
    """Whether a distribution is installed."""
    return any(metadata.distributions(name=name))


def git_commit() -> str | None:
    """The project's commit, with '+' when the working tree differs from it; None outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    with contextlib.suppress(OSError):
        result = subprocess.run(command, capture_output=True, text=True)
        return result.stdout.strip() or None
    return None


def fingerprint_code() -> str:
    """16 hex digits of the project's code that makes stages."""
    paths = [*ROOT.glob("*.py"), *(ROOT / "ads").rglob("*.py"), *(ROOT / "ads").rglob("*.c")]
    names = sorted(path.relative_to(ROOT).as_posix() for path in paths)
    return fingerprint_json(
        {name: fingerprint_file(ROOT / name) for name in names if not name.startswith(NO_STAGE)}
    )


def fingerprint_json(value: Any) -> str:
    """16 hex digits that identify a JSON-able value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def fingerprint_file(path: str | Path) -> str:
    """16 hex digits of a file's contents; of weights, their size and evenly spaced blocks."""
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if Path(path).suffix in WEIGHTS and size > SAMPLE_BYTES * NUM_SAMPLES:
            for i in range(NUM_SAMPLES):
                file.seek((size - SAMPLE_BYTES) * i // (NUM_SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
        else:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def fingerprint(path: str | Path) -> str:
    """16 hex digits of a file's contents or of a model folder's."""
    is_model = Path(path).is_dir()
    return fingerprint_folder(str(path), "model", MODEL_FILES) if is_model else fingerprint_file(path)


def fingerprint_folder(name: str, kind: str, patterns: Iterable[str]) -> str:
    """What identifies the files of a folder that match, or a repository of the hub: its name and commit.

    MissingInputError without the first of the kind's HUB_FILES.
    """
    where, commit = locate(name, kind)
    folder = find_folder(name, kind)
    if not (folder / HUB_FILES[kind][0]).is_file():
        raise MissingInputError(f"{name} is not complete: it has no {HUB_FILES[kind][0]}")
    if commit is not None:
        return f"{HUB}{where}@{commit}"
    files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return fingerprint_json({path.name: fingerprint_file(path) for path in files})
