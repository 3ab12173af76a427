"""Students against what their traces cost the teacher: arms, curves, and their comparison at equal price.

A price is the teacher's accuracy, or the mean NLL of its test traces under the unadjusted teacher.

The input is a flat dict of numbers per grid point (a row of results.csv) with the sidecars it was made from.
A replicate is what was run with one seed: its stages are tested on the same problems. Curves are told apart
by all settings of all stages: SETTINGS, and the columns with a dot, STAGE.SETTING.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ads.data.grading import wilson_interval

RULES = {"af": "forced", "raw": "raw"}
SEEDS = ("seed", "student_seed", "direction_seed")
REPLICATE = SEEDS[:2]  # the directions of a replicate are averaged
SETTINGS = ("data", "teacher", "student", "student_few_shot", *SEEDS, "eps", "top_k", "top_p")
STAGES = {  # what a column STAGE.SETTING is called by
    "model": "",
    "train": "traces ",
    "teacher": "teacher test ",
    "student": "student test ",
    "gradient": "gradient ",
}
FILES = " files"  # ends the name of a setting that is the fingerprint of files
DELTA_SETTINGS = ("eps", "proxy_dtype", "proxy_student files", "grad_rank")  # without lam they play no part
SYMBOLS = {"tau": "\N{GREEK SMALL LETTER TAU}", "lam": "\N{GREEK SMALL LETTER LAMDA}"}
NLL = "teacher_teacher_nll"  # nats/token of the teacher's test traces under the unadjusted teacher
ONE_SEED = "this seed's problems only"  # what an interval of one seed is about
POOLED = "same settings and seed more than once, pooled"
NO_SHARE = "left out, an accuracy that is no number from 0 to 1"


@dataclass(frozen=True)
class Point:
    """A grid point of one replicate: its row of numbers and the sidecars of its stages, by role.

    `copies`: the points that were pooled into this one, where the same was measured more than once.
    """

    row: Mapping
    stages: Mapping
    copies: tuple = ()


@dataclass(frozen=True)
class Curve:
    """The points of an arm that differ in tau (temperature) or lam alone, over all seeds.

    `start` holds the lam = 0 points at the tau of the others, where their curve begins.
    """

    arm: str
    label: str
    points: list
    start: list


def is_complete(row):
    """Whether teacher and student have both been tested."""
    return "teacher_n" in row and "student_n" in row


def values_of(rows, key):
    """The values of a setting, in order; None is that of a row where it plays no part."""
    found = {row[key] for row in rows if row.get(key) is not None}
    return sorted(found, key=lambda value: (isinstance(value, str), value))


def setting_names(rows):
    """The columns that tell curves apart."""
    return [*SETTINGS, *dict.fromkeys(key for row in rows for key in row if "." in key)]


def identity(row, with_delta=True):
    """What tells a row's curve apart besides arm and knobs: all settings but the seeds, as a dict's key.

    with_delta=False: without those that play a part only where lam is not 0.
    """
    names = [key for key in setting_names([row]) if key not in SEEDS and row.get(key) is not None]
    return tuple(sorted((key, row[key]) for key in names if with_delta or not concerns_delta(key)))


def concerns_delta(key):
    stage, _, name = key.rpartition(".")
    return stage == "gradient" or name in DELTA_SETTINGS


def differing(rows):
    """The settings in which rows differ, as few as name the difference.

    The student's seed only where it is not the traces' seed; a setting that differs alike in several stages
    once; fingerprints only where nothing else tells rows apart.
    """
    has_own_seed = any(row.get("student_seed", row["seed"]) != row["seed"] for row in rows)
    found = {}
    for key in setting_names(rows):
        if len(values_of(rows, key)) > 1 and (key != "student_seed" or has_own_seed):
            found.setdefault((key.rpartition(".")[2], *(row.get(key) for row in rows)), key)
    names = [key for key in found.values() if not key.endswith(FILES)]
    for key in [*(key for key in found.values() if key.endswith(FILES)), "recipe"]:
        if len(values_of(rows, key)) > 1 and num_groups(rows, [*names, key]) > num_groups(rows, names):
            names.append(key)
    return names


def num_groups(rows, names):
    return len({tuple(row.get(name) for name in names) for row in rows})


def show_name(key):
    """A setting's column in words: model.lr is lr, train.max_length is traces max_length."""
    stage, dot, name = key.rpartition(".")
    return f"{STAGES[stage]}{name}" if dot else key


def show_setting(value):
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else f"{value:g}"


def show_number(value, digits=3):
    return f"{value:.{digits}f}".removeprefix("0") if isinstance(value, float) else show_setting(value)


def show_signed(value):
    return "-" if value is None else f"{value:+.4f}"


def pool_copies(points):
    """Points with the same settings and seeds as one, the mean of their numbers."""
    groups = {}
    for point in points:
        row = point.row
        key = (row["arm"], row["tau"], row["lam"], identity(row), *(row.get(name) for name in SEEDS))
        groups.setdefault(key, []).append(point)
    return [pool(group) if len(group) > 1 else group[0] for group in groups.values()]


def pool(points):
    row = mean_row([point.row for point in points])
    return Point(row, points[0].stages, tuple(points))


def mean_row(rows):
    """A row with the mean of each number; what is no finite number in some is that of the others."""
    row = dict(rows[0])
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [row[key] for row in rows if is_number(row.get(key))]
        if key.endswith("_accuracy"):
            values = [value for value in values if 0 <= value <= 1]
        if len(set(values)) > 1:
            row[key] = min(values) if key.endswith("_n") else float(np.mean(values))
        elif values:
            row[key] = values[0]
    return row


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


def has_share(row, name):
    """Whether a row holds an accuracy such as teacher_af: from 0 to 1, on one problem or more."""
    share, size = row.get(f"{name}_accuracy"), row.get(f"{name.split('_')[0]}_n")
    return is_number(share) and 0 <= share <= 1 and is_number(size) and size > 0


def rules_of(rows):
    """The part of RULES by which any of the rows' students or teachers were graded; all where none was."""
    shares = [f"{who}_{rule}" for who in ("teacher", "student") for rule in RULES]
    found = {name.split("_")[1] for name in shares if any(has_share(row, name) for row in rows)}
    return {rule: name for rule, name in RULES.items() if rule in found} or RULES


def lost_shares(row):
    """[(rule, test and value)] of the tests whose accuracy should be there, and is none."""
    lost = []
    for who in ("teacher", "student"):
        for rule, name in RULES.items():
            # every test has raw answers, and forced ones where any number speaks of them
            is_due = f"{who}_n" in row and rule == "raw" or any(k.startswith(f"{who}_{rule}_") for k in row)
            if is_due and not has_share(row, f"{who}_{rule}"):
                lost.append((rule, f"{who} {name} {row.get(f'{who}_{rule}_accuracy', 'missing')}"))
    return lost


def point_name(row):
    """A point in words: arm, knobs and seeds."""
    knobs = [f"{SYMBOLS[key]} {show_setting(row[key])}" for key in ("tau", "lam") if key in row]
    seeds = list(dict.fromkeys(row[key] for key in REPLICATE if key in row))
    direction = row.get("direction_seed")
    parts = [row["arm"], *knobs, *([] if direction is None else [f"direction {direction}"])]
    return ", ".join([*parts, f"seed {' and '.join(map(str, seeds))}"])


def make_curves(points):
    """The curves through the complete points, in the order of the arms."""
    points = pool_copies(point for point in points if is_complete(point.row))
    names = [key for key in differing([point.row for point in points]) if key not in SEEDS]
    groups = {}
    for point in points:
        row = point.row
        groups.setdefault((row["arm"], row["tau"] if row["lam"] else None, identity(row)), []).append(point)
    return [
        Curve(key[0], curve_label(curve, names), curve, find_start(points, curve[0]))
        for key, curve in groups.items()
    ]


def find_start(points, first):
    """The lam = 0 points that share tau and all else with a curve of another arm."""
    if not first.row["lam"]:
        return []
    wanted = (first.row["tau"], identity(first.row, with_delta=False))
    return [p for p in points if not p.row["lam"] and (p.row["tau"], identity(p.row, False)) == wanted]


def curve_label(points, names):
    """The arm, the range of its knob, and the settings in which curves differ."""
    rows = [point.row for point in points]
    parts = [rows[0]["arm"]]
    for key in ("tau", "lam") if rows[0]["lam"] else ("tau",):
        ends = sorted({values_of(rows, key)[0], values_of(rows, key)[-1]})
        parts.append(f"{SYMBOLS[key]} = {' to '.join(map(show_setting, ends))}")
    for name in names:
        if rows[0].get(name) is not None:
            parts.append(f"{show_name(name)} {show_setting(rows[0][name])}")
    return ", ".join(parts)


def short_label(curve):
    """The label without the range of lam, as in "ADS (tau = 0.6)"."""
    arm, *parts = curve.label.split(", ")
    return f"{arm} ({', '.join(part for part in parts if not part.startswith(SYMBOLS['lam']))})"


def by_setting(points):
    """{(tau, lam): rows of all seeds}, in order; the random directions of a seed as their mean."""
    groups = {}
    for point in sorted(points, key=lambda point: (point.row["tau"], point.row["lam"])):
        seeds = groups.setdefault((point.row["tau"], point.row["lam"]), {})
        seeds.setdefault(replicate_of(point), []).append(point.row)
    return {knobs: [mean_row(rows) for rows in seeds.values()] for knobs, seeds in groups.items()}


def graded(rows, rule, price="accuracy"):
    """The rows whose teacher and student were both graded under a rule, and whose price is known."""
    rows = [row for row in rows if all(has_share(row, f"{who}_{rule}") for who in ("teacher", "student"))]
    return [row for row in rows if price == "accuracy" or is_number(row.get(NLL))]


def price_column(rule, price):
    return NLL if price == "nll" else f"teacher_{rule}_accuracy"


def pooled(rows, name):
    """(mean, low, high) over seeds of a share such as teacher_af, with a 95 % interval."""
    shares = np.array([row[f"{name}_accuracy"] for row in rows])
    sizes = np.array([row[f"{name.split('_')[0]}_n"] for row in rows])
    return float(shares.mean()), *pooled_interval(shares, sizes)


def pooled_interval(shares, sizes):
    """95 % interval of the mean of a share over seeds.

    One seed: Wilson's, of its problems. Several: the t interval over seeds, and no narrower than Wilson's of
    all their problems: seeds that happen to agree are no reason to be sure.
    """
    low, high = wilson_interval(shares.mean() * sizes.sum(), sizes.sum())
    if len(shares) > 1:
        ends = seed_interval(shares, least=0.0)
        low, high = np.fmin(low, ends[0]), np.fmax(high, ends[1])
    return float(low), float(high)


def seed_interval(values, least=-1.0, most=1.0):
    """(low, high) (...): 95 % t interval of the mean of values (..., S) of S seeds, two or more.

    It is cut off at `least` and `most`, beyond which no value can lie; nan where all S values are the same.
    """
    from scipy import stats  # half a second

    values = np.asarray(values, float)
    error = values.std(-1, ddof=1) / values.shape[-1] ** 0.5
    error = np.where(np.ptp(values, axis=-1) > 1e-9, error, np.nan)  # less is rounding
    low, high = stats.t.interval(0.95, values.shape[-1] - 1, values.mean(-1), error)
    return np.clip(low, least, most), np.clip(high, least, most)


def interval_kind(num_seeds):
    """What an interval stands on."""
    return f"t interval over {num_seeds} seeds" if num_seeds > 1 else ONE_SEED


def replicate_of(point):
    return tuple(point.row.get(key) for key in REPLICATE)
