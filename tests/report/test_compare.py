"""The statistics of the trade-off against a few plain lines, and cases whose answer is known."""

import dataclasses
import time

import numpy as np
import pytest

from ads.data.traces import wilson_interval
from ads.report.bootstrap import NUM_DRAWS, Draws, draw_accuracies, resample
from ads.report.compare import (
    LEVELS,
    WIDE,
    ZIGZAG,
    Match,
    choose_levels,
    compare,
    interpolate,
    interval_of,
    num_crossings,
    without_gaps,
)
from ads.report.curves import Axes, Point, make_curves, pair_up
from ads.report.numbers import pooled_interval, seed_interval
from ads.report.results import PRICES, read_row
from ads.report.words import controls, finding, finding_doubt, headline, in_points, second_finding, show_match


def test_interpolation_is_numpy_s_between_the_points_and_nothing_beyond():
    rng = np.random.default_rng(0)
    x, y, levels = rng.random((7, 5)), rng.random((7, 5)), np.linspace(-0.2, 1.2, 29)
    found = interpolate(x, y, levels)
    for row in range(7):
        order = np.argsort(x[row])
        wanted = np.interp(levels, x[row][order], y[row][order], left=np.nan, right=np.nan)
        np.testing.assert_allclose(found[row], wanted)
    assert np.isnan(found).any() and np.isfinite(found).any()


def test_interpolation_at_the_points_at_a_step_and_with_one_point():
    assert interpolate([0.9, 0.5], [0.6, 0.2], [0.5, 0.9]).tolist() == [0.2, 0.6]
    assert interpolate([0.5, 0.5], [0.2, 0.4], [0.5]).tolist() == pytest.approx([0.3])
    assert np.isnan(interpolate([0.5], [0.2], [0.5])).all()


def test_points_of_equal_teacher_accuracy_are_one_in_interpolation():
    """The last of them was read at their level, and the last or the first beside it."""
    x, y = [0.9, 0.7, 0.7, 0.5], [0.8, 0.4, 0.6, 0.2]
    for order in ([0, 1, 2, 3], [2, 3, 1, 0]):
        found = interpolate(np.take(x, order), np.take(y, order), [0.6, 0.7, 0.8])
        assert found.tolist() == pytest.approx([0.35, 0.5, 0.65])


def test_pooled_interval_is_wilson_s_with_one_seed_and_widens_with_their_spread():
    one = pooled_interval(np.array([0.7]), np.array([600]))
    assert one == pytest.approx(wilson_interval(420, 600))
    alike = pooled_interval(np.array([0.7] * 3), np.array([600] * 3))
    assert alike == pytest.approx(wilson_interval(1260, 1800))
    low, high = pooled_interval(np.array([0.6, 0.7, 0.8]), np.array([600] * 3))
    assert (high - low) / 2 == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)  # t(0.975, 2)
    assert pooled_interval(np.array([0.2, 0.7]), np.array([600] * 2)) == (0.0, 1.0)
    assert pooled_interval(np.array([1.0, 1.0]), np.array([50, 50]))[1] == 1.0


def test_an_interval_of_a_rounded_share_is_that_of_the_answers_it_counts():
    """Sidecars keep four digits: .0733 of 150 is 11 answers, and [.041, .127] wherever it is shown."""
    assert pooled_interval(np.array([0.0733]), np.array([150])) == wilson_interval(11, 150)


def test_resamples_are_shared_by_tests_and_have_the_binomial_spread():
    rng = np.random.default_rng(1)
    first = {i: bool(v) for i, v in enumerate(rng.random(400) < 0.7)}
    other = {i: bool(v) for i, v in enumerate(rng.random(300) < 0.7)}  # fewer problems: a share of its own
    a, b, c = resample([first, dict(first), other], np.random.default_rng(2))
    share = np.mean(list(first.values()))
    assert (a == b).all() and not (a == c).all()
    assert a.shape == (NUM_DRAWS,) and a.mean() == pytest.approx(share, abs=0.003)
    assert a.std() == pytest.approx((share * (1 - share) / 400) ** 0.5, rel=0.06)
    assert c.mean() == pytest.approx(np.mean(list(other.values())), abs=0.004)


ACROSS_ACCURACY = WIDE.format(PRICES["accuracy"].wide)
ACROSS_NLL = WIDE.format(PRICES["nll"].wide)
CROSSED = ZIGZAG.format(PRICES["accuracy"].words)
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
            points[arm].append(Point(read_row(row), stages))
    return points, answers


def match_of(rng, num_problems, seeds=(1,), **settings):
    points, answers = [], {}
    for seed in seeds:
        found, more = make_points(rng, num_problems, seed, **settings)
        points += [*found["temperature"], *found["ADS"]]
        answers |= more
    pairs = pair_up(make_curves(points))
    draws = Draws(draw_accuracies([curve for pair in pairs for curve in pair], answers))
    (match,) = compare(pairs, Axes("raw"), (0.75,), draws)
    return match


def test_problem_bootstrap_holds_one_seed_s_truth_about_as_often_as_it_says():
    """95 % of 60 experiments is 57; 52 or fewer would be less likely than 1 in 40."""
    rng = np.random.default_rng(5)
    matches = [match_of(rng, 150) for _ in range(60)]
    assert 52 < sum(m.low < TRUTH < m.high for m in matches) <= 60
    assert np.mean([m.difference for m in matches]) == pytest.approx(TRUTH, abs=0.02)


def test_intervals_narrow_with_problems_and_with_seeds():
    rng = np.random.default_rng(6)
    widths = [m.high - m.low for m in (match_of(rng, 150), match_of(rng, 2400), match_of(rng, 150, range(8)))]
    assert widths[1] < 0.4 * widths[0] and widths[2] < 0.7 * widths[0]
    assert match_of(rng, 150, range(8)).num_seeds == 8


def test_interval_over_seeds_is_student_s_and_ends_where_values_do():
    values = np.array([0.1, 0.2, 0.35])
    half = 4.302653 * values.std(ddof=1) / 3**0.5  # t(0.975, 2) of a table
    assert seed_interval(values) == pytest.approx((values.mean() - half, values.mean() + half))
    assert seed_interval([0.9, 0.1]) == pytest.approx((-1.0, 1.0))
    assert seed_interval([0.9, 0.1], least=0.0) == pytest.approx((0.0, 1.0))


def test_seeds_that_happen_to_agree_are_no_certainty():
    assert np.isnan(seed_interval([0.3] * 3)).all()
    assert interval_of(np.array([0.1 + 0.2, 0.3, 0.3]), [], "") == (
        None,
        None,
        "no interval: the seeds do not differ",
    )


def simulate(rng, num_experiments, num_seeds, ratio, num_problems=600, temperature=0.85, ads=0.6):
    """(students' accuracies by temperature, by ADS) (E, S), the latter with a spread between seeds.

    Between seeds the true accuracy has `ratio` times the standard deviation that one seed's difference has
    from its problems alone.
    """
    within = np.sqrt((temperature * (1 - temperature) + ads * (1 - ads)) / num_problems)
    true = np.clip(ads + ratio * within * rng.normal(size=(num_experiments, num_seeds)), 0, 1)
    plain = rng.binomial(num_problems, temperature, size=true.shape) / num_problems
    return plain, rng.binomial(num_problems, true) / num_problems


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
@pytest.mark.parametrize("ratio", [0, 1, 2, 4])
def test_interval_over_seeds_holds_the_truth_as_often_as_it_says(num_seeds, ratio):
    """A bootstrap over 3 seeds held it 79 to 86 times of 100 where seeds differ 2 to 4 times the noise."""
    plain, ads = simulate(np.random.default_rng(10 * num_seeds + ratio), 20_000, num_seeds, ratio)
    low, high = seed_interval(plain - ads)
    assert np.mean((low <= 0.25) & (high >= 0.25)) >= 0.93
    shares, sizes = ads[:1000], np.full(num_seeds, 600)
    ends = np.array([pooled_interval(line, sizes) for line in shares])
    assert np.mean((ends[:, 0] <= 0.6) & (ends[:, 1] >= 0.6)) >= 0.93


@pytest.mark.parametrize("num_seeds", [3, 5])
@pytest.mark.parametrize("ratio", [0, 1, 2, 4])
def test_comparison_of_whole_curves_holds_the_truth_as_often_as_it_says(num_seeds, ratio):
    """The same through all that a report does: curves with noise in both directions, read off at a level."""
    rng = np.random.default_rng(num_seeds + 10 * ratio)
    matches = [compared(noisy_curves(rng, num_seeds, ratio))[0] for _ in range(400)]
    assert {match.num_seeds for match in matches} == {num_seeds}
    assert np.mean([match.low <= 0.3 <= match.high for match in matches]) >= 0.93


def noisy_curves(rng, num_seeds, ratio):
    """Points of two curves, .3 apart at a teacher accuracy of .75.

    .018 is the standard deviation of one seed's difference there from its problems alone.
    """
    points = []
    for seed in range(num_seeds):
        shift = ratio * 0.018 * rng.normal()
        points += noisy_points(rng, seed, TEMPERATURE, "temperature")
        points += noisy_points(rng, seed, [(0.9, 0.6 + shift), (0.6, 0.5 + shift)], "ADS")
    return points


def noisy_points(rng, seed, settings, arm, num_problems=600):
    shares = [tuple(rng.binomial(num_problems, share) / num_problems for share in pair) for pair in settings]
    return plain_points(seed, shares, arm, num_problems)


def plain_points(seed, shares, arm="ADS", num_problems=600):
    """Points without files, of (teacher, student) accuracies in the order of the knob."""
    points = []
    for i, (teacher, student) in enumerate(shares):
        knobs = {"tau": 0.5, "lam": 1.0 + i} if arm == "ADS" else {"tau": 1.0 + i, "lam": 0.0}
        row = {"arm": arm, **knobs, "seed": seed, "student_seed": seed}
        row |= {"teacher_raw_accuracy": teacher, "student_raw_accuracy": student}
        row |= {"teacher_n": num_problems, "student_n": num_problems}
        stages = {who: {"path": f"{seed}/{arm}{i}-{who}"} for who in ("teacher", "student")}
        points.append(Point(read_row(row), stages))
    return points


def compared(points, levels=(0.75,)):
    pairs = pair_up(make_curves(points))
    return compare(pairs, Axes("raw"), levels, Draws())


def test_a_level_that_few_resamples_reach_has_no_interval():
    drawn = np.where(np.arange(NUM_DRAWS) % 5 == 0, np.nan, 0.2)
    low, high, note = interval_of(np.array([0.2]), [drawn], "")
    assert (low, high) == (None, None) and "end of a curve" in note


# What puts a reading in doubt

STRAIGHT = [(0.9, 0.9), (0.82, 0.85), (0.74, 0.8), (0.66, 0.7)]


def flags_of(ads, temperature=STRAIGHT, levels=(0.75,)):
    points = plain_points(1, temperature, "temperature") + plain_points(1, ads)
    return [match.flags for match in compared(points, levels)]


def test_a_curve_that_falls_with_its_knob_in_small_steps_is_in_no_doubt():
    assert flags_of(STRAIGHT, levels=(0.88, 0.82, 0.75, 0.7)) == [()] * 4


def test_a_zigzag_is_said_where_it_is_read_and_nowhere_else():
    """It was sorted by teacher accuracy, and read off as if it were a curve."""
    zigzag = [(0.9, 0.9), (0.81, 0.5), (0.86, 0.8), (0.77, 0.45), (0.7, 0.4)]
    assert flags_of(zigzag, levels=(0.88, 0.84, 0.75)) == [(), (f"ADS {CROSSED}: 3 times",), ()]
    (flags,) = flags_of(STRAIGHT, temperature=zigzag, levels=(0.84,))
    assert flags == (f"temperature {CROSSED}: 3 times",)


@pytest.mark.parametrize(
    "heights,num",
    [([1, -1], 1), ([1, 0], 1), ([1, 0, -1], 1), ([1, -1, 1], 2), ([1, 0, 1, -1], 2), ([0, 0], 2)],
)
def test_crossings_are_counted_at_the_points_and_between(heights, num):
    assert num_crossings(heights) == num


def test_a_wide_bracket_is_said_with_its_settings():
    lam = "\N{GREEK SMALL LETTER LAMDA}"
    wide = [(0.9, 0.9), (0.77, 0.6), (0.66, 0.5)]
    wanted = [
        (f"ADS {ACROSS_ACCURACY}: {lam} 1 to {lam} 2",),
        (),
        (f"ADS {ACROSS_ACCURACY}: {lam} 2 to {lam} 3",),
    ]
    assert flags_of(wide, levels=(0.8, 0.77, 0.7)) == wanted


def test_doubts_of_some_seeds_name_them():
    wide, lam = [(0.9, 0.9), (0.66, 0.5)], "\N{GREEK SMALL LETTER LAMDA}"
    points = [p for seed in (1, 2, 3) for p in plain_points(seed, STRAIGHT, "temperature")]
    points += [p for seed in (1, 2, 3) for p in plain_points(seed, STRAIGHT if seed == 2 else wide)]
    (match,) = compared(points)
    # the last settings differ: two curves meet in one name
    assert match.flags == (f"ADS {ACROSS_ACCURACY}: {lam} 1 to {lam} 2 (seed 1 and 3)",)


def test_levels_are_the_usual_ones_or_lie_in_the_common_range():
    points, _ = make_points(np.random.default_rng(0), 500, 1)
    curves = make_curves([*points["temperature"], *points["ADS"]])
    assert choose_levels(pair_up(curves), Axes("raw")) == LEVELS
    cheaper = [
        edited(point, teacher_raw_accuracy=point.row.share("teacher", "raw") - 0.3)
        for point in (*points["temperature"], *points["ADS"])
    ]
    levels = choose_levels(pair_up(make_curves(cheaper)), Axes("raw"))
    assert len(levels) == 4 and all(0.25 < level < 0.63 for level in levels)
    assert np.ptp(np.diff(levels)) < 0.005


# Equal teacher NLL


NLL = PRICES["nll"].column


def edited(point, **columns):
    return Point(read_row({**point.row.columns, **columns}), point.stages)


def priced(points, *nlls):
    """The points with the NLL of their teacher's test traces."""
    return [edited(point, **{NLL: nll}) for point, nll in zip(points, nlls, strict=True)]


def priced_curves(ads_nlls=(0.02, 0.2, 0.5), seed=1):
    temperature = plain_points(seed, [(0.95, 0.9), (0.9, 0.8), (0.8, 0.6)], "temperature")
    ads = plain_points(seed, [(0.94, 0.9), (0.9, 0.5), (0.8, 0.3)])
    return priced(temperature, 0.03, 0.11, 0.41), priced(ads, *ads_nlls)


def compare_nll(points, levels, draws=()):
    pairs = pair_up(make_curves(points))
    return compare(pairs, Axes("raw", "nll"), levels, Draws(dict(draws)))


def test_students_at_equal_nll_are_read_off_lines_against_nll():
    temperature, ads = priced_curves()
    (match,) = compare_nll([*temperature, *ads], (0.26,))
    wanted = (
        np.interp(0.26, [0.03, 0.11, 0.41], [0.9, 0.8, 0.6]),
        np.interp(0.26, [0.02, 0.2, 0.5], [0.9, 0.5, 0.3]),
    )
    assert (match.temperature, match.student) == pytest.approx(wanted)
    assert (match.price, match.level, match.num_seeds) == ("nll", 0.26, 1)
    assert show_match(match).startswith("raw, teacher NLL 0.26 nats/token: temperature .700, ADS .460, d")
    assert headline([match]) is None and controls([match]) == ""


def test_levels_of_nll_are_round_and_inside_the_common_range():
    temperature, ads = priced_curves()
    assert levels_of_nll([*temperature, *ads]) == (0.11, 0.18, 0.26, 0.33)
    small = [edited(point, **{NLL: point.row.number(NLL) / 1000}) for point in (*temperature, *ads)]
    assert levels_of_nll(small) == (0.00011, 0.00018, 0.00026, 0.00033)
    apart = [edited(point, **{NLL: point.row.number(NLL) + 10}) for point in ads]
    assert levels_of_nll([*temperature, *apart]) == ()


def levels_of_nll(points):
    return choose_levels(pair_up(make_curves(points)), Axes("raw", "nll"))


def test_a_reading_at_equal_nll_is_flagged_by_rules_of_its_own():
    """The common range is .03 to .41: a bracket wider than .095 is in doubt, however close the accuracies."""
    temperature, ads = priced_curves()
    first, second = compare_nll([*temperature, *ads], (0.06, 0.26))
    assert first.flags == (f"ADS {ACROSS_NLL}: \u03bb 1 to \u03bb 2",)
    assert [flag.split(":")[0] for flag in second.flags] == [
        f"{arm} {ACROSS_NLL}" for arm in ("temperature", "ADS")
    ]
    temperature, ads = priced_curves(ads_nlls=(0.1, 0.5, 0.02))
    (match,) = compare_nll([*temperature, *ads], (0.2,))
    assert "ADS is not monotone there, it meets this teacher NLL: 2 times" in match.flags


def test_problems_are_resampled_for_students_alone_and_nll_is_held():
    points, answers = make_points(np.random.default_rng(3), 400, 1)
    points = [*priced(points["temperature"], 0.1, 0.4), *priced(points["ADS"], 0.1, 0.4)]
    pairs = pair_up(make_curves(points))
    draws = draw_accuracies([curve for pair in pairs for curve in pair], answers)
    (match,) = compare_nll(points, (0.4,), draws)
    students = [draws[(1, 1), f"1/{arm}1-student", "raw"] for arm in ("temperature", "ADS")]
    assert (match.low, match.high) == pytest.approx(tuple(np.percentile(np.subtract(*students), (2.5, 97.5))))
    without = {key: values for key, values in draws.items() if "teacher" not in key[1]}
    assert compare_nll(points, (0.4,), without) == [match]


def test_seeds_at_equal_nll_have_the_t_interval():
    points = [p for seed in (1, 2, 3) for side in priced_curves(seed=seed) for p in side]
    for i, point in enumerate(points):
        share = point.row.share("student", "raw") + 0.01 * (i % 4)
        points[i] = edited(point, student_raw_accuracy=share)
    (match,) = compare_nll(points, (0.26,))
    gaps = [compare_nll(points[i : i + 6], (0.26,))[0].difference for i in (0, 6, 12)]
    half = 4.302653 * np.std(gaps, ddof=1) / 3**0.5  # t(0.975, 2) of a table
    assert (match.low, match.high) == pytest.approx((np.mean(gaps) - half, np.mean(gaps) + half))


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
        ((0.25, 0.33), "to 86 %, ADS traces to 57 %: 29 points less [25, 33] (t interval over 3 seeds)."),
        ((-0.02, 0.6), "29 points, whose 95 % interval includes 0 [-2, 60] (t interval over 3 seeds)."),
        ((0.004, 0.58), "to 57 %: 29.0 points less [0.4, 58.0] (t interval over 3 seeds)."),
        (
            (-0.004, 0.58),
            "29.0 points, whose 95 % interval includes 0 [-0.4, 58.0] (t interval over 3 seeds).",
        ),
        ((None, None), "29 points less (why; 3 seeds)."),
    ],
)
def test_finding_says_what_the_interval_allows_and_stands_on(ends, wanted):
    match = Match("af", "ADS", "ADS", 0.75, 0.86, 0.57, 0.29, *ends, 3, "why")
    assert finding([], [match]).endswith(wanted)


def test_finding_when_students_learn_more_from_ads():
    match = Match("af", "ADS", "ADS", 0.75, 0.57, 0.86, -0.29, -0.33, -0.25, 1, "")
    assert finding([], [match]).endswith(": 29 points more [25, 33] (this seed's problems only).")


def test_raw_answers_are_not_passed_over_in_silence():
    forced = Match("af", "ADS", "ADS", 0.75, 0.86, 0.57, 0.29, 0.25, 0.33, 3, "")
    raw = Match("raw", "ADS", "ADS", 0.65, 0.52, 0.51, 0.01, -0.02, 0.03, 3, "")
    assert headline([raw, forced]) == forced
    text = second_finding([raw, forced])
    assert text.endswith(
        "52.0 % by temperature, 51.0 % by ADS, a difference of 1.0 points [-2.0, 3.0] "
        "(t interval over 3 seeds)."
    )
    assert second_finding([raw]) == second_finding([]) == ""


def test_a_doubt_is_marked_in_every_sentence_and_explained_once():
    forced = Match("af", "ADS", "ADS", 0.75, 0.86, 0.57, 0.29, 0.25, 0.33, 3, "", ("ADS x",))
    raw, other = (
        dataclasses.replace(forced, answers="raw", flags=flags) for flags in (("ADS x",), ("ADS y",))
    )
    control = dataclasses.replace(forced, arm="permuted", name="permuted")
    assert finding([], [forced]).endswith(" (t interval over 3 seeds) (!).")
    assert finding_doubt([forced]) == "(!) ADS x." and finding_doubt([]) == ""
    assert second_finding([forced, raw]).endswith("(t interval over 3 seeds) (!).")
    assert second_finding([forced, other]).endswith("(!). (!) ADS y.")
    assert "3 seeds) (!). (!) marks a reading in doubt" in controls([forced, control])
    assert show_match(forced).endswith("[0.250, 0.330] (t interval over 3 seeds) (!) ADS x.")


def test_a_bound_near_0_shows_its_sign():
    near = Match("af", "ADS", "ADS", 0.75, 0.8, 0.7, 0.1, -0.0004, 0.2, 3, "")
    assert "difference 0.10000 [-0.00040, 0.20000]" in show_match(near)
    assert in_points(near) == ["10.00", "-0.04", "20.00"]  # they were 10.0, -0.0 and 20.0
    none = dataclasses.replace(near, low=-4.49e-8)
    assert in_points(none) == ["10.00", "0.00", "20.00"] and "[0.00000, 0.20000]" in show_match(none)
    assert in_points(dataclasses.replace(near, low=0.01)) == ["10", "1", "20"]


def test_a_control_is_shown_where_both_arms_reach_or_once_where_they_never_do():
    matches = [match(num_seeds=n) for n in (0, 2, 0)]
    assert without_gaps(matches) == [matches[1]]
    assert without_gaps([matches[0], matches[2]]) == [matches[0]]


def match(num_seeds):
    return Match("af", "permuted", "permuted", 0.8, None, None, None, None, None, num_seeds, "")
