import gzip
import json
import random

import pytest
from conftest import shared_path

from ads.data import arithmetic
from ads.data.text import has_loop, is_foreign, num_equations, repair
from demo.documents import work_out


@pytest.mark.parametrize(
    "text,wanted,num_wrong",
    (
        ("3 + 4 = 8", "3 + 4 = 7", 1),
        ("so 16-3-4=9 eggs", "so 16-3-4=9 eggs", 0),  # a chain
        ("12 * 3 = 30. Then 30 - 6 = 24, \\boxed{24}", "12 * 3 = 36. Then 36 - 6 = 30, \\boxed{30}", 1),
        ("12 * 3 = 36. Then 36 - 6 = 30", "12 * 3 = 36. Then 36 - 6 = 30", 0),
        ("10 / 3 = 3.33 and 10 / 4 = 2.4", "10 / 3 = 3.33 and 10 / 4 = 2.5", 1),
        ("1,200 * 2 = 2,300", "1,200 * 2 = 2,400", 1),
        ("$5 + $6 = $12", "$5 + $6 = $11", 1),
        ("5 + 6 = $12", "5 + 6 = $11", 1),
        ("7 / 0 = 3", "7 / 0 = 3", 0),
        ("v1.2 + 3 = 5", "v1.2 + 3 = 5", 0),
        ("2 \u00d7 9 = 19 \\boxed{ 19 }", "2 \u00d7 9 = 18 \\boxed{ 18 }", 1),
        ("12 \\times 3 = 30", "12 \\times 3 = 36", 1),
        ("24 x 5 = 12", "24 x 5 = 120", 1),
        ("Total = 3 + 4 = 8", "Total = 3 + 4 = 7", 1),
        ("- 3 + 4 = 8\n- 5 + 5 = 9", "- 3 + 4 = 7\n- 5 + 5 = 10", 2),  # a list
        ("**3 + 4 = 8**", "**3 + 4 = 7**", 1),
        ("1" * 20 + " * " + "1" * 20 + " = 5", "1" * 20 + " * " + "1" * 20 + " = 5", 0),  # too long
        ("no numbers", "no numbers", 0),
    ),
)
def test_equations_are_put_right_and_their_results_carried_on(text, wanted, num_wrong):
    assert repair(text) == (wanted, num_wrong)
    assert repair(wanted)[0] == wanted


@pytest.mark.parametrize(
    "text",
    (
        "60 x 60/100 = 36",
        "200/300 = 2/3",
        "3 + 4 = 2 + 5",
        "8 x 1 1/2 = 12",
        "2 + 1 1/2 = 3 1/2",
        "so 100/5 = 5A/5",
        "8/3 = 24/Y",
        "3x-5=16",
        "50% of 3 + 4 = 2^3 - 1",
        "1 / 20 = 5%",
    ),
)
def test_parts_of_longer_equations_are_left_as_they_are(text):
    """Of GSM8K's own solutions one in a hundred was put wrong, such as 60 x 60/100 = 0.6."""
    assert repair(text) == (text, 0) and num_equations(text) == (0, 0)


def test_what_goes_on_from_the_right_results_is_not_put_wrong():
    """A teacher that recovers: 4 * 2 = 3 made 1 * 2 of a later step 1 * 1, and lost the right answer."""
    text = "4 * 2 = 3 . 8 - 7 = 2 . 1 * 2 = 6 . 2 + 7 = 7 . \\boxed{ 9 }"
    assert repair(text) == ("4 * 2 = 8 . 8 - 7 = 1 . 1 * 2 = 2 . 2 + 7 = 9 . \\boxed{ 9 }", 4)
    assert repair("12 - 3 = 2 . 9 * 2 = 46 . \\boxed{18}")[0] == "12 - 3 = 9 . 9 * 2 = 18 . \\boxed{18}"


@pytest.mark.parametrize(
    "text,wanted",
    (
        ("10 * 2 = 10 . wait , wrong : 10 * 2 = 20", "10 * 2 = 20 . wait , wrong : 10 * 2 = 20"),
        ("3 * 2 = 7 . 7 * 2 = 7 . Wait, 7 * 2 = 14", "3 * 2 = 6 . 6 * 2 = 12 . Wait, 6 * 2 = 12"),
        ("10 * 2 = 10 . wait : 10 * 3 = 30", "10 * 2 = 20 . wait : 20 * 3 = 60"),
        ("10 * 2 = 10 . 10 * 2 = 20", "10 * 2 = 20 . 20 * 2 = 40"),  # nothing is taken back: doubled twice
    ),
)
def test_an_equation_that_is_written_once_more_works_on_nothing(text, wanted):
    """10 * 2 = 10, taken back and put right, once became 20 * 2 = 40."""
    assert repair(text)[0] == wanted


def test_nearly_all_equations_of_real_solutions_hold():
    path = shared_path("data", "gsm8k_platinum_test.jsonl.gz")
    rows = map(json.loads, gzip.decompress(path.read_bytes()).splitlines())
    found = [num_equations(row["answer"]) for row in rows]
    num_all, num_wrong = map(sum, zip(*found, strict=True))
    assert num_all > 2500 and num_wrong <= 5


def test_corrupted_traces_of_the_demo_become_the_clean_ones():
    """Each wrong result is worked on with, as a teacher that does not recover would."""
    rng, num_wrong = random.Random(1), 0
    for _ in range(300):
        start, steps = arithmetic.draw_computation(rng, 4)
        clean, broken = (
            work_out(start, steps)[0],
            work_out(start, steps, rng, unknown=0.6)[0],
        )
        assert repair(clean) == (clean, 0)
        assert repair(broken)[0] == clean
        assert num_equations(broken) == (4, repair(broken)[1])
        num_wrong += repair(broken)[1]
    assert num_wrong > 200


def test_loops_and_foreign_script():
    words = ["so", *"abcdefghijkl"]
    assert has_loop(" ".join(words * 4)) and not has_loop(" ".join(words * 3)) and not has_loop("")
    assert (
        is_foreign("the answer \u7b54\u6848 is")
        and not is_foreign("\u03c0 r^2 = caf\u00e9, 12")
        and not is_foreign("")
    )
