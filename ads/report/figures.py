"""Panels as figures: what a panel holds besides ink, where labels go, and the files and the page."""

import html
import io
import itertools
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ads.report.looks import COLOURS, variable
from ads.report.numbers import fixed, show_percent
from ads.stage import files

INK, MUTED, GRID = "#1b2231", "#5b6474", "#e1e5ec"  # as in STYLE
PANEL_SIZE = (4.6, 3.6)  # inches
Triple = tuple[float, float, float]  # mean, low, high
LABEL_SIZE = 8.5  # points
DISTANCES = (6, 11, 18, 28)  # of a label from its place, in points
SIDES = (  # (right, up) of the place, horizontal and vertical alignment
    *(((1, 0), "left", "center"), ((-1, 0), "right", "center")),
    *(((0, 1), "center", "bottom"), ((0, -1), "center", "top")),
    *(((0.7, 0.7), "left", "bottom"), ((-0.7, 0.7), "right", "bottom")),
    *(((0.7, -0.7), "left", "top"), ((-0.7, -0.7), "right", "top")),
)
MARKER_RADIUS = 5  # points, that a label keeps off a marker
HIT_RADIUS = 7  # points, around a marker, where a pointer gets its numbers
LEGEND_LINE = 0.21  # inches
LEGEND_CHARACTERS = 56  # that fit beside a line's key into the width of a panel
STYLE = Path(__file__).with_name("plots.mplstyle")


@dataclass(frozen=True)
class Label:
    """A text beside a place in data coordinates; it is left out where no side of the place is free."""

    x: float
    y: float
    text: str
    colour: str
    weight: str = "normal"


@dataclass(frozen=True)
class Drawn:
    """A table, a line a marker or more; `spots`: (x, y, line of the table) of markers."""

    header: tuple[str, ...] = ()
    lines: list[tuple[str, ...]] = field(default_factory=list)
    spots: list[tuple[float, float, int]] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)

    @property
    def cells(self) -> list[tuple[str, ...]]:
        """Header and lines; empty without lines."""
        return [self.header, *self.lines] if self.lines else []

    def add(self, line: tuple[str, ...], *places: tuple[float, float]) -> None:
        """A line of the table, and where its markers are."""
        self.spots.extend((x, y, len(self.lines)) for x, y in places)
        self.lines.append(line)

    def title(self, line: int) -> str:
        """What a pointer at a marker is told: the first cell, then a line for each of the others."""
        first, *others = zip(self.header, self.lines[line], strict=True)
        return "\n".join([first[1], *(f"{name}: {cell}" for name, cell in others)])


@dataclass(frozen=True)
class Panel:
    """One set of axes; `draw(axis)` fills it. `price`, `answers`: what it is about, where there is a panel of
    each."""

    title: str
    draw: Callable[[Any], Drawn]
    price: str = ""
    answers: str = ""


Panels = Mapping[str, Sequence[Panel]]  # by the name of the plot


@dataclass(frozen=True)
class Shown:
    """A panel as the page shows it: an <svg>, and the numbers behind it."""

    panel: Panel
    svg: str
    drawn: Drawn


def show_shares(found: Triple) -> str:
    """An accuracy with its interval, as in "72.5 % [70.6, 74.2]"."""
    mean, low, high = found
    bounds = "" if low == high else f" [{fixed(100 * low, 1)}, {fixed(100 * high, 1)}]"
    return f"{show_percent(mean)}{bounds}"


def show_amount(found: Triple) -> str:
    """Another number with its interval, where it has one."""
    mean, low, high = found
    return f"{mean:.3g}" if low == high else f"{mean:.3g} [{low:.3g}, {high:.3g}]"


def arm_label(x: float, y: float, text: str, arm: str) -> Label:
    return Label(x, y, text, COLOURS[arm])


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
    drawn = []
    for axis, panel in zip(axes, panels, strict=False):
        drawn.append(panel.draw(axis))
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
    lay_out(figure)
    for axis, found in zip(axes, drawn, strict=False):
        write_labels(axis, found)
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


def inline_svgs(panels: Panels) -> dict[str, list[Shown]]:
    """{name: its panels}, each by itself, for a page that defines the colours."""
    from matplotlib import style

    with style.context(STYLE):
        return {
            name: [inline_svg(panel, f"{name}{i}-") for i, panel in enumerate(drawn)]
            for name, drawn in panels.items()
        }


def inline_svg(panel: Panel, prefix: str) -> Shown:
    """One panel as an <svg> without size, header or background; its ids begin with `prefix`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=PANEL_SIZE, layout="constrained")
    axis = figure.subplots()
    drawn = panel.draw(axis)
    lay_out(figure)
    write_labels(axis, drawn)
    file = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    svg = file.getvalue()[file.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", svg)
    svg = re.sub(r'^<svg ([^>]*?)width="[^"]*" ', r'<svg \1role="img" ', svg)
    svg = re.sub(r'^(<svg [^>]*?)height="[^"]*" ', r"\1", svg)
    svg = re.sub(r"(font: [\d.]+px|font: bold [\d.]+px|font: 700 [\d.]+px) [^;\"]*", r"\1 var(--font)", svg)
    svg = svg.replace("</svg>", f"{hit_circles(axis, drawn)}</svg>")
    return Shown(panel, replace_colours(svg), drawn)


def replace_colours(svg: str) -> str:
    """The page's colours, which follow the reader's light or dark scheme, for those of the files."""
    names = {INK: "ink", MUTED: "muted", GRID: "grid"}
    names |= {colour: variable(arm) for arm, colour in COLOURS.items()}
    return re.sub("|".join(names), lambda found: f"var(--{names[found[0]]})", svg)


def lay_out(figure: Any) -> None:
    """The places of all axes, as they will be saved; nothing moves afterwards."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)  # which measures text
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def write_labels(axis: Any, drawn: Drawn) -> None:
    """The labels of laid out axes: none on another or outside; on a line or a marker only where there is no
    other place."""
    renderer = axis.figure.canvas.get_renderer()
    lines = [line.get_transform().transform_path(line.get_path()) for line in axis.lines]
    markers = [around(axis, x, y) for x, y, _ in drawn.spots]
    written: list[Any] = []
    for label in drawn.labels:
        style: Any = {"fontsize": LABEL_SIZE, "color": label.colour, "weight": label.weight, "zorder": 4}
        note = axis.annotate(label.text, (label.x, label.y), (0, 0), textcoords="offset points", **style)
        for boxes, paths in (([*written, *markers], lines), ([*written, *markers], []), (written, [])):
            box = find_place(axis, note, renderer, boxes, paths)
            if box is not None:
                written.append(box)
                break
        else:
            note.remove()


def find_place(axis: Any, note: Any, renderer: Any, boxes: Sequence[Any], paths: Sequence[Any]) -> Any:
    """The box of a note, put where it is free of boxes and paths; None where there is no such place."""
    frame, edge = axis.get_window_extent(renderer), right_edge(axis, renderer)
    for distance, ((right, up), horizontal, vertical) in itertools.product(DISTANCES, SIDES):
        note.set(position=(distance * right, distance * up), ha=horizontal, va=vertical)
        box = note.get_window_extent(renderer).padded(1)
        inside = frame.x0 < box.x0 and frame.y0 < box.y0 and box.y1 < frame.y1
        if not inside or box.x1 > edge or any(map(box.overlaps, boxes)):
            continue
        if not any(path.intersects_bbox(box, filled=False) for path in paths):
            return box
    return None


def right_edge(axis: Any, renderer: Any) -> float:
    """How far right a label may reach: to what the next axes have beside them, or the figure's edge."""
    end = axis.get_window_extent(renderer).x1
    others = [other.get_tightbbox(renderer) for other in axis.figure.axes if other.get_visible()]
    return min((box.x0 for box in others if box.x0 > end), default=axis.figure.bbox.x1)


def around(axis: Any, x: float, y: float) -> Any:
    """The box around a marker, in pixels of the figure."""
    from matplotlib.transforms import Bbox

    radius = MARKER_RADIUS * axis.figure.dpi / 72
    centre_x, centre_y = axis.transData.transform((x, y))
    return Bbox([[centre_x - radius, centre_y - radius], [centre_x + radius, centre_y + radius]])


def hit_circles(axis: Any, drawn: Drawn) -> str:
    """Unseen circles over the markers of laid out axes, as SVG, each with its numbers as title."""
    figure = axis.figure
    width, height = 72 * figure.get_size_inches()
    parts = []
    for x, y, line in drawn.spots:
        across, up = figure.transFigure.inverted().transform(axis.transData.transform((x, y)))
        place = f'cx="{width * across:.1f}" cy="{height * (1 - up):.1f}" r="{HIT_RADIUS}"'
        parts.append(f'<circle class="hit" {place}><title>{html.escape(drawn.title(line))}</title></circle>')
    return f"<g>{''.join(parts)}</g>" if parts else ""
