"""The demo's generated problems: right, disjoint, the same everywhere."""

import re

import pytest

from ads.data import arithmetic, grading
from ads.data.problems import fingerprint_data, load_problems
from ads.stage.fingerprint import fingerprint_file


def computation(row):
    """(start, equations without results) of a row, read from its solution."""
    equations = re.findall(r"(\d+) ([+*-]) (\d+) = (\d+)", row["solution"])
    return equations[0][0], tuple((sign, amount) for _, sign, amount, _ in equations)


def test_every_equation_and_answer_is_right():
    for row in arithmetic.generate("test", seed=5, count=200):
        equations = re.findall(r"(\d+) ([+*-]) (\d+) = (\d+)", row["solution"])
        results = [
            str({"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[s])
            for a, s, b, _ in equations
        ]
        assert len(equations) == 4 and results == [result for *_, result in equations]
        assert sum(s == "*" for _, s, _, _ in equations) >= 2 and max(map(int, results)) <= 59
        assert [a for a, *_ in equations[1:]] == results[:-1]
        assert grading.reference_answer(row["solution"]) == results[-1]
        numbers = re.findall(r"\d+", row["problem"])
        assert numbers == [equations[0][0], *(b for _, s, b, _ in equations if s != "*")]


def test_splits_are_disjoint_whatever_the_seed():
    splits = ("pretrain", "train", "test", "holdout")
    found = {
        split: {computation(row) for seed in range(3) for row in arithmetic.generate(split, seed, 400)}
        for split in splits
    }
    for one in splits:
        for other in splits:
            assert one == other or not found[one] & found[other]
    assert all(len(computations) > 1000 for computations in found.values())


def test_problems_depend_on_split_and_seed_alone():
    rows = load_problems("arithmetic_test", seed=3)
    assert len(rows) == 600 and len({row["id"] for row in rows}) == 600
    assert rows[:7] == load_problems("arithmetic_test", seed=3, max_samples=7)
    assert rows[0]["problem"] != load_problems("arithmetic_test", seed=4)[0]["problem"]
    assert len(load_problems("arithmetic_holdout", seed=3)) == 600
    # as made with Python 3.11: every version must make the same
    assert rows[0]["problem"] == (
        "There are 13 stamps in a box . Finn loses 3 of them . The number triples . Finn loses 5 of them . "
        "Now there are twice as many . How many stamps are left ?"
    )


@pytest.mark.parametrize("split", ("train", "test"))
def test_data_fingerprint_is_that_of_the_generator(split):
    assert fingerprint_data(f"arithmetic_{split}") == fingerprint_file(arithmetic.__file__)
