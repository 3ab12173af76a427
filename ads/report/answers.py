"""What students wrote on a few test problems, for the reader: their own and those of clean traces."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ads.data.tables import read_columns
from ads.data.text import checked_equations
from ads.report.curves import Point
from ads.report.numbers import show_percent
from ads.stage.errors import UserError

MAX_ANSWERS = 4  # problems of a test
MAX_ANSWER_BYTES = 600_000  # of all students together
MOST_CHARACTERS = 20_000  # of one answer
Written = dict[str, Any]


def of_students(chosen: Sequence[Point], points: Sequence[Point]) -> dict[str, Any]:
    """{students, pairs}: the students, and for each chosen point the places (its own, that of clean traces)
    among them; None where answers are not there."""
    clean = [clean_point(point, points) for point in chosen]
    tests = {path: point for point in (*chosen, *clean) if (path := path_of(point)) is not None}
    budget = MAX_ANSWER_BYTES // max(1, len(tests))
    students: dict[Any, Written] = {}
    for path, point in tests.items():
        if point is not None and (written := read_answers(point, budget)):
            accuracy = point.row.accuracy("student", "raw").share
            students[path] = {"accuracy": show_percent(accuracy), "answers": written}
    places = {path: i for i, path in enumerate(students)}
    pairs = [[places.get(path_of(p)), places.get(path_of(c))] for p, c in zip(chosen, clean, strict=True)]
    return {"students": list(students.values()), "pairs": pairs}


def path_of(point: Point | None) -> Any:
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
    try:
        table = read_columns(test["path"].with_suffix(".parquet"), names)
    except UserError:
        return []
    written: list[Written] = []
    for i in sorted(range(len(table["id"])), key=lambda i: order_of(table["id"][i]))[:MAX_ANSWERS]:
        written.append(describe({name: table[name][i] for name in names}, text))
        budget -= len(json.dumps(written[-1]))
        if budget < 0:
            return written[:-1]
    return written


def order_of(problem: str) -> tuple:
    """Numbers in an id by their size."""
    return tuple((part.isdigit(), int(part) if part.isdigit() else 0, part) for part in problem.split("/"))


def describe(row: Mapping[str, Any], text: str) -> Written:
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
