"""The numbers of a trace dataset against plain counting."""

import itertools
import math

import pytest
from scipy import stats

from ads.data.traces import compute_stats, pass_at, wilson_interval
from ads.stage.settings import GenConfig

LOOP = "2 + 2 = 4 and so it is the same again and again . " * 4


def row(problem="p", correct=False, **more):
    columns = {"problem_id": problem, "trace": "It is 4.", "finished": True, "num_tokens": 5}
    return columns | {"is_raw_correct": correct, "teacher_nll": 0.5, "raw_timed_out": False} | more


def by_subsets(num_correct, num_samples, k):
    """pass@k by trying all: the share of subsets of k samples that hold one of the correct ones."""
    subsets = list(itertools.combinations(range(num_samples), k))
    return sum(min(subset) < num_correct for subset in subsets) / len(subsets)


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample():
    for n in range(1, 7):
        for k in range(1, n + 1):
            wanted = [by_subsets(c, n, k) for c in range(n + 1)]
            assert [pass_at(k, n, [c]) for c in range(n + 1)] == pytest.approx(wanted, abs=1e-12)
            assert pass_at(k, n, range(n + 1)) == pytest.approx(sum(wanted) / (n + 1))


def test_accuracy_of_samples_is_the_mean_over_problems_and_its_interval_that_of_so_many_problems():
    """By the rows, which are no independent answers, it would be half as wide as it may be."""
    cfg = GenConfig(num_samples=4, tau=1.0, answer_force=False)
    counts = {f"p{i}": i % 5 for i in range(50)}
    rows = [row(problem, k < count) for problem, count in counts.items() for k in range(4)]
    found = compute_stats(cfg, rows)
    assert (found["n"], found["num_traces"], found["raw"]["num_correct"]) == (50, 200, 100)
    low, high = (round(end, 4) for end in wilson_interval(25, 50))
    assert (found["raw"]["accuracy"], found["raw"]["low"], found["raw"]["high"]) == (0.5, low, high)
    assert found["pass_at"] == {"raw": {1: 0.5, 4: 0.8}}
    of_rows = [row(problem, count >= 2) for problem, count in counts.items()]
    one = compute_stats(GenConfig(answer_force=False), of_rows)
    assert one["n"] == 50 and "num_traces" not in one and "pass_at" not in one


def test_the_interval_of_samples_covers_the_accuracy_however_alike_problems_are():
    """In 400 draws of 60 problems with 3 samples: it is never too narrow, and that of the rows is, where a
    problem is right always or never."""
    import numpy as np

    rng = np.random.default_rng(0)
    for spread in (0.0, 0.5, 1.0):  # of a problem's own chance around .5: none, some, all or nothing
        chance = 0.5 + spread * (rng.integers(0, 2, (400, 60)) - 0.5)
        right = rng.binomial(3, chance).sum(1)
        ends = [wilson_interval(count / 3, 60) for count in right]
        assert sum(low <= 0.5 <= high for low, high in ends) >= 0.93 * 400
    ends = [wilson_interval(int(count), 180) for count in right]
    assert sum(low <= 0.5 <= high for low, high in ends) < 0.85 * 400


def test_loops_are_a_share_of_the_rows():
    rows = [row(), row(trace=LOOP), row(), row(trace=LOOP.upper())]
    assert compute_stats(GenConfig(answer_force=False), rows)["loops"] == 0.5


@pytest.mark.parametrize("num_total", (1, 7, 150, 1200))
def test_wilson_interval_is_scipy_s(num_total):
    for num_correct in {0, 1, num_total // 3, num_total - 1, num_total}:
        wanted = stats.binomtest(num_correct, num_total).proportion_ci(0.95, method="wilson")
        assert wilson_interval(num_correct, num_total) == pytest.approx(tuple(wanted), abs=1e-12)
        assert all(math.isfinite(end) and 0 <= end <= 1 for end in wilson_interval(num_correct, num_total))
