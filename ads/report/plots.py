"""The report's plots: panels that are drawn side by side into files and one by one into the page."""

import functools
import io
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ads.arms import ARMS
from ads.report.compare import mean_nll, mean_price
from ads.report.curves import RULES, SYMBOLS, by_setting, graded, pooled, price_column, rules_of, show_setting
from ads.report.words import MARK, elicited, headline, in_points, show_seeds
from ads.stage import files

COLOURS = {arm.label: arm.colour for arm in ARMS}
MARKERS = {arm.label: arm.marker for arm in ARMS}
INK, MUTED, GRID = "#1b2231", "#5b6474", "#e1e5ec"
CURVE_STYLES = ("-", "--", ":", "-.")  # of several curves of one arm
PANEL_SIZE = (4.6, 3.6)  # inches
PRICE_TITLES = {"accuracy": "", "nll": ", price in NLL"}
TRAITS = {  # column: (title, axis label)
    "train_teacher_nll": ("How unlikely the traces are", "nats/token under the teacher"),
    "train_num_tokens_p50": ("Length of the traces", "median tokens"),
    "train_finished": ("Traces that finished", "share"),
    "train_one_step_change": ("One step of the proxy on the traces", "change of holdout loss, nats/token"),
}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ads",
    "text.parse_math": False,  # names may hold a dollar sign
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "figure.titlesize": "medium",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.edgecolor": MUTED,
    "text.color": INK,
    "axes.labelcolor": INK,
    **{f"{axis}tick.{part}": MUTED for axis in "xy" for part in ("color", "labelcolor")},
}


@dataclass(frozen=True)
class Panel:
    """One set of axes; `draw(axis)` fills it."""

    title: str
    draw: Callable


def make_panels(curves, baselines, matches):
    """{name of the plot: its panels}; plots without data have none, but the trade-off is always there."""
    shown = headline(matches)
    panels = {"tradeoff": [], "knobs": [], "traces": [], "losses": []}
    rows = [*baselines, *(point.row for curve in curves for point in curve.points)]
    for rule, name in rules_of(rows).items():
        gap = shown if shown and shown.rule == rule else None
        for price, title in PRICE_TITLES.items():
            if price == "accuracy" or has_price(curves, rule, price):
                draw = functools.partial(draw_tradeoff, rule, price, curves, baselines, gap)
                panels["tradeoff"].append(Panel(f"{name.capitalize()} answers{title}", draw))
        panels["knobs"] += knob_panels(rule, curves)
    for column, (title, label) in TRAITS.items():
        if any(column in point.row for curve in curves for point in curve.points):
            panels["traces"].append(Panel(title, functools.partial(draw_trait, column, label, curves)))
    for part, title in (("train", "Loss on the traces"), ("holdout", "Loss on clean holdout traces")):
        if any(loss_lines(curve, part) for curve in curves):
            panels["losses"].append(Panel(title, functools.partial(draw_losses, part, curves)))
    return panels


def show_share(value, _position=None):
    return f"{100 * value:.3g} %"


def percent_axis(axis):
    axis.yaxis.set_major_formatter(show_share)


def has_price(curves, rule, price):
    return any(graded([point.row], rule, price) for curve in curves for point in curve.points)


def draw_tradeoff(rule, price, curves, baselines, gap, axis):
    """Students against a price, a line an arm, seeds as dots, the undistilled student across as it answers
    when asked in the best way."""
    for curve, style in zip(curves, line_styles(curves), strict=True):
        draw_curve(axis, rule, price, curve, style)
    for label, rows in elicited(baselines, rule).items():
        share, low, high = pooled(rows, f"student_{rule}")
        axis.axhline(share, color=COLOURS["undistilled"], linestyle="--", linewidth=1.2, label=label)
        axis.axhspan(low, high, color=COLOURS["undistilled"], alpha=0.13, linewidth=0)
    percent_axis(axis)
    if price == "nll":
        axis.set(xlabel="NLL of the teacher's test traces, nats/token", ylabel="student accuracy")
        return
    if gap:
        draw_gap(axis, gap)
    axis.set(xlabel="teacher accuracy", ylabel="student accuracy")
    axis.xaxis.set_major_formatter(show_share)


def line_styles(curves):
    """A line style per curve; the curves of one arm differ."""
    seen = [curve.arm for curve in curves]
    return [CURVE_STYLES[seen[:i].count(arm) % len(CURVE_STYLES)] for i, arm in enumerate(seen)]


def draw_curve(axis, rule, price, curve, style):
    """A line through the means over seeds, from the curve's start on; error bars both ways, seeds as dots."""
    groups = [graded(rows, rule, price) for rows in by_setting(curve.points).values()]
    groups = [rows for rows in groups if rows]
    if not groups:
        return
    start = [graded(rows, rule, price) for rows in by_setting(curve.start).values()]
    line = sorted(means(rows, rule, price) for rows in [*start, *groups] if rows)
    colour, marker = COLOURS[curve.arm], MARKERS[curve.arm]
    axis.plot(*zip(*line, strict=True), color=colour, linestyle=style, linewidth=1.6, zorder=2)
    if max(map(len, groups)) > 1:
        dots = [row for rows in groups for row in rows]
        columns = (price_column(rule, price), f"student_{rule}_accuracy")
        x, y = ([row[column] for row in dots] for column in columns)
        axis.scatter(x, y, s=9, color=colour, marker=marker, alpha=0.4, linewidth=0, zorder=1)
    x, x_bars = price_bars(groups, rule, price)
    y, y_bars = error_bars(groups, f"student_{rule}")
    drawn = axis.errorbar(
        x,
        y,
        y_bars,
        x_bars,
        fmt=marker,
        color=colour,
        markersize=5.5,
        elinewidth=1,
        label=curve.label,
        zorder=3,
    )
    for bars in drawn[2]:
        bars.set_alpha(0.45)
    if len(groups) > 1 and style == CURVE_STYLES[0]:
        label_ends(axis, curve, groups, x, y, price)


def label_ends(axis, curve, groups, x, y, price):
    """Arm and knob beside the marker of the highest price; of accuracies, the knob beside the other end."""
    key = "lam" if groups[0][0]["lam"] else "tau"
    style = {"fontsize": 8.5, "color": COLOURS[curve.arm], "textcoords": "offset points", "zorder": 4}
    lowest, highest = int(np.argmin(x)), int(np.argmax(x))
    texts = [f"{SYMBOLS[key]} {show_setting(rows[0][key])}" for rows in groups]
    below = (-4, 8) if curve.arm == "temperature" else (-4, -14)
    if price == "nll":  # all curves begin close together
        axis.annotate(f"{curve.arm}, {texts[highest]}", (x[highest], y[highest]), below, ha="right", **style)
        return
    side = "right" if x[lowest] > np.mean(axis.get_xlim()) else "left"  # no label leaves the plot
    axis.annotate(f"{curve.arm}, {texts[lowest]}", (x[lowest], y[lowest]), below, ha=side, **style)
    axis.annotate(texts[highest], (x[highest], y[highest]), (8, -3), **style)


def draw_gap(axis, gap):
    """The difference that the finding is about, between the two lines."""
    axis.plot(
        [gap.level] * 2, [gap.student, gap.temperature], color=INK, linewidth=2, marker="_", markersize=9
    )
    difference = in_points(gap)[0].removeprefix("-")
    mark = f" {MARK}" if gap.flags else ""
    text = f"{difference} points{mark}\n{show_seeds(gap)}{' only' if gap.num_seeds == 1 else ''}"
    middle = (gap.level, (gap.student + gap.temperature) / 2)
    axis.annotate(text, middle, (-6, 0), textcoords="offset points", ha="right", va="center", weight="bold")


def means(rows, rule, price="accuracy"):
    """(price, student's accuracy), means over seeds."""
    return mean_price(rows, rule, price), pooled(rows, f"student_{rule}")[0]


def price_bars(groups, rule, price):
    """error_bars of the prices; with one seed, an NLL has none."""
    if price == "accuracy":
        return error_bars(groups, f"teacher_{rule}")
    values = np.array([mean_nll(rows) for rows in groups]).T
    return values[0], abs(values[1:] - values[0])


def error_bars(groups, name):
    """Means (P,) of P settings over seeds and their distances (2, P) to the bounds of the intervals."""
    values = np.array([pooled(rows, name) for rows in groups]).T
    return values[0], abs(values[1:] - values[0])


def knob_panels(rule, curves):
    """tau of the temperature arm, lam of the gradient's curves, and of a control that was run at several."""
    panels, directions = [], {}
    for arm in ARMS[:-1]:  # the last is not sampled by a teacher
        directions.setdefault(arm.direction, []).append(arm.label)
    for direction, arms in directions.items():
        key = "lam" if direction else "tau"
        chosen = [c for c in curves if c.arm in arms and graded([p.row for p in c.points], rule)]
        if len({point.row[key] for curve in chosen for point in curve.points}) > 1:
            title = f"{SYMBOLS[key]}, {' and '.join(arms)}: {RULES[rule]}"
            panels.append(Panel(title, functools.partial(draw_knob, rule, key, chosen)))
    return panels


def draw_knob(rule, key, curves, axis):
    """The teacher's and the student's accuracy against a knob."""
    for curve, style in zip(curves, line_styles(curves), strict=True):
        groups = by_setting([*curve.start, *curve.points]).values()
        groups = [rows for rows in (graded(rows, rule) for rows in groups) if rows]
        x = [rows[0][key] for rows in groups]
        for who, marker, colour in (
            ("teacher", "x", MUTED),
            ("student", MARKERS[curve.arm], COLOURS[curve.arm]),
        ):
            y, bars = error_bars(groups, f"{who}_{rule}")
            axis.errorbar(
                x, y, bars, marker=marker, color=colour, linestyle=style, markersize=5, elinewidth=0.8
            )
            end = int(np.argmax(x))
            place = {"textcoords": "offset points", "fontsize": 8.5, "color": colour}
            axis.annotate(who, (x[end], y[end]), (7, -3), **place)
    axis.margins(x=0.14)
    axis.set(xlabel=SYMBOLS[key])
    percent_axis(axis)


def draw_trait(column, label, curves, axis):
    """A number of the training traces against the teacher's accuracy."""
    rule = main_rule(curves)
    for curve, style in zip(curves, line_styles(curves), strict=True):
        line = []
        for rows in by_setting([*curve.start, *curve.points]).values():
            rows = [row for row in graded(rows, rule) if column in row]
            if rows:
                value = np.mean([row[column] for row in rows])
                line.append(
                    (means(rows, rule)[0], value, bool(rows[0]["lam"]) == (curve.arm != "temperature"))
                )
        if line:
            x, y, is_own = zip(*sorted(line), strict=True)
            look = {"color": COLOURS[curve.arm], "marker": MARKERS[curve.arm], "linestyle": style}
            axis.plot(x, y, markersize=5, markevery=list(np.flatnonzero(is_own)), label=curve.label, **look)
    if column == "train_finished":
        percent_axis(axis)
        axis.set_ylim(top=1.003)
    if column == "train_one_step_change":
        axis.axhline(0, color=INK, linewidth=1)
    axis.xaxis.set_major_formatter(show_share)
    axis.set(xlabel=f"teacher accuracy ({RULES[rule]})", ylabel=label)


def main_rule(curves):
    """Forced answers where there are any."""
    rows = [point.row for curve in curves for point in curve.points]
    return next((rule for rule in RULES if graded(rows, rule)), "raw")


def loss_lines(curve, part):
    """[(strength 0..1, steps, mean loss over seeds)] of a curve's students; seeds with other steps apart."""
    lines = {}
    settings = sorted(by_setting(curve.points), key=lambda knobs: (knobs[0], abs(knobs[1])))
    for point in curve.points:
        line = point.stages["model"].get("losses", {}).get(part) or []
        steps = tuple(step for step, _ in line)
        setting = (point.row["tau"], point.row["lam"])
        lines.setdefault((settings.index(setting), steps), []).append([loss for _, loss in line])
    last = len(settings) - 1
    return [
        (i / last if last else 1.0, steps, np.mean(losses, axis=0))
        for (i, steps), losses in lines.items()
        if steps
    ]


def draw_losses(part, curves, axis):
    """Losses of the students during training; the paler, the weaker the arm's knob."""
    for curve in curves:
        for strength, steps, losses in loss_lines(curve, part):
            label = curve.label if strength == 1 else None
            look = {"color": COLOURS[curve.arm], "alpha": 0.3 + 0.7 * strength, "label": label}
            axis.plot(steps, losses, marker="." if len(steps) < 9 else "", **look)
    axis.set(xlabel="training step", ylabel="nats/token")


def compose(panels, title):
    """A figure of panels side by side, at most two in a row, with the legend of all below."""
    from matplotlib.figure import Figure

    num_columns = min(2, len(panels))
    num_rows = -(-len(panels) // num_columns)
    size = (PANEL_SIZE[0] * num_columns, PANEL_SIZE[1] * num_rows + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    legend = {}
    for axis, panel in zip(axes, panels, strict=False):
        panel.draw(axis)
        axis.set_title(panel.title)
        handles, labels = axis.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(title)
    if legend:
        columns = 1 if max(map(len, legend)) > 50 else 2
        figure.legend(legend.values(), legend, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def write_plots(folder, panels, title):
    """NAME.png and NAME.svg of every plot that has panels, byte for byte the same for the same data."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        for name, drawn in panels.items():
            if drawn:
                figure = compose(drawn, title)
                for kind, metadata in (("png", {}), ("svg", {"Date": None})):
                    with files.atomic_path(folder / f"{name}.{kind}") as path:
                        figure.savefig(path, format=kind, dpi=160, metadata=metadata)
                    figure.set_layout_engine("none")  # laid out once: it is half of the time


def inline_svgs(panels):
    """{name: [(title, <svg> text)]}, each panel by itself, for a page that defines the colours."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        return {
            name: [(panel.title, inline_svg(panel, f"{name}{i}-")) for i, panel in enumerate(drawn)]
            for name, drawn in panels.items()
        }


def inline_svg(panel, prefix):
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


def replace_colours(svg):
    """The page's colours, which follow the reader's light or dark scheme, for those of the files."""
    names = {INK: "ink", MUTED: "muted", GRID: "grid"} | {
        colour: variable(arm) for arm, colour in COLOURS.items()
    }
    return re.sub("|".join(names), lambda found: f"var(--{names[found[0]]})", svg)


def variable(arm):
    """Name of an arm's colour in the page's style sheet."""
    return arm.replace(" ", "-").lower()
