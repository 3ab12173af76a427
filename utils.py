"""What every script needs: datasets and their splits, start-up (ranks, device), one-line errors, printing."""

import codecs
import contextlib
import errno
import functools
import gzip
import io
import json
import os
import shutil
import signal
import sys
import traceback
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

from ads import arithmetic
from ads.stage import errors, files, fingerprint, hub
from ads.stage.config import ignored_keys, load_config, native_setting, to_dict
from ads.stage.inputs import check_not_deleted
from ads.stage.settings import expand_home
from ads.stage.sidecar import is_finished, made_at_unknown_commits, made_by_other_code
from ads.stage.world import (
    STOPPING,
    check_launcher,
    is_main_process,
    leave_world,
    print0,
    start_world,
    stop,
    world_size,
)

ROOT = Path(__file__).resolve().parent
SHUFFLE_SEED = 42  # of the train/holdout split of datasets that are stored by subject
TRAIN_PERCENT = 70  # the rest is the holdout
MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


@dataclass(frozen=True)
class Source:
    """Where one part of a dataset comes from: `file` below data_dir, else the hub."""

    file: str
    hub: str
    configs: tuple[str, ...]
    split: str
    columns: tuple[str, ...]


GSM8K = ("question", "answer")
MATH = ("problem", "solution", "level", "type")
MMLU = ("question", "choices", "answer", "subject")
LETTERS = "ABCDEFGHIJ"  # of MMLU's choices
SOURCES = {
    ("gsm8k", "train"): Source("gsm8k_train", "openai/gsm8k", ("main",), "train", GSM8K),
    ("gsm8k", "test"): Source("gsm8k_platinum_test", "madrylab/gsm8k-platinum", ("main",), "test", GSM8K),
    ("hendrycks_math", "train"): Source(
        "hendrycks_math_train", "EleutherAI/hendrycks_math", MATH_SUBJECTS, "train", MATH
    ),
    ("hendrycks_math", "test"): Source(
        "hendrycks_math_test", "EleutherAI/hendrycks_math", MATH_SUBJECTS, "test", MATH
    ),
    ("mmlu", "train"): Source("mmlu_auxiliary_train", "cais/mmlu", ("all",), "auxiliary_train", MMLU),
    ("mmlu", "test"): Source("mmlu_test", "cais/mmlu", ("all",), "test", MMLU),
}
GENERATED = "arithmetic"  # needs no file
DATASETS = sorted({dataset for dataset, _ in SOURCES} | {GENERATED})
SHUFFLED = ("hendrycks_math", "mmlu")


def load_problems(data_split, data_dir=None, max_samples=None, seed=42):
    """The problems of a split such as 'gsm8k_holdout' or 'path/to/folder_test'.

    Returns dicts with id, problem, solution and the dataset's extras, in the dataset's order; max_samples
    takes a random subset that depends on the seed alone. `arithmetic` is generated: its seed makes the
    problems, max_samples is how many. Raises ValueError or FileNotFoundError in one line.
    """
    dataset, _, split = data_split.rpartition("_")
    if dataset == GENERATED:
        return arithmetic.generate(split, seed, max_samples)
    if is_folder(dataset):
        problems = load_folder(Path(dataset), split)
    else:
        problems = load_known(data_split, local_copies(data_dir))
    if not problems:
        raise ValueError(f"data_split={data_split!r} holds no problems")
    return take_subset(problems, max_samples, seed)


def take_subset(rows, max_samples, seed):
    """A seeded random subset in the order of the rows; all of them where max_samples is None."""
    if max_samples is None:
        return rows
    return [rows[i] for i in sorted(permutation(len(rows), seed)[:max_samples])]


def is_folder(dataset):
    """Whether a dataset is a folder of one's own; the name of a known dataset never is."""
    return dataset not in DATASETS and Path(dataset).is_dir()


def find_source(data_split):
    """The Source behind a split of a known dataset (train and holdout share one)."""
    dataset, _, split = data_split.rpartition("_")
    if dataset not in DATASETS:
        raise ValueError(
            f"data_split={data_split!r}: {dataset!r} is neither a known dataset ({', '.join(DATASETS)}) "
            "nor a folder"
        )
    return SOURCES[dataset, "test" if split == "test" else "train"]


def load_known(data_split, data_dir):
    """The split of a known dataset: train is cut 70/30 into train and holdout (MATH, MMLU: shuffled)."""
    source = find_source(data_split)
    dataset, _, split = data_split.rpartition("_")
    rows = read_local(source, data_dir) if data_dir else read_hub(source)
    order = list(range(len(rows)))
    if split != "test":
        order = permutation(len(rows), SHUFFLE_SEED) if dataset in SHUFFLED else order
        num_train = len(rows) * TRAIN_PERCENT // 100
        order = order[:num_train] if split == "train" else order[num_train:]
    part = "test" if split == "test" else "train"
    return [{"id": f"{dataset}/{part}/{i}", **to_problem(dataset, rows[i])} for i in order]


def local_copies(data_dir):
    """The folder of local copies of the datasets: data_dir, else $DATA_DIR; None: the hub."""
    text = data_dir or os.environ.get("DATA_DIR")
    return Path(expand_home("DATA_DIR", text)) if text else None


def local_file(source, data_dir):
    path = data_dir / f"{source.file}.jsonl.gz"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; copy {source.hub} there, or unset data_dir to use the hub"
        )
    return path


def read_local(source, data_dir):
    """Rows of <data_dir>/<file>.jsonl.gz, in the hub's schema."""
    return read_lines(local_file(source, data_dir), functools.partial(check_problem, columns=source.columns))


def read_hub(source):
    """Rows of a hub dataset, its configs one after another."""
    from datasets import concatenate_datasets, load_dataset

    commit = hub.find_commit(source.hub, "dataset")
    try:
        parts = [
            load_dataset(source.hub, config, split=source.split, revision=commit) for config in source.configs
        ]
    except (OSError, ValueError, RuntimeError) as error:
        reason = errors.reason(error)
        raise ValueError(
            f"dataset {source.hub} could not be loaded ({reason}); set data_dir to local copies"
        ) from error
    check_commit(source, parts, commit)
    rows = concatenate_datasets(parts).to_list()
    check_each(source.hub, rows, functools.partial(check_problem, columns=source.columns))
    return rows


def check_commit(source, parts, commit):
    """ValueError unless all parts are of a commit: without a network `datasets` takes what it cached last."""
    files = [Path(file["filename"]) for part in parts for file in part.cache_files]
    if wrong := [file for file in files if file.parent.name != commit]:
        raise ValueError(
            f"dataset {source.hub} is at commit {commit}, but {wrong[0]} is cached: load it with a network "
            "once, or set data_dir to local copies"
        )


def folder_file(folder, split):
    paths = [folder / f"{split}{suffix}" for suffix in (".jsonl", ".jsonl.gz", ".parquet")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} has none of {', '.join(path.name for path in paths)}")
    return path


def load_folder(folder, split):
    """Rows of <folder>/<split>.jsonl, .jsonl.gz or .parquet: problem, solution, perhaps id."""
    path = folder_file(folder, split)
    check = functools.partial(check_problem, columns=("problem", "solution"))
    if path.suffix == ".parquet":
        rows = read_parquet(path)
        check_each(path, rows, check)
    else:
        rows = read_lines(path, check)
    rows = one_table(path, rows)
    problems = [{**row, "id": str(row.get("id", f"{folder.name}/{split}/{i}"))} for i, row in enumerate(rows)]
    if len({row["id"] for row in problems}) < len(problems):
        raise ValueError(f"{path}: the ids in column 'id' are not all different")
    return problems


def one_table(path, rows):
    """The rows with the same columns each; ValueError when one could not be stored, as it mixes types."""
    import pyarrow

    columns = dict.fromkeys(key for row in rows for key in row)
    rows = [{key: row.get(key) for key in columns} for row in rows]
    try:
        pyarrow.Table.from_pylist(rows)
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError) as error:
        reason = ascii(" ".join(str(error).split())[:200])
        raise ValueError(f"{path}: a column mixes types or holds what is no text ({reason})") from error
    return rows


def read_lines(path, check):
    """The JSON objects of a .jsonl or .jsonl.gz file; ValueError naming the first line that will not do.

    check(object) raises one of what it finds. As `datasets` does, it passes over a byte order mark and empty
    lines.
    """
    rows = []
    for number, line in enumerate(read_bytes(path).removeprefix(codecs.BOM_UTF8).splitlines(), 1):
        if not line.strip():
            continue
        try:
            rows.append(parse_object(line))
            check(rows[-1])
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return rows


def read_bytes(path):
    """What a file holds, unpacked if its name ends in .gz; ValueError when it is damaged."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            return file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a readable gzip file: {error}") from error


def parse_object(line):
    """The JSON object in a line of bytes; ValueError saying what is wrong, with the column where one is."""
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode()) + 1
        raise ValueError(f"column {column}: {line[error.start]:#04x} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"column {error.colno}: {error.msg} (one JSON object a line)") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(row, dict):
        raise ValueError("not a JSON object (one a line)")
    if b"\\ud" in line.lower() and not is_text(json.dumps(row, ensure_ascii=False)):
        raise ValueError("\\ud800 to \\udfff stand for a character in pairs only")
    return row


def is_text(text):
    """Whether a string can be stored: half a surrogate pair, which JSON can write, is no character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def unique_keys(pairs):
    """The dict of a JSON object's pairs; ValueError when a key is there twice."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {ascii(twice)} is given twice")
    return row


def read_parquet(path):
    """The rows of a parquet file as dicts; ValueError when it is damaged."""
    return read_table(path).to_pylist()


def read_columns(path, columns):
    """{name: values} of some columns of a parquet file; ValueError when it is damaged or lacks one."""
    table = read_table(path, list(columns))
    if missing := [name for name in columns if name not in table.column_names]:
        raise ValueError(f"{path}: no column {', '.join(missing)}")
    return table.to_pydict()


def read_table(path, columns=None):
    import pyarrow
    import pyarrow.parquet

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return pyarrow.parquet.read_table(path, columns=columns)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is not a readable parquet file: {' '.join(str(error).split())[:200]}"
        ) from error


def fingerprint_data(data_split, data_dir=None):
    """What identifies the file behind a split, without reading its rows: contents, or name and commit."""
    dataset, _, split = data_split.rpartition("_")
    if dataset == GENERATED:
        return fingerprint.fingerprint_file(arithmetic.__file__)
    if is_folder(dataset):
        return fingerprint.fingerprint_file(folder_file(Path(dataset), split))
    source = find_source(data_split)
    if data_dir := local_copies(data_dir):
        return fingerprint.fingerprint_file(local_file(source, data_dir))
    return f"{hub.HUB}{source.hub}@{hub.find_commit(source.hub, 'dataset')}"


def check_columns(path, rows, columns):
    check_each(path, rows, functools.partial(check_row, columns=columns))


def check_each(path, rows, check):
    """ValueError naming the first row of which check(row) raises one."""
    for i, row in enumerate(rows):
        try:
            check(row)
        except ValueError as error:
            raise ValueError(f"{path}, row {i}: {error}") from error


def check_row(row, columns):
    if missing := [name for name in columns if name not in row]:
        raise ValueError(f"no column {', '.join(missing)} (found: {', '.join(row)})")


def check_problem(row, columns):
    """ValueError when a row lacks one of the columns or one holds no text (see check_choices for MMLU's)."""
    check_row(row, columns)
    text = [name for name in columns if "choices" not in columns or name not in ("choices", "answer")]
    if wrong := [name for name in text if not isinstance(row[name], str)]:
        raise ValueError(f"{wrong[0]} must be text, but is {ascii(row[wrong[0]])[:50]}")
    if "choices" in columns:
        check_choices(row["choices"], row["answer"])


def check_choices(choices, answer):
    """ValueError unless choices are texts, no more than LETTERS, and answer is the number of one, from 0."""
    if not isinstance(choices, list) or not all(isinstance(text, str) for text in choices):
        raise ValueError(f"choices must be a list of texts, but is {ascii(choices)[:50]}")
    if not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"choices must be 2 to {len(LETTERS)} texts, but are {len(choices)}")
    if type(answer) is not int or answer not in range(len(choices)):
        allowed = f"the number of the right choice, 0 to {len(choices) - 1}"
        raise ValueError(f"answer must be {allowed}, but is {ascii(answer)[:50]}")


def check_traces(path, rows, ids=(), text=(), flags=()):
    """ValueError naming the first row whose columns do not hold token ids, text and bools as they should."""
    check_columns(path, rows, (*ids, *text, *flags))
    for i, row in enumerate(rows):
        wrong = [f"{name} holds no token ids" for name in ids if not are_ids(row[name])]
        wrong += [f"{name} holds no text" for name in text if not isinstance(row[name], str)]
        wrong += [f"{name} is neither true nor false" for name in flags if not isinstance(row[name], bool)]
        if wrong:
            raise ValueError(f"{path}, row {i}: {wrong[0]} (but {ascii(row[wrong[0].split()[0]])[:50]})")


def are_ids(value):
    return isinstance(value, list) and all(isinstance(i, int) and i >= 0 for i in value)


def to_problem(dataset, row):
    """problem, solution and extras of one row in the hub's schema."""
    if dataset == "gsm8k":
        return {"problem": row["question"], "solution": row["answer"]}
    if dataset == "hendrycks_math":
        return {key: row[key] for key in MATH}
    choices = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, row["choices"], strict=False))
    question = f"{row['question']}\n\n{choices}\n\nAnswer with the letter of the correct choice."
    return {
        "problem": question,
        "solution": f"\\boxed{{{LETTERS[row['answer']]}}}",
        "subject": row["subject"],
    }


def permutation(num_rows, seed):
    """A random order that never changes between library versions (numpy freezes RandomState's streams)."""
    import numpy as np

    return np.random.RandomState(seed).permutation(num_rows).tolist()


NOT_DONE = 3  # exit code of --check for a stage that is still to be done


def begin_stage(config_class, default_yaml, fingerprint_inputs, arguments):
    """(config, input fingerprints) of a stage that is still to be done, its folder made.

    Exits with 0 when the stage is done already; with --check among the arguments, with NOT_DONE when it is
    not (its inputs need not be there yet).
    """
    only_check, arguments = "--check" in arguments, [a for a in arguments if a != "--check"]
    cfg = load_config(config_class, ROOT / default_yaml, arguments)
    native_setting()
    hub.read_commits(cfg.exp_dir)
    try:
        inputs = fingerprint_inputs(cfg)
    except errors.NotMade as error:
        if not only_check:
            raise
        print0(f"waits: {error}")
        sys.exit(NOT_DONE)
    finally:  # by itself --check writes nothing
        if os.environ.get("HUB_RECORD") and is_main_process():
            hub.record_commits(cfg.exp_dir)
    # Of several processes one might see the stage done and leave while another waits: they look once joined.
    if (only_check or world_size() == 1) and is_stage_finished(cfg, inputs):
        sys.exit(0)
    if only_check:
        sys.exit(NOT_DONE)
    check_launcher()
    prepare_exp_dir(cfg.exp_dir)
    if is_main_process():
        hub.record_commits(cfg.exp_dir)
    return cfg, inputs


def is_stage_finished(cfg, inputs):
    """Whether the stage is done with these settings and inputs; clears away what a kill left."""
    if not is_finished(cfg.sidecar_path, to_dict(cfg), inputs, ignored_keys(cfg)):
        check_not_deleted(inputs)
        return False
    notes = made_at_unknown_commits(cfg.sidecar_path, inputs)
    notes += made_by_other_code(cfg.sidecar_path)
    print0(f"{cfg.sidecar_path} is there: nothing to do{notes}")
    if is_main_process():
        for path in cfg.leftovers:
            shutil.rmtree(path, ignore_errors=True)
    return True


def run_stage(cfg, inputs, make):
    """make(cfg, inputs, world) with all processes joined and the stage's lock held by the main one.

    Where another run held the lock, the stage may be done by now.
    """
    world = start_world()
    world.check_same(inputs)
    name = "-".join(cfg.sidecar_path.with_suffix("").relative_to(cfg.exp_dir).parts)
    with files.stage_lock(cfg.exp_dir, name) if world.is_main else contextlib.nullcontext():
        world.barrier()
        # one verdict for all: another machine may see a file that has just been written late
        if not world.ask_main(is_stage_finished, cfg, inputs):
            make(cfg, inputs, world)
        world.barrier()


def prepare_exp_dir(exp_dir):
    """Make the experiment's folder; ValueError when it cannot be written to."""
    try:
        Path(exp_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"exp_dir={exp_dir}: cannot be made ({error.strerror}); choose another") from error
    if not os.access(exp_dir, os.W_OK):
        raise ValueError(f"exp_dir={exp_dir}: not writable; choose another")


def run_script(main):
    """Run a script's main() and leave with the right exit code.

    2 and one line: an error that a user can cause, that is ValueError, FileNotFoundError or RuntimeError from
    a `raise` of this project's own. 1 and one line: a fault of the machine (see `explain_fault`). 130, 143,
    129: stopped by SIGINT, by SIGTERM or SIGUSR1, by SIGHUP. All else keeps its traceback.
    """
    quiet_libraries()
    for stream in (sys.stdout, sys.stderr):  # models write what some terminals cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:  # as it is in the background of a script
            signal.signal(number, stop)
    try:
        main(sys.argv[1:])
        leave_world()
    except Exception as error:
        raised_at = traceback.extract_tb(error.__traceback__)[-1]
        is_ours = isinstance(error, (ValueError, FileNotFoundError, RuntimeError))
        is_ours = is_ours and is_of_project(raised_at.filename)
        if is_ours and raised_at.line.startswith("raise"):
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)
        if fault := explain_fault(error):
            print(f"error: {fault}", file=sys.stderr, flush=True)
            sys.exit(1)
        raise


def is_of_project(path):
    """Whether a source file is a script of the project's or in a folder of its code; its .venv is not."""
    path = Path(path).resolve()
    return path.parent == ROOT or any(ROOT / name in path.parents for name in ("ads", "demo"))


def explain_fault(error):
    """One line on a fault of the machine: no room, no permission, no memory. None for all else."""
    text = " ".join(str(error).split())[:300]
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:
        return f"the disk is full ({text}): free space and run again, what is finished is kept"
    if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{text}: not allowed to read or write there; mend that or choose another place"
    # the last of a part of a GPU (MIG): see is_out_of_memory
    told = "out of memory", "can't allocate memory", "NVML_SUCCESS == r INTERNAL ASSERT FAILED"
    if isinstance(error, MemoryError) or any(words in text for words in told):
        return f"out of memory ({text}): lower batch_size or per_device_batch_size, or max_length"
    if "CUDA driver error" in text:
        return f"{text}: if this is a virtual GPU or WSL, set PYTORCH_ALLOC_CONF=expandable_segments:False"
    return None


def quiet_libraries():
    """Silence what libraries say about every load; their warnings about ours stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)


def print_result(**values):
    """The one JSON line that ends a script."""
    print0(json.dumps(values))
