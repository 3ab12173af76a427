"""Students against what their traces cost the teacher: arms, curves, and their comparison at equal price.

A price is the teacher's accuracy, or the mean NLL of its test traces under the unadjusted teacher.

The input is a flat dict of numbers per grid point (a row of results.csv) with the sidecars it was made from.
A replicate is what was run with one seed: its stages are tested on the same problems. Curves are told apart
by all settings of all stages: SETTINGS, and the columns with a dot, STAGE.SETTING.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ads.data.grading import wilson_interval

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
LEVELS = (0.85, 0.8, 0.75, 0.65)  # teacher accuracies to compare at
NUM_LEVELS = 4  # where LEVELS do not fit
NLL = "teacher_teacher_nll"  # nats/token of the teacher's test traces under the unadjusted teacher
HEADLINE_LEVEL = 0.75  # the finding is about the level nearest to this one
NUM_DRAWS = 2000
BLOCK = 250  # draws resampled at once: bounds the memory for large test sets
LEAST_BRACKETED = 0.9  # share of the draws that must reach a level
WIDEST_BRACKET = 0.1  # of teacher accuracy, between the settings that a reading lies between
WIDEST_SHARE = 0.25  # the same for teacher NLL, as a share of the range that both curves span
ONE_SEED = "this seed's problems only"  # what an interval of one seed is about
MARK = "(!)"  # after a number that is in doubt
WIDE = "is read across more than 10 points of teacher accuracy"
WIDE_NLL = "is read across more than a quarter of the teacher NLL that both curves span"
ZIGZAG = "is not monotone there, it meets this teacher accuracy"
PRICES = {"accuracy": "teacher accuracy", "nll": "teacher NLL"}
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


@dataclass(frozen=True)
class Match:
    """Students' accuracies at one price to the teacher, its accuracy or NLL; the difference is temperature
    minus arm (or what stands in temperature's place).

    `note` says why there is no difference or no interval, `flags` what puts the numbers in doubt.
    """

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
    flags: tuple = ()
    price: str = "accuracy"


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


# Points


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


# Curves


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


# Equal price


def interpolate(x, y, levels):
    """y (..., L) at `levels` on the broken lines through points x, y (..., P), sorted by x; nan outside.

    Points of one x are one, the mean of their y.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    levels = np.broadcast_to(levels, (*x.shape[:-1], np.shape(levels)[-1]))
    if x.shape[-1] < 2:
        return np.full(levels.shape, np.nan)
    is_same = x[..., :, None] == x[..., None, :]
    y = (is_same * y[..., None, :]).sum(-1) / is_same.sum(-1)
    order = np.argsort(x, axis=-1, kind="stable")
    x, y = np.take_along_axis(x, order, -1), np.take_along_axis(y, order, -1)
    num_below = (x[..., None, :] <= levels[..., None]).sum(-1)  # (..., L)
    left = np.clip(num_below - 1, 0, x.shape[-1] - 2)
    x0, x1, y0, y1 = (np.take_along_axis(v, left + i, -1) for v in (x, y) for i in (0, 1))
    width = x1 - x0
    weight = np.where(width > 0, (levels - x0) / np.where(width > 0, width, 1), 0.0)
    inside = (x[..., :1] <= levels) & (levels <= x[..., -1:])
    return np.where(inside, y0 + weight * (y1 - y0), np.nan)


def pair_up(curves):
    """(temperature curve, other curve) that share all settings but those of Delta."""
    shared = [identity(curve.points[0].row, with_delta=False) for curve in curves]
    lines = list(zip(shared, curves, strict=True))
    baselines = {key: curve for key, curve in lines if curve.arm == "temperature"}
    return [
        (baselines[key], curve) for key, curve in lines if curve.arm != "temperature" and key in baselines
    ]


def choose_levels(pairs, rule, price="accuracy"):
    """Where to compare: LEVELS of teacher accuracy; or, for NLL and where no ADS curve reaches one of them,
    four rounded values inside the range that it has in common with temperature."""
    ranges = [common_range(pair, rule, price) for pair in pairs if pair[1].arm == "ADS"]
    ranges = [(low, high) for low, high in ranges if low < high]
    usual = LEVELS if price == "accuracy" else ()
    if not ranges or any(low <= level <= high for low, high in ranges for level in usual):
        return usual
    low, high = max(ranges, key=lambda ends: ends[1] - ends[0])
    inside = np.linspace(low, high, NUM_LEVELS + 2)[1:-1]
    if price == "accuracy":
        return tuple(dict.fromkeys(round(float(v), 3) for v in inside[::-1]))
    digits = 1 - int(np.floor(np.log10(high - low)))  # steps are about a fifth of the range
    return tuple(dict.fromkeys(v for v in (round(float(v), digits) for v in inside) if low <= v <= high))


def common_range(pair, rule, price="accuracy"):
    """The prices (lowest, highest) that both curves span, by their settings' means."""
    ends = []
    for curve in pair:
        groups = by_setting([*curve.start, *curve.points]).values()
        found = [mean_price(rows, rule, price) for rows in groups if graded(rows, rule, price)]
        ends.append((min(found, default=np.inf), max(found, default=-np.inf)))
    return max(low for low, _ in ends), min(high for _, high in ends)


def mean_price(rows, rule, price):
    return float(np.mean([row[price_column(rule, price)] for row in graded(rows, rule, price)]))


def mean_nll(rows):
    """(mean, low, high) over seeds of the teacher's NLL, with a 95 % t interval; of one seed no interval."""
    values = np.array([row[NLL] for row in rows])
    mean = float(values.mean())
    if len(values) < 2 or not np.ptp(values) > 1e-9:
        return mean, mean, mean
    low, high = seed_interval(values, least=0.0, most=np.inf)
    return mean, float(low), float(high)


def replicates(points):
    """{replicate: points}."""
    groups = {}
    for point in points:
        groups.setdefault(replicate_of(point), []).append(point)
    return groups


def graded_points(points, rule, price="accuracy"):
    return [point for point in points if graded([point.row], rule, price)]


def replicate_of(point):
    return tuple(point.row.get(key) for key in REPLICATE)


def directions(points):
    """A replicate's points by random direction, each with the lam = 0 points; all where there is one."""
    groups = {}
    for point in points:
        if point.row["lam"]:
            groups.setdefault(point.row.get("direction_seed"), []).append(point)
    start = [point for point in points if not point.row["lam"]]
    return [[*start, *group] for group in groups.values()] or [start]


def compare(pairs, levels, draws, missing="", price="accuracy"):
    """A Match per pair of curves, rule and level; an arm of one setting is compared at its own price.

    `levels`: {rule: prices}. `draws` come from draw_accuracies; `missing` says why some are not there.
    """
    arms = [curve.arm for _, curve in pairs]
    matches = []
    for rule in RULES:
        for first, curve in pairs:
            name = curve.arm if arms.count(curve.arm) == 1 else short_label(curve)
            is_lone = len(by_setting(curve.points)) == 1 and not (curve.arm == "ADS" and curve.start)
            points = curve.points if is_lone else [*curve.start, *curve.points]
            sides = [replicates([*first.start, *first.points]), replicates(points)]
            at = None if is_lone else levels[rule]
            found = []
            if graded_points(points, rule, price) and at != ():
                found = compare_sides(sides, (rule, curve.arm, name, price), at, draws, missing)
            matches += found if curve.arm == "ADS" else without_gaps(found)
    return matches


def without_gaps(matches):
    """The matches of a control where both arms are; one of them, which says so, where they never are."""
    return [match for match in matches if match.num_seeds] or matches[:1]


def compare_sides(sides, names, levels, draws, missing):
    """Matches of the temperature arm and another, {replicate: points} each; names = (rule, arm, name, price).

    Without levels, at the other's own price. Random directions of a replicate are read off one by one, and
    their mean is the replicate's.
    """
    if not sides[1]:
        return []
    rule, *_, price = names
    measured, drawn = {}, {}
    for key in [key for key in sides[1] if key in sides[0]]:
        first = graded_points(sides[0][key], rule, price)
        others = [graded_points(points, rule, price) for points in directions(sides[1][key])]
        if not first or not all(others):
            continue
        x = readings(first, rule, price)
        measured[key] = np.mean(
            [read_off(x, readings(other, rule, price), levels) for other in others], axis=0
        )
        x, *found = (draws_of(points, key, rule, price, draws) for points in (first, *others))
        if x is not None and all(other is not None for other in found):
            drawn[key] = np.mean([read_off(x, other, levels) for other in found], axis=0)
    matches = []
    for i, level in enumerate(levels or [None]):
        match = match_at(names, level, pick(measured, i), pick(drawn, i), missing)
        matches.append(dataclasses.replace(match, flags=flags_of(match, sides, pick(measured, i))))
    return matches


def read_off(temperature, other, levels):
    """(3, ..., L): price, temperature's student, the other's; curves are x, y (2, ..., P)."""
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
    paired = reached_by(measured)
    found = np.array([measured[key] for key in paired or measured]).reshape(-1, 3).T
    means = [float(v[np.isfinite(v)].mean()) if np.isfinite(v).any() else None for v in found]
    level, temperature, student = means[0] if level is None else level, *means[1:]
    difference, low, high = None, None, None
    note = "" if paired else "not reached by both" if measured else "no seed in common"
    if paired:
        difference = temperature - student
        if len(paired) > 1:
            low, high, note = over_seeds(found[1] - found[2])
        else:
            low, high, note = over_problems(drawn.get(paired[0]), missing)
    numbers = (level, temperature, student, difference, low, high, len(paired))
    return Match(*names[:3], *numbers, note, price=names[3])


def reached_by(measured):
    """The replicates of {replicate: what was read off} in which both curves reach the level."""
    return [key for key, values in measured.items() if np.isfinite(values).all()]


def over_seeds(differences):
    """(low, high, why there are none): the t interval over seeds."""
    low, high = map(float, seed_interval(differences))
    if not np.isfinite(low):
        return None, None, "no interval: the seeds do not differ"
    return low, high, ""


def over_problems(drawn, missing):
    """(low, high, why there are none): what one seed's differences (3, B) under resampled problems span.

    95 % percentile interval. It knows nothing of how seeds differ.
    """
    if drawn is None:
        return None, None, f"no interval: {missing}"
    differences = drawn[1] - drawn[2]
    reached = np.isfinite(differences)
    if reached.mean() < LEAST_BRACKETED:
        return None, None, "no interval: too near the end of a curve"
    low, high = np.percentile(differences[reached], (2.5, 97.5))
    return float(low), float(high), ""


# What puts a reading in doubt


def flags_of(match, sides, measured):
    """Sentences on what makes a Match's readings doubtful; `measured` is {replicate: what was read off}."""
    paired = reached_by(measured)
    if not paired:
        return ()
    texts = []
    if len(paired) < len(measured):
        reached = f"{len(paired)} of {len(measured)} seeds reach this {PRICES[match.price]} on both curves"
        texts.append(reached)
    if (num := len({seed for seed, *_ in paired})) < len(paired):
        texts.append(f"students of {len(paired)} seeds, traces of {num}")
    arms = [next(iter(side.values()))[-1].row["arm"] for side in sides]
    for side, name in zip(sides, (arms[0], match.name), strict=True):
        found = {}
        for key in paired:
            widest = widest_bracket([side[key] for side in sides], match)
            for kind, case in reading_flags(side[key], match, measured[key][0], widest):
                cases = found.setdefault(kind, {}).setdefault(case, [])
                cases += [key[0]] if key[0] not in cases else []
        texts += [f"{name} {kind}: {cases_of(cases, len(paired))}" for kind, cases in found.items()]
    return tuple(texts)


def cases_of(cases, num_seeds):
    """Texts of {case: seeds}, with the seeds where it is some of several."""
    return ", ".join(
        case if len(seeds) == num_seeds else f"{case} (seed {' and '.join(map(str, seeds))})"
        for case, seeds in cases.items()
    )


def widest_bracket(sides, match):
    """The price between two settings above which a reading between them is in doubt."""
    if match.price == "accuracy":
        return WIDEST_BRACKET
    prices = [readings(graded_points(points, match.rule, "nll"), match.rule, "nll")[0] for points in sides]
    return WIDEST_SHARE * (min(map(max, prices)) - max(map(min, prices)))


def reading_flags(points, match, level, widest):
    """[(kind, case)] of what makes one replicate's curve doubtful where it is read, at a price."""
    return [flag for group in directions(points) for flag in line_flags(group, match, level, widest)]


def line_flags(points, match, level, widest):
    rule, price = match.rule, match.price
    kept = graded_points(points, rule, price)
    if len({(p.row["tau"], p.row["lam"]) for p in kept}) == 1:  # a lone setting, read at its own price
        ends, flags = kept, []
    else:
        kept = sorted(kept, key=lambda p: (abs(p.row["lam"]), p.row["tau"]))
        x = readings(kept, rule, price)[0]
        below, above = x[x <= level].max(), x[x >= level].min()
        ends = [p for p, found in zip(kept, x, strict=True) if found in (below, above)]
        flags = []
        if above - below > widest:
            flags.append((WIDE if price == "accuracy" else WIDE_NLL, " to ".join(knob(p.row) for p in ends)))
        if (num := num_crossings(x - level)) > 1:
            flags.append((ZIGZAG.replace(PRICES["accuracy"], PRICES[price]), f"{num} times"))
    flags += [(POOLED, knob(p.row)) for p in ends if p.copies]
    lost = [p for p in points if any(rule == r for part in parts_of(p) for r, _ in lost_shares(part.row))]
    return flags + [(NO_SHARE, knob(p.row)) for p in lost]


def num_crossings(heights):
    """How often a broken line with these heights, in the order of the knob, meets 0."""
    heights = np.asarray(heights)
    return int((heights == 0).sum() + (heights[1:] * heights[:-1] < 0).sum())


def knob(row):
    key = "lam" if row["lam"] else "tau"
    return f"{SYMBOLS[key]} {show_setting(row[key])}"


def parts_of(point):
    """The measured points behind a point."""
    return point.copies or (point,)


def readings(points, rule, price="accuracy"):
    """x, y (2, P): the prices and the students' accuracies."""
    return np.array(
        [[p.row[key] for p in points] for key in (price_column(rule, price), f"student_{rule}_accuracy")]
    )


def draws_of(points, replicate, rule, price, draws):
    """The same (2, B, P) under B resamples of the problems; None where a test's answers are missing.

    NLL is held at its measured value: a test's NLL of single problems is not read.
    """
    x = readings(points, rule, price)[0]
    lines = [np.broadcast_to(x[:, None], (len(x), NUM_DRAWS))] if price == "nll" else []
    for who in ("teacher", "student")[len(lines) :]:
        keys = [[(replicate, p.stages[who]["path"], rule) for p in parts_of(point)] for point in points]
        if any(key not in draws for copies in keys for key in copies):
            return None
        lines.append([np.mean([draws[key] for key in copies], axis=0) for copies in keys])
    return np.array(lines).transpose(0, 2, 1)


def draw_accuracies(pairs, answers):
    """{(replicate, path, rule): accuracies (B,) of a test under NUM_DRAWS resamples of the problems}.

    All stages of a replicate see the same resamples: they were tested on the same problems.
    """
    tests = {}
    for curve in {id(curve): curve for pair in pairs for curve in pair}.values():
        for point in [part for p in [*curve.start, *curve.points] for part in parts_of(p)]:
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


# The undistilled student


def by_label(baselines, rule=None):
    """{label: rows} of undistilled students, a row per seed; what was measured twice is one.

    Ways of asking have other lengths, too: these are named only where nothing else tells two apart.
    """
    names = [name for name in differing(baselines) if name not in SEEDS]
    more = [name for name in names if name not in ("student", "student_few_shot", "student_prefill")]
    short = {}
    for row in baselines:
        short.setdefault(ask_label(row, names), set()).add(tuple(row.get(name) for name in more))
    groups = {}
    for row in baselines:
        label = ask_label(row, names)
        if len(short[label]) > 1:
            told = [name for name in more if row.get(name) is not None]
            label = ", ".join([label, *(f"{show_name(name)} {show_setting(row[name])}" for name in told)])
        if rule is None or has_share(row, f"student_{rule}"):
            groups.setdefault(label, {}).setdefault(row["seed"], []).append(row)
    return {label: [mean_row(rows) for rows in seeds.values()] for label, seeds in groups.items()}


def ask_label(row, names):
    """The undistilled student and how it was asked."""
    way = "prefilled" if row.get("student_prefill") else f"{row['student_few_shot']}-shot"
    return f"undistilled {row['student'] if 'student' in names else 'student'}, {way}"


def elicited(baselines, rule):
    """{label: rows} of the way of asking that gets most out of the undistilled student, of each student and
    dataset: the one with the highest mean over seeds."""
    best, num_ways = {}, {}
    for label, rows in by_label(baselines, rule).items():
        key = tuple(rows[0].get(name) for name in ("student", "data"))
        mean = pooled(rows, f"student_{rule}")[0]
        num_ways[key] = num_ways.get(key, 0) + 1
        if key not in best or mean > best[key][0]:
            best[key] = mean, label, rows
    labels = {key: f": best of {num} ways to ask" if num > 1 else "" for key, num in num_ways.items()}
    return {f"{label}{labels[key]}": rows for key, (_, label, rows) in best.items()}


# What it says


def headline(matches):
    """The Match that the finding is about: ADS, forced answers if there are any, nearest HEADLINE_LEVEL."""
    matched = [m for m in matches if m.arm == "ADS" and m.price == "accuracy" and m.difference is not None]
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
    difference, *ends = in_points(other)
    return (
        f"By {RULES[other.rule]} answers, at a teacher accuracy of {100 * other.level:.3g} %: {shares}, "
        f"a difference of {difference} points{bounds(other, ends)}{f' {MARK}' if other.flags else ''}."
        f"{doubt(other) if other.flags != best.flags else ''}"
    )


def finding(curves, matches):
    """One sentence on what the data show, with a mark where it is in doubt."""
    best = headline(matches)
    if best is None:
        return explain_no_finding(curves)
    temperature, student = (f"{100 * share:.0f} %" for share in (best.temperature, best.student))
    text = (
        f"At a teacher accuracy of {100 * best.level:.3g} % ({RULES[best.rule]} answers), "
        f"temperature-sampled traces bring students to {temperature}, {best.name} traces to {student}"
    )
    difference, *ends = in_points(best)
    if best.low is not None and best.low <= 0 <= best.high:
        text += f": a difference of {difference} points, whose 95 % interval includes 0"
    else:
        text += f": {difference.removeprefix('-')} points {'less' if best.difference > 0 else 'more'}"
        ends = [end.removeprefix("-") for end in (ends if best.difference > 0 else ends[::-1])]
    return f"{text}{bounds(best, ends)}{f' {MARK}' if best.flags else ''}."


def finding_doubt(matches):
    """Why the finding is in doubt, where it is marked."""
    best = headline(matches)
    return doubt(best).strip() if best else ""


def in_points(match):
    """Texts of a Match's difference and, where it has one, its interval, in percentage points."""
    numbers = [match.difference] + ([] if match.low is None else [match.low, match.high])
    return [f"{100 * number:.{digits_for(numbers[1:], 0)}f}" for number in numbers]


def digits_for(ends, digits):
    """The decimals to show: one more where a bound is within a point of 0, so that its sign can be read."""
    return digits + any(abs(end) < 0.01 for end in ends)


def bounds(match, ends):
    """[low, high] and what they stand on, or why there are none."""
    kind = interval_kind(match.num_seeds)
    if not ends:
        return f" ({match.note}; {match.num_seeds} seed{'' if match.num_seeds == 1 else 's'})"
    return f" [{', '.join(ends)}] ({kind})"


def doubt(match):
    """The mark of a Match that is in doubt, with why, as a sentence to add; else empty."""
    return f" {MARK} {'; '.join(match.flags)}." if match.flags else ""


def explain_no_finding(curves):
    arms = {curve.arm for curve in curves}
    if missing := [arm for arm in ("temperature", "ADS") if arm not in arms]:
        return f"No point of {' or '.join(missing)} is complete yet: there is nothing to compare."
    if not any(curve.arm == "ADS" for _, curve in pair_up(curves)):
        rows = [c.points[0].row for c in curves if c.arm in ("temperature", "ADS")]
        names = [key for key in differing(rows) if key not in SEEDS and not concerns_delta(key)]
        what = ", ".join(map(show_name, names)) or "what one of them does not name"
        return f"The temperature and the ADS curve differ in {what}: nothing is compared."
    return "The temperature and the ADS curve have no teacher accuracy in common: nothing is compared."


def controls(matches):
    """A sentence on the other arms, each at the matched level nearest the headline's; empty without any."""
    best = headline(matches)
    others = [m for m in matches if best and m.rule == best.rule and m.price == "accuracy"]
    others = [m for m in others if m.arm != "ADS" and m.difference is not None]
    nearest = {m.name: m for m in sorted(others, key=lambda m: -abs(m.level - best.level))}
    chosen = sorted(nearest.values(), key=lambda m: ARMS.index(m.arm))
    text = [
        f"{m.name} {100 * m.student:.0f} % against {100 * m.temperature:.0f} % "
        f"(teacher {100 * m.level:.0f} %, {show_seeds(m)}){f' {MARK}' if m.flags else ''}"
        for m in chosen
    ]
    if not text:
        return ""
    doubts = f" {MARK} marks a reading in doubt: why is said in the comparison." if any_flags(chosen) else ""
    return f"Controls, against temperature at the same teacher accuracy: {', '.join(text)}.{doubts}"


def any_flags(matches):
    return any(match.flags for match in matches)


def show_seeds(match):
    return f"{match.num_seeds} seed{'' if match.num_seeds == 1 else 's'}"


def show_level(match):
    """The price that a Match is at."""
    if match.level is None or match.price == "accuracy":
        return f"teacher {show_number(match.level)}"
    return f"{PRICES['nll']} {match.level:.3g} nats/token"


def show_match(match):
    """A line for the terminal and the Markdown report."""
    who = f"{RULES[match.rule]}, {show_level(match)}: temperature"
    both = f"{show_number(match.temperature)}, {match.name} {show_number(match.student)}"
    if match.difference is None:
        return f"{who} {both}; {match.note}"
    ends = [] if match.low is None else [match.low, match.high]
    digits = digits_for(ends, 3)
    shown = bounds(match, [f"{end:.{digits}f}" for end in ends])
    return f"{who} {both}, difference {match.difference:.{digits}f}{shown}{doubt(match)}"
