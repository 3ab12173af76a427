"""The gap that published traces close: from the undistilled student to that of clean traces.

A share of it is (S - base) / (S_clean - base): 0 where nothing was learned, 1 as if undefended.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ads.report.bootstrap import NUM_DRAWS, Draws
from ads.report.compare import Measured, Replicate
from ads.report.curves import Point, Points, group_by, pool_copies
from ads.report.results import ResultRow, show_knob
from ads.report.words import elicited, join_words

LEAST_GAP = 0.1  # a share of less is mostly noise
Key = tuple[Replicate, str | None, str | None]  # seeds, dataset, student


@dataclass(frozen=True)
class Gap:
    """Its ends (2,), base and clean, by replicate, dataset and student; `drawn` (2, B) under resamples."""

    ends: Mapping[Key, np.ndarray] = field(default_factory=dict)
    drawn: Mapping[Key, np.ndarray] = field(default_factory=dict)
    words: str = ""

    def share(self, row: ResultRow, student: float) -> Measured:
        """What a student's accuracy is of the gap of its replicate; None where there is none to speak of."""
        base, clean = self.ends.get(gap_of(row), (np.nan, np.nan))
        return float((student - base) / (clean - base)) if clean - base >= LEAST_GAP else None

    def drawn_share(self, row: ResultRow, students: np.ndarray) -> np.ndarray | None:
        """The same (B,) under resampled problems."""
        if gap_of(row) not in self.drawn:
            return None
        base, clean = self.drawn[gap_of(row)]
        return np.where(clean > base, (students - base) / np.where(clean > base, clean - base, 1), np.nan)


def gap_of(row: ResultRow) -> Key:
    return row.replicate, row.data, row.student


def measure_gap(points: Points, undistilled: Points, answers: str, draws: Draws) -> Gap:
    """The gap of each replicate: base is the undistilled student as it answers when asked in the best way,
    clean the student of the replicate's temperature point with the lowest tau (`points`: of one attack)."""
    clean = clean_points(points, answers)
    best = elicited([point.row for point in undistilled], answers)
    ends, drawn = {}, {}
    for key, point in clean.items():
        about = point.row.data, point.row.student
        rows = [row for same in best.values() for row in same if (row.data, row.student) == about]
        if not rows:
            continue
        own = [row for row in rows if row.seed == point.row.seed] or rows
        base = float(np.mean([row.share("student", answers) for row in own]))
        ends[key] = np.array([base, point.row.share("student", answers)])
        above = draws.of(point, "student", answers)
        if above is not None:
            below = drawn_base(own, undistilled, point.row.replicate, answers, draws)
            drawn[key] = np.stack([np.full(NUM_DRAWS, base) if below is None else below, above])
    return Gap(ends, drawn, describe(list(clean.values()), list(best)))


def clean_points(points: Points, answers: str) -> dict[Key, Point]:
    """The temperature point with the lowest tau, of each replicate, dataset and student."""
    plain = [point for point in pool_copies(points) if point.row.arm == "temperature"]
    graded = [point for point in plain if point.row.accuracy("student", answers).is_share]
    groups = group_by(sorted(graded, key=lambda point: point.row.tau), lambda point: gap_of(point.row))
    return {key: same[0] for key, same in groups.items()}


def drawn_base(
    rows: Sequence[ResultRow], undistilled: Points, replicate: Replicate, answers: str, draws: Draws
) -> np.ndarray | None:
    """The base under resampled problems; None where it is a mean over tests or its answers are not there."""
    columns = [row.columns for row in rows]
    paths = [point.stages["student"]["path"] for point in undistilled if point.row.columns in columns]
    return draws.shares.get((replicate, paths[0], answers)) if len(paths) == 1 else None


def describe(clean: Points, ways: Sequence[str]) -> str:
    """The ends in words."""
    knobs = dict.fromkeys(show_knob(point.row, "tau") for point in clean)
    return (
        f"from the undistilled student as it answers when asked in the best way ({join_words(ways)}) to the "
        f"student of clean traces (temperature at its lowest, {join_words(list(knobs))})"
    )
