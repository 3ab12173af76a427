"""The trace reader of the page: tokens of traces beside their clean twins, coloured by Delta."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ads.report.curves import Point, group_by
from ads.report.results import ResultRow, show_knob
from ads.stage import layout
from ads.stage.errors import UserError

MAX_CONTRAST_POINTS = 8
MAX_CONTRASTS_PER_ARM = 4
MAX_CONTRAST_BYTES = 3_000_000


def load_contrasts(points: Iterable[Point]) -> dict[str, Any]:
    """{points, scale, first} of a handful of points that stored clean and ADS traces side by side."""
    chosen = choose_contrasts(points)
    budget = MAX_CONTRAST_BYTES // max(1, len(chosen))
    loaded: list[dict[str, Any]] = []
    for point in chosen:
        if problems := read_contrast(contrast_path(point), budget):
            loaded.append({"label": contrast_label(point.row), "problems": problems})
    shifts = [abs(shift(token)) for point in loaded for token in tokens_of(point)]
    scale = float(np.clip(np.percentile(shifts, 95), 0.3, 4)) if shifts else 1.0
    ads = [i for i, point in enumerate(loaded) if point["label"].startswith("ADS")]
    return {"points": loaded, "scale": round(scale, 3), "first": ads[len(ads) // 2] if ads else 0}


def contrast_path(point: Point) -> Path:
    path = point.stages["train"]["path"]
    return layout.path_of("contrasts", path.parent.parent, path.stem)


def choose_contrasts(points: Iterable[Point]) -> list[Point]:
    """At most a handful: one seed of a setting, spread over lam, from every arm."""
    stored = [point for point in points if "train" in point.stages and contrast_path(point).is_file()]
    firsts = [same[0] for same in group_by(stored, setting).values()]
    chosen = [
        point for arm in group_by(firsts, lambda point: point.row.arm).values() for point in spread(arm)
    ]
    return chosen[:MAX_CONTRAST_POINTS]


def setting(point: Point) -> tuple:
    row = point.row
    return row.arm, row.tau, row.lam, row.eps, row.data, row.teacher


def spread(points: Sequence[Point]) -> list[Point]:
    """A few of the points, the first and the last among them."""
    places = np.linspace(0, len(points) - 1, MAX_CONTRASTS_PER_ARM).round().astype(int)
    return [points[i] for i in sorted({*places})]


def contrast_label(row: ResultRow) -> str:
    return f"{row.arm}: {show_knob(row, 'lam')}, {show_knob(row, 'tau')}, seed {row.seed}"


def read_contrast(path: Path, budget: int) -> list[dict[str, Any]]:
    """The problems of a file, as many as fit the budget of bytes; ValueError if it is something else."""
    problems = []
    try:
        for problem in json.loads(path.read_text(encoding="utf-8"))["problems"]:
            texts = {key: str(problem[key]) for key in ("id", "problem", "solution")}
            problems.append(texts | {side: read_side(problem[side]) for side in ("clean", "ads")})
            budget -= len(json.dumps(problems[-1]))
            if budget < 0:
                problems.pop()
                break
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a file of contrasted traces: delete it") from error
    return problems


def read_side(side: dict[str, Any]) -> dict[str, Any]:
    tokens = [[str(text), *map(short_float, numbers)] for text, *numbers in side["tokens"]]
    if any(len(token) != 4 for token in tokens):
        raise UserError("a token has other than 3 numbers")
    return {"finished": bool(side["finished"]), "is_correct": bool(side["is_correct"]), "tokens": tokens}


def short_float(value: float) -> float:
    """A number in 4 digits; 0 for what is none."""
    return float(f"{value:.4g}") if math.isfinite(value) else 0.0


def tokens_of(point: dict[str, Any]) -> list[list]:
    sides = [problem[side] for problem in point["problems"] for side in ("clean", "ads")]
    return [token for side in sides for token in side["tokens"]]


def shift(token: list) -> float:
    """log(ADS probability / clean probability), either of which may be 0."""
    return math.log(max(token[2], 1e-9) / max(token[1], 1e-9))
