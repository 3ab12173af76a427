"""Generated word problems in ordinary language: right, disjoint, varied, the same everywhere."""

import random
import re

import pytest
import torch
from conftest import byte_tokenizer

from ads import chat
from ads.data import grading, word_problems
from ads.data.problems import fingerprint_data, load_problems
from ads.data.text import equations, num_equations, repair
from ads.decode.corruption import Corruption
from ads.stage.fingerprint import fingerprint_file

ROWS = word_problems.generate("pretrain", seed=5, count=600)
SPLITS = tuple(word_problems.SPLIT_SIZES)


def test_every_equation_holds_and_is_read_as_repair_reads_it():
    """A sign that the parser does not know, or an equation within a longer one, would be left out."""
    for row in ROWS:
        num_all, num_wrong = num_equations(row["solution"])
        assert num_wrong == 0 and num_all == row["solution"].count("=") and 2 <= num_all <= 4, row
        assert repair(row["solution"]) == (row["solution"], 0)


def test_the_answer_is_the_last_result_and_what_the_grader_reads():
    for row in ROWS:
        last = equations(row["solution"])[-1][7]
        assert grading.reference_answer(row["solution"]) == last
        grading.check_solution(row["solution"])
        assert not grading.grade(row["solution"].replace(f"{{{last}}}", "{1}"), row["solution"]).correct


def test_a_solution_works_with_what_the_problem_says_and_its_own_results():
    """All numbers are whole and within bounds; no wording has lost or swapped one."""
    for row in ROWS:
        known = set(re.findall(r"\d+", row["problem"]))
        for equation in equations(row["solution"]):
            assert {equation[1], equation[5]} <= known, row
            known.add(equation[7])
        assert all(word_problems.LEAST <= int(number) <= word_problems.MOST for number in known), row


def test_a_wrong_result_is_put_right():
    for row in ROWS[:200]:
        first = equations(row["solution"])[0]
        wrong = f"{row['solution'][: first.start(7)]}777{row['solution'][first.end(7) :]}"
        assert repair(wrong) == (row["solution"], 1)


def test_every_result_outside_the_box_can_be_corrupted():
    tokenizer = byte_tokenizer()
    allowed_V = torch.zeros(272, dtype=torch.bool)
    allowed_V[:256] = True
    corruption, key = Corruption(tokenizer, allowed_V, 1.0), torch.tensor(7)
    for row in ROWS[:40]:
        places = corruption.places(chat.encode(tokenizer, row["solution"]), key)
        found = equations(row["solution"])
        assert places == [place for m in found for place in range(m.start(7), m.end(7))]


def test_the_text_is_ordinary_and_varied():
    text = " ".join(row["problem"] + " " + row["solution"] for row in ROWS)
    assert "  " not in text and not re.search(r" [.,?]", text)
    assert text.count("}") == text.count("{") == text.count("\\boxed{") == len(ROWS)
    for name in word_problems.NAMES:
        assert re.search(rf"\b{name}\b", text), name
    assert all(items in text for items, _ in word_problems.ITEMS)
    kinds = word_problems.KINDS.values()
    openings = {wording.split("{")[0] for kind in kinds for wording, _ in kind.wordings}
    assert all(opening in text for opening in openings)
    assert len({re.sub(r"\d+", "", row["problem"]) for row in ROWS}) > 0.95 * len(ROWS)


def test_no_problem_comes_twice_and_no_split_shares_one_whatever_the_seed():
    found = {}
    for split in SPLITS:
        for seed in range(3):
            problems = {row["problem"] for row in word_problems.generate(split, seed, 300)}
            assert len(problems) == 300
            found[split] = found.get(split, set()) | problems
    for one in SPLITS:
        for other in SPLITS:
            assert one == other or not found[one] & found[other]


def test_a_computation_has_one_split_and_one_answer_in_all_its_wordings():
    rng = random.Random(3)
    for _ in range(200):
        steps = word_problems.draw_computation(rng)
        assert word_problems.split_of(steps) in SPLITS
        told = {word_problems.tell(rng, steps) for _ in range(5)}
        assert len(told) > 1 and len({grading.reference_answer(solution) for _, solution in told}) == 1


def test_problems_depend_on_split_and_seed_alone():
    rows = load_problems("word_problems_test", seed=3)
    assert len(rows) == 400 and len({row["id"] for row in rows}) == 400
    assert rows[:7] == load_problems("word_problems_test", seed=3, max_samples=7)
    assert rows[0]["problem"] != load_problems("word_problems_test", seed=4)[0]["problem"]
    assert len(load_problems("word_problems_pretrain", seed=3, max_samples=9)) == 9
    # as made with Python 3.11: every version must make the same
    assert rows[0]["problem"] == (
        "Sam has 26 light bulbs. He buys 2 boxes with 11 light bulbs in each. Then he sells 29 of "
        "the light bulbs. He sells all of them for 5 dollars each. How many dollars does he get?"
    )


@pytest.mark.parametrize("split", SPLITS)
def test_data_fingerprint_is_that_of_the_generator(split):
    assert fingerprint_data(f"word_problems_{split}") == fingerprint_file(word_problems.__file__)


@pytest.mark.parametrize(
    "data_split,said",
    (
        ("gsm8k_pretrain", "gsm8k has train, holdout, test alone"),
        ("arithmetic_pretrain", "arithmetic_pretrain has no size of its own: set max_samples"),
    ),
)
def test_a_split_that_a_dataset_lacks_is_refused(data_split, said):
    """gsm8k_pretrain would have been its holdout."""
    with pytest.raises(ValueError, match=said):
        load_problems(data_split)
