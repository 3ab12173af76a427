"""Where everything of an experiment is: each path in its folder EXP_DIR, once (pipeline.sh spells the same).

Beside each output is its sidecar, which says what it was made with and is written last.
"""

import os
from pathlib import Path

PATHS = {
    "traces": "traces/NAME",  # the traces of a stage as a dataset (datasets.load_from_disk)
    "traces_table": "traces/NAME.parquet",  # the same as one table, which other stages read
    "contrasts": "traces/NAME.contrast.json",  # a few problems with and without ADS, for the report
    "traces_sidecar": "traces/NAME.yaml",
    "parts": "parts/NAME",  # rows of traces that are not finished
    "gradient": "student_grads.safetensors",  # the proxy's
    "gradient_sidecar": "student_grads.yaml",
    "model": "models/NAME",  # checkpoint-STEP while a student is trained, then final
    "mask": "models/NAME/mask.json",  # which tokens a student is not trained on (mask_share)
    "student": "models/NAME/final",
    "model_sidecar": "models/NAME.yaml",
    "search": "search",  # an EXP_DIR in itself, of what search.py evaluated
    "fresh": "fresh",  # in that one: problems on which what it found is measured again
    "report": "report",  # what report.py writes
    "registry": "metadata/NAME_registry.jsonl",  # a line for each stage that ended; NAME: trace or model
    "log": "logs/NAME.log",
    "lock": "locks/NAME.lock",
    "recipe": "attacks/NAME.yaml",  # of each attack, as it was when students were made by it
    "hub": "hub.yaml",  # the commits that the experiment takes from the hub
}


def path_of(kind: str, exp_dir: str | Path, name: str = "NAME") -> Path:
    return Path(exp_dir) / PATHS[kind].replace("NAME", name)


def all_of(kind: str, exp_dir: Path) -> list[Path]:
    """What there is of a kind, by name."""
    return sorted(exp_dir.glob(PATHS[kind].replace("NAME", "*")))


def is_a(kind: str, path: Path) -> bool:
    """Whether a path is where one of a kind would be, in whatever experiment."""
    return path.match(PATHS[kind].replace("NAME", "*"))


def sidecar_of(output: Path) -> Path:
    """The sidecar of a table of traces, a gradient or a student's folder."""
    if is_a("student", output):
        return output.parent.with_name(f"{output.parent.name}.yaml")
    return output.with_suffix(".yaml")


def checkpoints(model_folder: Path) -> list[Path]:
    return sorted(model_folder.glob("checkpoint-*"))


def hub_record(exp_dir: str | Path) -> Path:
    """The experiment's file of commits; pipeline.sh names a copy for its dry runs."""
    return Path(os.environ.get("HUB_RECORD") or path_of("hub", exp_dir))
