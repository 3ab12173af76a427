"""Students compared at equal price: the arms at one accuracy or NLL of the teacher, with intervals."""

import dataclasses
from dataclasses import dataclass

import numpy as np

from ads.report.curves import (
    NLL,
    NO_SHARE,
    POOLED,
    RULES,
    SYMBOLS,
    by_setting,
    graded,
    identity,
    lost_shares,
    price_column,
    replicate_of,
    seed_interval,
    short_label,
    show_setting,
)

LEVELS = (0.85, 0.8, 0.75, 0.65)  # teacher accuracies to compare at
NUM_LEVELS = 4  # where LEVELS do not fit
NUM_DRAWS = 2000
BLOCK = 250  # draws resampled at once: bounds the memory for large test sets
LEAST_BRACKETED = 0.9  # share of the draws that must reach a level
WIDEST_BRACKET = 0.1  # of teacher accuracy, between the settings that a reading lies between
WIDEST_SHARE = 0.25  # the same for teacher NLL, as a share of the range that both curves span
WIDE = "is read across more than 10 points of teacher accuracy"
WIDE_NLL = "is read across more than a quarter of the teacher NLL that both curves span"
ZIGZAG = "is not monotone there, it meets this teacher accuracy"
PRICES = {"accuracy": "teacher accuracy", "nll": "teacher NLL"}


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
