"""Datasets, splits, subsets and ids; real files where they are there."""

import functools
import gzip
import json
from pathlib import Path

import pytest
from conftest import shared_path

from ads.data.problems import (
    check_choices,
    check_problem,
    find_source,
    load_problems,
    local_file,
    permutation,
    read_local,
    to_problem,
)
from ads.data.tables import check_each, read_lines
from ads.data.traces import wilson_interval


def write_lines(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data_dir(tmp_path):
    """Small files in the hub's schemas."""
    gsm8k = [{"question": f"q{i}", "answer": f"a\n#### {i}"} for i in range(10)]
    math = [
        {"problem": f"p{i}", "level": "Level 1", "type": "Algebra", "solution": f"\\boxed{{{i}}}"}
        for i in range(20)
    ]
    mmlu = [{"question": f"q{i}", "subject": "", "choices": list("wxyz"), "answer": i % 4} for i in range(20)]
    write_lines(tmp_path / "gsm8k_train.jsonl.gz", gsm8k)
    write_lines(tmp_path / "gsm8k_platinum_test.jsonl.gz", gsm8k[:4])
    write_lines(tmp_path / "hendrycks_math_train.jsonl.gz", math)
    write_lines(tmp_path / "mmlu_auxiliary_train.jsonl.gz", mmlu)
    return str(tmp_path)


def ids(problems):
    return [p["id"] for p in problems]


def test_gsm8k_is_cut_as_it_stands(data_dir):
    train, holdout = (load_problems(f"gsm8k_{s}", data_dir) for s in ("train", "holdout"))
    assert ids(train) == [f"gsm8k/train/{i}" for i in range(7)]
    assert ids(holdout) == [f"gsm8k/train/{i}" for i in range(7, 10)]
    assert train[3] == {"id": "gsm8k/train/3", "problem": "q3", "solution": "a\n#### 3"}
    assert len(load_problems("gsm8k_test", data_dir)) == 4


@pytest.mark.parametrize("dataset", ("hendrycks_math", "mmlu"))
def test_math_and_mmlu_are_shuffled_and_disjoint(data_dir, dataset):
    """The reference computed this shuffle and threw it away."""
    train, holdout = (ids(load_problems(f"{dataset}_{s}", data_dir)) for s in ("train", "holdout"))
    assert (len(train), len(holdout)) == (14, 6)
    assert set(train) | set(holdout) == {f"{dataset}/train/{i}" for i in range(20)}
    assert train != sorted(train, key=lambda i: int(i.split("/")[-1]))
    assert train == ids(load_problems(f"{dataset}_train", data_dir))


def test_math_split_name_with_an_underscore_in_the_dataset(data_dir):
    """The reference parsed 'hendrycks_math_train' wrongly. Extras of the dataset follow the problem."""
    problem = load_problems("hendrycks_math_train", data_dir)[0]
    assert problem["level"] == "Level 1" and problem["type"] == "Algebra"


def test_mmlu_problem_has_lettered_choices_and_a_boxed_letter(data_dir):
    problems = {p["id"]: p for p in load_problems("mmlu_train", data_dir)}
    problem = next(iter(problems.values()))
    number = int(problem["id"].split("/")[-1])
    assert "\nA. w\nB. x\nC. y\nD. z\n" in problem["problem"]
    assert problem["solution"] == f"\\boxed{{{'ABCD'[number % 4]}}}"


def test_subset_is_random_seeded_nested_and_in_order(data_dir):
    whole = ids(load_problems("hendrycks_math_train", data_dir))
    five, eight = (ids(load_problems("hendrycks_math_train", data_dir, n, seed=1)) for n in (5, 8))
    assert set(five) < set(eight) < set(whole) and five != whole[:5]
    assert five == [i for i in whole if i in five]
    assert five == ids(load_problems("hendrycks_math_train", data_dir, 5, seed=1))
    assert five != ids(load_problems("hendrycks_math_train", data_dir, 5, seed=2))
    assert ids(load_problems("hendrycks_math_train", data_dir, 99)) == whole


def test_permutation_never_changes():
    assert permutation(10, 42) == [8, 1, 5, 0, 7, 2, 9, 4, 3, 6]


@pytest.mark.parametrize("suffix", (".jsonl", ".jsonl.gz", ".parquet"))
def test_folder_of_ones_own(tmp_path, suffix):
    rows = [{"problem": "1+1", "solution": "2", "extra": 5}, {"problem": "2+2", "solution": "4", "extra": 6}]
    folder = tmp_path / "my_sums"
    folder.mkdir()
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "test.parquet")
    else:
        write_lines(folder / f"test{suffix}", rows)
    found = load_problems(f"{folder}_test")
    assert found == [{**row, "id": f"my_sums/test/{i}"} for i, row in enumerate(rows)]
    with pytest.raises(FileNotFoundError, match="none of train.jsonl, train.jsonl.gz, train.parquet"):
        load_problems(f"{folder}_train")


@pytest.mark.parametrize(
    "text,words",
    (
        ("", "holds no problems"),
        ("\ufeff\n \t\n", "holds no problems"),
        ('{"problem": "x"}\n', "line 1: no column solution"),
        ('{"problem": "x", "solution": "1"}\nnot json\n', "line 2: column 1: Expecting value"),
        ('\ufeff{"problem": "x"; "solution": "1"}\n', "line 1: column 16: Expecting ',' delimiter"),
        ('\n{"problem": "x", "solution": "1"}\r\n\r\n{"problem": "\u00e9" 1}\n', "line 4: column 17: "),
        ('\n\n{"problem": "x"}\n', "line 3: no column solution"),
        ('{"problem": "x",\n"solution": "1"}\n', "line 1: column 17: "),
        ('[{"problem": "x",\n"solution": "1"}]\n', "one JSON object a line"),
        ("[1]\n", "line 1: not a JSON object"),
        ("[" * 100_000, "line 1: nested too deeply"),
        ('{"problem": "x", "problem": "y", "solution": "1"}\n', "line 1: key 'problem' is given twice"),
        (
            '{"problem": "\\uD83E", "solution": "1"}\n',
            "line 1: \\ud800 to \\udfff stand for a character in pairs",
        ),
        ('{"problem": "x", "solution": 1}\n', "line 1: solution must be text, but is 1"),
        ('{"problem": null, "solution": "1"}\n', "line 1: problem must be text, but is None"),
        ('{"id": 1, "problem": "x", "solution": "1"}\n' * 2, "not all different"),
    ),
)
def test_bad_files_are_one_line_errors(tmp_path, text, words):
    (tmp_path / "test.jsonl").write_bytes(text.encode())
    with pytest.raises(ValueError) as error:
        load_problems(f"{tmp_path}_test")
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("newline", ("\n", "\r\n", "\r"))
@pytest.mark.parametrize("start", ("", "\ufeff", "\n \n", "\ufeff\n"))
@pytest.mark.parametrize("suffix", (".jsonl", ".jsonl.gz"))
def test_lines_are_read_as_datasets_reads_them(tmp_path, suffix, start, newline):
    """A byte order mark or an empty line was an error, and in a line that was not that one."""
    rows = [{"problem": f"{i} \u2028 \u00e9", "solution": "1", "extra": float(i)} for i in range(3)]
    lines = [json.dumps(row, ensure_ascii=bool(i % 2)) for i, row in enumerate(rows)]
    text = start + "\n\n \t \n".join(lines) + "\n\n"
    opener = gzip.open if suffix.endswith("gz") else open
    with opener(tmp_path / f"test{suffix}", "wb") as file:
        file.write(text.replace("\n", newline).encode())
    found = load_problems(f"{tmp_path}_test")
    assert [{key: row[key] for key in rows[0]} for row in found] == rows
    assert ids(found) == [f"{tmp_path.name}/test/{i}" for i in range(3)]


def test_datasets_reads_the_same(tmp_path):
    from datasets import load_dataset

    path = tmp_path / "test.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\n{"problem": "x", "solution": "1", "y": NaN}\r\n \t\n{"problem": "z"}\n')
    theirs = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path)).to_list()
    ours = read_lines(path, dict)
    assert [row["problem"] for row in ours] == [row["problem"] for row in theirs] == ["x", "z"]
    assert ours[0]["y"] != ours[0]["y"] and theirs[0]["y"] != theirs[0]["y"]


def test_bytes_that_are_no_text_are_named_by_line_and_column(tmp_path):
    """Text is decoded in blocks: the line named was that of the block's beginning."""
    good = '{"problem": "\u00e9", "solution": "1"}\n'.encode()
    (tmp_path / "test.jsonl").write_bytes(good * 500 + good.replace(b'"1"', b'"\xff"'))
    with pytest.raises(ValueError, match="line 501: column 31: 0xff is not UTF-8"):
        load_problems(f"{tmp_path}_test")


@pytest.mark.parametrize("cut,overwritten", ((12, b""), (0, b"xxxx"), (8, b"xxxxxxxx")))
def test_damaged_gzip_is_one_line(tmp_path, cut, overwritten):
    """Damage within the data was a traceback of zlib's."""
    packed = gzip.compress(b'{"problem": "x", "solution": "1"}\n' * 100)
    middle = len(packed) - cut if cut else 30
    (tmp_path / "test.jsonl.gz").write_bytes(packed[:middle] + overwritten + packed[middle + 4 :] * (not cut))
    with pytest.raises(ValueError, match="test.jsonl.gz is not a readable gzip file: .+"):
        load_problems(f"{tmp_path}_test")


BAD_ROWS = (
    ("mmlu", {"answer": -1}, "answer must be the number of the right choice, 0 to 3, but is -1"),
    ("mmlu", {"answer": 7}, "answer must be the number of the right choice, 0 to 3, but is 7"),
    ("mmlu", {"answer": 4}, "answer must be the number of the right choice, 0 to 3, but is 4"),
    ("mmlu", {"answer": "B"}, "answer must be the number of the right choice, 0 to 3, but is 'B'"),
    ("mmlu", {"answer": None}, "0 to 3, but is None"),
    ("mmlu", {"answer": True}, "0 to 3, but is True"),
    ("mmlu", {"answer": 1.0}, "0 to 3, but is 1.0"),
    ("mmlu", {"choices": list("abcdefghijkl"), "answer": 11}, "choices must be 2 to 10 texts, but are 12"),
    ("mmlu", {"choices": ["a"], "answer": 0}, "choices must be 2 to 10 texts, but are 1"),
    ("mmlu", {"choices": None}, "choices must be a list of texts, but is None"),
    ("mmlu", {"choices": "wxyz"}, "choices must be a list of texts, but is 'wxyz'"),
    ("mmlu", {"choices": ["w", None]}, "choices must be a list of texts, but is ['w', None]"),
    ("mmlu", {"question": None}, "question must be text, but is None"),
    ("gsm8k", {"answer": None}, "answer must be text, but is None"),
    ("gsm8k", {"question": 5}, "question must be text, but is 5"),
    ("hendrycks_math", {"solution": None}, "solution must be text, but is None"),
    ("hendrycks_math", {"problem": ["x"]}, "problem must be text, but is ['x']"),
    ("hendrycks_math", {"level": 5}, "level must be text, but is 5"),
)


@pytest.mark.parametrize("dataset,change,words", BAD_ROWS)
def test_a_bad_row_of_a_known_dataset_is_named(data_dir, dataset, change, words):
    """-1 was the last choice, a twelfth choice was left out; the others were tracebacks."""
    source = find_source(f"{dataset}_train")
    path = local_file(source, Path(data_dir))
    rows = read_local(source, Path(data_dir))
    rows[2] |= change
    write_lines(path, rows)
    with pytest.raises(ValueError) as error:
        load_problems(f"{dataset}_train", data_dir)
    assert str(error.value).startswith(f"{path}, line 3: ") and str(error.value).endswith(words)
    check = functools.partial(check_problem, columns=source.columns)
    with pytest.raises(ValueError, match="^cais/x, row 2: "):  # as of the hub's rows
        check_each("cais/x", rows, check)


def test_mmlu_may_have_from_two_to_ten_choices(data_dir):
    for num_choices in (2, 10):
        row = {"question": "q", "choices": list("qrstuvwxyz"[:num_choices]), "answer": num_choices - 1}
        check_choices(row["choices"], row["answer"])
        problem = to_problem("mmlu", row | {"subject": ""})
        assert problem["solution"] == f"\\boxed{{{'ABCDEFGHIJ'[num_choices - 1]}}}"


def test_unknown_dataset_and_missing_local_file(tmp_path):
    with pytest.raises(
        ValueError,
        match="neither a known dataset \\(arithmetic, gsm8k, hendrycks_math, mmlu, word_problems\\) nor a",
    ):
        load_problems("gsm9k_test")
    with pytest.raises(FileNotFoundError, match="mmlu_test.jsonl.gz does not exist"):
        load_problems("mmlu_test", str(tmp_path))


@pytest.mark.parametrize(
    "data_split,num_problems,first_id",
    (
        ("gsm8k_train", 5231, "gsm8k/train/0"),
        ("gsm8k_holdout", 2242, "gsm8k/train/5231"),
        ("gsm8k_test", 1209, "gsm8k/test/0"),
        ("hendrycks_math_train", 5250, None),
        ("hendrycks_math_holdout", 2250, None),
        ("hendrycks_math_test", 5000, "hendrycks_math/test/0"),
        ("mmlu_test", 14042, "mmlu/test/0"),
    ),
)
def test_real_splits_have_their_sizes(data_split, num_problems, first_id):
    problems = load_problems(data_split, str(shared_path("data")))
    assert len(problems) == num_problems
    assert first_id is None or problems[0]["id"] == first_id
    assert len({p["id"] for p in problems}) == num_problems


def test_real_math_subset_covers_all_subjects():
    """The reference took the head of the file: 4 of 7 subjects of MATH, 19 of 57 of MMLU."""
    math = load_problems("hendrycks_math_test", str(shared_path("data")), 500)
    assert len({p["type"] for p in math}) == 7
    mmlu = load_problems("mmlu_test", str(shared_path("data")), 2880)
    assert len({p["subject"] for p in mmlu}) == 57


@pytest.mark.parametrize(
    "num_correct,num_total,low,high", ((0, 0, 0.0, 1.0), (0, 10, 0, 0.2775), (8, 10, 0.4902, 0.9433))
)
def test_wilson_interval(num_correct, num_total, low, high):
    """Reference values of Wilson's score interval."""
    assert wilson_interval(num_correct, num_total) == pytest.approx((low, high), abs=1e-4)
