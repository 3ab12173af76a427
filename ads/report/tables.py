"""Tables of a report, as cells and as the lines of a terminal, of Markdown and of CSV."""

import csv
import dataclasses
import html
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ads.report import numbers, results
from ads.report.attackers import Cell
from ads.report.claims import RAW, Claim
from ads.report.compare import Match
from ads.report.curves import Curve, Point, all_rows, by_setting, group_by, pool_copies, pooled
from ads.report.results import ANSWERS, ResultRow, Rows
from ads.report.words import by_label, elicited

Cells = list[list[str]]
LEGEND = [
    "forced, raw: accuracy on the n test problems with and without answer forcing",
    f"[low, high]: 95 % Wilson interval of one run; {numbers.ONE_SEED}",
    "t.fin, s.fin: share of the teacher's and the student's test traces that finished",
    "nll, tokens: of the training traces, mean nats/token under the teacher without a defence, median length",
    "loss: the student's on the holdout traces after training, nats/token",
]
ONE_STEP_LEGEND = (
    "step: change of the proxy's holdout loss after one SGD step on the training traces, nats/token"
)


# of a column: what it is, where a row has it
PRICE_LEGEND = {
    results.KL: (
        "KL(q||p): of the training traces, nats/token: how far the defence moves the teacher from its own "
        "distribution at the same tau; 0 by temperature alone, - where it was not measured"
    ),
    "train_lam": "lam_t, capped: mean strength of the defence, share of tokens where a cap lowers it",
    results.NUM_MODELS: "models: held while the traces are sampled; theta +- eps g are two",
    results.SPEED: "ms/token: milliseconds per token of the training traces as published, on their machine",
}


def legend_of(rows: Rows) -> list[str]:
    found = [line for key, line in PRICE_LEGEND.items() if any(key in row.columns for row in rows)]
    return [*LEGEND, *([ONE_STEP_LEGEND] if has_one_step(rows) else []), *found]


def has_one_step(rows: Rows) -> bool:
    return any(results.ONE_STEP in row.columns for row in rows)


def point_cells(rows: Rows) -> Cells:
    """A line per point, caps named with its arm; a setting has a column only where points differ in it."""
    if not rows:
        return []
    settings = ["tau", "lam", *results.differing(rows, results.CAPS)]
    tests = [(who, answers) for who in results.TESTS for answers in results.answers_of(rows)]
    shown = [
        n for n in results.NUMBERS if n.heading and (n.is_always or any(n.column in r.columns for r in rows))
    ]
    tested = [f"{who} {ANSWERS[answers]}" for who, answers in tests]
    lines = [["arm", *map(results.show_name, settings), "n", *tested, *(number.heading for number in shown)]]
    for row in rows:
        cells = [", ".join([row.arm, *row.caps])]
        cells += [*map(numbers.show_setting, map(row.number, settings)), show_sizes([row], "/")]
        cells += [results.show_accuracy(row.accuracy(*test)) for test in tests]
        lines.append([*cells, *(number.show(row.number(number.column)) for number in shown)])
    return lines


def setting_cells(curves: Sequence[Curve]) -> Cells:
    """A line per setting: means over seeds."""
    rows = all_rows(curves)
    tests = [(who, answers) for answers in ANSWERS for who in results.TESTS]
    tests = [test for test in tests if any(row.accuracy(*test).share is not None for row in rows)]
    shown = [n for n in results.NUMBERS if n.setting_heading and any(n.column in row.columns for row in rows)]
    names = [*(f"{who} {ANSWERS[answers]}" for who, answers in tests), *(n.setting_heading for n in shown)]
    lines = [["arm", *results.SYMBOLS.values(), "seeds", *names]]
    for curve in curves:
        for (tau, lam), seeds in by_setting(curve.points).items():
            cells = [curve.name, numbers.show_setting(tau), numbers.show_setting(lam), str(len(seeds))]
            shares = [[row.share(*test) for row in seeds] for test in tests]
            cells += [show_mean(found, numbers.show_number) for found in shares]
            cells += [show_mean((row.number(n.column) for row in seeds), n.show) for n in shown]
            lines.append(cells)
    return lines


def show_mean(found: Iterable[Any], show: Callable[[Any], str]) -> str:
    values = [value for value in found if isinstance(value, int | float)]
    return show(float(np.mean(values))) if values else "-"


def asked_cells(baselines: Rows) -> Cells:
    """The undistilled student by the way it was asked: means over seeds with intervals, the best marked."""
    graded_by = results.answers_of(baselines)
    best = {answers: elicited(baselines, answers).values() for answers in graded_by}
    lines = [["undistilled student", "seeds", *graded_by.values(), "best by"]]
    for label, rows in by_label(baselines).items():
        line = [label.removeprefix("undistilled student, "), str(len(rows))]
        for answers in graded_by:
            tested = [row for row in rows if row.accuracy("student", answers).is_share]
            share, *ends = pooled(tested, "student", answers) if tested else (None, None, None)
            line.append(f"{numbers.show_number(share)} {numbers.show_interval(*ends)}" if tested else "-")
        names = [name for answers, name in graded_by.items() if rows in best[answers]]
        lines.append([*line, " and ".join(names) or "-"])
    return lines if len(lines) > 1 else []


def one_step_cells(curves: Sequence[Curve]) -> Cells:
    """By arm: the proxy's change of loss, what students of the same traces lost, and whether ranks agree."""
    rows = [row for row in all_rows(curves) if has_step(row)]
    if not rows:
        return []
    clean = clean_students(curves)
    groups = group_by(rows, lambda row: row.arm)
    groups |= {"all": rows} if len(groups) > 1 else {}
    header = [
        "arm",
        "points",
        "one-step change",
        "its range",
        "student's loss of accuracy",
        "rank correlation",
    ]
    return [header, *(one_step_line(arm, group, clean) for arm, group in groups.items())]


def has_step(row: ResultRow) -> bool:
    return numbers.is_number(row.number(results.ONE_STEP)) and row.accuracy("student", RAW).is_share


def clean_students(curves: Sequence[Curve]) -> dict[tuple, float]:
    """{(replicate, settings without Delta's): accuracy of the student of temperature's lowest}."""
    found: dict[tuple, float] = {}
    for row in sorted(all_rows(c for c in curves if c.arm == "temperature"), key=lambda row: row.tau):
        if row.accuracy("student", RAW).is_share:
            found.setdefault(clean_key(row), row.share("student", RAW))
    return found


def clean_key(row: ResultRow) -> tuple:
    return row.replicate, results.identity(row, with_defence=False)


def one_step_line(arm: str, rows: Rows, clean: Mapping[tuple, float]) -> list[str]:
    change = [row.number(results.ONE_STEP) for row in rows]
    students = [row.share("student", RAW) for row in rows]
    lost = [clean[clean_key(row)] - row.share("student", RAW) for row in rows if clean_key(row) in clean]
    ends = " to ".join(numbers.show_signed(value) for value in (min(change), max(change)))
    mean = numbers.show_signed(float(np.mean(change)))
    harm = numbers.fixed(float(np.mean(lost)), 3, "+") if lost else "-"
    return [arm, str(len(rows)), mean, ends, harm, rank_correlation(change, students)]


def rank_correlation(change: Sequence[float], students: Sequence[float]) -> str:
    """Spearman's, with n; none of fewer than three points or where one side does not vary."""
    from scipy import stats  # half a second

    if len(change) < 3 or len(set(change)) < 2 or len(set(students)) < 2:
        return f"- (n {len(change)})"
    return f"{numbers.fixed(stats.spearmanr(change, students).statistic, 2, '+')} (n {len(change)})"


def shared_settings(rows: Rows) -> str:
    if not rows:
        return "no grid point has finished a stage"
    columns = [row.columns for row in rows]
    shared = {key: results.values_of(columns, key) for key in results.SETTINGS}
    text = [f"{key} {numbers.show_setting(values[0])}" for key, values in shared.items() if len(values) == 1]
    num_complete = sum(row.is_complete for row in rows)
    return f"{num_complete} of {len(rows)} points complete; {', '.join(text)}"


def show_sizes(rows: Rows, separator: str) -> str:
    """The number of test problems; the least and the largest where numbers differ."""
    sizes = {row.size(who) for row in rows for who in results.TESTS} - {None}
    return numbers.show_span(sizes, separator=separator) if sizes else "-"


def aligned(cells: Cells, align: Callable[[str, int], str] = str.rjust) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(align, line, widths)).rstrip() for line in cells]


def markdown_table(cells: Cells, others: str = "---:") -> list[str]:
    header, *body = cells
    lines = [header, ["---"] + [others] * (len(header) - 1), *body]
    return [f"| {' | '.join(map(inline, line))} |" for line in lines]


def inline(text: str) -> str:
    """Text that cannot end its table cell or start HTML or code."""
    return html.escape(text, quote=False).replace("|", "\\|").replace("`", "'")


def result_lines(points: Sequence[Point], baselines: Rows) -> Iterable[dict[str, Any]]:
    """The lines of results.csv: the rows, what the intervals are, and what puts each in doubt."""
    copies = [part for point in pool_copies(points) for part in point.copies]
    for point in points:
        flags = [results.POOLED] if point in copies else []
        flags += [f"{results.NO_SHARE}: {test}" for _, test in results.lost_shares(point.row)]
        yield result_line(point.row, flags)
    yield from (result_line(row, []) for row in baselines)


def result_line(row: ResultRow, flags: Iterable[str]) -> dict[str, Any]:
    return {**row.columns, "interval": f"Wilson, {numbers.ONE_SEED}", "flags": "; ".join(flags)}


def reading_line(found: Match | Cell) -> dict[str, Any]:
    """A line of comparisons.csv or of matrix.csv."""
    kind = "" if found.low is None else numbers.interval_kind(found.num_seeds)
    line = {"rule": found.answers, **dataclasses.asdict(found), "flags": "; ".join(found.flags)}
    del line["answers"]
    return line | {"interval": f"problem bootstrap, {kind}" if kind == numbers.ONE_SEED else kind}


def claim_line(claim: Claim) -> dict[str, Any]:
    """A line of claims.csv; `least` and `most` are in words in the claim."""
    found = dataclasses.asdict(claim) | {"flags": "; ".join(claim.flags), "answers": ANSWERS[RAW]}
    del found["least"], found["most"]
    return found | {"interval": "" if claim.low is None else numbers.interval_kind(claim.num_seeds)}


def to_csv(lines: Iterable[Mapping[str, Any]]) -> str:
    """All numbers, a line per row; empty where a stage is missing."""
    lines, file = list(lines), io.StringIO()
    columns = dict.fromkeys(key for line in lines for key in line)
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: defuse(value) for key, value in line.items()} for line in lines)
    return file.getvalue()


def defuse(value: object) -> object:
    """Text that a spreadsheet would run as a formula gets a quote in front; minus 0 is 0."""
    if isinstance(value, float):
        return value + 0
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value
