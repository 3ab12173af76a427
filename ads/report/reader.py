"""The trace reader of the page: tokens of traces beside their clean twins, coloured by Delta."""

import json
import math

import numpy as np

from ads.report.curves import SYMBOLS, show_setting
from ads.stage import layout
from ads.stage.errors import UserError

MAX_CONTRAST_POINTS = 8
MAX_CONTRASTS_PER_ARM = 4
MAX_CONTRAST_BYTES = 3_000_000


def load_contrasts(points):
    """{points, scale, first} of a handful of points that stored clean and ADS traces side by side."""
    chosen = choose_contrasts([(point, contrast_path(point)) for point in points])
    budget = MAX_CONTRAST_BYTES // max(1, len(chosen))
    loaded = [
        {"label": contrast_label(point), "problems": read_contrast(path, budget)} for point, path in chosen
    ]
    loaded = [point for point in loaded if point["problems"]]
    shifts = [abs(shift(token)) for point in loaded for token in tokens_of(point)]
    scale = float(np.clip(np.percentile(shifts, 95), 0.3, 4)) if shifts else 1.0
    ads = [i for i, point in enumerate(loaded) if point["label"].startswith("ADS")]
    return {"points": loaded, "scale": round(scale, 3), "first": ads[len(ads) // 2] if ads else 0}


def contrast_path(point):
    path = point.stages["train"]["path"] if "train" in point.stages else None
    return path and layout.path_of("contrasts", path.parent.parent, path.stem)


def choose_contrasts(found):
    """At most a handful of (point, path): one seed of a setting, spread over lam, from every arm."""
    settings = {}
    for point, path in found:
        if path and path.is_file():
            key = [point.row.get(name) for name in ("arm", "tau", "lam", "eps", "data", "teacher")]
            settings.setdefault(tuple(key), (point, path))
    arms = {}
    for key, value in settings.items():
        arms.setdefault(key[0], []).append(value)
    spread = [
        [
            group[i]
            for i in sorted({*np.linspace(0, len(group) - 1, MAX_CONTRASTS_PER_ARM).round().astype(int)})
        ]
        for group in arms.values()
    ]
    return [value for group in spread for value in group][:MAX_CONTRAST_POINTS]


def contrast_label(point):
    row = point.row
    knobs = [f"{SYMBOLS[key]} {show_setting(row[key])}" for key in ("lam", "tau")]
    return f"{row['arm']}: {', '.join(knobs)}, seed {row['seed']}"


def read_contrast(path, budget):
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


def read_side(side):
    tokens = [[str(text), *map(short_float, numbers)] for text, *numbers in side["tokens"]]
    if any(len(token) != 4 for token in tokens):
        raise UserError("a token has other than 3 numbers")
    return {"finished": bool(side["finished"]), "is_correct": bool(side["is_correct"]), "tokens": tokens}


def short_float(value):
    """A number in 4 digits; 0 for what is none."""
    return float(f"{value:.4g}") if math.isfinite(value) else 0.0


def tokens_of(point):
    return [
        token
        for problem in point["problems"]
        for side in ("clean", "ads")
        for token in problem[side]["tokens"]
    ]


def shift(token):
    """log(ADS probability / clean probability), either of which may be 0."""
    return math.log(max(token[2], 1e-9) / max(token[1], 1e-9))
