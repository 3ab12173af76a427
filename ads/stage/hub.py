"""Models, tokenizers and datasets of the Hugging Face hub, each at one commit for a whole experiment.

A branch of the hub may move while an experiment runs. So the first stage that needs a name looks it up and
records its commit in EXP_DIR/hub.yaml; all later stages take that commit, also in later runs and when run by
hand. An old gradient never meets new weights, and a sweep of many hours is not cut in two. Settings and
sidecars keep the name as it was given. `print_moved` says what has moved since.
"""

import functools
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from ads.stage import layout
from ads.stage.errors import MissingInputError, UserError, reason
from ads.stage.files import differing_keys, read_yaml, stage_lock, write_text

ADAPTER_FILE = "adapter_config.json"
# of a repository of the hub: what must be there, and what must not
HUB_FILES = {
    "model": ("config.json", ADAPTER_FILE),
    "tokenizer": ("tokenizer_config.json",),
}
TOKENIZER_FILES = ("tokenizer*", "chat_template*", "vocab*", "merges*")
HUB = "hub:"  # begins the fingerprint of what is there
# {name on the hub: commit} in this process: what is fingerprinted is what is loaded
COMMITS: dict[str, str] = {}
OF_DATASETS = "datasets/"  # begins their names there
HUB_SECONDS = 10  # to wait for an answer


def recorded_commits(path: Path) -> dict[str, str]:
    return read_yaml(path) if path.is_file() else {}


def read_commits(exp_dir: str) -> None:
    """From now on take from the hub the commits that an experiment has recorded, if any."""
    COMMITS.clear()
    COMMITS.update(recorded_commits(layout.hub_record(exp_dir)))


def record_commits(exp_dir: str) -> None:
    """Record the commits that this process takes; UserError if another has meanwhile recorded other ones."""
    path = layout.hub_record(exp_dir)
    if COMMITS.items() <= recorded_commits(path).items():
        return
    with stage_lock(path.parent, "hub"):
        commits = COMMITS | recorded_commits(path)
        if differences := differing_keys({name: commits[name] for name in COMMITS}, COMMITS):
            raise UserError(f"{path} has just been written by another stage ({differences[0]}): run again")
        write_text(path, yaml.safe_dump(commits))


def print_moved(exp_dir: str) -> None:
    """Say what has moved on the hub since an experiment recorded its commit; nothing without a network."""
    path = layout.hub_record(exp_dir)
    for name, commit in recorded_commits(path).items():
        try:
            now = ask_hub(name)
        except FileNotFoundError:
            return
        if now != commit:
            print(
                f"{name} has moved on the hub from {commit} to {now}: this experiment stays at the former; "
                f"for the latter take another EXP_DIR (or delete {path}: finished stages then refuse it)",
                flush=True,
            )


def locate(name: str, kind: str) -> tuple[str, str | None]:
    """(what a library is to load, at which commit); for a folder (the folder, None).

    Anything else is a name on the hub, OWNER/NAME or OWNER/NAME@REVISION, with a branch, a tag or a commit as
    REVISION. kind: model, tokenizer or dataset.
    """
    if Path(name).is_dir():
        return name, None
    return name.partition("@")[0], find_commit(name, kind)


def find_folder(name: str, kind: str) -> Path:
    """The folder itself, or for a name on the hub the local snapshot that has the kind's HUB_FILES."""
    where, commit = locate(name, kind)
    return Path(where) if commit is None else find_snapshot(where, commit, kind)


def find_commit(name: str, kind: str) -> str:
    """The commit to take of a name on the hub: that in the name itself, else in COMMITS, else the hub's now.

    Where the hub does not answer, one that the local cache has. MissingInputError when there is none.
    """
    repository, _, revision = name.partition("@")
    if Path(name).is_absolute() or name.startswith(".") or repository.count("/") > 1:
        raise MissingInputError(f"{name} is neither a folder nor the name of a model on the hub (OWNER/NAME)")
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    key = f"{OF_DATASETS}{name}" if kind == "dataset" else name
    if key not in COMMITS:
        try:
            COMMITS[key] = ask_hub(key)
        except FileNotFoundError as error:
            COMMITS[key] = cached_commit(name, kind, error)
    return COMMITS[key]


def ask_hub(key: str) -> str:
    """The commit at which a key of COMMITS is on the hub now; MissingInputError where the hub does not say.

    Nothing is downloaded: other programs find what is in the cache by its refs, which must stay as they are.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    repository, _, revision = key.removeprefix(OF_DATASETS).partition("@")
    api = HfApi()
    ask: Any = api.dataset_info if key.startswith(OF_DATASETS) else api.model_info
    try:
        return ask(repository, revision=revision or None, timeout=HUB_SECONDS).sha
    except (OSError, ValueError, HTTPError) as error:
        raise MissingInputError(reason(error)) from error


def cached_commit(name: str, kind: str, why: Exception) -> str:
    """The commit at which the local cache has a branch or tag, if it is complete there.

    Else, for main, the newest commit that is complete: where main has moved, a look at it left a few files of
    the new commit in the cache, without weights. MissingInputError when there is none; it says `why` the hub
    was of no help.
    """
    from huggingface_hub import constants

    repository, _, revision = name.partition("@")
    repo_type = "datasets" if kind == "dataset" else "models"
    folder = Path(constants.HF_HUB_CACHE) / f"{repo_type}--{repository.replace('/', '--')}"
    reference = folder / "refs" / (revision or "main")
    at_reference = [reference.read_text().strip()] if reference.is_file() else []
    newest = sorted((folder / "snapshots").glob("*"), key=os.path.getmtime, reverse=True)
    commits = at_reference + [path.name for path in newest if not revision]
    found = next((commit for commit in commits if is_complete(folder / "snapshots" / commit, kind)), None)
    if found is None:
        remedy = "; set data_dir to local copies" if kind == "dataset" else ""
        raise MissingInputError(f"{name} is no folder, nor to be had from the hub: {why}{remedy}") from why
    if [found] != at_reference:
        print(f"{name}: at {found}, the newest complete commit in the cache", file=sys.stderr, flush=True)
    return found


def is_complete(folder: Path, kind: str) -> bool:
    """Whether a snapshot in the cache holds all that will be loaded; a look at it leaves only HUB_FILES."""
    if kind == "model":
        indexes = [json.loads(path.read_text()) for path in folder.glob("*.safetensors.index.json")]
        parts = {name for index in indexes for name in index["weight_map"].values()}
        return any(folder.glob("*.safetensors")) and all((folder / name).is_file() for name in parts)
    patterns = TOKENIZER_FILES if kind == "tokenizer" else ("*",)
    files = {path.name for pattern in patterns for path in folder.glob(pattern)}
    return bool(files - {*HUB_FILES["tokenizer"]})


@functools.cache  # a commit never changes
def find_snapshot(repository: str, commit: str, kind: str) -> Path:
    """The local folder with a model's or tokenizer's HUB_FILES at a commit, downloaded if not cached.

    MissingInputError when it cannot be had; UserError when its owner has not granted access.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HTTPError

    try:
        folder = Path(snapshot_download(repository, revision=commit, allow_patterns=[*HUB_FILES[kind]]))
        if not is_complete(folder, kind):
            check_access(repository)
        return folder
    except GatedRepoError as error:
        raise UserError(
            f"{repository} is gated: ask for access on its page of the hub, then `hf auth login` here (or "
            f"set HF_TOKEN) with the account that has it ({reason(error)})"
        ) from error
    except (OSError, ValueError, HTTPError) as error:
        raise MissingInputError(
            f"{repository}@{commit} is no folder, nor to be had from the hub: {reason(error)}"
        ) from error


def check_access(repository: str) -> None:
    """GatedRepoError if this account may not download the repository, although HUB_FILES are in the cache.

    Whatever else keeps the hub from answering shows when the model is loaded.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HTTPError

    try:
        HfApi().auth_check(repository)
    except GatedRepoError:
        raise
    except (OSError, ValueError, HTTPError):
        return
