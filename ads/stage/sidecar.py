"""The record beside a finished stage: what it was made with and what it measured.

A stage is done when its sidecar exists; the sidecar is written, by atomic rename, after everything else.
"""

import os
import sys
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import yaml

from ads.stage.errors import UserError
from ads.stage.files import differing_keys, read_yaml, write_text
from ads.stage.fingerprint import fingerprint, fingerprint_code, git_commit, versions
from ads.stage.hub import HUB
from ads.stage.world import world_size

Record = dict[str, Any]  # a sidecar, or its part `config` or `inputs`
# keys that settings of earlier versions lacked, and what stood for them; by a key that tells the stage
LACKED: dict[str, Record] = {
    "is_teacher": {"keep_top1": False, "num_samples": 1, "attacker": "naive"},
    "model_name": {"mask_share": 0.0, "weights": False},
}


def write_sidecar(
    path: Path,
    config: Record,
    inputs: Record,
    stats: Record,
    seconds: float,
    outputs: Iterable[Path] = (),
    **more: Any,
) -> Record:
    """Write what a finished stage was made with and measured. Call it last: its presence means finished.

    outputs: the files and model folders that later stages read, which must then be as they are now.
    """
    record = {
        "config": config,
        "inputs": inputs,
        "outputs": {os.path.relpath(output, Path(path).parent): fingerprint(output) for output in outputs},
        "stats": stats,
        **more,
        "code": fingerprint_code(),
        "versions": versions(),
        "commit": git_commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "world_size": world_size(),
        "seconds": round(seconds, 1),
    }
    write_record(path, record)
    return record


def write_record(path: Path, record: Record) -> None:
    write_text(path, yaml.safe_dump(record, sort_keys=False, allow_unicode=True, width=110))


def read_sidecar(path: Path) -> Record:
    """The record in a sidecar; UserError when it was cut short."""
    record = read_yaml(path)
    if "seconds" not in record:  # the last key
        raise UserError(f"{path} is cut short: delete it to redo the stage")
    return record | {"config": upgraded(record.get("config") or {})}


def upgraded(config: Record) -> Record:
    """Settings of an earlier version by today's names, with what stood for keys that it lacked."""
    for name, lacked in LACKED.items():
        config = lacked | config if name in config else config
    if "is_teacher" not in config or "defence" in config:
        return config
    direction = config.get("direction", "gradient")  # what `defence` was called
    defence = {"defence": "ads" if direction == "gradient" else direction}
    found = {key: value for key, value in config.items() if key != "direction"}
    return found | defence | {"direction_seed": config.get("direction_seed")}


def is_finished(path: Path, config: Record, inputs: Record, ignore: Container[str] = ()) -> bool:
    """Whether the sidecar `path` exists.

    UserError naming the difference if it was made with another config or other inputs. `ignore` names config
    keys that do not change the result (such as batch_size).
    """
    path = Path(path)
    if not path.is_file():
        return False
    record = read_sidecar(path)
    if differences := find_differences(record, config, inputs, ignore):
        raise UserError(
            f"{path} was made with other settings: {'; '.join(differences)}. "
            "Choose another name or exp_dir, restore the settings, or delete that file to redo the stage"
            + at_a_commit(differences)
        )
    for name in record.get("outputs", {}):
        check_output(path, path.parent / name)
    return True


def check_output(sidecar: Path, path: str | Path) -> None:
    """UserError if a stage's output is no longer what its sidecar says it wrote."""
    if not sidecar.is_file():
        return
    record = read_sidecar(sidecar)
    written = record.get("outputs", {}).get(os.path.relpath(path, sidecar.parent))
    exists = Path(path).exists()
    if written is None or "deleted" in record or (exists and fingerprint(path) == written):
        return
    state = "damaged or changed since" if exists else "missing"
    raise UserError(
        f"{path} is {state}, by {sidecar}: put it back, or delete {sidecar} to redo the stage that makes it"
    )


def find_differences(record: Record, config: Record, inputs: Record, ignore: Container[str]) -> list[str]:
    """What differs between a record's config and inputs and those given now, one text per key."""
    found = differing_keys(record.get("config", {}), config, ignore)
    made_with = record.get("inputs", {})
    return found + differing_keys(made_with, inputs, unrecorded(made_with, inputs))


def unrecorded(made_with: Record, inputs: Record) -> list[str]:
    """Keys of inputs from the hub that were recorded without their commit and may be those given now."""
    return [key for key, before in made_with.items() if is_unrecorded(before, inputs.get(key))]


def is_unrecorded(before: object, now: object) -> bool:
    """Whether `before` names a repository of the hub without a commit, and `now` the same with one.

    Old sidecars are so. Which commit it was is unknown, so it counts as the same.
    """
    is_hub = isinstance(before, str) and before.startswith(HUB)
    return is_hub and "@" not in str(before) and str(now).startswith(f"{before}@")


def at_a_commit(differences: Iterable[str]) -> str:
    """How to go back to what the hub had, where that is among the differences; else an empty text."""
    names_hub = any(f"'{HUB}" in text for text in differences)
    return " (OWNER/NAME@COMMIT is a model of the hub at an earlier commit)" if names_hub else ""


def made_by_other_code(sidecar: Path) -> str:
    """What to say of a finished stage whose code has changed since, or an empty text."""
    record = read_sidecar(sidecar)
    if record.get("code") == fingerprint_code():
        return ""
    return f" (made by other code: commit {record.get('commit')}, now {git_commit()})"


def made_at_unknown_commits(sidecar: Path, inputs: Record) -> str:
    """What to say of a finished stage whose record does not tell the hub's commits, or an empty text."""
    names = unrecorded(read_sidecar(sidecar).get("inputs", {}), inputs)
    return f" (at which commit of the hub was not recorded: {', '.join(names)})" if names else ""


def open_parts(folder: Path, config: Record, inputs: Record, ignore: Container[str] = ()) -> None:
    """Prepare the folder of unfinished work; UserError if it holds work of other settings or other code."""
    settings = folder / "settings.yaml"
    record = read_yaml(settings) if settings.is_file() else {}
    makers = {"code": fingerprint_code(), **versions()}
    differences = find_differences(record, config, inputs, ignore)
    differences += differing_keys(record.get("makers", {}), makers)
    # a kill within an atomic write leaves a .tmp, which holds nothing that is finished
    work = [path for path in folder.glob("*") if path != settings and path.suffix != ".tmp"]
    if differences and work:
        raise UserError(
            f"{folder} holds unfinished work done with other settings: {'; '.join(differences)}. "
            "Restore them to finish it, or delete that folder to start anew"
        )
    written = {"config": config, "inputs": inputs, "makers": makers}
    write_text(settings, yaml.safe_dump(written, sort_keys=False))
