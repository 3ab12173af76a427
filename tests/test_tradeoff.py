"""The statistics of the trade-off against a few plain lines, and cases whose answer is known."""

import itertools
import time

import numpy as np
import pytest

from ads import tradeoff
from ads.tradeoff import Point


def test_interpolation_is_numpy_s_between_the_points_and_nothing_beyond():
    rng = np.random.default_rng(0)
    x, y, levels = rng.random((7, 5)), rng.random((7, 5)), np.linspace(-0.2, 1.2, 29)
    found = tradeoff.interpolate(x, y, levels)
    for row in range(7):
        order = np.argsort(x[row])
        wanted = np.interp(levels, x[row][order], y[row][order], left=np.nan, right=np.nan)
        np.testing.assert_allclose(found[row], wanted)
    assert np.isnan(found).any() and np.isfinite(found).any()


def test_interpolation_at_the_points_at_a_step_and_with_one_point():
    assert tradeoff.interpolate([0.9, 0.5], [0.6, 0.2], [0.5, 0.9]).tolist() == [0.2, 0.6]
    assert tradeoff.interpolate([0.5, 0.5], [0.2, 0.4], [0.5]).tolist() == pytest.approx([0.3])
    assert np.isnan(tradeoff.interpolate([0.5], [0.2], [0.5])).all()


def test_pooled_interval_is_wilson_s_with_one_seed_and_widens_with_their_spread():
    one = tradeoff.pooled_interval(np.array([0.7]), np.array([600]))
    assert one == pytest.approx(tradeoff.wilson_interval(420, 600))
    alike = tradeoff.pooled_interval(np.array([0.7] * 3), np.array([600] * 3))
    assert alike == pytest.approx(tradeoff.wilson_interval(1260, 1800))
    low, high = tradeoff.pooled_interval(np.array([0.6, 0.7, 0.8]), np.array([600] * 3))
    assert (high - low) / 2 == pytest.approx(1.96 * 0.1 / 3**0.5, rel=0.05)
    assert tradeoff.pooled_interval(np.array([1.0, 1.0]), np.array([50, 50]))[1] == 1.0


def test_resamples_are_shared_by_tests_and_have_the_binomial_spread():
    rng = np.random.default_rng(1)
    first = {i: bool(v) for i, v in enumerate(rng.random(400) < 0.7)}
    other = {i: bool(v) for i, v in enumerate(rng.random(300) < 0.7)}  # fewer problems: a share of its own
    a, b, c = tradeoff.resample([first, dict(first), other], np.random.default_rng(2))
    share = np.mean(list(first.values()))
    assert (a == b).all() and not (a == c).all()
    assert a.shape == (tradeoff.NUM_DRAWS,) and a.mean() == pytest.approx(share, abs=0.003)
    assert a.std() == pytest.approx((share * (1 - share) / 400) ** 0.5, rel=0.06)
    assert c.mean() == pytest.approx(np.mean(list(other.values())), abs=0.004)


TEMPERATURE, ADS = ((0.9, 0.9), (0.6, 0.8)), ((0.9, 0.8), (0.6, 0.4))  # (teacher, student) of two settings
TRUTH = 0.85 - 0.6  # at 0.75


def make_points(rng, num_problems, seed, temperature=TEMPERATURE, ads=ADS):
    """({arm: points}, answers) of an experiment with these true accuracies."""
    points, answers = {"temperature": [], "ADS": []}, {}
    for arm, settings in (("temperature", temperature), ("ADS", ads)):
        for i, shares in enumerate(settings):
            row = {"arm": arm, "tau": 1.0 + i, "lam": 0.0, "seed": seed, "student_seed": seed}
            row |= {"tau": 0.5, "lam": 1.0 + i} if arm == "ADS" else {}
            stages = {}
            for who, share in zip(("teacher", "student"), shares, strict=True):
                path = f"{seed}/{arm}{i}-{who}"
                correct = dict(enumerate((rng.random(num_problems) < share).tolist()))
                answers[path, "raw"] = correct
                stages[who] = {"path": path}
                row |= {f"{who}_raw_accuracy": sum(correct.values()) / num_problems, f"{who}_n": num_problems}
            points[arm].append(Point(row, stages))
    return points, answers


def match_of(rng, num_problems, seeds=(1,), **settings):
    points, answers = [], {}
    for seed in seeds:
        found, more = make_points(rng, num_problems, seed, **settings)
        points += [*found["temperature"], *found["ADS"]]
        answers |= more
    pairs = tradeoff.pair_up(tradeoff.make_curves(points))
    (match,) = tradeoff.compare(pairs, {"af": (0.75,), "raw": (0.75,)}, answers)
    return match


def test_bootstrap_interval_holds_the_truth_about_as_often_as_it_says():
    """95 % of 60 experiments is 57; 52 or fewer would be less likely than 1 in 40."""
    rng = np.random.default_rng(5)
    matches = [match_of(rng, 150) for _ in range(60)]
    assert 52 < sum(m.low < TRUTH < m.high for m in matches) <= 60
    assert np.mean([m.difference for m in matches]) == pytest.approx(TRUTH, abs=0.02)


def test_bootstrap_interval_narrows_with_problems_and_with_seeds():
    rng = np.random.default_rng(6)
    widths = [m.high - m.low for m in (match_of(rng, 150), match_of(rng, 2400), match_of(rng, 150, range(8)))]
    assert widths[1] < 0.4 * widths[0] and widths[2] < 0.7 * widths[0]
    assert match_of(rng, 150, range(8)).num_seeds == 8


def test_seeds_that_disagree_widen_the_interval():
    steady, apart = (
        [np.full(tradeoff.NUM_DRAWS, v) for v in values] for values in ((0.2,) * 3, (0.1, 0.2, 0.3))
    )
    assert tradeoff.interval(steady, 3, "")[:2] == pytest.approx((0.2, 0.2))
    means = [np.mean(chosen) for chosen in itertools.product((0.1, 0.2, 0.3), repeat=3)]
    assert tradeoff.interval(apart, 3, "")[:2] == pytest.approx(np.percentile(means, (2.5, 97.5)), abs=0.04)


def test_a_level_that_few_resamples_reach_has_no_interval():
    drawn = np.where(np.arange(tradeoff.NUM_DRAWS) % 5 == 0, np.nan, 0.2)
    low, high, note = tradeoff.interval([drawn], 1, "")
    assert (low, high) == (None, None) and "end of a curve" in note


def test_levels_are_the_usual_ones_or_lie_in_the_common_range():
    points, _ = make_points(np.random.default_rng(0), 500, 1)
    curves = tradeoff.make_curves([*points["temperature"], *points["ADS"]])
    assert tradeoff.choose_levels(tradeoff.pair_up(curves), "raw") == tradeoff.LEVELS
    for point in (p for arm in points.values() for p in arm):
        point.row["teacher_raw_accuracy"] -= 0.3
    levels = tradeoff.choose_levels(tradeoff.pair_up(curves), "raw")
    assert len(levels) == 4 and all(0.25 < level < 0.63 for level in levels)
    assert np.ptp(np.diff(levels)) < 0.005


def test_a_full_sweep_is_compared_in_seconds():
    """14 points, 3 seeds, 600 problems: about a second on one core."""
    shares = [(0.95 - 0.05 * i, 0.9 - 0.08 * i) for i in range(9)]
    start = time.process_time()
    match = match_of(np.random.default_rng(0), 600, range(3), temperature=shares[::2], ads=shares)
    assert match.num_seeds == 3 and match.low is not None
    assert time.process_time() - start < 4


@pytest.mark.parametrize(
    "ends,wanted",
    [
        ((0.25, 0.33), "to 86 %, ADS traces to 57 %: 29 points less [25, 33]."),
        ((-0.02, 0.6), "a difference of 29 points whose 95 % interval [-2, 60] includes 0."),
        ((None, None), "29 points less (why)."),
    ],
)
def test_finding_says_what_the_interval_allows(ends, wanted):
    match = tradeoff.Match("af", "ADS", "ADS", 0.75, 0.86, 0.57, 0.29, *ends, 3, "why")
    assert tradeoff.finding([], [match]).endswith(wanted)


def test_finding_when_students_learn_more_from_ads():
    match = tradeoff.Match("af", "ADS", "ADS", 0.75, 0.57, 0.86, -0.29, -0.33, -0.25, 1, "")
    assert tradeoff.finding([], [match]).endswith(": 29 points more [25, 33].")


def test_raw_answers_are_not_passed_over_in_silence():
    forced = tradeoff.Match("af", "ADS", "ADS", 0.75, 0.86, 0.57, 0.29, 0.25, 0.33, 3, "")
    raw = tradeoff.Match("raw", "ADS", "ADS", 0.65, 0.52, 0.51, 0.01, -0.02, 0.03, 3, "")
    assert tradeoff.headline([raw, forced]) == forced
    text = tradeoff.second_finding([raw, forced])
    assert text.endswith("65 %: 52 % by temperature, 51 % by ADS, a difference of 1 points [-2, 3].")
    assert tradeoff.second_finding([raw]) == tradeoff.second_finding([]) == ""


def test_a_control_is_shown_where_both_arms_reach_or_once_where_they_never_do():
    matches = [match(num_seeds=n) for n in (0, 2, 0)]
    assert tradeoff.without_gaps(matches) == [matches[1]]
    assert tradeoff.without_gaps([matches[0], matches[2]]) == [matches[0]]


def match(num_seeds):
    return tradeoff.Match("af", "permuted", "permuted", 0.8, None, None, None, None, None, num_seeds, "")
