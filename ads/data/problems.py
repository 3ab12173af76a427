"""Datasets and their splits: problems with the solutions they are graded against."""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ads.data import arithmetic, word_problems
from ads.data.tables import Row, check_each, check_row, read_lines, read_rows
from ads.stage import errors, fingerprint, hub
from ads.stage.errors import MissingInputError, UserError
from ads.stage.fields import expand_home

SHUFFLE_SEED = 42  # of the train/holdout split of datasets that are stored by subject
TRAIN_PERCENT = 70  # the rest is the holdout
MATH_SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
    "precalculus",
)  # fmt: skip
Item = TypeVar("Item")


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
MATH_HUB = "EleutherAI/hendrycks_math"
LETTERS = "ABCDEFGHIJ"  # of MMLU's choices
SOURCES = {
    ("gsm8k", "train"): Source("gsm8k_train", "openai/gsm8k", ("main",), "train", GSM8K),
    ("gsm8k", "test"): Source("gsm8k_platinum_test", "madrylab/gsm8k-platinum", ("main",), "test", GSM8K),
    ("hendrycks_math", "train"): Source("hendrycks_math_train", MATH_HUB, MATH_SUBJECTS, "train", MATH),
    ("hendrycks_math", "test"): Source("hendrycks_math_test", MATH_HUB, MATH_SUBJECTS, "test", MATH),
    ("mmlu", "train"): Source("mmlu_auxiliary_train", "cais/mmlu", ("all",), "auxiliary_train", MMLU),
    ("mmlu", "test"): Source("mmlu_test", "cais/mmlu", ("all",), "test", MMLU),
}
GENERATED = {"arithmetic": arithmetic, "word_problems": word_problems}  # need no file
DATASETS = sorted({dataset for dataset, _ in SOURCES} | GENERATED.keys())
SPLITS = ("train", "holdout", "test")  # of a known dataset that is not generated
SHUFFLED = ("hendrycks_math", "mmlu")


def load_problems(
    data_split: str, data_dir: str | None = None, max_samples: int | None = None, seed: int = 42
) -> list[Row]:
    """The problems of a split such as 'gsm8k_holdout' or 'path/to/folder_test'.

    Returns dicts with id, problem, solution and the dataset's extras, in the dataset's order; max_samples
    takes a random subset that depends on the seed alone. `arithmetic` and `word_problems` are generated:
    their seed makes the problems, max_samples is how many. Raises ValueError or FileNotFoundError in one
    line.
    """
    dataset, _, split = data_split.rpartition("_")
    if dataset in GENERATED:
        if max_samples is None and split not in GENERATED[dataset].SPLIT_SIZES:
            raise UserError(f"{data_split} has no size of its own: set max_samples")
        return GENERATED[dataset].generate(split, seed, max_samples)
    if is_folder(dataset):
        problems = load_folder(Path(dataset), split)
    else:
        problems = load_known(data_split, local_copies(data_dir))
    if not problems:
        raise UserError(f"data_split={data_split!r} holds no problems")
    return take_subset(problems, max_samples, seed)


def take_subset(rows: list[Item], max_samples: int | None, seed: int) -> list[Item]:
    """A seeded random subset in the order of the rows; all of them where max_samples is None."""
    if max_samples is None:
        return rows
    return [rows[i] for i in sorted(permutation(len(rows), seed)[:max_samples])]


def permutation(num_rows: int, seed: int) -> list[int]:
    """A random order that never changes between library versions (numpy freezes RandomState's streams)."""
    import numpy as np

    return np.random.RandomState(seed).permutation(num_rows).tolist()


def fingerprint_data(data_split: str, data_dir: str | None = None) -> str:
    """What identifies the file behind a split, without reading its rows: contents, or name and commit."""
    dataset, _, split = data_split.rpartition("_")
    if dataset in GENERATED:
        return fingerprint.fingerprint_file(str(GENERATED[dataset].__file__))
    if is_folder(dataset):
        return fingerprint.fingerprint_file(folder_file(Path(dataset), split))
    source = find_source(data_split)
    if folder := local_copies(data_dir):
        return fingerprint.fingerprint_file(local_file(source, folder))
    return f"{hub.HUB}{source.hub}@{hub.find_commit(source.hub, 'dataset')}"


# Known datasets: local copies in the hub's schema, or the hub


def is_folder(dataset: str) -> bool:
    """Whether a dataset is a folder of one's own; the name of a known dataset never is."""
    return dataset not in DATASETS and Path(dataset).is_dir()


def find_source(data_split: str) -> Source:
    """The Source behind a split of a known dataset (train and holdout share one)."""
    dataset, _, split = data_split.rpartition("_")
    if dataset not in DATASETS:
        raise UserError(
            f"data_split={data_split!r}: {dataset!r} is neither a known dataset ({', '.join(DATASETS)}) "
            "nor a folder"
        )
    if split not in SPLITS:
        raise UserError(f"data_split={data_split!r}: {dataset} has {', '.join(SPLITS)} alone")
    return SOURCES[dataset, "test" if split == "test" else "train"]


def load_known(data_split: str, data_dir: Path | None) -> list[Row]:
    """The split of a known dataset: train is cut 70/30 into train and holdout (MATH, MMLU: shuffled)."""
    source = find_source(data_split)
    dataset, _, split = data_split.rpartition("_")
    rows = read_local(source, data_dir) if data_dir else read_hub(source)
    if split == "test":
        return [{"id": f"{dataset}/test/{i}", **to_problem(dataset, row)} for i, row in enumerate(rows)]
    order = permutation(len(rows), SHUFFLE_SEED) if dataset in SHUFFLED else list(range(len(rows)))
    num_train = len(rows) * TRAIN_PERCENT // 100
    order = order[:num_train] if split == "train" else order[num_train:]
    return [{"id": f"{dataset}/train/{i}", **to_problem(dataset, rows[i])} for i in order]


def local_copies(data_dir: str | None) -> Path | None:
    """The folder of local copies of the datasets: data_dir, else $DATA_DIR; None: the hub."""
    text = data_dir or os.environ.get("DATA_DIR")
    return Path(expand_home("DATA_DIR", text)) if text else None


def local_file(source: Source, data_dir: Path) -> Path:
    path = data_dir / f"{source.file}.jsonl.gz"
    if not path.is_file():
        raise MissingInputError(
            f"{path} does not exist; copy {source.hub} there, or unset data_dir to use the hub"
        )
    return path


def read_local(source: Source, data_dir: Path) -> list[Row]:
    """Rows of <data_dir>/<file>.jsonl.gz, in the hub's schema."""
    return read_lines(local_file(source, data_dir), functools.partial(check_problem, columns=source.columns))


def read_hub(source: Source) -> list[Row]:
    """Rows of a hub dataset, its configs one after another."""
    from datasets import concatenate_datasets, load_dataset

    commit = hub.find_commit(source.hub, "dataset")
    try:
        parts = [
            load_dataset(source.hub, name, split=source.split, revision=commit) for name in source.configs
        ]
    except (OSError, ValueError, RuntimeError) as error:
        reason = errors.reason(error)
        raise UserError(
            f"dataset {source.hub} could not be loaded ({reason}); set data_dir to local copies"
        ) from error
    check_commit(source, parts, commit)
    rows = concatenate_datasets(parts).to_list()
    check_each(source.hub, rows, functools.partial(check_problem, columns=source.columns))
    return rows


def check_commit(source: Source, parts: Sequence[Any], commit: str) -> None:
    """ValueError unless all parts are of a commit: without a network `datasets` takes what it cached last."""
    files = [Path(file["filename"]) for part in parts for file in part.cache_files]
    if wrong := [file for file in files if file.parent.name != commit]:
        raise UserError(
            f"dataset {source.hub} is at commit {commit}, but {wrong[0]} is cached: load it with a network "
            "once, or set data_dir to local copies"
        )


def check_problem(row: Row, columns: tuple[str, ...]) -> None:
    """ValueError when a row lacks one of the columns or one holds no text; MMLU's: see check_choices."""
    check_row(row, columns)
    text = [name for name in columns if columns is not MMLU or name not in ("choices", "answer")]
    if wrong := [name for name in text if not isinstance(row[name], str)]:
        raise UserError(f"{wrong[0]} must be text, but is {ascii(row[wrong[0]])[:50]}")
    if columns is MMLU:
        check_choices(row["choices"], row["answer"])


def check_choices(choices: Any, answer: Any) -> None:
    """ValueError unless choices are texts, no more than LETTERS, and answer is the number of one, from 0."""
    if not isinstance(choices, list) or not all(isinstance(text, str) for text in choices):
        raise UserError(f"choices must be a list of texts, but is {ascii(choices)[:50]}")
    if not 2 <= len(choices) <= len(LETTERS):
        raise UserError(f"choices must be 2 to {len(LETTERS)} texts, but are {len(choices)}")
    if type(answer) is not int or answer not in range(len(choices)):
        allowed = f"the number of the right choice, 0 to {len(choices) - 1}"
        raise UserError(f"answer must be {allowed}, but is {ascii(answer)[:50]}")


def to_problem(dataset: str, row: Row) -> Row:
    """problem, solution and extras of one row in the hub's schema."""
    if dataset == "gsm8k":
        return {"problem": row["question"], "solution": row["answer"]}
    if dataset == "hendrycks_math":
        return {key: row[key] for key in MATH}
    choices = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, row["choices"], strict=False))
    question = f"{row['question']}\n\n{choices}\n\nAnswer with the letter of the correct choice."
    solution = f"\\boxed{{{LETTERS[row['answer']]}}}"
    return {"problem": question, "solution": solution, "subject": row["subject"]}


# Folders of one's own


def folder_file(folder: Path, split: str) -> Path:
    paths = [folder / f"{split}{suffix}" for suffix in (".jsonl", ".jsonl.gz", ".parquet")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise MissingInputError(f"{folder} has none of {', '.join(path.name for path in paths)}")
    return path


def load_folder(folder: Path, split: str) -> list[Row]:
    """Rows of <folder>/<split>.jsonl, .jsonl.gz or .parquet: problem, solution, perhaps id."""
    path = folder_file(folder, split)
    check = functools.partial(check_problem, columns=("problem", "solution"))
    rows = one_table(path, read_rows(path, check))
    problems = [{**row, "id": str(row.get("id", f"{folder.name}/{split}/{i}"))} for i, row in enumerate(rows)]
    if len({row["id"] for row in problems}) < len(problems):
        raise UserError(f"{path}: the ids in column 'id' are not all different")
    return problems


def one_table(path: Path, rows: list[Row]) -> list[Row]:
    """The rows with the same columns each; ValueError when one could not be stored, as it mixes types."""
    import pyarrow

    columns = dict.fromkeys(key for row in rows for key in row)
    rows = [{key: row.get(key) for key in columns} for row in rows]
    try:
        pyarrow.Table.from_pylist(rows)
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError) as error:
        reason = ascii(" ".join(str(error).split())[:200])
        raise UserError(f"{path}: a column mixes types or holds what is no text ({reason})") from error
    return rows
