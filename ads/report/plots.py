"""The report's plots: what each panel draws, and the numbers that it shows."""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ads.arms import LABELS
from ads.report import results
from ads.report.attacked import Attacked
from ads.report.compare import Match
from ads.report.curves import Axes, Curve, all_rows, by_setting, knobs, pooled
from ads.report.figures import INK, MUTED, Drawn, Label, Panel, Triple, arm_label, show_amount, show_shares
from ads.report.looks import COLOURS, LEVEL, LOOKS, MARKERS, OWN, Look, looks
from ads.report.numbers import is_number, seed_interval, show_number, show_percent, show_seeds, show_setting
from ads.report.results import ANSWERS, PRICES, Number, ResultRow, Rows, show_knob, show_knobs
from ads.report.words import elicited, headline, in_points, mark

MOST_LOSS_MARKERS = 6  # on a line
WIDE_SPAN = 50  # of prices, from the least to the largest
NO_CONTROLS = ("temperature", "ADS", "negative lambda", "undistilled")
KNOBS = (  # of which arms there is a panel; the gradient's two share one
    *(("tau", ("temperature",)), ("lam", ("ADS", "negative lambda"))),
    *(("lam", (arm,)) for arm in LABELS if arm not in NO_CONTROLS),
)


def make_panels(curves: Sequence[Curve], baselines: Rows, matches: Iterable[Match]) -> dict[str, list[Panel]]:
    """{name of the plot: its panels}; plots without data have none, but the trade-off is always there."""
    gap, rows = headline(matches), all_rows(curves)
    panels: dict[str, list[Panel]] = {"tradeoff": [], "knobs": [], "traces": [], "losses": []}
    for answers, name in results.distinct_answers([*baselines, *rows]).items():
        for axes in (Axes(answers, price) for price in PRICES):
            if axes.price == "accuracy" or axes.graded_rows(rows):
                shown = gap if gap and (gap.answers, gap.price) == (answers, axes.price) else None
                draw = functools.partial(draw_tradeoff, axes, curves, baselines, shown)
                panels["tradeoff"].append(price_panel(axes, f"{name.capitalize()} answers", draw))
        panels["knobs"] += knob_panels(Axes(answers), name, curves)
    for number in results.NUMBERS:
        if number.title and any(number.column in row.columns for row in rows):
            draw = functools.partial(draw_trait, number, curves)
            panels["traces"].append(Panel(number.title, draw))
    for part, title in (("train", "Loss on the traces"), ("holdout", "Loss on clean holdout traces")):
        if any(loss_lines(curve, part) for curve in curves):
            panels["losses"].append(Panel(title, functools.partial(draw_losses, part, curves)))
    return panels


def worst_panels(attacked: Attacked, baselines: Rows) -> dict[str, list[Panel]]:
    """{"worst": a panel for each kind of answers and each price}: what each defence leaves to the best
    attacker; none without several attackers."""
    rows, panels = all_rows(attacked.curves), []
    for answers, name in results.distinct_answers(rows).items() if rows else ():
        for axes in (Axes(answers, price) for price in PRICES):
            if axes.graded_rows(rows):
                draw = functools.partial(draw_worst, axes, attacked, baselines)
                panels.append(price_panel(axes, f"Worst student: {name} answers", draw))
    return {"worst": panels} if panels else {}


def price_panel(axes: Axes, title: str, draw: Callable[[Any], Drawn]) -> Panel:
    price = "" if axes.price == "accuracy" else f", price in {PRICES[axes.price].short}"
    return Panel(f"{title}{price}", draw, axes.price, axes.answers)


def show_share(value: float, _position: int | None = None) -> str:
    return show_percent(value)


def draw_tradeoff(
    axes: Axes, curves: Sequence[Curve], baselines: Rows, gap: Match | None, axis: Any
) -> Drawn:
    """Students against a price, a line an arm, seeds as dots, the undistilled student across as it answers
    when asked in the best way."""
    price = PRICES[axes.price]
    if price.unit and spans_widely([axes.place(row)[0] for row in axes.graded_rows(all_rows(curves))]):
        set_log(axis, "x")
    drawn = Drawn(("curve", "setting", f"{price.words} {price.unit}".rstrip(), "student", "seeds"))
    if gap:
        drawn.labels.append(draw_gap(axis, gap))
    for curve, look in looks(curves):
        draw_curve(axis, axes, curve, look, drawn)
    for curve, look in looks(curves):
        if look == LOOKS[0]:
            drawn.labels.extend(end_labels(axes, curve))
    for label, rows in elicited(baselines, axes.answers).items():
        share, low, high = found = pooled(rows, "student", axes.answers)
        style = {"color": COLOURS["undistilled"], "linestyle": LEVEL.of_line, "linewidth": 1.2}
        axis.axhline(share, label=label, **style)
        axis.axhspan(low, high, color=COLOURS["undistilled"], alpha=0.13, linewidth=0)
        drawn.add((label, "-", "-", show_shares(found), str(len(rows))))
    axis.set(xlabel=price.axis, ylabel="student accuracy")
    axis.yaxis.set_major_formatter(show_share)
    if not price.unit:
        axis.xaxis.set_major_formatter(show_share)
    return drawn


def draw_worst(axes: Axes, attacked: Attacked, baselines: Rows, axis: Any) -> Drawn:
    """The worst students' curves as those of one attack are drawn, and what needs no published trace."""
    drawn = draw_tradeoff(axes, attacked.curves, baselines, None, axis)
    style = {"color": COLOURS["undistilled"], "linestyle": OWN.of_line, "linewidth": 1.4}
    for line in attacked.own_lines:
        start = f"student_{axes.answers}_"
        if f"{start}accuracy" in line:
            share, low, high = (line[f"{start}{name}"] for name in ("accuracy", "low", "high"))
            axis.axhline(share, label=line["attacker"], **style)
            drawn.add((line["attacker"], "-", "-", show_shares((share, low, high)), str(line["seeds"])))
    return drawn


def line_look(curve: Curve, look: Look) -> dict[str, Any]:
    """What draws a curve's line and markers."""
    style = {"color": COLOURS[curve.arm], "linestyle": look.of_line, "linewidth": 1.6}
    return style | {"marker": MARKERS[curve.arm], "fillstyle": look.fill, "markersize": 7}


def draw_curve(axis: Any, axes: Axes, curve: Curve, look: Look, drawn: Drawn) -> None:
    """A line through the means over seeds, from the curve's start on; error bars both ways, seeds as dots."""
    groups = axes.settings(curve.points)
    if not groups:
        return
    line = sorted(means(axes, rows) for rows in [*axes.settings(curve.start), *groups])
    colour, marker = COLOURS[curve.arm], MARKERS[curve.arm]
    through: Any = np.array(line).T  # whose markers are drawn with their bars, but for the legend's
    through = along(*through) if axis.get_xscale() == "log" else through
    axis.plot(*through, **line_look(curve, look), markevery=[], zorder=2, label=curve.label)
    if max(map(len, groups)) > 1:
        dots = zip(*(axes.place(row) for rows in groups for row in rows), strict=True)
        axis.scatter(*dots, s=9, color=colour, marker=marker, alpha=0.4, linewidth=0, zorder=1)
    prices = [price_of(axes, rows) for rows in groups]
    students = [pooled(rows, "student", axes.answers) for rows in groups]
    (x, x_bars), (y, y_bars) = to_bars(prices), to_bars(students)
    style = line_look(curve, look) | {"linestyle": "none", "elinewidth": 1, "zorder": 3}
    for bars in axis.errorbar(x, y, y_bars, x_bars, **style)[2]:
        bars.set_alpha(0.45)
    show_price = show_amount if PRICES[axes.price].unit else show_shares
    for rows, price, student in zip(groups, prices, students, strict=True):
        cells = curve.name, show_knobs(rows[0]), show_price(price), show_shares(student), str(len(rows))
        drawn.add(cells, (price[0], student[0]))


def end_labels(axes: Axes, curve: Curve) -> list[Label]:
    """Arm and knob beside the marker of the highest price; of accuracies, the knob beside the other end."""
    groups = axes.settings(curve.points)
    if not groups:
        return []
    places, texts = [means(axes, rows) for rows in groups], [show_knob(rows[0]) for rows in groups]
    lowest, highest = places.index(min(places)), places.index(max(places))
    named, other = (lowest, highest) if axes.price == "accuracy" else (highest, lowest)
    labels = [arm_label(*places[named], f"{curve.arm}, {texts[named]}", curve.arm)]
    if axes.price == "accuracy" and other != named:  # by other prices all curves begin close together
        labels.append(arm_label(*places[other], texts[other], curve.arm))
    return labels


def spans_widely(prices: Sequence[float]) -> bool:
    """Whether prices need a log scale: a text that nobody would sample costs hundreds of times more."""
    return min(prices, default=0) > 0 and max(prices) > WIDE_SPAN * min(prices)


def set_log(axis: Any, which: str) -> None:
    """A log scale, x or y, whose ticks are plain numbers."""
    from matplotlib.ticker import NullFormatter

    axis.set(**{f"{which}scale": "log"})
    scaled = {"x": axis.xaxis, "y": axis.yaxis}[which]
    scaled.set_major_formatter("{x:g}")
    scaled.set_minor_formatter(NullFormatter())


def along(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Points of a broken line, dense enough to be one on a log scale as well."""
    dense = np.unique(np.concatenate([x, *(np.linspace(*ends, 30) for ends in itertools.pairwise(x))]))
    return dense, np.interp(dense, x, y)


def draw_gap(axis: Any, gap: Match) -> Label:
    """The difference that the finding is about, between the two lines, and its label."""
    ends = [gap.student, gap.temperature]
    axis.plot([gap.level] * 2, ends, color=INK, linewidth=2, marker="_", markersize=9)
    difference, only = in_points(gap)[0].removeprefix("-"), " only" if gap.num_seeds == 1 else ""
    text = f"{difference} points{mark(gap)}\n{show_seeds(gap.num_seeds)}{only}"
    return Label(gap.level, sum(ends) / 2, text, INK, "bold")


def means(axes: Axes, rows: Rows) -> tuple[float, float]:
    """(price, student's accuracy), means over seeds."""
    return axes.mean_price(rows), pooled(rows, "student", axes.answers)[0]


Bars = tuple[np.ndarray, np.ndarray]  # means (P,) of P settings over seeds, distances (2, P) to their bounds


def price_of(axes: Axes, rows: Rows) -> Triple:
    """The price of a setting with its interval; with one seed, one that is no accuracy has none."""
    if axes.price == "accuracy":
        return pooled(rows, "teacher", axes.answers)
    return mean_interval([axes.place(row)[0] for row in rows])


def mean_interval(values: Sequence[float]) -> Triple:
    """(mean, low, high) over seeds of numbers above 0, with a 95 % t interval; of one seed no interval."""
    mean = float(np.mean(values))
    if len(values) < 2 or not np.ptp(values) > 1e-9:
        return mean, mean, mean
    low, high = seed_interval(np.array(values), least=0.0, most=np.inf)
    return mean, float(low), float(high)


def to_bars(found: Iterable[Triple]) -> Bars:
    values = np.array(list(found)).T
    return values[0], abs(values[1:] - values[0])


def knob_panels(axes: Axes, name: str, curves: Sequence[Curve]) -> Iterable[Panel]:
    """tau of the temperature arm, lam of the gradient's curves, and of a control that was run at several."""
    for key, arms in KNOBS:
        chosen = [curve for curve in curves if curve.arm in arms and axes.graded(curve.points)]
        if len({row.number(key) for row in all_rows(chosen)}) > 1:
            title = f"{results.SYMBOLS[key]}, {' and '.join(arms)}: {name}"
            yield Panel(title, functools.partial(draw_knob, axes, key, chosen), answers=axes.answers)


def draw_knob(axes: Axes, key: str, curves: Sequence[Curve], axis: Any) -> Drawn:
    """The teacher's and the student's accuracy against a knob."""
    drawn = Drawn(("curve", results.SYMBOLS[key], *results.TESTS, "seeds"))
    for curve, look in looks(curves):
        groups = axes.settings(curve.line)
        x = [rows[0].number(key) for rows in groups]
        end = int(np.argmax(x))
        student = line_look(curve, look) | {"markersize": 6, "elinewidth": 0.8}
        looked = {"teacher": student | {"marker": "x", "color": MUTED}, "student": student}
        found = {who: [pooled(rows, who, axes.answers) for rows in groups] for who in looked}
        for who, style in looked.items():
            y, bars = to_bars(found[who])
            axis.errorbar(x, y, bars, **style)
            drawn.labels.append(Label(x[end], y[end], who, style["color"]))
        for value, rows, teacher, taught in zip(x, groups, *found.values(), strict=True):
            texts = show_setting(value), show_shares(teacher), show_shares(taught)
            drawn.add((curve.name, *texts, str(len(rows))), (value, teacher[0]), (value, taught[0]))
    axis.margins(x=0.14)
    axis.set(xlabel=results.SYMBOLS[key])
    axis.yaxis.set_major_formatter(show_share)
    return drawn


def draw_trait(number: Number, curves: Sequence[Curve], axis: Any) -> Drawn:
    """A number of the training traces against the teacher's accuracy."""
    axes = Axes(main_answers(curves))
    drawn = Drawn(("curve", "setting", "teacher", number.axis, "seeds"))
    for curve, look in looks(curves):
        draw_trait_line(axis, axes, number, curve, look, drawn)
    values = [row.number(number.column) for row in all_rows(curves)]
    if number.is_log and spans_widely(list(filter(is_number, values))):
        set_log(axis, "y")
    if number.axis == "share":
        axis.yaxis.set_major_formatter(show_share)
        axis.set_ylim(top=1.003)
    if number.column == results.ONE_STEP:
        axis.axhline(0, color=INK, linewidth=1)
    axis.xaxis.set_major_formatter(show_share)
    axis.set(xlabel=f"teacher accuracy ({ANSWERS[axes.answers]})", ylabel=number.axis)
    return drawn


def draw_trait_line(axis: Any, axes: Axes, number: Number, curve: Curve, look: Look, drawn: Drawn) -> None:
    """A curve's line, with a marker at the points of its own, and its arm's name where it costs most."""
    line = []
    for group in axes.settings(curve.line):
        rows = [row for row in group if number.column in row.columns]
        if rows:
            value = float(np.mean([row.number(number.column) for row in rows]))
            is_own = bool(rows[0].lam) == (curve.arm != "temperature")
            line.append((axes.mean_price(rows), value, is_own, rows))
    if not line:
        return
    line.sort(key=lambda place: place[:3])
    x, y, owned, groups = zip(*line, strict=True)
    style = line_look(curve, look) | {"markersize": 6, "markevery": list(np.flatnonzero(owned))}
    axis.plot(x, y, label=curve.label, **style)
    for price, value, is_own, rows in line:
        if is_own:
            cells = show_percent(price), number.show(value), str(len(rows))
            drawn.add((curve.name, show_knobs(rows[0]), *cells), (price, value))
    if look == LOOKS[0] and any(owned):
        first = owned.index(True)
        drawn.labels.append(arm_label(x[first], y[first], curve.arm, curve.arm))


def main_answers(curves: Iterable[Curve]) -> str:
    """Forced answers where there are any."""
    rows = all_rows(curves)
    return next((answers for answers in ANSWERS if Axes(answers).graded_rows(rows)), "raw")


@dataclass(frozen=True)
class LossLine:
    """Mean loss over seeds of a setting's students at some steps; `strength`: of its knob, from 0 to 1."""

    strength: float
    row: ResultRow
    num_seeds: int
    steps: tuple[int, ...]
    losses: np.ndarray


def loss_lines(curve: Curve, part: str) -> list[LossLine]:
    """Of a curve's students; seeds with other steps apart."""
    settings = sorted(by_setting(curve.points), key=lambda setting: (setting[0], abs(setting[1])))
    lines: dict[tuple, list[tuple[ResultRow, list[float]]]] = {}
    for point in curve.points:
        line = point.stages["model"].get("losses", {}).get(part) or []
        key = settings.index(knobs(point.row)), tuple(step for step, _ in line)
        lines.setdefault(key, []).append((point.row, [loss for _, loss in line]))
    last = len(settings) - 1
    return [
        LossLine(i / last if last else 1.0, found[0][0], len(found), steps, np.mean([y for _, y in found], 0))
        for (i, steps), found in lines.items()
        if steps
    ]


def draw_losses(part: str, curves: Sequence[Curve], axis: Any) -> Drawn:
    """Losses of the students during training; the paler, the weaker the arm's knob."""
    drawn = Drawn(("curve", "setting", "training step", "nats/token", "seeds"))
    for curve, look in looks(curves):
        for line in loss_lines(curve, part):
            every = -(-len(line.steps) // MOST_LOSS_MARKERS)
            style = line_look(curve, look) | {"markersize": 6, "alpha": 0.3 + 0.7 * line.strength}
            label = curve.label if line.strength == 1 else None
            axis.plot(line.steps, line.losses, label=label, **style, markevery=every)
            for step, loss in list(zip(line.steps, line.losses, strict=True))[::every]:
                cells = str(step), show_number(float(loss)), str(line.num_seeds)
                drawn.add((curve.name, show_knobs(line.row), *cells), (step, float(loss)))
            if look == LOOKS[0] and line.strength == 1:
                text = f"{curve.arm}, {show_knob(line.row)}"
                drawn.labels.append(arm_label(line.steps[-1], float(line.losses[-1]), text, curve.arm))
    axis.margins(x=0.02)
    axis.set(xlabel="training step", ylabel="nats/token")
    return drawn
