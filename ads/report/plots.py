"""The report's plots: panels that are drawn side by side into files and one by one into the page."""

import functools
import io
import itertools
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ads.arms import LABELS
from ads.report import results
from ads.report.compare import Match
from ads.report.curves import Axes, Curve, all_rows, by_setting, knobs, pooled
from ads.report.looks import COLOURS, LEVEL, LOOKS, MARKERS, Look, looks, variable
from ads.report.numbers import is_number, seed_interval, show_percent, show_seeds
from ads.report.results import ANSWERS, PRICES, Number, Rows, show_knob
from ads.report.words import elicited, headline, in_points, mark
from ads.stage import files

INK, MUTED, GRID = "#1b2231", "#5b6474", "#e1e5ec"  # as in STYLE
PANEL_SIZE = (4.6, 3.6)  # inches
MOST_LOSS_MARKERS = 6  # on a line
WIDE_SPAN = 50  # of prices, from the least to the largest
LEGEND_LINE = 0.21  # inches
LEGEND_CHARACTERS = 56  # that fit beside a line's key into the width of a panel
NO_CONTROLS = ("temperature", "ADS", "negative lambda", "undistilled")
KNOBS = (  # of which arms there is a panel; the gradient's two share one
    *(("tau", ("temperature",)), ("lam", ("ADS", "negative lambda"))),
    *(("lam", (arm,)) for arm in LABELS if arm not in NO_CONTROLS),
)
STYLE = Path(__file__).with_suffix(".mplstyle")


@dataclass(frozen=True)
class Panel:
    """One set of axes; `draw(axis)` fills it. `price`: what it is about, where there is one panel of each."""

    title: str
    draw: Callable[[Any], None]
    price: str = ""


Panels = Mapping[str, Sequence[Panel]]  # by the name of the plot


def make_panels(curves: Sequence[Curve], baselines: Rows, matches: Iterable[Match]) -> dict[str, list[Panel]]:
    """{name of the plot: its panels}; plots without data have none, but the trade-off is always there."""
    gap, rows = headline(matches), all_rows(curves)
    panels: dict[str, list[Panel]] = {"tradeoff": [], "knobs": [], "traces": [], "losses": []}
    for answers, name in results.answers_of([*baselines, *rows]).items():
        for axes in (Axes(answers, price) for price in PRICES):
            if axes.price == "accuracy" or axes.graded_rows(rows):
                shown = gap if gap and (gap.answers, gap.price) == (answers, axes.price) else None
                price = "" if axes.price == "accuracy" else f", price in {PRICES[axes.price].short}"
                draw = functools.partial(draw_tradeoff, axes, curves, baselines, shown)
                panels["tradeoff"].append(Panel(f"{name.capitalize()} answers{price}", draw, axes.price))
        panels["knobs"] += knob_panels(Axes(answers), curves)
    for number in results.NUMBERS:
        if number.title and any(number.column in row.columns for row in rows):
            draw = functools.partial(draw_trait, number, curves)
            panels["traces"].append(Panel(number.title, draw))
    for part, title in (("train", "Loss on the traces"), ("holdout", "Loss on clean holdout traces")):
        if any(loss_lines(curve, part) for curve in curves):
            panels["losses"].append(Panel(title, functools.partial(draw_losses, part, curves)))
    return panels


def show_share(value: float, _position: int | None = None) -> str:
    return show_percent(value)


def draw_tradeoff(axes: Axes, curves: Sequence[Curve], baselines: Rows, gap: Match | None, axis: Any) -> None:
    """Students against a price, a line an arm, seeds as dots, the undistilled student across as it answers
    when asked in the best way."""
    if PRICES[axes.price].unit and spans_widely(
        [axes.place(row)[0] for row in axes.graded_rows(all_rows(curves))]
    ):
        set_log(axis, "x")
    for curve, look in looks(curves):
        draw_curve(axis, axes, curve, look)
    for curve, look in looks(curves):
        if look == LOOKS[0]:
            label_ends(axis, axes, curve)
    for label, rows in elicited(baselines, axes.answers).items():
        share, low, high = pooled(rows, "student", axes.answers)
        style = {"color": COLOURS["undistilled"], "linestyle": LEVEL.of_line, "linewidth": 1.2}
        axis.axhline(share, label=label, **style)
        axis.axhspan(low, high, color=COLOURS["undistilled"], alpha=0.13, linewidth=0)
    if gap:
        draw_gap(axis, gap)
    axis.set(xlabel=PRICES[axes.price].axis, ylabel="student accuracy")
    axis.yaxis.set_major_formatter(show_share)
    if not PRICES[axes.price].unit:
        axis.xaxis.set_major_formatter(show_share)


def line_look(curve: Curve, look: Look) -> dict[str, Any]:
    """What draws a curve's line and markers."""
    style = {"color": COLOURS[curve.arm], "linestyle": look.of_line, "linewidth": 1.6}
    return style | {"marker": MARKERS[curve.arm], "fillstyle": look.fill, "markersize": 7}


def draw_curve(axis: Any, axes: Axes, curve: Curve, look: Look) -> None:
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
    x, x_bars = price_bars(axes, groups)
    y, y_bars = error_bars(groups, "student", axes.answers)
    style = line_look(curve, look) | {"linestyle": "none", "elinewidth": 1, "zorder": 3}
    drawn = axis.errorbar(x, y, y_bars, x_bars, **style)
    for bars in drawn[2]:
        bars.set_alpha(0.45)


def label_ends(axis: Any, axes: Axes, curve: Curve) -> None:
    """Arm and knob beside the marker of the highest price; of accuracies, the knob beside the other end."""
    groups = axes.settings(curve.points)
    if len(groups) < 2:
        return
    places, texts = [means(axes, rows) for rows in groups], [show_knob(rows[0]) for rows in groups]
    style = {"fontsize": 8.5, "color": COLOURS[curve.arm], "textcoords": "offset points", "zorder": 4}
    lowest, highest = places.index(min(places)), places.index(max(places))
    named = lowest if axes.price == "accuracy" else highest
    side = "right" if share_across(axis, places[named][0]) > 0.5 else "left"  # no label leaves the plot
    beside = (-4 if side == "right" else 4, 8 if curve.arm == "temperature" else -14)
    axis.annotate(f"{curve.arm}, {texts[named]}", places[named], beside, ha=side, **style)
    if axes.price == "accuracy":  # by other prices all curves begin close together
        axis.annotate(texts[highest], places[highest], (8, -3), **style)


def share_across(axis: Any, x: float) -> float:
    """How far from the left, 0, to the right, 1, an x lies."""
    place = axis.transData.transform((x, 0.5))  # an accuracy, which is on no log scale
    return float(axis.transAxes.inverted().transform(place)[0])


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


def draw_gap(axis: Any, gap: Match) -> None:
    """The difference that the finding is about, between the two lines."""
    ends = [gap.student, gap.temperature]
    axis.plot([gap.level] * 2, ends, color=INK, linewidth=2, marker="_", markersize=9)
    difference, only = in_points(gap)[0].removeprefix("-"), " only" if gap.num_seeds == 1 else ""
    text = f"{difference} points{mark(gap)}\n{show_seeds(gap.num_seeds)}{only}"
    middle = (gap.level, sum(ends) / 2)
    axis.annotate(text, middle, (-6, 0), textcoords="offset points", ha="right", va="center", weight="bold")


def means(axes: Axes, rows: Rows) -> tuple[float, float]:
    """(price, student's accuracy), means over seeds."""
    return axes.mean_price(rows), pooled(rows, "student", axes.answers)[0]


Bars = tuple[np.ndarray, np.ndarray]  # means (P,) of P settings over seeds, distances (2, P) to their bounds


def price_bars(axes: Axes, groups: Iterable[Rows]) -> Bars:
    """Of the prices; with one seed, one that is no accuracy has no bars."""
    if axes.price == "accuracy":
        return error_bars(groups, "teacher", axes.answers)
    return to_bars(mean_interval([axes.place(row)[0] for row in rows]) for rows in groups)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) over seeds of numbers above 0, with a 95 % t interval; of one seed no interval."""
    mean = float(np.mean(values))
    if len(values) < 2 or not np.ptp(values) > 1e-9:
        return mean, mean, mean
    low, high = seed_interval(np.array(values), least=0.0, most=np.inf)
    return mean, float(low), float(high)


def error_bars(groups: Iterable[Rows], who: str, answers: str) -> Bars:
    return to_bars(pooled(rows, who, answers) for rows in groups)


def to_bars(found: Iterable[tuple[float, float, float]]) -> Bars:
    values = np.array(list(found)).T
    return values[0], abs(values[1:] - values[0])


def knob_panels(axes: Axes, curves: Sequence[Curve]) -> Iterable[Panel]:
    """tau of the temperature arm, lam of the gradient's curves, and of a control that was run at several."""
    for key, arms in KNOBS:
        chosen = [curve for curve in curves if curve.arm in arms and axes.graded(curve.points)]
        if len({row.number(key) for row in all_rows(chosen)}) > 1:
            title = f"{results.SYMBOLS[key]}, {' and '.join(arms)}: {ANSWERS[axes.answers]}"
            yield Panel(title, functools.partial(draw_knob, axes, key, chosen))


def draw_knob(axes: Axes, key: str, curves: Sequence[Curve], axis: Any) -> None:
    """The teacher's and the student's accuracy against a knob."""
    for curve, look in looks(curves):
        groups = axes.settings(curve.line)
        x = [rows[0].number(key) for rows in groups]
        end = int(np.argmax(x))
        student = line_look(curve, look) | {"markersize": 6, "elinewidth": 0.8}
        teacher = student | {"marker": "x", "color": MUTED}
        for who, style in (("teacher", teacher), ("student", student)):
            y, bars = error_bars(groups, who, axes.answers)
            axis.errorbar(x, y, bars, **style)
            place = {"textcoords": "offset points", "fontsize": 8.5, "color": style["color"]}
            axis.annotate(who, (x[end], y[end]), (7, -3), **place)
    axis.margins(x=0.14)
    axis.set(xlabel=results.SYMBOLS[key])
    axis.yaxis.set_major_formatter(show_share)


def draw_trait(number: Number, curves: Sequence[Curve], axis: Any) -> None:
    """A number of the training traces against the teacher's accuracy."""
    axes = Axes(main_answers(curves))
    for curve, look in looks(curves):
        line = []
        for group in axes.settings(curve.line):
            rows = [row for row in group if number.column in row.columns]
            if rows:
                value = np.mean([row.number(number.column) for row in rows])
                is_own = bool(rows[0].lam) == (curve.arm != "temperature")
                line.append((axes.mean_price(rows), value, is_own))
        if line:
            x, y, owned = zip(*sorted(line), strict=True)
            style = line_look(curve, look) | {"markersize": 6, "markevery": list(np.flatnonzero(owned))}
            axis.plot(x, y, label=curve.label, **style)
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


def main_answers(curves: Iterable[Curve]) -> str:
    """Forced answers where there are any."""
    rows = all_rows(curves)
    return next((answers for answers in ANSWERS if Axes(answers).graded_rows(rows)), "raw")


def loss_lines(curve: Curve, part: str) -> list[tuple[float, tuple[int, ...], np.ndarray]]:
    """[(strength 0..1, steps, mean loss over seeds)] of a curve's students; seeds with other steps apart."""
    settings = sorted(by_setting(curve.points), key=lambda setting: (setting[0], abs(setting[1])))
    lines: dict[tuple, list[list[float]]] = {}
    for point in curve.points:
        line = point.stages["model"].get("losses", {}).get(part) or []
        key = settings.index(knobs(point.row)), tuple(step for step, _ in line)
        lines.setdefault(key, []).append([loss for _, loss in line])
    last = len(settings) - 1
    return [
        (i / last if last else 1.0, steps, np.mean(losses, axis=0))
        for (i, steps), losses in lines.items()
        if steps
    ]


def draw_losses(part: str, curves: Sequence[Curve], axis: Any) -> None:
    """Losses of the students during training; the paler, the weaker the arm's knob."""
    for curve, look in looks(curves):
        for strength, steps, losses in loss_lines(curve, part):
            style = line_look(curve, look) | {"markersize": 6, "alpha": 0.3 + 0.7 * strength}
            style["markevery"] = -(-len(steps) // MOST_LOSS_MARKERS)
            axis.plot(steps, losses, label=curve.label if strength == 1 else None, **style)
    axis.set(xlabel="training step", ylabel="nats/token")


def compose(panels: Sequence[Panel], title: str) -> Any:
    """A figure of panels side by side, at most two in a row, with the legend of all below.

    It grows with its legend: the axes of a figure of a fixed height collapsed under a long one.
    """
    from matplotlib.figure import Figure

    num_columns = min(2, len(panels))
    num_rows = -(-len(panels) // num_columns)
    width, height = PANEL_SIZE[0] * num_columns, PANEL_SIZE[1] * num_rows + 0.3
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    legend: dict[str, Any] = {}
    for axis, panel in zip(axes, panels, strict=False):
        panel.draw(axis)
        axis.set_title(panel.title)
        handles, labels = axis.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(textwrap.fill(title, LEGEND_CHARACTERS * num_columns))
    if legend:
        columns = num_columns if max(map(len, legend)) <= LEGEND_CHARACTERS else 1
        labels = [textwrap.fill(label, LEGEND_CHARACTERS * num_columns // columns) for label in legend]
        place: Any = {"loc": "outside lower center", "ncols": columns, "frameon": False}
        figure.legend(list(legend.values()), labels, **place)
        num_lines = sum(label.count("\n") + 1 for label in labels) / columns
        figure.set_figheight(height + LEGEND_LINE * (num_lines + 1))
    return figure


def write_plots(folder: Path, panels: Panels, title: str) -> None:
    """NAME.png and NAME.svg of every plot that has panels, byte for byte the same for the same data."""
    from matplotlib import style

    with style.context(STYLE):
        for name, drawn in panels.items():
            if drawn:
                figure = compose(drawn, title)
                for kind, metadata in (("png", {}), ("svg", {"Date": None})):
                    with files.atomic_path(folder / f"{name}.{kind}") as path:
                        figure.savefig(path, format=kind, dpi=160, metadata=metadata)
                    figure.set_layout_engine("none")  # laid out once: it is half of the time


def inline_svgs(panels: Panels) -> dict[str, list[tuple[Panel, str]]]:
    """{name: [(panel, <svg> text)]}, each panel by itself, for a page that defines the colours."""
    from matplotlib import style

    with style.context(STYLE):
        return {
            name: [(panel, inline_svg(panel, f"{name}{i}-")) for i, panel in enumerate(drawn)]
            for name, drawn in panels.items()
        }


def inline_svg(panel: Panel, prefix: str) -> str:
    """One panel as an <svg> without size, header or background; its ids begin with `prefix`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=PANEL_SIZE, layout="constrained")
    axis = figure.subplots()
    panel.draw(axis)
    file = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    svg = file.getvalue()[file.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", svg)
    svg = re.sub(r'^<svg ([^>]*?)width="[^"]*" ', r'<svg \1aria-hidden="true" ', svg)
    svg = re.sub(r'^(<svg [^>]*?)height="[^"]*" ', r"\1", svg)
    svg = re.sub(r"(font: [\d.]+px|font: bold [\d.]+px|font: 700 [\d.]+px) [^;\"]*", r"\1 var(--font)", svg)
    return replace_colours(svg)


def replace_colours(svg: str) -> str:
    """The page's colours, which follow the reader's light or dark scheme, for those of the files."""
    names = {INK: "ink", MUTED: "muted", GRID: "grid"}
    names |= {colour: variable(arm) for arm, colour in COLOURS.items()}
    return re.sub("|".join(names), lambda found: f"var(--{names[found[0]]})", svg)
