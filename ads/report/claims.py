"""The claims that a demo is judged by, each with what was found: words and verdicts come from the numbers.

All by raw answers: forcing an answer hides much of what a defence costs and of what a student cannot do.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np

from ads.report.compare import (
    PRICES,
    choose_levels,
    common_range,
    compare,
    directions,
    graded_points,
    pair_up,
    readings,
    replicate_of,
    replicates,
)
from ads.report.curves import (
    RULES,
    SYMBOLS,
    by_setting,
    graded,
    has_share,
    identity,
    is_number,
    pooled,
    rules_of,
    show_number,
    show_setting,
    show_signed,
)
from ads.report.words import MARK, by_label, elicited

RULE = "raw"
MOST_BASE = 0.25  # of the undistilled student, asked in the best way
LEAST_CLEAN = 0.85  # of the student of clean traces
LEAST_GAPS = {0.85: 0.15, 0.75: 0.25}  # teacher accuracy: temperature - ADS
MOST_RANDOM = 0.07  # of the distance between a random direction and temperature
ABOVE_0 = float(np.nextafter(0, 1))
HOLDS, FAILS, UNMEASURED = "holds", "does not hold", "not measured"
PARTLY = "holds as far as it was measured"
THIS_SEED = ", this seed only"
WAYS = ("zero-shot", "few-shot", "prefilled")
RULES_OF_VERDICT = f"""\
Differences are of students' accuracies by raw answers. A claim holds where the number and the whole of its
95 % interval lie on its side: the t interval over seeds (of one accuracy, no narrower than Wilson's). One
seed has an interval of its problems only, or none, and its verdict says "this seed only". {MARK} marks what
is in doubt."""
HEADER = ("", "claim", "found", "95 % interval", "seeds", "verdict")


@dataclass(frozen=True)
class Claim:
    """A claim, the number it is about, and the verdict; `note` says what was missing or who harms more.

    It holds where the number lies from `least` to `most`.
    """

    key: str
    claim: str
    found: float | None
    low: float | None
    high: float | None
    num_seeds: int
    verdict: str
    note: str = ""
    flags: tuple = ()
    price: str = ""
    least: float = -np.inf
    most: float = np.inf


def make_claims(curves, baselines, draws, missing=""):
    """The claims a to f of an experiment, whatever of them was measured."""
    arms = choose_arms(curves)
    if not arms:
        return []
    compared = (arms, draws, missing)
    return [
        base_claim(arms, baselines),
        clean_claim(arms),
        *gap_claims(compared),
        *difference_claims("c", "temperature", "ADS", compared, "nll"),
        *difference_claims("d", "negative lambda", "ADS", compared),
        *random_claims(compared),
        *difference_claims("f", "corrupted results", "ADS", compared),
        *difference_claims("f", "corrupted results", "ADS", compared, "nll"),
    ]


def choose_arms(curves):
    """{arm: curve} that share all settings but those of Delta; of several, those with the most settings."""
    pairs = pair_up(curves)
    ads = [pair for pair in pairs if pair[1].arm == "ADS"]
    temperature = [(curve, curve) for curve in curves if curve.arm == "temperature"]
    if not (ads or temperature):
        return {}
    baseline = max(ads or temperature, key=lambda pair: num_settings(pair[1]))[0]
    arms = {"temperature": baseline}
    for first, curve in pairs:
        if first is baseline and num_settings(curve) > num_settings(arms.get(curve.arm)):
            arms[curve.arm] = curve
    return arms


def num_settings(curve):
    return len(by_setting(curve.points)) if curve else 0


def base_claim(arms, baselines):
    """a: no way of asking gets the skill out of the undistilled student."""
    text = f"undistilled student, asked in the best way: at most {show(MOST_BASE, 2)}"
    first = arms["temperature"].points[0].row
    ours = [row for row in baselines if all(row.get(key) == first[key] for key in ("student", "data"))]
    best = elicited(ours, RULE)
    if not best:
        return unmeasured("a", text, "no test of the undistilled student")
    ((label, rows),) = best.items()
    claim = judge("a", text, *pooled(rows, f"student_{RULE}"), len(rows), most=MOST_BASE)
    asked = {way_of(row) for row in ours}
    absent = [way for way in WAYS if way not in asked]
    if absent and claim.verdict.startswith(HOLDS):
        return unmeasured("a", text, f"no {' and no '.join(absent)} test; {label}: {show(claim.found)}")
    return add_note(claim, label)


def way_of(row):
    if row.get("student_prefill"):
        return "prefilled"
    return "few-shot" if row["student_few_shot"] else "zero-shot"


def clean_claim(arms):
    """a: there is something to learn."""
    text = f"student of clean traces (temperature at its lowest): at least {show(LEAST_CLEAN, 2)}"
    (tau, _), rows = next(iter(by_setting(arms["temperature"].points).items()))
    rows = graded(rows, RULE)
    if not rows:
        return unmeasured("a", text, f"no {RULE} answers")
    found = pooled(rows, f"student_{RULE}")
    claim = judge("a", text, *found, len(rows), least=LEAST_CLEAN)
    return add_note(claim, f"{SYMBOLS['tau']} {show_setting(tau)}")


def gap_claims(compared):
    """b: at equal teacher accuracy students of ADS learn less, by so much."""
    found = matches_of("temperature", "ADS", compared)
    for level, least in LEAST_GAPS.items():
        text = f"{name_of('temperature', 'ADS', 'accuracy', level)}: at least {show(least, 2)}"
        yield from_match("b", text, found, level, "ADS", least=least)


def difference_claims(key, first, second, compared, price="accuracy"):
    """c, d, f: `first` leaves students better than `second` does, at every level."""
    found = matches_of(first, second, compared, price)
    for level in [match.level for match in found or ()] or (
        list(LEAST_GAPS) if price == "accuracy" else [None]
    ):
        text = f"{name_of(first, second, price, level)}: above 0"
        claim = from_match(key, text, found, level, missing_arm(compared[0], first, second), least=ABOVE_0)
        winner = "" if key == "c" or claim.found is None else who_harms_more(claim, first, second)
        yield add_note(claim, winner)


def random_claims(compared):
    """e: without the gradient's direction, its perturbation does nothing."""
    first, second = "temperature", "random direction"
    found = matches_of(first, second, compared)
    levels = [match.level for match in found or () if match.num_seeds]
    for level in levels or [match.level for match in found or ()][:1] or [None]:
        text = f"{name_of(first, second, 'accuracy', level)}: within {show(MOST_RANDOM, 2)} of 0"
        claim = from_match("e", text, found, level, second, least=-MOST_RANDOM, most=MOST_RANDOM)
        yield add_note(claim, show_directions(compared[0].get(second)))


def show_directions(curve):
    """How many random directions a seed's reading is the mean of, where they are several."""
    if curve is None:
        return ""
    num = [len(directions(points)) for points in replicates(curve.points).values()]
    ends = " to ".join(map(str, sorted({min(num), max(num)})))
    return f"mean of {ends} directions a seed" if max(num) > 1 else ""


def matches_of(first, second, compared, price="accuracy"):
    """The matches of two arms at the claims' levels, by raw answers; None where an arm is missing."""
    arms, draws, missing = compared
    if not (first in arms and second in arms):
        return None
    pairs = [(arms[first], arms[second])]
    levels = choose_levels(pairs, RULE, price) if price == "nll" else accuracies_for(*pairs[0])
    found = compare(pairs, dict.fromkeys(RULES, levels), draws, missing, price)
    return [match for match in found if match.rule == RULE]


def accuracies_for(first, second):
    """The claims' teacher accuracies; where an arm never costs so much, the lowest that both arms reach.

    Else an arm that harms for next to nothing would be left out of the comparison.
    """
    low, high = common_range((first, second), RULE)
    if first.arm == "temperature" or low <= max(LEAST_GAPS) or low >= high:
        return tuple(LEAST_GAPS)
    ends = [lowest(points) for curve in (first, second) for points in by_seed(curve) if points]
    return (float(np.ceil(1000 * max(ends)) / 1000),)


def by_seed(curve):
    """The points of a curve with its start, graded, a list a seed."""
    seeds = replicates([*curve.start, *curve.points]).values()
    return [graded_points(points, RULE) for points in seeds]


def lowest(points):
    return readings(points, RULE)[0].min()


def missing_arm(arms, *names):
    return " and ".join(name for name in names if name not in arms)


def from_match(key, text, found, level, absent, **side):
    """A claim about the Match at a level, None being whatever level it is."""
    if found is None:
        return unmeasured(key, text, f"no {absent} arm")
    match = next((match for match in found if match.level == level), None)
    if match is None:
        return unmeasured(key, text, "no such price that both arms reach")
    if match.difference is None:
        return unmeasured(key, text, match.note)
    claim = judge(key, text, match.difference, match.low, match.high, match.num_seeds, match.note, **side)
    return dataclasses.replace(claim, flags=match.flags, price=match.price)


def judge(key, text, found, low, high, num_seeds, note="", least=-np.inf, most=np.inf):
    """The verdict on a number: the whole of its interval has to lie from `least` to `most`."""
    if num_seeds > 1 and low is None:
        return Claim(key, text, found, low, high, num_seeds, UNMEASURED, note, least=least, most=most)
    ends = [found] if low is None else [found, low, high]
    verdict = HOLDS if all(least <= end <= most for end in ends) else FAILS
    only = THIS_SEED if num_seeds == 1 else ""
    return Claim(key, text, found, low, high, num_seeds, verdict + only, note, least=least, most=most)


def unmeasured(key, text, why):
    return Claim(key, text, None, None, None, 0, UNMEASURED, why)


def add_note(claim, note):
    return dataclasses.replace(claim, note="; ".join(filter(None, (claim.note, note))))


def who_harms_more(claim, first, second):
    """In words, which of two arms leaves students worse; the number is first minus second."""
    winner = second if claim.found > 0 else first
    if claim.low is not None and claim.low <= 0 <= claim.high:
        return f"neither shown to harm more, {winner} in the mean"
    return f"{winner} harm{'' if winner.endswith('s') and winner != 'ADS' else 's'} more"


def show(value, digits=3):
    """A share or a difference with its sign, as in .150 and -.020."""
    return "-" if value is None else f"{value:.{digits}f}".replace("0.", ".", 1)


def name_of(first, second, price, level):
    """The difference of two arms at a price, in words."""
    if level is None:
        return f"{first} - {second} at equal {PRICES[price]}"
    where = f"{100 * level:.3g} %" if price == "accuracy" else f"{level:.3g} nats/token"
    return f"{first} - {second} at a {PRICES[price]} of {where}"


def show_interval(claim):
    return "-" if claim.low is None else f"[{show(claim.low)}, {show(claim.high)}]"


def cells(claims):
    """Header and lines of the table."""
    lines = [list(HEADER)]
    for claim in claims:
        mark = f" {MARK}" if claim.flags else ""
        verdict = f"{claim.verdict} ({claim.note})" if claim.note else claim.verdict
        numbers = [f"{show(claim.found)}{mark}", show_interval(claim), str(claim.num_seeds or "-")]
        lines.append([claim.key, claim.claim, *numbers, verdict])
    return lines


def lines(claims):
    """A line per claim, for the terminal."""
    for key, text, found, interval, seeds, verdict in cells(claims)[1:]:
        yield f"{key}  {text}: {verdict}; found {found} {interval}, seeds {seeds}"


def failures(claims):
    """The verdicts in words, for the first paragraph: how many seeds, and what was found where one fails.

    A claim holds if it does at every price.
    """
    if not claims:
        return ""
    verdicts = {key: verdict_of([c for c in claims if c.key == key]) for key in keys_of(claims)}
    keys = {v: [key for key in verdicts if verdicts[key] == v] for v in (HOLDS, PARTLY, FAILS, UNMEASURED)}
    parts = [f"On {count_seeds(claims)}, by {RULE} answers, {say(keys[HOLDS]) or 'none'} of the claims"]
    parts[0] += f" a to f hold{'s' if len(keys[HOLDS]) == 1 else ''}."
    if failed := [claim for claim in claims if claim.verdict.startswith(FAILS)]:
        parts.append(f"Does not hold: {'; '.join(show_failures(failed))}.")
    for verdict in (PARTLY, UNMEASURED):
        if keys[verdict]:
            parts.append(f"{verdict.capitalize()}: {say(keys[verdict])}.")
    return " ".join(parts)


def verdict_of(claims):
    """The verdict on a claim as a whole, of those at each price."""
    verdicts = [claim.verdict.removesuffix(THIS_SEED) for claim in claims]
    if FAILS in verdicts:
        return FAILS
    return verdicts[0] if len(set(verdicts)) == 1 else PARTLY


def keys_of(claims):
    return list(dict.fromkeys(claim.key for claim in claims))


def say(names):
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def count_seeds(claims):
    """In words, on how many seeds the claims stand."""
    found = sorted({claim.num_seeds for claim in claims if claim.num_seeds})
    if found in ([], [1]):
        return "one seed only" if found else "no seed"
    return f"{' to '.join(map(str, dict.fromkeys((found[0], found[-1]))))} seeds"


def show_failures(failed):
    """The same claim that fails at several prices once, where it is the farthest from holding."""
    groups = {}
    for claim in failed:
        same = (claim.key, claim.price, claim.least, claim.most) if claim.price else claim.claim
        groups.setdefault(same, []).append(claim)
    for group in groups.values():
        worst = max(group, key=lambda claim: max(claim.least - claim.found, claim.found - claim.most))
        others = f", and at {len(group) - 1} more price{'s' if len(group) > 2 else ''}"
        yield show_failure(worst) + (others if len(group) > 1 else "")


def show_failure(claim):
    mark = f" {MARK}" if claim.flags else ""
    ends = "" if claim.low is None else f" {show_interval(claim)}"
    note = f" ({claim.note})" if claim.note else ""
    return f"({claim.key}) {claim.claim}, found {show(claim.found)}{ends}{mark}{note}"


def asked_cells(baselines):
    """The undistilled student by the way it was asked: means over seeds with intervals, the best marked."""
    rules = rules_of(baselines)
    found = [["undistilled student", "seeds", *rules.values(), "best by"]]
    best = {rule: elicited(baselines, rule).values() for rule in rules}
    for label, rows in by_label(baselines).items():
        line = [label.removeprefix("undistilled student, "), str(len(rows))]
        for rule in rules:
            graded = [row for row in rows if has_share(row, f"student_{rule}")]
            numbers = [show_number(v) for v in pooled(graded, f"student_{rule}")] if graded else []
            line.append(f"{numbers[0]} [{', '.join(numbers[1:])}]" if graded else "-")
        names = [name for rule, name in rules.items() if rows in best[rule]]
        found.append([*line, " and ".join(names) or "-"])
    return found if len(found) > 1 else []


def one_step_cells(curves):
    """By arm: the proxy's change of loss, what students of the same traces lost, and whether ranks agree."""
    points = [point for curve in curves for point in curve.points if has_step(point.row)]
    if not points:
        return []
    clean = clean_students(curves)
    groups = {}
    for point in points:
        groups.setdefault(point.row["arm"], []).append(point)
    header = [
        "arm",
        "points",
        "one-step change",
        "its range",
        "student's loss of accuracy",
        "rank correlation",
    ]
    groups = groups | ({"all": points} if len(groups) > 1 else {})
    return [header, *(one_step_line(arm, group, clean) for arm, group in groups.items())]


def has_step(row):
    return is_number(row.get("train_one_step_change")) and has_share(row, f"student_{RULE}")


def clean_students(curves):
    """{(replicate, settings without Delta's): accuracy of the student of temperature's lowest}."""
    found = {}
    for curve in [curve for curve in curves if curve.arm == "temperature"]:
        for point in sorted(curve.points, key=lambda point: point.row["tau"]):
            if has_share(point.row, f"student_{RULE}"):
                found.setdefault(clean_key(point), point.row[f"student_{RULE}_accuracy"])
    return found


def clean_key(point):
    return replicate_of(point), identity(point.row, with_delta=False)


def one_step_line(arm, points, clean):
    change = [point.row["train_one_step_change"] for point in points]
    students = [point.row[f"student_{RULE}_accuracy"] for point in points]
    keys = [clean_key(point) for point in points]
    harm = [clean[key] - student for key, student in zip(keys, students, strict=True) if key in clean]
    ends = " to ".join(show_signed(value) for value in (min(change), max(change)))
    lost = f"{np.mean(harm):+.3f}" if harm else "-"
    mean = show_signed(float(np.mean(change)))
    return [arm, str(len(points)), mean, ends, lost, rank_correlation(change, students)]


def rank_correlation(change, students):
    """Spearman's, with n; none of fewer than three points or where one side does not vary."""
    from scipy import stats  # half a second

    if len(change) < 3 or len(set(change)) < 2 or len(set(students)) < 2:
        return f"- (n {len(change)})"
    return f"{stats.spearmanr(change, students).statistic:+.2f} (n {len(change)})"
