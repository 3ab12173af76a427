"""Files that survive a kill: atomic writes, parts of an unfinished stage, sidecars, registries, locks,
fingerprints.

A stage is done when its sidecar exists; the sidecar is written, by atomic rename, after everything else.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
UMASK = os.umask(0o077)  # it can only be read by being set
os.umask(UMASK)
# Weights are fingerprinted by NUM_SAMPLES blocks of SAMPLE_BYTES: a retrained model differs in every one.
WEIGHTS = (".safetensors", ".bin")
MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.jinja", "*.model")
ADAPTER_FILE = "adapter_config.json"
# of a repository of the hub: what must be there, and what must not
HUB_FILES = {
    "model": ("config.json", ADAPTER_FILE),
    "tokenizer": ("tokenizer_config.json",),
}
TOKENIZER_FILES = ("tokenizer*", "chat_template*", "vocab*", "merges*")
HUB = "hub:"  # begins the fingerprint of what is there
SAMPLE_BYTES = 4096
NUM_SAMPLES = 256
# what only reads finished stages, or plans them
NO_STAGE = {
    *("grid.py", "report.py", "search.py"),
    *("ads/claims.py", "ads/page.py", "ads/plots.py", "ads/tradeoff.py"),
}
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)  # of a file system without flock


class NotMade(FileNotFoundError):
    """What a stage reads and another stage is still to make."""


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary sibling of `path` to write to; on success it is flushed to disk and renamed.

    Two processes may not write one path at a time: hold the stage's lock.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(
        f".{path.name}.tmp"
    )  # one name: what a kill leaves is overwritten, not collected
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~UMASK)  # safetensors lets nobody else read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path):
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


def write_text(path, text):
    """Write `text` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_jsonl(path, record):
    """Append one JSON line to a registry that several processes may be writing to."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_jsonl(path):
    """The records of a JSON-lines file."""
    with Path(path).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_yaml(path):
    """The mapping in a YAML file; ValueError when the file holds something else."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error
    if content is not None and not isinstance(content, dict):
        raise ValueError(f"{path} should hold `key: value` lines, but holds a {type(content).__name__}")
    return content or {}


# Sidecars


def write_sidecar(path, config, inputs, stats, seconds, outputs=(), **more):
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
    write_text(path, yaml.safe_dump(record, sort_keys=False, allow_unicode=True, width=110))
    return record


def is_finished(path, config, inputs, ignore=()):
    """Whether the sidecar `path` exists; ValueError naming the difference if it was made with another config
    or other inputs. `ignore` names config keys that do not change the result (such as batch_size)."""
    path = Path(path)
    if not path.is_file():
        return False
    record = read_sidecar(path)
    if differences := find_differences(record, config, inputs, ignore):
        raise ValueError(
            f"{path} was made with other settings: {'; '.join(differences)}. "
            "Choose another name or exp_dir, restore the settings, or delete that file to redo the stage"
            + at_a_commit(differences)
        )
    for name in record.get("outputs", {}):
        check_output(path, path.parent / name)
    return True


def at_a_commit(differences):
    """How to go back to what the hub had, where that is among the differences; else an empty text."""
    names_hub = any(f"'{HUB}" in text for text in differences)
    return " (OWNER/NAME@COMMIT is a model of the hub at an earlier commit)" if names_hub else ""


def read_sidecar(path):
    """The record in a sidecar; ValueError when it was cut short."""
    record = read_yaml(path)
    if record.keys().isdisjoint({"seconds"}):  # the last key
        raise ValueError(f"{path} is cut short: delete it to redo the stage")
    return record


def check_output(sidecar, path):
    """ValueError if a stage's output is no longer what its sidecar says it wrote."""
    if not Path(sidecar).is_file():
        return
    record = read_sidecar(sidecar)
    written = record.get("outputs", {}).get(os.path.relpath(path, Path(sidecar).parent))
    if written is None or "deleted" in record or (Path(path).exists() and fingerprint(path) == written):
        return
    state = "damaged or changed since" if Path(path).exists() else "missing"
    raise ValueError(
        f"{path} is {state}, by {sidecar}: put it back, or delete {sidecar} to redo the stage that makes it"
    )


def find_differences(record, config, inputs, ignore):
    """What differs between a record's config and inputs and those given now, one text per key."""
    found = differing_keys(record.get("config", {}), config, ignore)
    made_with = record.get("inputs", {})
    alike = {key for key in made_with if is_unrecorded(made_with[key], inputs.get(key))}
    return found + differing_keys(made_with, inputs, alike)


def differing_keys(before, now, ignore=()):
    """One 'key: before -> now' string per key in which two mappings differ."""
    keys = [key for key in {**before, **now} if key not in ignore]
    return [
        f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
        for key in keys
        if before.get(key) != now.get(key)
    ]


def world_size():
    """How many processes make the stage, as their launcher says (WORLD_SIZE); 1 without one."""
    text = os.environ.get("WORLD_SIZE") or "1"
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(
            f"WORLD_SIZE={text!r} in the environment: must be a whole number from 1; unset it to run alone"
        )
    return int(text)


def is_unrecorded(before, now):
    """Whether a fingerprint of the hub is from when commits were not recorded: it may be of any."""
    is_hub = isinstance(before, str) and before.startswith(HUB)
    return is_hub and "@" not in before and str(now).startswith(f"{before}@")


def versions():
    """Version of every library that can change a result."""
    names = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "math-verify", "numpy")
    found = {name: metadata.version(name) for name in names if importable(name)}
    return {"python": platform.python_version(), **found}


def importable(name):
    """Whether a distribution is installed."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def git_commit():
    """The project's commit, with '+' when the working tree differs from it; None outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    with contextlib.suppress(OSError):
        result = subprocess.run(command, capture_output=True, text=True)
        return result.stdout.strip() or None
    return None


def fingerprint_code():
    """16 hex digits of the project's code that makes stages."""
    paths = [*ROOT.glob("*.py"), *(ROOT / "ads").rglob("*.py"), *(ROOT / "ads").rglob("*.c")]
    by_name = {path.relative_to(ROOT).as_posix(): path for path in paths}
    return fingerprint_json(
        {name: fingerprint_file(by_name[name]) for name in sorted(by_name.keys() - NO_STAGE)}
    )


def made_by_other_code(sidecar):
    """What to say of a finished stage whose code has changed since, or an empty text."""
    record = read_sidecar(sidecar)
    if record.get("code") == fingerprint_code():
        return ""
    return f" (made by other code: commit {record.get('commit')}, now {git_commit()})"


def made_at_unknown_commits(sidecar, inputs):
    """What to say of a finished stage whose record does not tell the hub's commits, or an empty text."""
    made_with = read_sidecar(sidecar).get("inputs", {})
    names = [key for key, before in made_with.items() if is_unrecorded(before, inputs.get(key))]
    return f" (at which commit of the hub was not recorded: {', '.join(names)})" if names else ""


# Parts: finished batches of a stage that is still running


def write_part(parts_dir, rank, rows):
    """Store finished rows (dicts with an 'id') as one JSON-lines file that no later call touches.

    Its name ends in a checksum of its contents.
    """
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_text(Path(parts_dir) / f"{time.time_ns():020d}-{rank}-{checksum(text.encode())}.jsonl", text)


def read_parts(parts_dir):
    """{id: row} of every row stored so far. A damaged part is said and left out: its rows are made again."""
    rows = {}
    for path in sorted(Path(parts_dir).glob("[0-9]*.jsonl")):
        content = path.read_bytes()
        if path.stem.split("-")[-1] != checksum(content):
            print(f"{path} is damaged: its rows are made again", flush=True)
            continue
        rows |= {row["id"]: row for row in map(json.loads, content.splitlines())}
    return rows


def checksum(content):
    return hashlib.sha256(content).hexdigest()[:16]


def open_parts(folder, config, inputs, ignore=()):
    """Prepare the folder of unfinished work; ValueError if it holds work done with other settings, code or
    libraries."""
    folder = Path(folder)
    settings = folder / "settings.yaml"
    record = read_yaml(settings) if settings.is_file() else {}
    makers = {"code": fingerprint_code(), **versions()}
    differences = find_differences(record, config, inputs, ignore)
    differences += differing_keys(record.get("makers", {}), makers)
    # what is left of a write that a kill cut short is no work
    work = [path for path in folder.glob("*") if path != settings and path.suffix != ".tmp"]
    if differences and work:
        raise ValueError(
            f"{folder} holds unfinished work done with other settings: {'; '.join(differences)}. "
            "Restore them to finish it, or delete that folder to start anew"
        )
    written = {"config": config, "inputs": inputs, "makers": makers}
    write_text(settings, yaml.safe_dump(written, sort_keys=False))


@contextlib.contextmanager
def stage_lock(exp_dir, name):
    """Hold the lock of one stage, waiting while another process has it; a killed holder lets go."""
    path = Path(exp_dir) / "locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        take_lock(file, path)
        file.truncate(0)
        file.write(
            f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        )
        file.flush()
        yield


def take_lock(file, path):
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


def reason(error):
    """One line on an error that a library raised: its text, and its type where that says more."""
    text = " ".join(str(error).split())[:300]
    is_plain = isinstance(error, OSError | ValueError | ImportError | RuntimeError)
    return text if is_plain else f"{type(error).__name__}: {text}"


# Fingerprints


def fingerprint_json(value):
    """16 hex digits that identify a JSON-able value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def fingerprint_file(path):
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


def fingerprint(path):
    """16 hex digits of a file's contents or of a model folder's."""
    is_model = Path(path).is_dir()
    return fingerprint_folder(str(path), "model", MODEL_FILES) if is_model else fingerprint_file(path)


def fingerprint_existing(path, remedy):
    """fingerprint_file of an input; NotMade, a FileNotFoundError, that says how to make it.

    ValueError if a stage made it and it has changed since.
    """
    if not Path(path).is_file():
        raise NotMade(f"{path} does not exist: {remedy}")
    check_output(Path(path).with_suffix(".yaml"), path)
    return fingerprint_file(path)


def fingerprint_model(name):
    """What identifies a model: the contents of a folder, tokenizer included, or the hub's name and commit.

    ValueError if it is a student that has changed since it was made, or holds an adapter; NotMade if it is
    one that is still to be made. Of a deleted student it is what it was.
    """
    if deleted := deleted_student(name):
        return deleted["model"]
    folder = Path(name).absolute()
    check_output(student_sidecar(folder), folder)
    if is_student(folder) and not folder.is_dir():
        raise NotMade(f"{name} does not exist: make it with distill.py")
    check_no_adapter(name)
    return fingerprint_folder(name, "model", MODEL_FILES)


def fingerprint_tokenizer(name):
    """What identifies a tokenizer: its files in a local folder, or the hub's name and commit."""
    if deleted := deleted_student(name):
        return deleted["tokenizer"]
    return fingerprint_folder(name, "tokenizer", TOKENIZER_FILES)


def fingerprint_folder(name, kind, patterns):
    """Contents of the files that match, or a repository's name and commit on the hub.

    FileNotFoundError without the first of the kind's HUB_FILES.
    """
    where, commit = locate(name, kind)
    folder = find_folder(name, kind)
    if not (folder / HUB_FILES[kind][0]).is_file():
        raise FileNotFoundError(f"{name} is not complete: it has no {HUB_FILES[kind][0]}")
    if commit is not None:
        return f"{HUB}{where}@{commit}"
    files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return fingerprint_json({path.name: fingerprint_file(path) for path in files})


def check_no_adapter(name):
    """ValueError for a model with an adapter beside it, which transformers would add without a word."""
    folder = find_folder(name, "model")
    if (folder / ADAPTER_FILE).is_file():
        is_model = (folder / "config.json").is_file()
        remedy = f"or remove {ADAPTER_FILE}" if is_model else "it is no model by itself"
        raise ValueError(
            f"{name} holds an adapter ({ADAPTER_FILE}): merge it into its base model first "
            f"(merge_and_unload of peft, then save_pretrained); {remedy}"
        )


# Students
#
# They take more room than all else. One that has been evaluated may be deleted; its sidecar, which says so,
# and what was measured of it stay, and its stages count as done.

DELETED = {}  # {fingerprint: sidecar} of the deleted students that this process has met


def is_student(folder):
    """Whether a folder is where distill.py puts a student: EXP_DIR/models/NAME/final."""
    return folder.name == "final" and folder.parent.parent.name == "models"


def student_sidecar(folder):
    return folder.parent.with_name(f"{folder.parent.name}.yaml")


def delete_student(name):
    """Delete a finished student's folder; first its sidecar tells what it was. Again, what a kill left."""
    folder = Path(name).absolute()
    if not is_student(folder):
        raise ValueError(f"{name} is no student (EXP_DIR/models/NAME/final): not deleted")
    if not deleted_student(name):
        fingerprints = {"model": fingerprint_model(name), "tokenizer": fingerprint_tokenizer(name)}
        sidecar = student_sidecar(folder)
        record = {"deleted": fingerprints, **read_sidecar(sidecar)}
        write_text(sidecar, yaml.safe_dump(record, sort_keys=False, allow_unicode=True, width=110))
    if folder.exists():
        shutil.rmtree(folder)


def deleted_student(name):
    """{"model": fingerprint, "tokenizer": fingerprint} of a student that was deleted, else None."""
    folder = Path(name).absolute()
    sidecar = student_sidecar(folder)
    if not (is_student(folder) and sidecar.is_file()):
        return None
    found = read_sidecar(sidecar).get("deleted")
    if found:
        DELETED[found["model"]] = sidecar
    return found


def check_not_deleted(inputs):
    """ValueError if a stage that is to be done reads a student that was deleted."""
    for sidecar in [DELETED[made_from] for made_from in inputs.values() if made_from in DELETED]:
        raise ValueError(
            f"{sidecar.with_suffix('')}/final was deleted once it had been evaluated (KEEP_STUDENTS=0): "
            f"delete {sidecar} and run again to make the student anew from its traces"
        )


# The hub
#
# A branch moves while an experiment runs, so each name is looked up once for an experiment, not for a stage:
# the first stage that needs it records the commit in EXP_DIR/hub.yaml, and all others, of later runs too,
# take that one. So an old gradient never meets new weights, and a sweep of many hours is not cut in two.
# Names stay as they are in settings and records; datasets and stages run by hand take part. `print_moved`
# says what has moved since.

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
            raise ValueError(f"{path} has just been written by another stage ({differences[0]}): run again")
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
        raise FileNotFoundError(f"{name} is neither a folder nor the name of a model on the hub (OWNER/NAME)")
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
        raise FileNotFoundError(reason(error)) from error


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
        raise FileNotFoundError(f"{name} is no folder, nor to be had from the hub: {why}{remedy}") from why
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
        raise ValueError(
            f"{repository} is gated: ask for access on its page of the hub, then `hf auth login` here (or "
            f"set HF_TOKEN) with the account that has it ({reason(error)})"
        ) from error
    except (OSError, ValueError, HTTPError) as error:
        raise FileNotFoundError(
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
