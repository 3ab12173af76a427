"""What becomes of each attacker's students at each point, and what both sides spend on it: a line each."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ads.data.tables import read_columns
from ads.report import results
from ads.report.attackers import Attacker, Defence, find_defences
from ads.report.curves import Points, group_by, knobs, pooled
from ads.report.numbers import is_number
from ads.report.recipes import Recipe, title_of
from ads.report.results import ResultRow
from ads.stage.errors import UserError

Line = dict[str, Any]
THREAT = ("labels", "clean_traces", "queries", "models")
SPENT = ("published_tokens", "read_tokens", "trained_tokens", "defender_seconds", "attacker_seconds")
MADE_OF = ("finished", "right_of_finished", "right_unfinished", "loops")  # of accuracies by raw answers
OF_ATTACKER = ("samples", "attack", "model")  # stages that an attacker pays for


def attacker_lines(attackers: Sequence[Attacker], recipes: Mapping[str, Recipe]) -> list[Line]:
    """The lines of attackers.csv: each attacker at each setting of each defence, means over seeds."""
    cache: dict[Any, Any] = {}
    lines = []
    for defence in find_defences(attackers):
        for attacker in (attacker for attacker in attackers if defence.key in attacker.curves):
            points = attacker.curves[defence.key].points
            for _, same in sorted(group_by(points, lambda point: knobs(point.row)).items()):
                lines.append(setting_line(defence, attacker, same, recipes, cache))
    return lines


def setting_line(
    defence: Defence, attacker: Attacker, points: Points, recipes: Mapping[str, Recipe], cache: dict[Any, Any]
) -> Line:
    """Of one setting: accuracies with intervals, what they are made of, and what was spent."""
    rows = [
        results.mean_row([point.row for point in same])
        for same in group_by(points, lambda point: point.row.replicate).values()
    ]
    line: Line = {"defence": defence.label, "arm": defence.arm, "tau": rows[0].tau, "lam": rows[0].lam}
    line |= {"attacker": attacker.label, "attack": attacker.name, "seeds": len(rows)}
    parts = [part for point in points for part in point.parts]
    found = [spent(part.stages, cache) | made_of(part.stages.get("student"), cache) for part in parts]
    numbers = {
        name: [values[name] for values in found if is_number(values.get(name))] for name in (*MADE_OF, *SPENT)
    }
    return (
        line
        | accuracies(rows)
        | {name: float(np.mean(values)) for name, values in numbers.items() if values}
        | passed(rows)
        | threat_of(recipes, attacker.name)
    )


def accuracies(rows: Sequence[ResultRow]) -> Line:
    """Teacher's and student's, by each kind of answers, with the 95 % intervals of pooled_interval."""
    line: Line = {}
    for who in results.TESTS:
        for answers in results.ANSWERS:
            tested = [row for row in rows if row.accuracy(who, answers).is_share]
            if tested:
                numbers = zip(("accuracy", "low", "high"), pooled(tested, who, answers), strict=True)
                line |= {f"{who}_{answers}_{name}": number for name, number in numbers}
    return line


def passed(rows: Sequence[ResultRow]) -> Line:
    """{pass_at_K_ANSWERS: share} of students that were sampled several times, means over seeds."""
    line: Line = {}
    for answers in results.ANSWERS:
        start = f"student_pass_at_{answers}_"
        for column in dict.fromkeys(c for row in rows for c in row.columns if c.startswith(start)):
            values = [row.number(column) for row in rows if is_number(row.number(column))]
            line[f"pass_at_{column.removeprefix(start)}_{answers}"] = float(np.mean(values))
    return line


def made_of(test: Mapping[str, Any] | None, cache: dict[Any, Any]) -> Line:
    """accuracy = finished * right_of_finished + right_unfinished, by raw answers; and the share of loops.

    The middle two need the answers beside the sidecar.
    """
    if not test:
        return {}
    line: Line = {key: test["stats"].get(key) for key in ("finished", "loops")}
    columns = read_cached(test, ("finished", "is_raw_correct"), cache)
    if columns and any(columns["finished"]):
        pairs = list(zip(columns["finished"], columns["is_raw_correct"], strict=True))
        line["right_of_finished"] = float(np.mean([right for finished, right in pairs if finished]))
        line["right_unfinished"] = float(np.mean([right and not finished for finished, right in pairs]))
    return line


def spent(stages: Mapping[str, Any], cache: dict[Any, Any]) -> Line:
    """Tokens that the teacher published, that the attacker had to get and that the student was trained on,
    once over; and the seconds of either side's stages."""
    train, attack = stages.get("train"), stages.get("attack")
    columns = read_cached(train, ("num_tokens",), cache) if train else None
    published = sum(columns["num_tokens"]) if columns else None
    return {
        "published_tokens": published,
        "read_tokens": attack["stats"].get("tokens_read", published) if attack else published,
        "trained_tokens": attack["stats"].get("tokens") if attack else published,
        "defender_seconds": train.get("seconds") if train else None,
        "attacker_seconds": sum(stages[name].get("seconds", 0) for name in OF_ATTACKER if name in stages),
    }


def read_cached(sidecar: Mapping[str, Any], columns: tuple[str, ...], cache: dict[Any, Any]) -> Line | None:
    """Columns of the table beside a sidecar, each table read once; None where they are not there."""
    key = sidecar["path"], columns
    if key not in cache:
        try:
            cache[key] = read_columns(sidecar["path"].with_suffix(".parquet"), columns)
        except UserError:
            cache[key] = None
    return cache[key]


def threat_of(recipes: Mapping[str, Recipe], attack: str) -> Line:
    threat = recipes[attack].threat if attack in recipes else {}
    return {name: threat.get(name) for name in THREAT}


def own_lines(own: Points, recipes: Mapping[str, Recipe]) -> list[Line]:
    """The students that hang on no published trace, one line an attack."""
    cache: dict[Any, Any] = {}
    lines = []
    for name, same in group_by(own, lambda point: str(point.row.attack)).items():
        rows = [point.row for point in same]
        found = [spent(point.stages, cache) for point in same]
        line: Line = (
            {"attacker": title_of(recipes, name), "attack": name, "seeds": len(rows)}
            | accuracies(rows)
            | passed(rows)
        )
        for key in ("trained_tokens", "attacker_seconds"):
            values = [values[key] for values in found if is_number(values[key])]
            line |= {key: float(np.mean(values))} if values else {}
        emptied = [row for row in rows if row.student_n is None and row.number("attack_n") == 0]
        line |= {"note": f"no row left in {len(emptied)} of {len(rows)} seeds"} if emptied else {}
        lines.append(line | threat_of(recipes, name))
    return lines


def card_lines(lines: Iterable[Line]) -> list[Line]:
    """A line an attacker: its threat card, and what is spent on a point, means over points."""
    cards = []
    for same in group_by(lines, lambda line: line["attacker"]).values():
        card = {key: same[0].get(key) for key in ("attacker", *THREAT)}
        for key in SPENT:
            values = [line[key] for line in same if is_number(line.get(key))]
            card[key] = float(np.mean(values)) if values else None
        cards.append(card)
    return cards
