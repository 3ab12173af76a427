"""Tables and sentences of the attackers, as cells of text and as the lines of CSV files."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ads.report import words
from ads.report.attacked import MADE_OF, SPENT, THREAT, Attacked, Line, card_lines
from ads.report.attackers import Cell, defence_of
from ads.report.compare import Match
from ads.report.curves import group_by
from ads.report.doubts import name_some
from ads.report.numbers import (
    show_count,
    show_interval,
    show_number,
    show_percent,
    show_seeds,
    show_setting,
)
from ads.report.results import ANSWERS, PRICES, knob_of, row_name
from ads.report.worst import WORST

Cells = list[list[str]]
HOW_WORST = (
    "that of the attacker who gets most out of a point's traces, chosen on one half of the test problems "
    "and reported on the other, both ways, in each seed"
)
MATRIX = (
    "accuracy [95 % interval], share of the gap recovered; intervals over seeds (t) or, of one seed, over "
    f"its problems only (bootstrap); {words.MARK} marks a reading in doubt, why is in matrix.csv"
)
MADE_OF_WORDS = (
    "by raw answers: accuracy = finished x right of finished + right unfinished; loops: share of answers "
    "that repeat themselves"
)
CARDS = (
    "what each attacker takes, and what either side spends on a point, means over points and seeds: the "
    "teacher's tokens and seconds of sampling what is published; the tokens that the attacker had to get, "
    "clean traces and further samples among them, and those that a student is trained on, once over; the "
    "seconds of attack.py, its samples and the training"
)


@dataclass(frozen=True)
class Table:
    """The matrix at one price, a row an attacker: `cells` holds (attacker, its Cells by defence)."""

    answers: str
    price: str
    level: float | None
    defences: Sequence[str]
    cells: Sequence[tuple[str, Sequence[Cell | None]]]

    @property
    def title(self) -> str:
        price = PRICES[self.price]
        at = f"each defence at its own {price.words}"
        if self.level is not None:
            at = f"at a {price.words} of {price.show_with_unit(self.level)}"
        return f"Students by {ANSWERS[self.answers]} answers, {at}"


def matrix_tables(attacked: Attacked) -> list[Table]:
    """The matrix at each price where any student is read; the prices nearest the headline's first."""
    tables = []
    for answers in ANSWERS:
        for price in PRICES:
            cells = [cell for cell in attacked.cells if (cell.answers, cell.price) == (answers, price)]
            levels = dict.fromkeys(c.level for c in cells if c.student is not None and not c.is_own)
            tables += [matrix_table(cells, level) for level in levels or ([None] if cells else [])]
    return sorted(tables, key=far_from_headline)


def far_from_headline(table: Table) -> tuple:
    """Accuracies before other prices, and of them the one that the finding is about first."""
    is_accuracy = table.price == "accuracy"
    distance = abs((table.level or 0) - words.HEADLINE_LEVEL) if is_accuracy else 0
    return list(ANSWERS).index(table.answers), not is_accuracy, distance


def matrix_table(cells: Sequence[Cell], level: float | None) -> Table:
    shown = {(c.attacker, c.defence): c for c in cells if c.is_own or c.level == level}
    defences = list(dict.fromkeys(cell.defence for cell in cells))
    attackers = dict.fromkeys(cell.attacker for cell in cells)
    lines = [(name, [shown.get((name, defence)) for defence in defences]) for name in attackers]
    return Table(cells[0].answers, cells[0].price, level, defences, lines)


def matrix_cells(table: Table) -> Cells:
    """Header and lines of text."""
    lines = [["attacker", *table.defences]]
    return lines + [
        [name, *(" ".join(filter(None, cell_text(cell))) for cell in row)] for name, row in table.cells
    ]


def cell_text(cell: Cell | None) -> tuple[str, str, str]:
    """(accuracy, interval or why there is none, share of the gap) of a cell."""
    if cell is None:
        return "-", "", ""
    if cell.student is None:
        return cell.note, "", ""
    own = f", at {PRICES[cell.price].show(cell.level)}" if cell.is_own else ""
    below = show_interval(cell.low, cell.high) if cell.low is not None else ""
    below = "; ".join(filter(None, (below, cell.note)))
    gap = f"gap {show_number(cell.gap, 2)}" if cell.gap is not None else ""
    if cell.gap_low is not None:
        gap += f" [{show_number(cell.gap_low, 2)}, {show_number(cell.gap_high, 2)}]"
    return show_number(cell.student) + own + words.mark(cell), below, gap


def worst_cells(attacked: Attacked) -> Cells:
    """The worst student at each setting, and whose it is."""
    worst = [line for line in attacked.lines if line["attack"] == WORST]
    first = attacked.attacks[0] if attacked.attacks else ""
    naive = {setting_of(line): line for line in attacked.lines if line["attack"] == first}
    names = ["teacher", WORST, "95 % interval", first, "chosen on halves", "seeds"]
    cells = [["defence", "setting", *names]]
    for line in worst:
        answers = next((a for a in ANSWERS if f"student_{a}_accuracy" in line), "raw")
        ends = [line.get(f"student_{answers}_{end}") for end in ("low", "high")]
        other = naive.get(setting_of(line), {})
        taught, share, alone = (
            show_number(found.get(f"{who}_{answers}_accuracy"))
            for found, who in ((line, "teacher"), (line, "student"), (other, "student"))
        )
        chosen = show_chosen(attacked, line, answers)
        numbers = [taught, share, show_interval(*ends), alone, chosen, str(line["seeds"])]
        cells.append([line["defence"], knob_of(line["tau"], line["lam"]), *numbers])
    return cells if worst else []


def setting_of(line: Line) -> tuple:
    return line["defence"], line["tau"], line["lam"]


def show_chosen(attacked: Attacked, line: Line, answers: str) -> str:
    """The attackers that were chosen at a setting, each with how often."""
    labels = {defence.key: defence.label for defence in attacked.defences}
    found = Counter[str]()
    for choice in attacked.choices:
        row = choice.point.row
        if (labels.get(defence_of(row)), row.tau, row.lam) == setting_of(line):
            found.update(choice.attacks.get(answers, ()))
    return ", ".join(f"{name} {num}" for name, num in found.most_common())


def made_of_cells(attacked: Attacked) -> Cells:
    """What each attacker's students are made of, at each setting."""
    lines = [line for line in attacked.lines if line["attack"] != WORST]
    shown = [key for key in MADE_OF if any(key in line for line in lines)]
    shown += dict.fromkeys(key for line in lines for key in line if key.startswith("pass_at_"))
    names = [key.replace("_", " ") for key in shown]
    cells = [["defence", "setting", "attacker", "seeds", "accuracy", *names]]
    for line in lines:
        numbers = [show_number(line.get(key)) for key in ("student_raw_accuracy", *shown)]
        where = [line["defence"], knob_of(line["tau"], line["lam"]), line["attacker"]]
        cells.append([*where, str(line["seeds"]), *numbers])
    return cells if lines else []


def own_sentences(attacked: Attacked) -> list[str]:
    """Students that hang on no published trace: what defended traces have to beat."""
    found = []
    for line in attacked.own_lines:
        answers = next((a for a in ANSWERS if f"student_{a}_accuracy" in line), None)
        text = line.get("note", "not tested")
        if answers:
            share, *ends = (line[f"student_{answers}_{name}"] for name in ("accuracy", "low", "high"))
            where = f"by {ANSWERS[answers]} answers, {show_seeds(line['seeds'])}"
            text = f"{show_number(share)} {show_interval(*ends)} ({where})"
        found.append(f"Without any published trace, {line['attacker']}: {text}.")
    return found


def card_cells(attacked: Attacked) -> Cells:
    """The threat cards, a line an attacker."""
    lines = [line for line in attacked.lines if line["attack"] != WORST]
    cells = [["attacker", *(name.replace("_", " ") for name in (*THREAT, *SPENT))]]
    for card in card_lines([*lines, *attacked.own_lines]):
        taken = [show_threat(card[name]) for name in THREAT]
        cells.append([card["attacker"], *taken, *(show_count(card[name]) for name in SPENT)])
    return cells if len(cells) > 1 else []


def show_threat(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return show_percent(value) if isinstance(value, float) and 0 < value < 1 else show_setting(value)


def headline(attacked: Attacked) -> str:
    """What the best attacker is left with, in one sentence; empty where nothing is compared."""
    best = words.headline(attacked.matches)
    if best is None or len(attacked.compared) < 2:
        return ""
    return (
        f"At a teacher accuracy of {show_percent(best.level)} ({ANSWERS[best.answers]} answers), the best of "
        f"{len(attacked.compared)} attackers brings students to {words.percent(best.temperature, best)} with "
        f"temperature-sampled traces, to {words.percent(best.student, best)} with {best.name} traces: "
        f"{words.how_much_less(best)}.{without_traces(attacked, best)}"
    )


def without_traces(attacked: Attacked, best: Match) -> str:
    """The best attacker without any published trace, where the defended traces bring no more than that."""
    name = f"student_{best.answers}_accuracy"
    own = max(attacked.own_lines, key=lambda line: line.get(name, -1.0), default={})
    if own.get(name, -1.0) < best.student:
        return ""
    return f" Without any published trace, {own['attacker']} brings them to {words.percent(own[name], best)}."


def gap_sentence(attacked: Attacked) -> str:
    """What shares of the gap are shares of."""
    found = dict.fromkeys(gap.words for gap in attacked.gaps.values() if gap.ends)
    return f"The gap reaches {'; '.join(found)}" if found else ""


def small_tables(attacked: Attacked, is_brief: bool) -> dict[str, Cells]:
    """{caption: cells}; is_brief: the matrix at one level of each price."""
    tables = matrix_tables(attacked)
    if is_brief:
        tables = [same[0] for same in group_by(tables, lambda table: table.price).values()]
    found = {f"{table.title}, {MATRIX}": matrix_cells(table) for table in tables}
    found[f"The worst student at each setting, {HOW_WORST}"] = worst_cells(attacked)
    if not is_brief:
        found[f"What students are made of, {MADE_OF_WORDS}"] = made_of_cells(attacked)
    return found | {f"Threat cards, {CARDS}": card_cells(attacked)}


def warning_lines(attacked: Attacked) -> list[str]:
    """What puts the worst students in doubt."""
    if len(attacked.attacks) > 1 and not attacked.choices:
        return ["WARNING: no worst student, as answers to single problems are missing"]
    cases = [
        f"{name} ({row_name(points[0].row)}{f' and {len(points) - 1} more' if len(points) > 1 else ''})"
        for name, points in attacked.missing.items()
    ]
    what = "WARNING: the worst student is chosen without the attackers that some points have no student of"
    return [f"{what}: {name_some(cases)}"] if cases else []
