"""The demo's generated problems: right, disjoint, the same everywhere."""

import random
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


def test_slips_are_corrected_and_spans_are_the_results():
    rng = random.Random(0)
    for _ in range(100):
        start, steps = arithmetic.draw_computation(rng, 3)
        text, spans = arithmetic.work_out(start, steps, rng, slips=0.5)
        values = [start]
        for step in steps:
            values.append(step.apply(values[-1]))
        assert [text[first:end] for first, end in spans] == [str(value) for value in values[1:]]
        assert text.endswith(f"\\boxed{{ {values[-1]} }} .")


def test_unknown_results_are_random_and_worked_on_with():
    """Those of the skill alone; a right one is no likelier among them than another."""
    rng, num_wrong, num_steps = random.Random(0), 0, 0
    for _ in range(400):
        start, steps = arithmetic.draw_computation(rng, 3)
        text, spans = arithmetic.work_out(start, steps, rng, unknown=0.4)
        equations = re.findall(r"(\d+) ([+*-]) (\d+) = (\d+)", text)
        written = [start, *(int(text[first:end]) for first, end in spans)]
        assert [int(a) for a, *_ in equations] == written[:-1] and int(equations[-1][3]) == written[-1]
        assert all(0 <= value <= 59 for value in written)
        assert text.endswith(f"\\boxed{{ {written[-1]} }} .")
        made = list(zip(steps, written, written[1:], strict=False))
        assert all(s.apply(a) == b for s, a, b in made if s.kind not in arithmetic.SKILL)
        num_wrong += sum(s.apply(a) != b for s, a, b in made)
        num_steps += sum(s.kind in arithmetic.SKILL for s in steps)
    assert 0.34 < num_wrong / num_steps < 0.44


@pytest.mark.parametrize("split", ("train", "test"))
def test_data_fingerprint_is_that_of_the_generator(split):
    assert fingerprint_data(f"arithmetic_{split}") == fingerprint_file(arithmetic.__file__)
