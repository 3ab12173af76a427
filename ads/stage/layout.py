"""Where everything of an experiment is: each path in its folder EXP_DIR, here once.

    traces/NAME/                the traces of a stage as a dataset (datasets.load_from_disk)
    traces/NAME.parquet         the same as one table, which other stages read
    traces/NAME.contrast.json   the same problems with and without ADS, for the report
    parts/NAME/                 rows of traces that are not finished
    student_grads.safetensors   the proxy's gradient
    models/NAME/final/          a student; beside it checkpoint-STEP/ while it is trained
    search/                     an EXP_DIR in itself: what search.py evaluated
    report/                     what report.py writes
    metadata/, logs/, locks/, hub.yaml

Beside each output is its sidecar, which says what made it and is written last: traces/NAME.yaml,
student_grads.yaml, models/NAME.yaml. pipeline.sh spells the same paths.
"""

import os
from pathlib import Path

SIDECAR, TABLE, CONTRASTS = ".yaml", ".parquet", ".contrast.json"  # what follows NAME


def beside(path: Path, ending: str) -> Path:
    """models/NAME and .yaml -> models/NAME.yaml; a NAME may have points in it."""
    return path.with_name(path.name + ending)


def traces(exp_dir: str, name: str) -> Path:
    return Path(exp_dir) / "traces" / name


def parts(exp_dir: str, name: str) -> Path:
    return Path(exp_dir) / "parts" / name


def gradient(exp_dir: str) -> Path:
    return Path(exp_dir) / "student_grads.safetensors"


def model(exp_dir: str, name: str) -> Path:
    return Path(exp_dir) / "models" / name


def student(model_folder: Path) -> Path:
    return model_folder / "final"


def is_student(folder: Path) -> bool:
    """Whether a folder is where distill.py puts a student."""
    return folder.name == "final" and folder.parent.parent.name == "models"


def checkpoints(model_folder: Path) -> list[Path]:
    return sorted(model_folder.glob("checkpoint-*"))


def sidecar_of(output: Path) -> Path:
    """The sidecar of a table of traces, a gradient or a student's folder."""
    return beside(output.parent, SIDECAR) if is_student(output) else output.with_suffix(SIDECAR)


def sidecars(exp_dir: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Those of an experiment's finished traces, students and gradient."""
    found = (exp_dir.glob(name) for name in ("traces/*.yaml", "models/*.yaml", "student_grads.yaml"))
    traces, models, gradient = map(sorted, found)
    return traces, models, gradient


def is_table(path: Path) -> bool:
    """Whether a file is where gentraces.py puts a table of traces."""
    return path.parent.name == "traces" and path.suffix == TABLE


def registry(exp_dir: str, kind: str) -> Path:
    """One line for each stage that ended; kind: trace or model."""
    return Path(exp_dir) / "metadata" / f"{kind}_registry.jsonl"


def lock(exp_dir: str | Path, name: str) -> Path:
    return Path(exp_dir) / "locks" / f"{name}.lock"


def hub_record(exp_dir: str | Path) -> Path:
    """The commits that the experiment takes from the hub; pipeline.sh names a copy for its dry runs."""
    return Path(os.environ.get("HUB_RECORD") or Path(exp_dir) / "hub.yaml")


def search(exp_dir: str) -> Path:
    return Path(exp_dir) / "search"


def log(exp_dir: str | Path, name: str) -> Path:
    return Path(exp_dir) / "logs" / f"{name}.log"


def report(exp_dir: str | Path) -> Path:
    return Path(exp_dir) / "report"
