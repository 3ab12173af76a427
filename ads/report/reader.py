"""The trace reader of the page: tokens of defended traces beside their clean twins, coloured by the score.

Below them stands what students wrote on a few test problems: those of such traces and those of clean ones.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ads.arms import ARMS, DELTA
from ads.data.text import checked_equations
from ads.report.curves import Point, group_by
from ads.report.experiments import read_beside
from ads.report.numbers import show_percent
from ads.report.results import CAPS, ResultRow, show_knobs
from ads.stage import layout
from ads.stage.errors import UserError

MAX_CONTRAST_POINTS = 12
MAX_CONTRASTS_PER_ARM = 4
SIDES = ("clean", "defended")
HAVE_DELTA = {arm.label for arm in ARMS if arm.inputs == DELTA}
MAX_CONTRAST_BYTES = 3_000_000
LEAST_PROBABILITY = 1e-9  # what a smaller one counts as
LEAST_FLOAT = 1e-45  # of float32, which probabilities are computed in
LEAST_SCALE = 0.3  # nats: shades of less would be of noise
MAX_ANSWERS = 4  # problems of a test
MAX_ANSWER_BYTES = 600_000  # of all students together
MOST_CHARACTERS = 20_000  # of one answer
Written = dict[str, Any]


def load_contrasts(points: Sequence[Point]) -> dict[str, Any]:
    """{points, students, problems, first} of a handful of points that stored clean and defended traces side
    by side, with what students wrote who were trained on such traces."""
    chosen = choose_contrasts(points)
    budget = MAX_CONTRAST_BYTES // max(1, len(chosen))
    found = [(point, read_contrast(contrast_path(point), budget)) for point in chosen]
    kept = [point for point, problems in found if problems]
    loaded = [describe(point.row, problems) for point, problems in found if problems]
    shown: dict[str, Any] = {"points": loaded, "first": first_shown([point.row for point in kept])}
    return shown | load_students(kept, points)


def describe(row: ResultRow, problems: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A point of the reader; `scale`: the largest shift of any of its tokens, in nats."""
    tokens = [token for problem in problems for side in SIDES for token in problem[side]["tokens"]]
    shifts = [abs(shift(token)) for token in tokens if len(token) > 2]
    scale = max([LEAST_SCALE, *shifts])
    return {
        "label": contrast_label(row),
        "score": "Delta" if row.arm in HAVE_DELTA else "score",
        "tau": row.tau or 1.0,  # greedy traces are judged at tau 1
        "scale": round(scale, 3),
        "problems": problems,
    }


def first_shown(rows: Sequence[ResultRow]) -> int:
    """Of ADS without caps, one of middling strength."""
    ads = [i for i, row in enumerate(rows) if row.arm == "ADS"]
    ads = [i for i in ads if not rows[i].caps] or ads
    return ads[len(ads) // 2] if ads else 0


def contrast_path(point: Point) -> Path:
    path = point.stages["train"]["path"]
    return layout.path_of("contrasts", path.parent.parent, path.stem)


def choose_contrasts(points: Iterable[Point]) -> list[Point]:
    """At most a handful: one seed of a setting, spread over lam, from every arm."""
    stored = [point for point in points if "train" in point.stages and contrast_path(point).is_file()]
    firsts = [same[0] for same in group_by(stored, setting).values()]
    arms = list(group_by(firsts, lambda point: point.row.arm).values())
    sizes = {n: sum(min(n, len(arm)) for arm in arms) for n in range(1, MAX_CONTRASTS_PER_ARM + 1)}
    most = max((n for n, size in sizes.items() if size <= MAX_CONTRAST_POINTS), default=1)
    return [point for arm in arms for point in spread(arm, most)][:MAX_CONTRAST_POINTS]


def setting(point: Point) -> tuple:
    row = point.row
    return row.arm, row.tau, row.lam, row.eps, row.data, row.teacher, *map(row.number, CAPS)


def spread(points: Sequence[Point], most: int) -> list[Point]:
    """A few of the points, the first and, where they may be several, the last among them."""
    places = np.linspace(0, len(points) - 1, most).round().astype(int)
    return [points[i] for i in sorted({*places})]


def contrast_label(row: ResultRow) -> str:
    return f"{row.arm}: {', '.join([show_knobs(row), *row.caps, f'seed {row.seed}'])}"


def read_contrast(path: Path, budget: int) -> list[dict[str, Any]]:
    """The problems of a file, as many as fit the budget of bytes; ValueError if it is something else.

    Older files call the defended side "ads", whatever the defence.
    """
    try:
        return within(map(read_problem, json.loads(path.read_text(encoding="utf-8"))["problems"]), budget)
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is not a file of contrasted traces: delete it") from error


def within(found: Iterable[Written], budget: int) -> list[Written]:
    """The first of them, as many as fit the budget of bytes."""
    kept = []
    for one in found:
        budget -= len(json.dumps(one))
        if budget < 0:
            break
        kept.append(one)
    return kept


def read_problem(problem: Mapping[str, Any]) -> Written:
    texts = {key: str(problem[key]) for key in ("id", "problem", "solution")}
    found = problem if SIDES[1] in problem else {**problem, SIDES[1]: problem["ads"]}
    return texts | {side: read_side(found[side]) for side in SIDES}


def read_side(side: dict[str, Any]) -> dict[str, Any]:
    """`wrong`: [first token, token after the last, right result] of equations that do not hold; `nll`: mean
    -log clean probability, nats/token."""
    tokens: list[list[Any]] = [[str(text), *map(short_float, numbers)] for text, *numbers in side["tokens"]]
    if any(len(token) not in (2, 4) for token in tokens):
        raise UserError("a token has other than 1 or 3 numbers")
    flags = {key: bool(side[key]) for key in ("finished", "is_correct")}
    replaced = [range(len(tokens))[i] for i in side.get("replaced", ())]
    surprises = [-math.log(max(clean, LEAST_FLOAT)) for _, clean, *_ in tokens]
    nll = short_float(float(np.mean(surprises))) if tokens else None
    return {**flags, "tokens": tokens, "replaced": replaced, "wrong": wrong_tokens(tokens), "nll": nll}


def wrong_tokens(tokens: Sequence[list]) -> list[list]:
    """[first token, token after the last, right result] of each equation that does not hold."""
    starts = np.cumsum([0, *(len(text) for text, *_ in tokens)])
    found = []
    for match, right in checked_equations("".join(text for text, *_ in tokens)):
        if right is not None:
            first = np.searchsorted(starts, match.start(), "right") - 1
            found.append([int(first), int(np.searchsorted(starts, match.end())), right])
    return found


def short_float(value: float) -> float:
    """A number in 4 digits; 0 for what is none."""
    return float(f"{value:.4g}") if math.isfinite(value) else 0.0


def shift(token: list) -> float:
    """log(defended probability / clean probability), either of which may be 0."""
    return math.log(max(token[2], LEAST_PROBABILITY) / max(token[1], LEAST_PROBABILITY))


def load_students(chosen: Sequence[Point], points: Sequence[Point]) -> dict[str, Any]:
    """{students, pairs}: the students, and for each chosen point the places (its own, that of clean traces)
    among them; None where answers are not there."""
    clean = [clean_point(point, points) for point in chosen]
    tests = {path: point for point in (*chosen, *clean) if (path := test_path(point)) is not None}
    budget = MAX_ANSWER_BYTES // max(1, len(tests))
    students: dict[Any, Written] = {}
    for path, point in tests.items():
        if point is not None and (written := read_answers(point, budget)):
            accuracy = point.row.accuracy("student", "raw").share
            students[path] = {"accuracy": show_percent(accuracy), "answers": written}
    places = {path: i for i, path in enumerate(students)}
    pairs = [[places.get(test_path(p)), places.get(test_path(c))] for p, c in zip(chosen, clean, strict=True)]
    return {"students": list(students.values()), "pairs": pairs}


def test_path(point: Point | None) -> Any:
    """The sidecar of a point's test of its student."""
    return point.stages["student"]["path"] if point is not None and "student" in point.stages else None


def clean_point(point: Point, points: Sequence[Point]) -> Point | None:
    """The temperature point of lowest tau of the same seeds, data, models and attack."""
    names = ("seed", "student_seed", "data", "teacher", "student", "attack")
    wanted = [getattr(point.row, name) for name in names]
    plain = [p for p in points if p.row.arm == "temperature" and p.row.is_complete]
    same = [p for p in plain if [getattr(p.row, name) for name in names] == wanted]
    return min(same, key=lambda p: p.row.tau, default=None)


def read_answers(point: Point, budget: int) -> list[Written]:
    """The first problems of a test by id, so that all students' are the same, as many as fit the budget."""
    test = point.stages["student"]
    text = test["config"].get("trace_colname", "trace")
    names = ("id", "problem", "solution", text, "finished", "is_raw_correct")
    table = read_beside(test, names)
    if table is None:
        return []
    first = sorted(range(len(table["id"])), key=lambda i: order_of(table["id"][i]))[:MAX_ANSWERS]
    return within((describe_answer({name: table[name][i] for name in names}, text) for i in first), budget)


def order_of(problem: str) -> tuple:
    """Numbers in an id by their size."""
    return tuple((part.isdigit(), int(part) if part.isdigit() else 0, part) for part in problem.split("/"))


def describe_answer(row: Mapping[str, Any], text: str) -> Written:
    """An answer; `parts`: its text cut at equations that do not hold, [text, right result or None]."""
    trace, parts, end = str(row[text])[:MOST_CHARACTERS], list[list[str | None]](), 0
    for match, right in checked_equations(trace):
        if right is not None:
            parts += [[trace[end : match.start()], None], [match[0], right]]
            end = match.end()
    return {
        **{key: str(row[key]) for key in ("id", "problem", "solution")},
        **{"finished": bool(row["finished"]), "is_correct": bool(row["is_raw_correct"])},
        "parts": [*parts, [trace[end:], None]],
    }
