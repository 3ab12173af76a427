"""What is of the hub, at one commit for a whole experiment.

A branch moves while an experiment runs, so each name is looked up once for an experiment, not for a stage:
the first stage that needs it records the commit in EXP_DIR/hub.yaml, and all others, of later runs too, take
that one. So an old gradient never meets new weights, and a sweep of many hours is not cut in two. Names stay
as they are in settings and records; datasets and stages run by hand take part. `print_moved` says what has
moved since.
"""

import functools
import json
import os
import re
import sys
from pathlib import Path

import yaml

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
COMMITS = {}  # {name on the hub: commit} in this process: what is fingerprinted is what is loaded
OF_DATASETS = "datasets/"  # begins their names there
HUB_SECONDS = 10  # to wait for an answer


def record_of_commits(exp_dir):
    """The file with the commits that an experiment takes; pipeline.sh names a copy for its dry runs."""
    return Path(os.environ.get("HUB_RECORD") or Path(exp_dir) / "hub.yaml")


def recorded_commits(path):
    return read_yaml(path) if path.is_file() else {}


def read_commits(exp_dir):
    """Take what is of the hub at the commits that an experiment has recorded, if any."""
    COMMITS.clear()
    COMMITS.update(recorded_commits(record_of_commits(exp_dir)))


def record_commits(exp_dir):
    """Record the commits that this process takes; ValueError if another has meanwhile recorded other ones."""
    path = record_of_commits(exp_dir)
    if COMMITS.items() <= recorded_commits(path).items():
        return
    with stage_lock(path.parent, "hub"):
        commits = COMMITS | recorded_commits(path)
        if differences := differing_keys({name: commits[name] for name in COMMITS}, COMMITS):
            raise UserError(f"{path} has just been written by another stage ({differences[0]}): run again")
        write_text(path, yaml.safe_dump(commits))


def print_moved(exp_dir):
    """Say what has moved on the hub since an experiment recorded its commit; nothing without a network."""
    path = record_of_commits(exp_dir)
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


def locate(name, kind):
    """(what a library is to load, at which commit): of a folder (itself, None).

    Anything else is OWNER/NAME or OWNER/NAME@REVISION of the hub: a branch, a tag or a commit.
    """
    if Path(name).is_dir():
        return name, None
    return name.partition("@")[0], find_commit(name, kind)


def find_folder(name, kind):
    """A folder, or that of a repository's snapshot, with the kind's HUB_FILES."""
    where, commit = locate(name, kind)
    return Path(where) if commit is None else find_snapshot(where, commit, kind)


def find_commit(name, kind):
    """The commit of what is of the hub: that of its name, or that in COMMITS, or as it is there now.

    Where the hub does not answer, a commit that the cache has. FileNotFoundError when there is none.
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


def ask_hub(key):
    """The commit at which something is on the hub now; FileNotFoundError where that cannot be had.

    The cache's refs, by which others find what is in it, stay where they are.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    repository, _, revision = key.removeprefix(OF_DATASETS).partition("@")
    ask = HfApi().dataset_info if key.startswith(OF_DATASETS) else HfApi().model_info
    try:
        return ask(repository, revision=revision or None, timeout=HUB_SECONDS).sha
    except (OSError, ValueError, HTTPError) as error:
        raise MissingInputError(reason(error)) from error


def cached_commit(name, kind, why):
    """The commit at which the cache has a branch or tag, if complete; else, of main, the newest complete one.

    Where main has moved, a look at it leaves a few files of the new commit in the cache, without weights.
    FileNotFoundError when there is none; `why` the hub was of no help.
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


def is_complete(folder, kind):
    """Whether a snapshot in the cache holds what is loaded, beyond the HUB_FILES that a look at it leaves."""
    if kind == "model":
        indexes = [json.loads(path.read_text()) for path in folder.glob("*.safetensors.index.json")]
        parts = {name for index in indexes for name in index["weight_map"].values()}
        return any(folder.glob("*.safetensors")) and all((folder / name).is_file() for name in parts)
    patterns = TOKENIZER_FILES if kind == "tokenizer" else ("*",)
    files = {path.name for pattern in patterns for path in folder.glob(pattern)}
    return bool(files - {*HUB_FILES["tokenizer"]})


@functools.cache  # a commit never changes
def find_snapshot(repository, commit, kind):
    """The local folder of a model's or tokenizer's HUB_FILES at a commit; without a network, of those cached.

    FileNotFoundError when there is none.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HTTPError

    try:
        folder = Path(snapshot_download(repository, revision=commit, allow_patterns=HUB_FILES[kind]))
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


def check_access(repository):
    """GatedRepoError if what is still to be downloaded of a repository may not be.

    HUB_FILES may be in the cache by an account that has access. Whatever else keeps the hub from answering
    shows when the model is loaded.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HTTPError

    try:
        HfApi().auth_check(repository)
    except GatedRepoError:
        raise
    except (OSError, ValueError, HTTPError):
        return
