"""What a stage reads: fingerprints of models, tokenizers and files that other stages made.

Students take more room than all else. One that has been evaluated may be deleted; its sidecar, which says
so, and what was measured of it stay, and its stages count as done.
"""

import shutil
from pathlib import Path
from typing import Any

from ads.stage import layout
from ads.stage.errors import NotMadeError, UserError
from ads.stage.fingerprint import MODEL_FILES, fingerprint_file, fingerprint_folder
from ads.stage.hub import ADAPTER_FILE, TOKENIZER_FILES, find_folder
from ads.stage.sidecar import check_output, read_sidecar, write_record


def fingerprint_existing(path: str | Path, remedy: str) -> str:
    """What identifies a file that a stage reads; NotMadeError that says how to make it.

    UserError for a folder, and if a stage made the file and it has changed since.
    """
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder: give the file beside it, such as {Path(path).name}.parquet")
    if not Path(path).is_file():
        raise NotMadeError(f"{path} does not exist: {remedy}")
    check_output(layout.sidecar_of(Path(path)), path)
    return fingerprint_file(path)


def fingerprint_model(name: str) -> str:
    """What identifies a model: the contents of a folder, tokenizer included, or the hub's name and commit.

    UserError if it is a student that has changed since it was made, or holds an adapter; NotMadeError if it
    is one that is still to be made. Of a deleted student it is what it was.
    """
    if deleted := deleted_student(name):
        return deleted["model"]
    folder = Path(name).absolute()
    if layout.is_a("student", folder):
        check_output(layout.sidecar_of(folder), folder)
        if not folder.is_dir():
            raise NotMadeError(f"{name} does not exist: make it with distill.py")
    check_no_adapter(name)
    return fingerprint_folder(name, "model", MODEL_FILES)


def fingerprint_tokenizer(name: str) -> str:
    """What identifies a tokenizer: its files in a local folder, or the hub's name and commit."""
    if deleted := deleted_student(name):
        return deleted["tokenizer"]
    return fingerprint_folder(name, "tokenizer", TOKENIZER_FILES)


def check_no_adapter(name: str) -> None:
    """UserError for a model with an adapter beside it, which transformers would add without a word."""
    folder = find_folder(name, "model")
    if (folder / ADAPTER_FILE).is_file():
        is_model = (folder / "config.json").is_file()
        remedy = f"or remove {ADAPTER_FILE}" if is_model else "it is no model by itself"
        raise UserError(
            f"{name} holds an adapter ({ADAPTER_FILE}): merge it into its base model first "
            f"(merge_and_unload of peft, then save_pretrained); {remedy}"
        )


DELETED: dict[str, Path] = {}  # {fingerprint: sidecar} of the deleted students that this process has met


def delete_student(name: str) -> None:
    """Delete a finished student's folder, once its sidecar tells what it was; or what a kill left of it."""
    folder = Path(name).absolute()
    if not layout.is_a("student", folder):
        raise UserError(f"{name} is no student (EXP_DIR/models/NAME/final): not deleted")
    if not deleted_student(name):
        fingerprints = {"model": fingerprint_model(name), "tokenizer": fingerprint_tokenizer(name)}
        sidecar = layout.sidecar_of(folder)
        write_record(sidecar, {"deleted": fingerprints, **read_sidecar(sidecar)})
    if folder.exists():
        shutil.rmtree(folder)


def deleted_student(name: str) -> dict[str, str] | None:
    """{"model": fingerprint, "tokenizer": fingerprint} of a student that was deleted, else None."""
    folder = Path(name).absolute()
    sidecar = layout.sidecar_of(folder)
    if not (layout.is_a("student", folder) and sidecar.is_file()):
        return None
    found = read_sidecar(sidecar).get("deleted")
    if found:
        DELETED[found["model"]] = sidecar
    return found


def check_not_deleted(inputs: dict[str, Any]) -> None:
    """UserError if a stage that is to be done reads a student that was deleted."""
    for sidecar in [DELETED[made_from] for made_from in inputs.values() if made_from in DELETED]:
        raise UserError(
            f"{sidecar.with_suffix('')}/final was deleted once it had been evaluated (KEEP_STUDENTS=0): "
            f"delete {sidecar} and run again to make the student anew from its traces"
        )
