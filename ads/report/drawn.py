"""What a panel of a plot holds besides ink: the numbers behind its markers and the labels beside them."""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ads.report.looks import COLOURS
from ads.report.numbers import fixed, show_percent

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
    frame = axis.get_window_extent(renderer)
    for place, horizontal, vertical in candidates():
        note.set(position=place, ha=horizontal, va=vertical)
        box = note.get_window_extent(renderer).padded(1)
        inside = frame.x0 < box.x0 and frame.y0 < box.y0 and box.y1 < frame.y1
        if not inside or box.x1 > axis.figure.bbox.x1 or any(map(box.overlaps, boxes)):
            continue
        if not any(path.intersects_bbox(box, filled=False) for path in paths):
            return box
    return None


def candidates() -> Iterator[tuple[tuple[float, float], str, str]]:
    for distance in DISTANCES:
        for (right, up), horizontal, vertical in SIDES:
            yield (distance * right, distance * up), horizontal, vertical


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
