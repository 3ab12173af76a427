"""What the comparison found, in sentences."""

from collections.abc import Iterable, Sequence
from typing import Any

from ads.arms import LABELS
from ads.report import results
from ads.report.compare import Match
from ads.report.curves import Curve, group_by, pair_up, pooled
from ads.report.numbers import fixed, interval_kind, show_number, show_percent, show_seeds
from ads.report.results import ANSWERS, PRICES, SEEDS, ResultRow, Rows, mean_row

HEADLINE_LEVEL = 0.75  # the finding is about the level nearest to this one
SMALL = 0.05  # a difference of accuracies that is shown to a tenth of a point
MARK = "(!)"  # after a number that is in doubt


def mark(found: Any) -> str:
    """The mark of a Match or a Claim with flags."""
    return f" {MARK}" if found.flags else ""


def join_words(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def by_label(baselines: Rows, answers: str | None = None) -> dict[str, list[ResultRow]]:
    """{label: rows} of undistilled students, a row per seed; what was measured twice is one.

    Ways of asking have other lengths, too: these are named only where nothing else tells two apart.
    """
    names = results.differing(baselines, SEEDS)
    more = [name for name in names if name not in ("student", "student_few_shot", "student_prefill")]
    labels = {}
    for label, group in group_by(baselines, lambda row: ask_label(row, "student" in names)).items():
        is_one = len({tuple(map(row.number, more)) for row in group}) == 1
        for row in group:
            told = [] if is_one else [name for name in more if row.number(name) is not None]
            settings = (results.show_named(name, row.number(name)) for name in told)
            labels[id(row)] = ", ".join([label, *settings])
    kept = [row for row in baselines if answers is None or row.accuracy("student", answers).is_share]
    return {
        label: [mean_row(same) for same in group_by(group, lambda row: row.seed).values()]
        for label, group in group_by(kept, lambda row: labels[id(row)]).items()
    }


def ask_label(row: ResultRow, name_student: bool) -> str:
    """The undistilled student and how it was asked."""
    way = "prefilled" if row.student_prefill else f"{row.student_few_shot}-shot"
    return f"undistilled {row.student if name_student else 'student'}, {way}"


def elicited(baselines: Rows, answers: str) -> dict[str, list[ResultRow]]:
    """{label: rows} of the way of asking that gets most out of the undistilled student, of each student and
    dataset: the one with the highest mean over seeds."""
    found = {}
    ways = by_label(baselines, answers).items()
    for group in group_by(ways, lambda way: (way[1][0].student, way[1][0].data)).values():
        label, seeds = max(group, key=lambda way: pooled(way[1], "student", answers)[0])
        found[f"{label}: best of {len(group)} ways to ask" if len(group) > 1 else label] = seeds
    return found


def headline(matches: Iterable[Match]) -> Match | None:
    """The Match that the finding is about: ADS, forced answers if there are any, nearest HEADLINE_LEVEL."""
    return min(
        (m for m in matches if m.arm == "ADS" and m.price == "accuracy" and m.difference is not None),
        key=lambda m: (list(ANSWERS).index(m.answers), abs(m.level - HEADLINE_LEVEL), m.low is None),
        default=None,
    )


def finding(curves: Sequence[Curve], matches: Iterable[Match]) -> str:
    """One sentence on what the data show, with a mark where it is in doubt."""
    best = headline(matches)
    if best is None:
        return explain_no_finding(curves)
    text = (
        f"At a teacher accuracy of {show_percent(best.level)} ({ANSWERS[best.answers]} answers), temperature-"
        f"sampled traces bring students to {percent(best.temperature, best)}, {best.name} traces to "
        f"{percent(best.student, best)}"
    )
    return f"{text}: {how_much_less(best)}."


def how_much_less(match: Match) -> str:
    """A Match's difference with its interval, as points less or more where 0 is not in it."""
    difference, *ends = in_points(match)
    if match.low is not None and match.low <= 0 <= match.high:
        text = f"a difference of {difference} points, whose 95 % interval includes 0"
    else:
        text = f"{difference.removeprefix('-')} points {'less' if match.difference > 0 else 'more'}"
        ends = [end.removeprefix("-") for end in (ends if match.difference > 0 else ends[::-1])]
    return f"{text}{bounds(match, ends)}{mark(match)}"


def explain_no_finding(curves: Sequence[Curve]) -> str:
    arms = {curve.arm for curve in curves}
    if missing := [arm for arm in ("temperature", "ADS") if arm not in arms]:
        return f"No point of {' or '.join(missing)} is complete yet: there is nothing to compare."
    if not any(curve.arm == "ADS" for _, curve in pair_up(curves)):
        first = [c.points[0].row for c in curves if c.arm in ("temperature", "ADS")]
        names = [key for key in results.differing(first, SEEDS) if not results.concerns_defence(key)]
        what = ", ".join(map(results.show_name, names)) or "what one of them does not name"
        return f"The temperature and the ADS curve differ in {what}: nothing is compared."
    return "The temperature and the ADS curve have no teacher accuracy in common: nothing is compared."


def finding_doubt(matches: Iterable[Match]) -> str:
    """Why the finding is in doubt, where it is marked."""
    best = headline(matches)
    return doubt(best).strip() if best else ""


def second_finding(matches: Iterable[Match]) -> str:
    """A sentence on the headline's comparison by raw answers, where the headline is about forced ones."""
    best = headline(matches)
    other = headline(m for m in matches if best and m.name == best.name and m.answers != best.answers)
    if best is None or other is None:
        return ""
    difference, *ends = in_points(other)
    return (
        f"By {ANSWERS[other.answers]} answers, at a teacher accuracy of {show_percent(other.level)}: "
        f"{percent(other.temperature, other)} by temperature, {percent(other.student, other)} by "
        f"{other.name}, a difference of {difference} points{bounds(other, ends)}{mark(other)}."
        f"{doubt(other) if other.flags != best.flags else ''}"
    )


def controls(matches: Iterable[Match]) -> str:
    """A sentence on the other arms, each at the matched level nearest the headline's; empty without any."""
    best = headline(matches)
    if best is None:
        return ""
    others = [m for m in matches if m.arm != "ADS" and m.difference is not None]
    others = [m for m in others if (m.answers, m.price) == (best.answers, "accuracy")]
    nearest = {m.name: m for m in sorted(others, key=lambda m: -abs(m.level - best.level))}
    chosen = sorted(nearest.values(), key=lambda m: LABELS.index(m.arm))
    text = [
        f"{m.name} {whole_percent(m.student)} against {whole_percent(m.temperature)} "
        f"(teacher {whole_percent(m.level)}, {show_seeds(m.num_seeds)}){mark(m)}"
        for m in chosen
    ]
    if not text:
        return ""
    is_doubtful = any(m.flags for m in chosen)
    doubts = f" {MARK} marks a reading in doubt: why is said in the comparison." if is_doubtful else ""
    return f"Controls, against temperature at the same teacher accuracy: {', '.join(text)}.{doubts}"


def whole_percent(share: float) -> str:
    return f"{fixed(100 * share, 0)} %"


def percent(share: float, match: Match) -> str:
    """A student's accuracy beside the difference of a Match."""
    return f"{fixed(100 * share, decimals(match))} %"


def decimals(match: Match) -> int:
    """How many decimals of a percentage a Match needs: whole points would hide how large a small one is."""
    return int(abs(match.difference) < SMALL)


def in_points(match: Match) -> list[str]:
    """Texts of a Match's difference and, where it has one, its interval, in percentage points."""
    numbers = [match.difference] + ([] if match.low is None else [match.low, match.high])
    digits = max(decimals(match), digits_for(numbers[1:], 0))
    return [fixed(100 * number, digits) for number in numbers]


def digits_for(ends: Iterable[float], digits: int) -> int:
    """The decimals to show: more where a bound is close to 0, so that its sign can be read."""
    nearest = min(map(abs, ends), default=1.0)
    return digits + (nearest < 0.01) + (0 < nearest < 0.0005)


def bounds(match: Match, ends: Sequence[str]) -> str:
    """[low, high] and what they stand on, or why there are none."""
    if not ends:
        return f" ({match.note}; {show_seeds(match.num_seeds)})"
    return f" [{', '.join(ends)}] ({interval_kind(match.num_seeds)})"


def doubt(match: Match) -> str:
    """The mark of a Match that is in doubt, with why, as a sentence to add; else empty."""
    return f"{mark(match)} {'; '.join(match.flags)}." if match.flags else ""


def show_match(match: Match) -> str:
    """A line for the terminal and the Markdown report."""
    where = f"teacher {show_number(match.level)}"
    if match.price != "accuracy" and match.level is not None:
        price = PRICES[match.price]
        where = f"{price.words} {price.show_with_unit(match.level)}"
    text = f"{ANSWERS[match.answers]}, {where}: temperature {show_number(match.temperature)}, "
    text += f"{match.name} {show_number(match.student)}"
    if match.difference is None:
        return f"{text}; {match.note}"
    ends = [] if match.low is None else [match.low, match.high]
    digits = digits_for(ends, 3)
    shown = bounds(match, [fixed(end, digits) for end in ends])
    return f"{text}, difference {fixed(match.difference, digits)}{shown}{doubt(match)}"
