"""Claims and verdicts, from sidecars as the stages write them to the files of report.py."""

import csv
import functools
import json

import numpy as np
import pytest
from helpers_report import STUDENT, baselines_of, run, write_point, write_stage_1_and_2, write_traces

import report
from ads.report import claims, figures, page, plots, tables
from ads.report.bootstrap import load_draws
from ads.report.compare import compare_arms
from ads.report.curves import by_setting, make_curves
from ads.report.experiments import load_experiment
from ads.report.numbers import show_number
from ads.report.points import collect_points
from ads.stage import files

# (tau, lam, direction): (teacher, student, NLL of the teacher's traces, one-step change)
GRID = {
    (0.4, 0.0, "gradient"): (0.97, 0.95, 0.03, -0.02),
    (1.1, 0.0, "gradient"): (0.86, 0.93, 0.12, -0.018),
    (1.4, 0.0, "gradient"): (0.70, 0.80, 0.40, -0.01),
    (0.4, 4.0, "gradient"): (0.93, 0.80, 0.06, 0.005),
    (0.4, 8.0, "gradient"): (0.84, 0.60, 0.15, 0.01),
    (0.4, 12.0, "gradient"): (0.72, 0.40, 0.35, 0.02),
    (0.4, -6.0, "gradient"): (0.87, 0.90, 0.05, -0.03),
    (0.4, -9.0, "gradient"): (0.70, 0.70, 0.20, -0.04),
    (0.4, 0.4, "corrupt"): (0.92, 0.70, 0.20, -0.01),
    (0.4, 0.8, "corrupt"): (0.70, 0.20, 0.50, -0.005),
}
DIRECTIONS = {1: (0.88, 0.92), 2: (0.86, 0.90), 3: (0.84, 0.88)}  # random ones at lam 80: (teacher, student)
ASKED = {"base": 0.004, "base_few_shot": 0.02, "base_prefill": 0.01}


def write_experiment(exp_dir, seed=1, grid=GRID, directions=DIRECTIONS, asked=ASKED, parquet=False, nll=True):
    """A whole experiment of one seed; students of several seeds differ by a point or so."""
    rng = np.random.default_rng(seed)
    write_stage_1_and_2(exp_dir, dataset="arithmetic", n=400)
    (exp_dir / "traces" / "base.yaml").unlink()
    for name, share in asked.items():
        write_base(exp_dir, name, share, seed)
    rows = [(*key, None, *values) for key, values in grid.items()]
    rows += [(0.4, 80.0, "random", i, *shares, 0.1, -0.015) for i, shares in directions.items()]
    for i, (tau, lam, direction, number, teacher, student, teacher_nll, change) in enumerate(rows):
        stats = {"one_step": {"n": 9, "change": change}, "teacher_nll": teacher_nll if nll else None}
        student += 0.01 * rng.normal() if seed > 1 else 0
        more = {"direction": direction, "direction_seed": number, "seed": seed, "more_stats": stats}
        more |= {"dataset": "arithmetic", "n": 400, "parquet": parquet}
        write_point(exp_dir, str(i), tau, lam, (teacher, teacher), (student, student), **more)
    return exp_dir


def write_base(exp_dir, name, share, seed):
    """A test of the undistilled student. Prompts with examples are longer, as in the demo."""
    ways = {"base_few_shot": {"few_shot": 2, "few_shot_traces": "x.parquet", "max_length": 400}}
    ways["base_prefill"] = {"prefill": "start with"}
    base = {"is_teacher": False, "teacher": STUDENT, "data_split": "arithmetic_test", "tau": 0.0, "n": 400}
    write_traces(exp_dir, name, share, share, seed=seed, **base, **ways.get(name, {}))


def without(*arms):
    """The grid without some arms, by (lam's sign, direction)."""
    return {key: v for key, v in GRID.items() if (np.sign(key[1]), key[2]) not in arms}


NEGATIVE, CORRUPT = (-1, "gradient"), (1, "corrupt")


def load(*exp_dirs):
    """(claims by key, curves, baselines)."""
    experiments = [load_experiment(path) for path in exp_dirs]
    curves = make_curves(collect_points(experiments))
    baselines = baselines_of(experiments)
    found = {}
    for claim in claims.make_claims(curves, baselines, load_draws(curves)):
        found.setdefault(claim.key, []).append(claim)
    return found, curves, baselines


# The verdicts


@pytest.fixture(scope="module")
def three_seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("claims")
    return [write_experiment(folder / str(seed), seed) for seed in (2, 3, 4)]


@pytest.fixture(scope="module")
def three_seeds_claims(three_seeds):
    return load(*three_seeds)[0]


@functools.cache
def rows_of(exp_dir):
    return [point.row.columns for point in collect_points([load_experiment(exp_dir)])]


def read_by_hand(exp_dir, arm, price, level):
    """The student's accuracy that an arm's sidecars give at a price, by numpy's interpolation."""
    rows = [r for r in rows_of(exp_dir) if r["arm"] == arm or (r["tau"], r["lam"]) == (0.4, 0)]
    key = {"accuracy": "teacher_raw_accuracy", "nll": "teacher_teacher_nll"}[price]
    line = sorted((row[key], row["student_raw_accuracy"]) for row in rows)
    return np.interp(level, *zip(*line, strict=True))


@pytest.mark.parametrize(
    "key,first,second,price,level",
    [
        ("b", "temperature", "ADS", "accuracy", 0.75),
        ("c", "temperature", "ADS", "nll", 0.22),
        ("d", "negative lambda", "ADS", "accuracy", 0.85),
        ("f", "corrupted results", "ADS", "accuracy", 0.75),
        ("f", "corrupted results", "ADS", "nll", 0.22),
    ],
)
def test_a_difference_is_that_of_the_curves_with_a_t_interval_over_seeds(
    three_seeds, three_seeds_claims, key, first, second, price, level
):
    gaps = [np.subtract(*(read_by_hand(e, a, price, level) for a in (first, second))) for e in three_seeds]
    half = 4.302653 * np.std(gaps, ddof=1) / 3**0.5  # t(0.975, 2) of a table
    where = f"{100 * level:.3g} %" if price == "accuracy" else f"{level} nats"
    (claim,) = [c for c in three_seeds_claims[key] if where in c.claim]
    assert (claim.found, claim.low, claim.high) == pytest.approx(
        (np.mean(gaps), np.mean(gaps) - half, np.mean(gaps) + half)
    )
    assert claim.num_seeds == 3
    assert claim.verdict == (claims.FAILS if (key, price) == ("f", "accuracy") else claims.HOLDS)


def test_every_claim_has_a_verdict_and_what_fails_is_in_the_first_paragraph(three_seeds_claims):
    found = three_seeds_claims
    verdicts = {key: {claim.verdict for claim in same} for key, same in found.items()}
    assert verdicts == {**dict.fromkeys("abcde", {"holds"}), "f": {"holds", "does not hold"}}
    text = claims.failures([claim for same in found.values() for claim in same])
    assert text.startswith("On 3 seeds, by raw answers, a, b, c, d and e of the claims a to f hold. Does not")
    worst = min(claim.found for claim in found["f"])
    name = "(f) corrupted results - ADS at a teacher accuracy of 75 %: above 0, found"
    assert f"{name} {show_number(worst)} [" in text
    assert text.endswith("(corrupted results harm more), and at 1 more price.") and "NLL" not in text


def test_one_seed_says_so_in_each_verdict_and_has_intervals_of_its_problems(tmp_path):
    found = load(write_experiment(tmp_path, parquet=True))[0]
    flat = [claim for same in found.values() for claim in same]
    assert {claim.verdict for claim in flat} == {"holds, this seed only", "does not hold, this seed only"}
    assert all(claim.low < claim.found < claim.high and claim.num_seeds == 1 for claim in flat)
    assert claims.failures(flat).startswith("On one seed only, by raw answers, a, b, c, d and e of")
    (gap,) = [claim for claim in found["c"] if "0.22 nats" in claim.claim]
    wanted = [read_by_hand(tmp_path, arm, "nll", 0.22) for arm in ("temperature", "ADS")]
    assert gap.found == pytest.approx(wanted[0] - wanted[1])


def test_arms_that_are_missing_are_named_and_nothing_is_said_of_them(tmp_path):
    found = load(write_experiment(tmp_path, grid=without(NEGATIVE, CORRUPT), directions={}))[0]
    for key, arm in (("d", "negative lambda"), ("e", "random direction"), ("f", "corrupted results")):
        assert {(c.verdict, c.note, c.found) for c in found[key]} == {("not measured", f"no {arm} arm", None)}
    assert {claim.verdict for claim in found["b"]} == {"holds, this seed only"}
    text = claims.failures([claim for same in found.values() for claim in same])
    assert text.endswith("a, b and c of the claims a to f hold. Not measured: d, e and f.")


def test_without_temperature_there_are_no_claims(tmp_path):
    grid = {key: values for key, values in GRID.items() if key[1]}
    found, _, baselines = load(write_experiment(tmp_path, grid=grid, directions={}))
    assert (found, claims.failures([])) == ({}, "")
    assert len(tables.asked_cells(baselines)) == 1 + 3
    report.main([str(tmp_path)])
    assert "<h2>The undistilled student</h2>" in (tmp_path / "report" / "report.html").read_text()


def test_a_level_that_an_arm_does_not_reach_is_not_measured(tmp_path):
    grid = {key: values for key, values in GRID.items() if key[1] != 12.0}
    found = load(write_experiment(tmp_path, grid=grid))[0]
    verdicts = [[(c.verdict.split(",")[0], c.note) for c in found[key]] for key in "bd"]
    assert verdicts[0] == [
        ("holds", "no interval: traces/d0.parquet is not there"),
        ("not measured", "not reached by both"),
    ]
    assert [verdict for verdict, _ in verdicts[1]] == ["holds", "not measured"]
    assert claims.verdict_of(found["b"]) == claims.PARTLY


def test_sidecars_without_nll_are_compared_at_equal_accuracy_alone(tmp_path):
    """Older ones have none."""
    found, curves, baselines = load(write_experiment(tmp_path, nll=False))
    (claim,) = found["c"]
    assert (claim.verdict, claim.note) == ("not measured", "no such price that both arms reach")
    assert [c.verdict for c in found["f"]] == ["does not hold, this seed only"] * 2 + ["not measured"]
    matches = compare_arms(curves, None, load_draws(curves))
    assert {match.price for match in matches} == {"accuracy"} and page.matched_tables(matches, "nll") == {}
    titles = [panel.title for panel in plots.make_panels(curves, baselines, matches)["tradeoff"]]
    assert titles == ["Forced and raw answers"]  # which agree there


def test_an_arm_that_never_costs_so_much_is_compared_at_the_most_it_costs(tmp_path):
    """A teacher that recovers pays next to nothing for corrupted results: they never get to .85 or .75."""
    grid = without(CORRUPT) | {
        (0.4, 0.4, "corrupt"): (0.96, 0.6, 0.2, 0.0),
        (0.4, 0.8, "corrupt"): (0.9325, 0.2, 0.4, 0.0),
    }
    found = load(*[write_experiment(tmp_path / str(seed), seed, grid=grid) for seed in (1, 2)])[0]
    (claim,) = [claim for claim in found["f"] if "accuracy" in claim.claim]
    assert "at a teacher accuracy of 93.3 %" in claim.claim and claim.num_seeds == 2
    assert claim.found < -0.5 and claim.verdict == "does not hold"
    assert [c.claim.partition(" of ")[2][:4] for c in found["b"] + found["d"]] == ["85 %", "75 %"] * 2


def test_corrupted_results_are_one_point_though_the_one_step_test_read_the_proxy(tmp_path):
    """Their training traces named it among their inputs, the teacher's test did not: no point was whole."""
    exp_dir = write_experiment(tmp_path)
    for path in exp_dir.glob("traces/a*.yaml"):
        sidecar = files.read_yaml(path)
        if sidecar["config"]["defence"] == "corrupt":
            sidecar["inputs"]["proxy_student"] = "hub:proxy"
            files.write_text(path, json.dumps(sidecar))
    found, curves, _ = load(exp_dir)
    assert [len(curve.points) for curve in curves if curve.arm == "corrupted results"] == [2]
    assert "not measured" not in {claim.verdict for claim in found["f"]}


LEAST, INSIDE = {"least": 0.15}, {"least": -0.07, "most": 0.07}


@pytest.mark.parametrize(
    "numbers,side,wanted",
    [
        ((0.2, 0.16, 0.24, 5), LEAST, "holds"),
        ((0.15, 0.15, 0.15, 2), LEAST, "holds"),
        ((0.2, 0.14, 0.26, 5), LEAST, "does not hold"),
        ((0.1, 0.0, 0.2, 5), LEAST, "does not hold"),
        ((0.2, None, None, 5), LEAST, "not measured"),
        ((0.2, None, None, 1), LEAST, "holds, this seed only"),
        ((0.2, 0.14, 0.26, 1), LEAST, "does not hold, this seed only"),
        ((0.0, -0.06, 0.06, 5), INSIDE, "holds"),
        ((0.0, -0.08, 0.06, 5), INSIDE, "does not hold"),
        ((0.1, 0.0, 0.2, 5), {"least": claims.ABOVE_0}, "does not hold"),
        ((0.1, 0.001, 0.2, 5), {"least": claims.ABOVE_0}, "holds"),
    ],
)
def test_a_claim_holds_only_with_the_whole_of_its_interval(numbers, side, wanted):
    assert claims.judge(claims.Claim("b", "", **side), *numbers).verdict == wanted


# The undistilled student


def test_the_best_way_of_asking_is_the_line_and_the_claim_and_all_stand_in_the_table(tmp_path):
    """Its line was that of one way, and the demo's student could do the task when asked in another."""
    dirs = [write_experiment(tmp_path / str(seed), seed, asked={}) for seed in (2, 3)]
    for seed, exp_dir in zip((2, 3), dirs, strict=True):
        for name, share in (
            ("base", 0.05),
            ("base_few_shot", 0.1 * seed),
            ("base_prefill", 0.7 - 0.1 * seed),
        ):
            write_base(exp_dir, name, share, seed)
    found, curves, baselines = load(*dirs)
    assert found["a"][0].found == pytest.approx(0.45) and found["a"][0].verdict == "does not hold"
    assert found["a"][0].note == "undistilled student, prefilled: best of 3 ways to ask"
    assert [line[:2] + line[3:4] for line in tables.asked_cells(baselines)[1:]] == [
        ["0-shot", "2", ".050 [.037, .067]"],
        ["2-shot", "2", ".250 [.000, .885]"],
        ["prefilled", "2", ".450 [.000, 1.000]"],
    ]
    axis = figures.compose(plots.make_panels(curves, baselines, [])["tradeoff"], "").axes[0]
    grey = [line for line in axis.lines if line.get_color() == plots.COLOURS["undistilled"]]
    assert [line.get_ydata()[0] for line in grey] == [pytest.approx(0.45)]


def test_a_student_that_was_not_asked_in_all_ways_is_not_known_to_lack_the_skill(tmp_path):
    exp_dir = write_experiment(tmp_path, asked={"base": 0.01})
    claim = load(exp_dir)[0]["a"][0]
    assert claim.verdict == "not measured" and claim.note.startswith("no few-shot and no prefilled test; ")
    (exp_dir / "traces" / "base.yaml").unlink()
    write_base(exp_dir, "base", 0.4, 1)
    assert load(exp_dir)[0]["a"][0].verdict == "does not hold, this seed only"


# Random directions


def test_directions_of_a_seed_are_read_off_one_by_one_and_averaged(tmp_path):
    """They were curves of their own, and none was compared with temperature."""
    found, curves, _ = load(write_experiment(tmp_path, parquet=True))
    (claim,) = found["e"]
    gaps = [read_by_hand(tmp_path, "temperature", "accuracy", t) - s for t, s in DIRECTIONS.values()]
    assert claim.found == pytest.approx(np.mean(gaps)) and claim.num_seeds == 1
    assert claim.note == "mean of 3 directions a seed" and "86 %" in claim.claim and claim.flags == ()
    (curve,) = [curve for curve in curves if curve.arm == "random direction"]
    ((row,),) = by_setting(curve.points).values()
    assert row.share("student", "raw") == pytest.approx(0.9) and len(curve.points) == 3


# The one-step test


def test_one_step_is_set_beside_what_students_lost(tmp_path):
    _, curves, _ = load(write_experiment(tmp_path, directions={}))
    lines = {line[0]: line[1:] for line in tables.one_step_cells(curves)}
    assert lines["ADS"][:4] == ["3", "+0.0117", "+0.0050 to +0.0200", "+0.350"]  # .95 - mean(.8, .6, .4)
    assert lines["ADS"][4] == "-1.00 (n 3)" and lines["negative lambda"][4] == "- (n 2)"
    change, student = np.array([(values[3], values[1]) for values in GRID.values()]).T
    ranks = [np.array([np.mean(np.flatnonzero(np.sort(v) == x)) for x in v]) for v in (change, student)]
    assert lines["all"][4] == f"{np.corrcoef(ranks)[0, 1]:+.2f} (n 10)"


# The files


def test_claims_and_both_prices_are_in_every_file(three_seeds, tmp_path):
    code, output, errors = run(*three_seeds, "--out", tmp_path / "r")
    assert (code, errors) == (0, "")
    assert "\nc  temperature - ADS at a teacher NLL of 0.22 nats/token: above 0  " in output
    rows = list(csv.DictReader((tmp_path / "r" / "claims.csv").open()))
    assert [row["key"] for row in rows] == [*"aabbccccddeffffff"]
    assert {row["interval"] for row in rows} == {"t interval over 3 seeds"} and rows[0]["answers"] == "raw"
    compared = list(csv.DictReader((tmp_path / "r" / "comparisons.csv").open()))
    assert {row["price"] for row in compared} == {"accuracy", "nll"}
    text, markup = ((tmp_path / "r" / f"report.{kind}").read_text() for kind in ("md", "html"))
    first = text.split("\n\n")[1]
    assert "On 3 seeds, by raw answers" in first and "Does not hold: (f) corrupted results - ADS" in first
    assert "| b | temperature - ADS at a teacher accuracy of 85 %: at least .15 | " in text
    assert "At equal teacher NLL, " in text and "| ADS | 9 | +0.0117 |" in text
    for part in (
        "The claims, and which of them hold",
        "Students at equal teacher NLL",
        "prefilled",
        "One step",
    ):
        assert part in markup
    assert "Does not hold: (f)" in markup[markup.index('<p class="failures">') : markup.index("<main>")]
