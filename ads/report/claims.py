"""The claims that a demo is judged by, each with what was found: words and verdicts come from the numbers.

All by raw answers: forcing an answer hides much of what a defence costs and of what a student cannot do.
A claim on the difference of two arms is a line of DIFFERENCES.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ads.report.bootstrap import Draws
from ads.report.compare import Levels, Match, Measured, choose_levels, common_range, compare, directions
from ads.report.curves import Axes, Curve, by_replicate, by_setting, group_by, pair_up, pooled
from ads.report.numbers import show_interval, show_number, show_span
from ads.report.results import PRICES, ResultRow, Rows, show_knob
from ads.report.words import MARK, elicited, headline, join_words, mark

RAW = "raw"
MOST_BASE = 0.25  # of the undistilled student, asked in the best way
LEAST_CLEAN = 0.85  # of the student of clean traces
LEVELS = (0.85, 0.75)  # teacher accuracies that arms are compared at
ABOVE_0 = float(np.nextafter(0, 1))
HOLDS, FAILS, UNMEASURED = "holds", "does not hold", "not measured"
PARTLY = "holds as far as it was measured"
THIS_SEED = ", this seed only"
WAYS = ("zero-shot", "few-shot", "prefilled")
VERDICTS = f"""\
Differences are of students' accuracies by raw answers. A claim holds where the number and the whole of its
95 % interval lie on its side: the t interval over seeds (of one accuracy, no narrower than Wilson's). One
seed has an interval of its problems only, or none, and its verdict says "this seed only". {MARK} marks what
is in doubt."""
HEADER = ["", "claim", "found", "95 % interval", "seeds", "verdict"]


@dataclass(frozen=True)
class Difference:
    """What is claimed of two arms: the accuracy that the first leaves students minus the second's, at a
    price, lies from `least` to `most`.

    `level`: the one price it is about; else it is about all at which the arms are compared.
    """

    key: str
    first: str
    second: str
    price: str
    words: str
    least: float
    most: float = np.inf
    level: float | None = None


DIFFERENCES = (
    Difference("b", "temperature", "ADS", "accuracy", "at least .15", 0.15, level=0.85),
    Difference("b", "temperature", "ADS", "accuracy", "at least .25", 0.25, level=0.75),
    Difference("c", "temperature", "ADS", "nll", "above 0", ABOVE_0),
    Difference("d", "negative lambda", "ADS", "accuracy", "above 0", ABOVE_0),
    # without the gradient's direction, its perturbation does nothing
    Difference("e", "temperature", "random direction", "accuracy", "within .07 of 0", -0.07, 0.07),
    Difference("f", "corrupted results", "ADS", "accuracy", "above 0", ABOVE_0),
    Difference("f", "corrupted results", "ADS", "nll", "above 0", ABOVE_0),
)


WORST = Difference("g", "temperature", "ADS", "accuracy", "above 0", ABOVE_0)


@dataclass(frozen=True)
class Claim:
    """A claim, the number it is about, and the verdict; `note` says what was missing or who harms more.

    It holds where the number lies from `least` to `most`.
    """

    key: str
    claim: str
    found: Measured = None
    low: Measured = None
    high: Measured = None
    num_seeds: int = 0
    verdict: str = UNMEASURED
    note: str = ""
    flags: tuple[str, ...] = ()
    price: str = ""
    least: float = -np.inf
    most: float = np.inf


def make_claims(curves: Sequence[Curve], baselines: Rows, draws: Draws) -> list[Claim]:
    """The claims a to f of an experiment, whatever of them was measured; g: `worst_claim`."""
    arms = choose_arms(curves)
    if not arms:
        return []
    claims = [base_claim(arms["temperature"], baselines), clean_claim(arms["temperature"])]
    for asked in DIFFERENCES:
        claims += difference_claims(asked, arms, compare_two(asked, arms, draws))
    return claims


def worst_claim(matches: Iterable[Match]) -> list[Claim]:
    """The claim g, of matches of the worst students: that ADS leaves the best attacker less."""
    ours = [match for match in matches if (match.arm, match.answers, match.price) == ("ADS", RAW, "accuracy")]
    if not ours:
        return []
    match = headline(ours) or ours[0]
    name = difference_name(WORST, None if match.difference is None else match.level)
    claim = Claim(WORST.key, f"worst students: {name}: {WORST.words}", least=WORST.least, note=match.note)
    return [judge_match(claim, match)]


def choose_arms(curves: Sequence[Curve]) -> dict[str, Curve]:
    """{arm: curve} that share all settings but those of Delta; of several, one without a cap, and of these
    one with the most settings."""
    pairs = pair_up(curves)
    candidates = [pair for pair in pairs if pair[1].arm == "ADS"]
    candidates = candidates or [(curve, curve) for curve in curves if curve.arm == "temperature"]
    if not candidates:
        return {}
    baseline, _ = max(candidates, key=lambda pair: weight(pair[1]))
    arms = {"temperature": baseline}
    for first, curve in pairs:
        if first is baseline and weight(curve) > weight(arms.get(curve.arm)):
            arms[curve.arm] = curve
    return arms


def weight(curve: Curve | None) -> tuple[bool, int]:
    """By which one of several curves of an arm is chosen: whether it has no cap, the number of settings."""
    return (not curve.caps, len(by_setting(curve.points))) if curve else (False, 0)


def base_claim(temperature: Curve, baselines: Rows) -> Claim:
    """a: no way of asking gets the skill out of the undistilled student."""
    text = f"undistilled student, asked in the best way: at most {show_number(MOST_BASE, 2)}"
    blank = Claim("a", text, most=MOST_BASE)
    first = temperature.points[0].row
    ours = [row for row in baselines if (row.student, row.data) == (first.student, first.data)]
    best = elicited(ours, RAW)
    if not best:
        return replace(blank, note="no test of the undistilled student")
    ((label, rows),) = best.items()
    claim = judge(blank, *pooled(rows, "student", RAW), len(rows))
    absent = [way for way in WAYS if way not in set(map(way_of, ours))]
    if absent and claim.verdict.startswith(HOLDS):
        return replace(blank, note=f"no {' and no '.join(absent)} test; {label}: {show_number(claim.found)}")
    return replace(claim, note=label)


def way_of(row: ResultRow) -> str:
    if row.student_prefill:
        return "prefilled"
    return "few-shot" if row.student_few_shot else "zero-shot"


def clean_claim(temperature: Curve) -> Claim:
    """a: there is something to learn."""
    text = f"student of clean traces (temperature at its lowest): at least {show_number(LEAST_CLEAN, 2)}"
    blank = Claim("a", text, least=LEAST_CLEAN)
    rows = Axes(RAW).graded_rows(next(iter(by_setting(temperature.points).values())))
    if not rows:
        return replace(blank, note=f"no {RAW} answers")
    claim = judge(blank, *pooled(rows, "student", RAW), len(rows))
    return replace(claim, note=show_knob(rows[0]))


def compare_two(asked: Difference, arms: Mapping[str, Curve], draws: Draws) -> list[Match] | None:
    """The matches of two arms at the claims' levels, by raw answers; None where an arm is missing."""
    if not (asked.first in arms and asked.second in arms):
        return None
    pair, axes = (arms[asked.first], arms[asked.second]), Axes(RAW, asked.price)
    levels = accuracies_for(pair, axes) if asked.price == "accuracy" else choose_levels([pair], axes)
    return compare([pair], axes, levels, draws)


def accuracies_for(pair: tuple[Curve, Curve], axes: Axes) -> Levels:
    """The claims' teacher accuracies; where an arm never costs so much, the lowest that both arms reach.

    Else an arm that harms for next to nothing would be left out of the comparison.
    """
    low, high = common_range(pair, axes)
    if pair[0].arm == "temperature" or low <= max(LEVELS) or low >= high:
        return LEVELS
    seeds = [by_replicate(axes.graded(curve.line)) for curve in pair]
    lowest = max(axes.xy(points)[0].min() for side in seeds for points in side.values())
    return (float(np.ceil(1000 * lowest) / 1000),)


def difference_claims(
    asked: Difference, arms: Mapping[str, Curve], matches: Sequence[Match] | None
) -> Iterable[Claim]:
    """A claim at each price that it is about, be it measured or not."""
    levels: Sequence[float | None] = [match.level for match in matches or ()]
    if asked.level is not None:
        levels = [asked.level]
    elif not levels:
        levels = LEVELS if (asked.second, asked.price) == ("ADS", "accuracy") else [None]
    absent = " and ".join(arm for arm in (asked.first, asked.second) if arm not in arms)
    for level in levels:
        text = f"{difference_name(asked, level)}: {asked.words}"
        claim = Claim(asked.key, text, least=asked.least, most=asked.most)
        match = next((match for match in matches or () if match.level == level), None)
        note = f"no {absent} arm" if matches is None else "no such price that both arms reach"
        if match is not None:
            note = match.note
            claim = judge_match(claim, match)
        notes = (note, show_directions(arms.get(asked.second)) or who_harms_more(claim, asked))
        yield replace(claim, note="; ".join(filter(None, notes)))


def difference_name(asked: Difference, level: float | None) -> str:
    """The difference of two arms at a price, in words."""
    name, price = f"{asked.first} - {asked.second}", PRICES[asked.price]
    if level is None:
        return f"{name} at equal {price.words}"
    return f"{name} at a {price.words} of {price.show_with_unit(level)}"


def judge_match(claim: Claim, match: Match) -> Claim:
    """The claim with what a match found and its verdict; as it is where there is no difference."""
    if match.difference is None:
        return claim
    claim = replace(claim, flags=match.flags, price=match.price)
    return judge(claim, match.difference, match.low, match.high, match.num_seeds)


def judge(claim: Claim, found: float, low: Measured, high: Measured, num_seeds: int) -> Claim:
    """The claim with its verdict: the whole of the number's interval has to lie from `least` to `most`."""
    claim = replace(claim, found=found, low=low, high=high, num_seeds=num_seeds)
    if num_seeds > 1 and low is None:
        return claim
    ends = [found] if low is None else [found, low, high]
    verdict = HOLDS if all(claim.least <= end <= claim.most for end in ends) else FAILS
    return replace(claim, verdict=verdict + (THIS_SEED if num_seeds == 1 else ""))


def show_directions(curve: Curve | None) -> str:
    """How many random directions a seed's reading is the mean of, where they are several."""
    if curve is None or curve.arm != "random direction":
        return ""
    num = [len(directions(points)) for points in by_replicate(curve.points).values()]
    return f"mean of {show_span(num)} directions a seed" if max(num) > 1 else ""


def who_harms_more(claim: Claim, asked: Difference) -> str:
    """In words, which of two arms that are both no baseline leaves students worse."""
    if claim.found is None or asked.first == "temperature":
        return ""
    winner = asked.second if claim.found > 0 else asked.first
    if claim.low is not None and claim.low <= 0 <= claim.high:
        return f"neither shown to harm more, {winner} in the mean"
    return f"{winner} harm{'' if winner.endswith('s') and winner != 'ADS' else 's'} more"


def cells(claims: Iterable[Claim]) -> list[list[str]]:
    """Header and lines of the table."""
    lines = [HEADER]
    for claim in claims:
        verdict = f"{claim.verdict} ({claim.note})" if claim.note else claim.verdict
        numbers = [f"{show_number(claim.found)}{mark(claim)}", show_interval(claim.low, claim.high)]
        lines.append([claim.key, claim.claim, *numbers, str(claim.num_seeds or "-"), verdict])
    return lines


def failures(claims: Sequence[Claim]) -> str:
    """The verdicts in words, for the first paragraph: how many seeds, and what was found where one fails.

    A claim holds if it does at every price.
    """
    if not claims:
        return ""
    verdicts = {key: verdict_of(same) for key, same in group_by(claims, lambda claim: claim.key).items()}
    keys = {v: [key for key in verdicts if verdicts[key] == v] for v in (HOLDS, PARTLY, UNMEASURED)}
    text = f"On {seeds_in_words(claims)}, by {RAW} answers, {join_words(keys[HOLDS]) or 'none'} of the claims"
    parts = [f"{text} a to {claims[-1].key} hold{'s' if len(keys[HOLDS]) == 1 else ''}."]
    if failed := [claim for claim in claims if claim.verdict.startswith(FAILS)]:
        parts.append(f"Does not hold: {'; '.join(show_failures(failed))}.")
    for verdict in (PARTLY, UNMEASURED):
        if keys[verdict]:
            parts.append(f"{verdict.capitalize()}: {join_words(keys[verdict])}.")
    return " ".join(parts)


def verdict_of(claims: Iterable[Claim]) -> str:
    """The verdict on a claim as a whole, of those at each price."""
    verdicts = {claim.verdict.removesuffix(THIS_SEED) for claim in claims}
    if FAILS in verdicts:
        return FAILS
    return verdicts.pop() if len(verdicts) == 1 else PARTLY


def seeds_in_words(claims: Iterable[Claim]) -> str:
    """On how many seeds the claims stand."""
    found = sorted({claim.num_seeds for claim in claims if claim.num_seeds})
    if found in ([], [1]):
        return "one seed only" if found else "no seed"
    return f"{show_span(found)} seeds"


def show_failures(failed: Iterable[Claim]) -> Iterable[str]:
    """The same claim that fails at several prices once, where it is the farthest from holding."""
    for group in group_by(
        failed, lambda c: (c.key, c.price, c.least, c.most) if c.price else c.claim
    ).values():
        worst = max(group, key=lambda claim: max(claim.least - claim.found, claim.found - claim.most))
        interval = "" if worst.low is None else f" {show_interval(worst.low, worst.high)}"
        note = f" ({worst.note})" if worst.note else ""
        more = f", and at {len(group) - 1} more price{'s' if len(group) > 2 else ''}"
        found = f"found {show_number(worst.found)}{interval}{mark(worst)}{note}"
        yield f"({worst.key}) {worst.claim}, {found}{more if len(group) > 1 else ''}"
