"""report.py --pair: two tests, problem by problem."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from helpers_attacks import RECIPES, change_sidecar, write_attack
from helpers_report import accuracy, run, write_student_test
from scipy import stats

from ads.report.pairs import compare_tests, paired_interval
from ads.stage.errors import MissingInputError, UserError


def write_test(exp_dir, name, right, n=20, start=0, inputs=()):
    """A student's test that has these problems right."""
    write_student_test(exp_dir, name, "m", None, len(right) / n, n=n, inputs=inputs)
    path = exp_dir / "traces" / f"{name}.parquet"
    ids = range(start, start + n)
    table = {"id": [f"gsm8k/test/{i}" for i in ids], "is_raw_correct": [i in right for i in ids]}
    pyarrow.parquet.write_table(pyarrow.table(table | {"is_af_correct": [None] * n}), path)
    return path


def test_two_tests_as_a_user_compares_them(tmp_path):
    """Counts by hand: both right on 0 to 4, the first alone on 5 to 14, the second alone on 15."""
    write_test(tmp_path / "x", "a", range(15))
    other = write_test(tmp_path / "y", "b", [*range(5), 15])
    code, output, errors = run(tmp_path / "x", "--pair", "a", other)
    assert (code, errors) == (0, "")
    line, record = output.splitlines()
    assert (
        line.startswith("raw answers, n 20: .750 and .300, difference .450 [") and "(McNemar, exact)" in line
    )
    found = json.loads(record)["raw"]
    assert (found["only_first"], found["only_second"], found["n"]) == (10, 1, 20)
    assert found["p"] == pytest.approx(stats.binomtest(1, 11).pvalue) == pytest.approx(24 / 2**11)
    a, b = 11 / 22, 2 / 22  # Bonett and Price
    half = 1.959964 * ((a + b - (a - b) ** 2) / 22) ** 0.5
    assert (found["low"], found["high"]) == pytest.approx((a - b - half, a - b + half))
    assert not (tmp_path / "x" / "report").exists()


def test_a_pair_by_paths_and_by_both_kinds_of_answers(tmp_path):
    first, second = (write_test(tmp_path, name, range(num)) for name, num in (("a", 10), ("b", 10)))
    for path in (first, second):
        table = pyarrow.parquet.read_table(path).to_pydict()
        table["is_af_correct"] = table["is_raw_correct"]
        pyarrow.parquet.write_table(pyarrow.table(table), path)
        change_sidecar(path.with_suffix(".yaml"), stats={"af": accuracy(0.5, 20)})
    forced, raw = compare_tests([str(first), str(second.with_suffix(".yaml"))], [])
    assert (forced.answers, raw.answers) == ("forced", "raw")
    assert (raw.difference, raw.p) == (0, 1) and raw.low == -raw.high and raw.high > 0.05


def test_the_paired_interval_covers_what_it_says():
    """Exactly, over all outcomes of 40 problems of which 10 % and 20 % are right in one alone."""
    n, a, b = 40, 0.1, 0.2
    found = 0.0
    for i in range(n + 1):
        for j in range(n + 1 - i):
            low, high = paired_interval(i, j, n)
            if low <= a - b <= high:
                found += stats.multinomial.pmf([i, j, n - i - j], n, [a, b, 1 - a - b])
    assert 0.94 < found < 0.975


def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path):
    write_test(tmp_path, "a", range(10))
    write_test(tmp_path, "other", range(10, 15), start=10)
    code, output, errors = run(tmp_path, "--pair", "a", "other")
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert "tests of different problems, 20 and 20 of which 10 are the same" in errors
    write_test(tmp_path, "c", range(10), inputs={"data": "1"})
    write_test(tmp_path, "d", range(10), inputs={"data": "2"})
    write_test(tmp_path, "many", range(10))
    change_sidecar(tmp_path / "traces" / "many.yaml", config={"num_samples": 8})
    write_attack(tmp_path, "attack", RECIPES["mix25"][2], "a")
    write_test(tmp_path, "lost", range(10)).unlink()
    refused = [
        (("c", "d"), "of the same ids from different files"),
        (("a", "many"), "several samples a problem"),
        (("a", "attack"), "attack.py made, and no test"),
        (("a", "lost"), "traces/lost.parquet is not there"),
    ]
    for words, wanted in refused:
        with pytest.raises(UserError, match=wanted):
            compare_tests(words, [tmp_path])
    for words, folders, wanted in (
        (("a", "none"), [tmp_path], "none: is not in"),
        (("a", "c"), [], "is not in any folder: give EXP_DIR too"),
        (("a", "no.parquet"), [tmp_path], "there is no sidecar no.yaml"),
        (("a", "a"), [tmp_path, tmp_path], "a: is in .*: give one of these"),
    ):
        with pytest.raises(MissingInputError, match=wanted):
            compare_tests(words, folders)
