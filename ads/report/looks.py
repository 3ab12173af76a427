"""How curves look: what tells them apart on any screen and in print, colour or none.

An arm has a colour and a marker (ads/arms.py). Curves of one arm differ in the filling of the marker and in
the style of the line; a cap has the same filling in all arms wherever it can.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ads.arms import ARMS
from ads.report.curves import Curve

COLOURS = {arm.label: arm.colour for arm in ARMS}
DARK_COLOURS = {arm.label: arm.dark_colour for arm in ARMS}
MARKERS = {arm.label: arm.marker for arm in ARMS}
KEY_SIZE = 36, 14  # of a line of the page's legend, in pixels


@dataclass(frozen=True)
class Look:
    """A style of line, as dashes and gaps (none: whole), and the part of a marker that is filled."""

    dashes: tuple[float, ...]
    fill: str

    @property
    def of_line(self) -> Any:
        return (0, self.dashes) if self.dashes else "-"


# by which caps are set: none, KL, top-1, both; and more for curves that differ in something else
LOOKS = (
    Look((), "full"),
    Look((4, 2), "none"),
    Look((1, 1.6), "left"),
    Look((6, 2, 1, 2), "right"),
    Look((9, 3), "bottom"),
    Look((3, 1.5, 1, 1.5, 1, 1.5), "top"),
)
LEVEL = Look((4, 2), "")  # of the undistilled student, a line across
OWN = Look((1, 1.6), "")  # of a student that no published trace made, a line across


def looks(curves: Iterable[Curve]) -> list[tuple[Curve, Look]]:
    """Each curve with its look; curves of one arm differ, as long as there are looks."""
    taken: dict[str, list[Look]] = {}
    found = []
    for curve in curves:
        used = taken.setdefault(curve.arm, [])
        in_order = LOOKS[wanted(curve)], *LOOKS[4:], *LOOKS
        look = next((look for look in in_order if look not in used), in_order[0])
        used.append(look)
        found.append((curve, look))
    return found


def wanted(curve: Curve) -> int:
    """Place of the look that says which caps are set."""
    row = curve.points[0].row
    is_set = [row.number(key) is not None for key in ("max_kl", "keep_top1")]
    return is_set[0] + 2 * is_set[1]


def key_svg(arm: str, look: Look) -> str:
    """A line of the page's legend as <svg>: the line and marker that plots have, in the text's colour."""
    from matplotlib.markers import MarkerStyle

    width, height = KEY_SIZE
    dashes = f' stroke-dasharray="{" ".join(f"{2 * d:g}" for d in look.dashes)}"' if look.dashes else ""
    parts = [f'<path d="M0 {height / 2:g}H{width}" stroke-width="2"{dashes}/>']
    if look.fill:
        fill: Any = look.fill
        marker: Any = MarkerStyle(MARKERS[arm], fill)
        shapes = [(marker.get_path(), marker.get_transform(), look.fill != "none")]
        if marker.get_alt_path() is not None:
            shapes.append((marker.get_alt_path(), marker.get_alt_transform(), False))
        for path, transform, is_filled in shapes:
            outlines = path.transformed(transform).to_polygons()
            paint = "currentColor" if is_filled else "var(--card)"
            parts.append(f'<path d="{"".join(map(outline, outlines))}" fill="{paint}" stroke-width="1.2"/>')
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return (
        f'<svg class="key" {size} fill="none" stroke="currentColor" aria-hidden="true">{"".join(parts)}</svg>'
    )


def outline(vertices: Sequence[Sequence[float]]) -> str:
    """A closed outline of a marker, one unit high, in the middle of a line of the legend."""
    width, height = KEY_SIZE
    size = height - 3
    places = (f"{width / 2 + size * x:.4g} {height / 2 - size * y:.4g}" for x, y in vertices)
    return f"M{'L'.join(places)}Z"


def variable(arm: str) -> str:
    """Name of an arm's colour in the page's style sheet."""
    return arm.replace(" ", "-").lower()
