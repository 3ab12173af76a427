"""What the comparison found, in sentences."""

from ads.arms import LABELS
from ads.report.compare import PRICES, pair_up
from ads.report.curves import (
    RULES,
    SEEDS,
    concerns_delta,
    differing,
    has_share,
    interval_kind,
    mean_row,
    pooled,
    show_name,
    show_number,
    show_setting,
)

HEADLINE_LEVEL = 0.75  # the finding is about the level nearest to this one
MARK = "(!)"  # after a number that is in doubt


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
    chosen = sorted(nearest.values(), key=lambda m: LABELS.index(m.arm))
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
