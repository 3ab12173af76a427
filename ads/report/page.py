"""report.html: one file without any link to another. What it says and in what order is in page.html.

Whatever a model, a dataset or a name says becomes text: the template escapes it, and the page's script puts
it into text nodes. Only the plots come as markup, which matplotlib wrote.
"""

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ads.delta import agreement_table
from ads.report import (
    attack_tables,
    claims,
    detect,
    figures,
    findings,
    looks,
    numbers,
    reader,
    tables,
    words,
)
from ads.report.attacked import Line
from ads.report.compare import Match
from ads.report.curves import Curve
from ads.report.numbers import NBSP
from ads.report.results import ANSWERS, PRICES, Rows, distinct_answers

TEMPLATE = Path(__file__).with_suffix(".html")
# whose functions the template calls
MODULES = (agreement_table, attack_tables, claims, detect, findings, looks, numbers, tables, words)
ONE_ATTACK = (
    "Students fine-tuned on the traces of one teacher, with one recipe; an attacker may choose another."
)
SEVERAL = "Students of {} attackers fine-tuned on the traces of one teacher; another attacker may do better."
ANY_NOTE = "A fall of the raw accuracy is part of the price, even where forced answers hide it."


def render(found: findings.Findings, panels: figures.Panels, scale: str, about: Sequence[str]) -> str:
    """The whole page as text; `scale`: how large the experiment is; `about`: sentences on what it is and is
    not, where more is known than of any."""
    answers = distinct_answers([*found.baselines, *found.tested])
    asked, one_step = tables.asked_cells(found.baselines), tables.one_step_cells(found.curves)
    comparisons = {name: matched_tables(found.matches, name, answers) for name in PRICES}
    attacks = attack_parts(found, answers)
    svgs, contrasts = figures.inline_svgs(panels), reader.load_contrasts(found.points)
    gradients = {repr(gradient["stats"]): gradient for gradient in found.gradients}.values()
    sections = {  # with whether there is anything in it
        "Trade-off": True,
        "Worst student": svgs.get("worst"),
        "Attackers": attacks["matrix"],
        "Claims": found.claims or asked,
        **{f"Equal {price.words}": comparisons[name] for name, price in PRICES.items()},
        "Threat cards": attacks["cards"],
        "Detectability": found.detections,
        "Trace reader": contrasts["points"],
        "Knobs": svgs["knobs"],
        "Traces": svgs["traces"],
        "One step": one_step,
        "Losses": svgs["losses"],
        "Gradient": gradients,
        "All points": True,
    }
    template = make_environment().from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        {module.__name__.rpartition(".")[2]: module for module in MODULES} | attacks,
        found=found,
        scale=scale,
        answers=answers,
        sections=sections,
        about=about or any_note(found),
        svgs=svgs,
        legend=legend(found.curves, found.baselines),
        arms=legend(found.curves, []),
        asked=asked,
        comparisons=comparisons,
        **price_parts(sections, [*panels["tradeoff"], *attacks["matrix"]], comparisons),
        one_step=one_step,
        gradients=gradients,
        contrasts=contrasts,
        script_hash=script_hash(),
        nbsp=NBSP,
    )


def price_parts(
    sections: Iterable[str], shown: Iterable[Any], comparisons: Mapping[str, Any]
) -> dict[str, Any]:
    """The prices, those that anything is shown at, and the one that each section is about, if any."""
    has_price = {part.price for part in shown} | {name for name in PRICES if comparisons[name]}
    return {
        "prices": PRICES,
        "price_of": dict.fromkeys(sections, "") | {f"Equal {p.words}": name for name, p in PRICES.items()},
        "shown_prices": [name for name in PRICES if name in has_price],
    }


def attack_parts(found: findings.Findings, answers: Mapping[str, str]) -> dict[str, Any]:
    """What the sections on attackers hold."""
    matrix = attack_tables.matrix_tables(found.attacked)
    return {
        "matrix": [table for table in matrix if table.answers in answers],
        "cards": attack_tables.card_cells(found.attacked),
        "worst_legend": legend(found.attacked.curves, found.baselines, found.attacked.own_lines),
    }


def any_note(found: findings.Findings) -> tuple[str, str]:
    """What any experiment is and is not."""
    num = len(found.attacked.compared)
    return SEVERAL.format(num) if num > 1 else ONE_ATTACK, ANY_NOTE


def make_environment() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment


def script_hash() -> str:
    """What the page's policy allows: its one script, in base64."""
    script = TEMPLATE.read_text(encoding="utf-8").partition("<script>")[2].partition("</script>")[0]
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def legend(curves: Sequence[Curve], baselines: Rows, own: Iterable[Line] = ()) -> list[dict[str, str]]:
    """What each line of the trade-off is, without repetitions; `own`: students of no published trace."""
    lines = [(curve.arm, look, curve.label) for curve, look in looks.looks(curves)]
    drawn = [label for answers in ANSWERS for label in words.elicited(baselines, answers)]
    lines += [("undistilled", looks.LEVEL, label) for label in drawn]
    lines += [("undistilled", looks.OWN, line["attacker"]) for line in own]
    return [
        {"colour": looks.variable(arm), "key": looks.key_svg(arm, look), "label": label}
        for arm, look, label in dict.fromkeys(lines)
    ]


def matched_tables(
    matches: Iterable[Match], price: str, shown: Iterable[str] = ANSWERS
) -> dict[str, list[dict[str, Any]]]:
    """{answers: lines of a table}: ADS by level, then the other arms."""
    found = {}
    for answers in shown:
        same = [match for match in matches if (match.answers, match.price) == (answers, price)]
        arms = list(dict.fromkeys(match.name for match in same))
        same.sort(key=lambda match: (arms.index(match.name), -(match.level or 0)))
        found[answers] = [matched_line(match) for match in same if is_told(match, same)]
    return {answers: lines for answers, lines in found.items() if lines}


def is_told(match: Match, others: Sequence[Match]) -> bool:
    """Whether a comparison has a line: one without a difference only where its arm has no other."""
    same = [other for other in others if other.name == match.name]
    has_any = any(other.difference is not None for other in same)
    return match.difference is not None or (match is same[0] and not has_any)


def matched_line(match: Match) -> dict[str, Any]:
    """A comparison: both students on a track from 0 to 100 %, and the difference with what it stands on."""
    shown = [] if match.difference is None else words.in_points(match)
    difference, *ends = [number.replace("-", "\N{MINUS SIGN}") for number in shown] or [""]
    below = [f"[{f',{NBSP}'.join(ends)}]", numbers.interval_kind(match.num_seeds)] if ends else [match.note]
    dots = [(match.temperature, "temperature"), (match.student, match.arm)]
    dots = [(100 * share, looks.variable(arm)) for share, arm in dots if share is not None]
    bar = sorted(share for share, _ in dots) if len(dots) == 2 else []
    return {"match": match, "dots": dots, "bar": bar, "difference": difference, "below": below}
