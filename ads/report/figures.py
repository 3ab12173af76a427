"""Panels as figures: side by side in files, one by one in the page."""

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ads.report.drawn import Drawn, hit_circles, lay_out, write_labels
from ads.report.looks import COLOURS, variable
from ads.report.plots import GRID, INK, MUTED, PANEL_SIZE, Panel
from ads.stage import files

LEGEND_LINE = 0.21  # inches
LEGEND_CHARACTERS = 56  # that fit beside a line's key into the width of a panel
STYLE = Path(__file__).with_name("plots.mplstyle")
Panels = Mapping[str, Sequence[Panel]]  # by the name of the plot


@dataclass(frozen=True)
class Shown:
    """A panel as the page shows it: an <svg>, and the numbers behind it."""

    panel: Panel
    svg: str
    drawn: Drawn


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
