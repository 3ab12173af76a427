"""Student against teacher accuracy: arms, curves, and their comparison at equal teacher accuracy.

The input is a flat dict of numbers per grid point (a row of results.csv) with the sidecars it was made from.
A replicate is what was run with one seed: its stages are tested on the same problems.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ads.grading import wilson_interval

ARMS = (
    *("temperature", "ADS", "negative lambda", "random direction", "permuted", "corrupted results"),
    "undistilled",
)
CONTROLS = {  # direction: arm
    "random": "random direction",
    "permuted": "permuted",
    "corrupt": "corrupted results",
}
RULES = {"af": "forced", "raw": "raw"}
SEEDS = ("seed", "student_seed")
SETTINGS = ("data", "teacher", "student", "student_few_shot", *SEEDS, "eps", "top_k", "top_p")
SYMBOLS = {"tau": "\N{GREEK SMALL LETTER TAU}", "lam": "\N{GREEK SMALL LETTER LAMDA}"}
LEVELS = (0.85, 0.8, 0.75, 0.65)  # teacher accuracies to compare at
HEADLINE_LEVEL = 0.75  # the finding is about the level nearest to this one
NUM_DRAWS = 2000
BLOCK = 250  # draws resampled at once: bounds the memory for large test sets
LEAST_BRACKETED = 0.9  # share of the draws that must reach a level


@dataclass(frozen=True)
class Point:
    """A grid point of one replicate: its row of numbers and the sidecars of its stages, by role."""

    row: Mapping
    stages: Mapping


@dataclass(frozen=True)
class Curve:
    """The points of an arm that differ in tau (temperature) or lam alone, over all seeds.

    `start` holds the lam = 0 points at the tau of the others, where their curve begins.
    """

    arm: str
    label: str
    points: list
    start: list


@dataclass(frozen=True)
class Match:
    """Students' accuracies at one teacher accuracy; the difference is temperature minus arm."""

    rule: str
    arm: str
    name: str
    level: float | None
    temperature: float | None
    student: float | None
    difference: float | None
    low: float | None
    high: float | None
    num_seeds: int
    note: str


def arm_of(config):
    """The arm of a trace dataset's settings; sidecars older than the controls have no direction."""
    direction = config.get("direction", "gradient")
    if not config["lam"]:
        return "temperature"
    if direction == "gradient":
        return "ADS" if config["lam"] > 0 else "negative lambda"
    if direction not in CONTROLS:
        raise ValueError(f"direction={direction!r}: must be gradient or one of {', '.join(CONTROLS)}")
    return CONTROLS[direction]


def is_complete(row):
    """Whether teacher and student have both been tested."""
    return "teacher_n" in row and "student_n" in row


def values_of(rows, key):
    return sorted({row[key] for row in rows if row.get(key) is not None})


def differing(rows):
    """The settings in which rows differ; the student's seed only where it is not the traces' seed."""
    has_own_seed = any(row.get("student_seed", row["seed"]) != row["seed"] for row in rows)
    names = [key for key in SETTINGS if key != "student_seed" or has_own_seed]
    return [key for key in names if len(values_of(rows, key)) > 1]


def show_setting(value):
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:g}"


def show_number(value, digits=3):
    return f"{value:.{digits}f}".removeprefix("0") if isinstance(value, float) else show_setting(value)


def show_signed(value):
    return "-" if value is None else f"{value:+.4f}"


# Curves


def make_curves(points):
    """The curves through the complete points, in the order of the arms."""
    points = [point for point in points if is_complete(point.row)]
    names = [key for key in differing([point.row for point in points]) if key not in SEEDS]
    groups = {}
    for point in points:
        row, tau = point.row, point.row["tau"] if point.row["lam"] else None
        groups.setdefault((row["arm"], tau, *(row.get(name) for name in names)), []).append(point)
    return [
        Curve(key[0], curve_label(curve, names), curve, find_start(points, curve[0], names))
        for key, curve in groups.items()
    ]


def find_start(points, first, names):
    """The lam = 0 points that share tau and all else with a curve of another arm; eps plays no part there."""
    shared = ["tau", *(name for name in names if name != "eps")]
    return [
        point
        for point in points
        if first.row["lam"]
        and not point.row["lam"]
        and all(point.row.get(name) == first.row.get(name) for name in shared)
    ]


def curve_label(points, names):
    """The arm, the range of its knob, and the settings in which curves differ."""
    rows = [point.row for point in points]
    parts = [rows[0]["arm"]]
    for key in ("tau", "lam") if rows[0]["lam"] else ("tau",):
        ends = sorted({values_of(rows, key)[0], values_of(rows, key)[-1]})
        parts.append(f"{SYMBOLS[key]} = {' to '.join(map(show_setting, ends))}")
    parts += [f"{name} {show_setting(rows[0][name])}" for name in names if rows[0].get(name) is not None]
    return ", ".join(parts)


def short_label(curve):
    """The label without the range of lam, as in "ADS (tau = 0.6)"."""
    arm, *parts = curve.label.split(", ")
    return f"{arm} ({', '.join(part for part in parts if not part.startswith(SYMBOLS['lam']))})"


def by_setting(points):
    """{(tau, lam): rows of all seeds}, in order."""
    groups = {}
    for row in sorted((point.row for point in points), key=lambda row: (row["tau"], row["lam"])):
        groups.setdefault((row["tau"], row["lam"]), []).append(row)
    return groups


def graded(rows, rule):
    """The rows whose teacher and student were both graded under a rule."""
    return [row for row in rows if all(f"{who}_{rule}_accuracy" in row for who in ("teacher", "student"))]


def pooled(rows, name):
    """(mean, low, high) over seeds of a share such as teacher_af, with a 95 % interval."""
    shares = np.array([row[f"{name}_accuracy"] for row in rows])
    sizes = np.array([row[f"{name.split('_')[0]}_n"] for row in rows])
    return float(shares.mean()), *pooled_interval(shares, sizes)


def pooled_interval(shares, sizes):
    """Wilson interval of a mean over seeds.

    The variance of one seed is its binomial one or the one between seeds, whichever is larger; the interval
    is that of as many problems as would give the mean this variance. One seed: the interval of its run.
    """
    mean, binomial = shares.mean(), (shares * (1 - shares) / sizes).mean()
    between = shares.var(ddof=1) if len(shares) > 1 else 0.0
    variance = max(binomial, between) / len(shares)
    size = min(sizes.sum(), mean * (1 - mean) / variance) if variance else sizes.sum()
    return wilson_interval(mean * size, size)


# Equal teacher accuracy


def interpolate(x, y, levels):
    """y (..., L) at `levels` on the broken lines through points x, y (..., P), sorted by x; nan outside."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    levels = np.broadcast_to(levels, (*x.shape[:-1], np.shape(levels)[-1]))
    if x.shape[-1] < 2:
        return np.full(levels.shape, np.nan)
    order = np.argsort(x, axis=-1, kind="stable")
    x, y = np.take_along_axis(x, order, -1), np.take_along_axis(y, order, -1)
    num_below = (x[..., None, :] <= levels[..., None]).sum(-1)  # (..., L)
    left = np.clip(num_below - 1, 0, x.shape[-1] - 2)
    x0, x1, y0, y1 = (np.take_along_axis(v, left + i, -1) for v in (x, y) for i in (0, 1))
    width = x1 - x0
    weight = np.where(width > 0, (levels - x0) / np.where(width > 0, width, 1), 0.5)
    inside = (x[..., :1] <= levels) & (levels <= x[..., -1:])
    return np.where(inside, y0 + weight * (y1 - y0), np.nan)


def pair_up(curves):
    """(temperature curve, other curve) that share data, models and truncation."""
    names = [key for key in SETTINGS if key not in (*SEEDS, "eps")]
    baselines = {tuple(c.points[0].row.get(n) for n in names): c for c in curves if c.arm == "temperature"}
    others = [(tuple(c.points[0].row.get(n) for n in names), c) for c in curves if c.arm != "temperature"]
    return [(baselines[key], curve) for key, curve in others if key in baselines]


def choose_levels(pairs, rule):
    """LEVELS, or where no ADS curve reaches one of them, four levels inside the range it has in common."""
    ranges = [common_range(pair, rule) for pair in pairs if pair[1].arm == "ADS"]
    ranges = [(low, high) for low, high in ranges if low < high]
    if not ranges or any(low <= level <= high for low, high in ranges for level in LEVELS):
        return LEVELS
    low, high = max(ranges, key=lambda ends: ends[1] - ends[0])
    return tuple(dict.fromkeys(round(float(v), 3) for v in np.linspace(high, low, 6)[1:-1]))


def common_range(pair, rule):
    """The teacher accuracies (lowest, highest) that both curves span, by their settings' means."""
    ends = []
    for curve in pair:
        groups = [graded(rows, rule) for rows in by_setting([*curve.start, *curve.points]).values()]
        shares = [pooled(rows, f"teacher_{rule}")[0] for rows in groups if rows]
        ends.append((min(shares, default=1.0), max(shares, default=0.0)))
    return max(low for low, _ in ends), min(high for _, high in ends)


def replicates(points, rule):
    """{replicate: points} of those that were graded under a rule."""
    groups = {}
    for point in points:
        if graded([point.row], rule):
            groups.setdefault(replicate_of(point), []).append(point)
    return groups


def replicate_of(point):
    return tuple(point.row.get(key) for key in SEEDS)


def compare(pairs, levels, answers, missing=""):
    """A Match per pair of curves, rule and level; an arm of one setting is compared at its own accuracy.

    `levels`: {rule: teacher accuracies}. `answers`: {(path of a test's sidecar, rule): {problem id: correct}}
    of the tests whose answers are there; `missing` says why others are not.
    """
    draws = draw_accuracies(pairs, answers)
    arms = [curve.arm for _, curve in pairs]
    matches = []
    for rule in RULES:
        for temperature, curve in pairs:
            name = curve.arm if arms.count(curve.arm) == 1 else short_label(curve)
            is_lone = len(by_setting(curve.points)) == 1 and not (curve.arm == "ADS" and curve.start)
            points = curve.points if is_lone else [*curve.start, *curve.points]
            sides = [replicates(temperature.points, rule), replicates(points, rule)]
            at = None if is_lone else levels[rule]
            found = compare_sides(sides, (rule, curve.arm, name), at, draws, missing)
            matches += found if curve.arm == "ADS" else without_gaps(found)
    return matches


def without_gaps(matches):
    """The matches of a control where both arms are; one of them, which says so, where they never are."""
    return [match for match in matches if match.num_seeds] or matches[:1]


def compare_sides(sides, names, levels, draws, missing):
    """Matches of the temperature arm and another, {replicate: points} each; names = (rule, arm, name).

    Without levels, at the other's own teacher accuracy.
    """
    if not sides[1]:
        return []
    measured, drawn = {}, {}
    for key in [key for key in sides[1] if key in sides[0]]:
        groups = [side[key] for side in sides]
        measured[key] = read_off(*(accuracies(group, names[0]) for group in groups), levels)
        found = [draws_of(group, key, names[0], draws) for group in groups]
        if all(side is not None for side in found):
            drawn[key] = read_off(*found, levels)
    return [
        match_at(names, level, pick(measured, i), pick(drawn, i), missing)
        for i, level in enumerate(levels or [None])
    ]


def read_off(temperature, other, levels):
    """(3, ..., L): teacher accuracy, temperature's student, the other's; curves are x, y (2, ..., P)."""
    if levels is None:
        return np.stack([other[0], interpolate(*temperature, other[0]), other[1]])
    students = [interpolate(*curve, levels) for curve in (temperature, other)]
    return np.stack([np.broadcast_to(levels, students[0].shape), *students])


def pick(found, i):
    """{replicate: what was read off at level i}."""
    return {key: values[..., i] for key, values in found.items()}


def match_at(names, level, measured, drawn, missing):
    """The Match at one level from what was read off, {replicate: (3,)} and {replicate: (3, B)}; nan: not
    reached."""
    paired = [key for key, values in measured.items() if np.isfinite(values).all()]
    found = np.array([measured[key] for key in paired or measured]).reshape(-1, 3).T
    means = [float(v[np.isfinite(v)].mean()) if np.isfinite(v).any() else None for v in found]
    level, temperature, student = means[0] if level is None else level, *means[1:]
    difference, low, high = None, None, None
    note = "" if paired else "not reached by both" if measured else "no seed in common"
    if paired:
        difference = temperature - student
        differences = [drawn[key][1] - drawn[key][2] for key in paired if key in drawn]
        low, high, note = interval(differences, len(paired), missing)
    return Match(*names, level, temperature, student, difference, low, high, len(paired), note)


def interval(drawn, num_seeds, missing):
    """(low, high, note): 95 % percentile interval of the mean over seeds of their drawn differences (B,).

    Hierarchical: seeds are drawn with replacement, and each drawn seed with a resample of its problems.
    """
    if len(drawn) < num_seeds:
        return None, None, f"no interval: {missing}"
    rng = np.random.default_rng(0)
    total = np.zeros((2, NUM_DRAWS))  # sum and number of the seeds that reach the level in a draw
    for _ in range(num_seeds):
        chosen = rng.integers(num_seeds, size=NUM_DRAWS)
        # a seed that is drawn twice comes with two resamples of its problems
        differences = np.stack(drawn)[chosen, rng.permutation(NUM_DRAWS)]
        total += np.nan_to_num(differences), np.isfinite(differences)
    reached = total[1] > 0
    if reached.mean() < LEAST_BRACKETED:
        return None, None, "no interval: too near the end of a curve"
    low, high = np.percentile(total[0][reached] / total[1][reached], (2.5, 97.5))
    return float(low), float(high), ""


def accuracies(points, rule):
    """x, y (2, P): the teachers' and the students' accuracies."""
    return np.array([[p.row[f"{who}_{rule}_accuracy"] for p in points] for who in ("teacher", "student")])


def draws_of(points, replicate, rule, draws):
    """The same (2, B, P) under B resamples of the problems; None where a test's answers are missing."""
    keys = [[(replicate, p.stages[who]["path"], rule) for p in points] for who in ("teacher", "student")]
    if any(key not in draws for line in keys for key in line):
        return None
    return np.array([[draws[key] for key in line] for line in keys]).transpose(0, 2, 1)


def draw_accuracies(pairs, answers):
    """{(replicate, path, rule): accuracies (B,) of a test under NUM_DRAWS resamples of the problems}.

    All stages of a replicate see the same resamples: they were tested on the same problems.
    """
    tests = {}
    for curve in {id(curve): curve for pair in pairs for curve in pair}.values():
        for point in [*curve.start, *curve.points]:
            paths = [point.stages[who]["path"] for who in ("teacher", "student")]
            keys = [(path, rule) for path in paths for rule in RULES if (path, rule) in answers]
            tests.setdefault(replicate_of(point), {}).update(dict.fromkeys(keys))
    draws = {}
    for seed, (replicate, keys) in enumerate(tests.items()):
        drawn = resample([answers[key] for key in keys], np.random.default_rng(seed))
        draws |= {(replicate, *key): values for key, values in zip(keys, drawn, strict=True)}
    return draws


def resample(tests, rng):
    """Accuracies (S, B) of S tests, {problem id: correct}, under the same B bootstrap draws of problems."""
    ids = {i: position for position, i in enumerate(dict.fromkeys(i for test in tests for i in test))}
    correct_SN, present_SN = np.zeros((2, len(tests), len(ids)))
    for row, test in enumerate(tests):
        columns = [ids[i] for i in test]
        correct_SN[row, columns] = list(test.values())
        present_SN[row, columns] = 1
    shares = []
    for _ in range(0, NUM_DRAWS, BLOCK):
        drawn = rng.integers(len(ids), size=(BLOCK, len(ids))) + np.arange(BLOCK)[:, None] * len(ids)
        times_BN = np.bincount(drawn.ravel(), minlength=BLOCK * len(ids)).reshape(BLOCK, -1).astype(float)
        shares.append(correct_SN @ times_BN.T / np.maximum(present_SN @ times_BN.T, 1))
    return np.concatenate(shares, axis=1)


# What it says


def headline(matches):
    """The Match that the finding is about: ADS, forced answers if there are any, nearest HEADLINE_LEVEL."""
    matched = [m for m in matches if m.arm == "ADS" and m.difference is not None]
    order = list(RULES)
    return min(
        matched,
        key=lambda m: (order.index(m.rule), abs(m.level - HEADLINE_LEVEL), m.low is None),
        default=None,
    )


def second_finding(matches):
    """A sentence on the headline's comparison by raw answers, where the headline is about forced ones."""
    best = headline(matches)
    rest = [m for m in matches if best and m.name == best.name and m.rule != best.rule]
    other = headline(rest)
    if other is None:
        return ""
    shares = f"{100 * other.temperature:.0f} % by temperature, {100 * other.student:.0f} % by {other.name}"
    bounds = "" if other.low is None else f" [{100 * other.low:.0f}, {100 * other.high:.0f}]"
    return (
        f"By {RULES[other.rule]} answers, at a teacher accuracy of {100 * other.level:.3g} %: {shares}, "
        f"a difference of {100 * other.difference:.0f} points{bounds}."
    )


def finding(curves, matches):
    """One sentence on what the data show."""
    best = headline(matches)
    if best is None:
        return explain_no_finding(curves)
    points, ends = 100 * best.difference, (best.low, best.high)
    temperature, student = (f"{100 * share:.0f} %" for share in (best.temperature, best.student))
    text = (
        f"At a teacher accuracy of {100 * best.level:.3g} % ({RULES[best.rule]} answers), "
        f"temperature-sampled traces bring students to {temperature}, {best.name} traces to {student}"
    )
    size = f"{abs(points):.0f} points {'less' if points > 0 else 'more'}"
    if best.low is None:
        return f"{text}: {size} ({best.note})."
    if best.low <= 0 <= best.high:
        low, high = (f"{100 * end:.0f}" for end in ends)
        return f"{text}: a difference of {points:.0f} points whose 95 % interval [{low}, {high}] includes 0."
    low, high = sorted(abs(100 * end) for end in ends)
    return f"{text}: {size} [{low:.0f}, {high:.0f}]."


def explain_no_finding(curves):
    arms = {curve.arm for curve in curves}
    if missing := [arm for arm in ("temperature", "ADS") if arm not in arms]:
        return f"No point of {' or '.join(missing)} is complete yet: there is nothing to compare."
    return "The temperature and the ADS curve have no teacher accuracy in common: nothing is compared."


def controls(matches):
    """A sentence on the other arms, each at the matched level nearest the headline's; empty without any."""
    best = headline(matches)
    others = [
        m for m in matches if best and m.rule == best.rule and m.arm != "ADS" and m.difference is not None
    ]
    nearest = {m.name: m for m in sorted(others, key=lambda m: -abs(m.level - best.level))}
    text = [
        f"{m.name} {100 * m.student:.0f} % against {100 * m.temperature:.0f} % "
        f"(teacher {100 * m.level:.0f} %)"
        for m in sorted(nearest.values(), key=lambda m: ARMS.index(m.arm))
    ]
    return f"Controls, against temperature at the same teacher accuracy: {', '.join(text)}." if text else ""


def show_match(match):
    """A line for the terminal and the Markdown report."""
    who = f"{RULES[match.rule]}, teacher {show_number(match.level)}: temperature"
    both = f"{show_number(match.temperature)}, {match.name} {show_number(match.student)}"
    if match.difference is None:
        return f"{who} {both}; {match.note}"
    bounds = f"[{match.low:.3f}, {match.high:.3f}]" if match.low is not None else f"({match.note})"
    seeds = f"{match.num_seeds} seed{'s' if match.num_seeds > 1 else ''}"
    return f"{who} {both}, difference {match.difference:.3f} {bounds}, {seeds}"
