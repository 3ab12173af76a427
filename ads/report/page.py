"""report.html: one file without any link to another.

Whatever a model, a dataset or a name says becomes text: the template escapes it, and the page's script puts
it into text nodes. Only the plots come as markup, which matplotlib wrote.
"""

import base64
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ads.delta import agreement_table
from ads.report import claims, findings, numbers, plots, reader, tables, words
from ads.report.compare import Match
from ads.report.curves import Curve
from ads.report.findings import Findings
from ads.report.numbers import NBSP
from ads.report.rows import ANSWERS, ONE_STEP, PRICES, Rows

TEMPLATE = Path(__file__).with_suffix(".html")
NUM_NORMS = 10
NUM_OPEN = 20  # a longer table of points is folded
GLYPHS = dict(zip("osvD^P_", "\u25cf\u25a0\u25bc\u25c6\u25b2\u271a", strict=False)) | {"_": ""}  # of markers
BORDERS = dict(zip(plots.CURVE_STYLES, ("solid", "dashed", "dotted", "double"), strict=True))
ANY_NOTE = (
    "Students fine-tuned on the traces of one teacher, with one recipe; an attacker may choose another.",
    "A fall of the raw accuracy is part of the price, even where forced answers hide it.",
)


def render(found: Findings, panels: plots.Panels, about: Sequence[str]) -> str:
    """The whole page as text; `about`: sentences on what the experiment is and is not, where more is known
    than of any."""
    curves, svgs = found.curves, plots.inline_svgs(panels)
    contrasts = reader.load_contrasts(found.points)
    asked = tables.asked_cells(found.baselines)
    one_step = tables.one_step_cells(curves)
    gradients = {repr(gradient["stats"]): gradient for gradient in found.gradients}.values()
    comparisons = {name: matched_tables(found.matches, name) for name in PRICES}
    shown = {  # by section, whether there is anything in it
        "Trade-off": True,
        "Claims": found.claims or asked,
        **{f"Equal {price.words}": comparisons[name] for name, price in PRICES.items()},
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
        script_hash=script_hash(),
        shown=shown,
        title=findings.title(found),
        finding=words.finding(curves, found.matches),
        failures=claims.failures(found.claims),
        doubt=words.finding_doubt(found.matches),
        second=f"{words.second_finding(found.matches)} {words.controls(found.matches)}",
        warnings=[note for note in found.notes if note.startswith("WARNING")],
        about=about or ANY_NOTE,
        svgs=svgs,
        legend=legend(curves, found.baselines),
        arms=legend(curves, []),
        claims=found.claims,
        claim_cells=claims.cells(found.claims)[1:],
        verdicts=claims.VERDICTS,
        asked=asked,
        asked_caption=findings.ASKED,
        comparisons=comparisons,
        prices=PRICES,
        settings=tables.setting_cells(curves),
        has_step=any(row.number(ONE_STEP) is not None for row in plots.all_rows(curves)),
        one_step=one_step,
        one_step_caption=findings.ONE_STEP,
        gradients=[gradient_parts(gradient) for gradient in gradients],
        points=tables.point_cells(found.rows),
        num_open=NUM_OPEN,
        legend_lines=tables.legend_of(found.rows),
        summary=tables.shared_settings(found.rows),
        notes=found.notes,
        contrasts=contrasts,
        factor=math.exp(contrasts["scale"]),
        made_from=findings.provenance(found.sidecars),
        mark=words.MARK,
    )


def make_environment() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters["keep"] = keep_percents
    return environment


def script_hash() -> str:
    """What the page's policy allows: its one script, in base64."""
    script = TEMPLATE.read_text(encoding="utf-8").partition("<script>")[2].partition("</script>")[0]
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def keep_percents(text: str) -> str:
    """Text in which no line ends before a percent sign."""
    return text.replace(" %", f"{NBSP}%")


def legend(curves: Sequence[Curve], baselines: Rows) -> list[dict[str, str]]:
    """What each line of the trade-off is, without repetitions."""
    lines = [(curve.arm, BORDERS[style], curve.label) for curve, style in plots.line_styles(curves)]
    drawn = [label for answers in ANSWERS for label in words.elicited(baselines, answers)]
    lines += [("undistilled", BORDERS["--"], label) for label in drawn]
    return [
        {"colour": plots.variable(arm), "border": border, "glyph": GLYPHS[plots.MARKERS[arm]], "label": label}
        for arm, border, label in dict.fromkeys(lines)
    ]


def matched_tables(matches: Iterable[Match], price: str) -> dict[str, list[dict[str, Any]]]:
    """{answers in words: lines of a table}: ADS by level, then the other arms."""
    found = {}
    for answers, name in ANSWERS.items():
        same = [match for match in matches if (match.answers, match.price) == (answers, price)]
        arms = list(dict.fromkeys(match.name for match in same))
        same.sort(key=lambda match: (arms.index(match.name), -(match.level or 0)))
        found[name] = [matched_line(match) for match in same]
    return {name: lines for name, lines in found.items() if lines}


def matched_line(match: Match) -> dict[str, Any]:
    """The cells of a comparison: both students on a track from 0 to 100 %, and the difference."""
    difference, *ends = [""] if match.difference is None else words.in_points(match)
    ends = [end.replace("-", "\N{MINUS SIGN}") for end in ends]
    dots = [(match.temperature, "temperature"), (match.student, match.arm)]
    dots = [(100 * share, plots.variable(arm)) for share, arm in dots if share is not None]
    students = (numbers.show_percent(share, 2, NBSP) for share in (match.temperature, match.student))
    return {
        "level": PRICES[match.price].show(match.level, NBSP),
        "seeds": numbers.show_seeds(match.num_seeds),
        "name": match.name,
        "dots": dots,
        "bar": sorted(share for share, _ in dots) if len(dots) == 2 else [],
        "students": f",{NBSP}".join(students),
        "difference": difference.replace("-", "\N{MINUS SIGN}"),
        "below": [f"[{f',{NBSP}'.join(ends)}]", numbers.interval_kind(match.num_seeds)]
        if ends
        else [match.note],
        "flags": match.flags,
    }


def gradient_parts(gradient: Mapping[str, Any]) -> dict[str, Any]:
    """Whatever scalars the sidecar has, how well each way to Delta agrees, and the largest norms."""
    scalars = {k: v for k, v in gradient["stats"].items() if isinstance(v, int | float | str)}
    norms = gradient.get("norms") or {}
    largest = sorted(norms.items(), key=lambda item: -item[1])[:NUM_NORMS]
    diagnostics = gradient.get("diagnostics")
    return {
        "scalars": {str(key).replace("_", " "): show_scalar(value) for key, value in scalars.items()},
        "norms": [(str(name).removesuffix(".weight"), norm) for name, norm in largest],
        "num_norms": len(norms),
        "ways": way_cells(diagnostics) if diagnostics else [],
        "about_ways": about_ways(diagnostics) if diagnostics else "",
    }


def way_cells(diagnostics: Mapping[str, Any]) -> tables.Cells:
    figures = agreement_table.FIGURES
    lines = [["way to Delta", *figures.values()]]
    for way, found in agreement_table.rows(diagnostics).items():
        lines.append([way, *(show_scalar(found[key]) for key in figures)])
    return lines


def about_ways(diagnostics: Mapping[str, Any]) -> str:
    return f"{agreement_table.caption(diagnostics)}. {agreement_table.spread(diagnostics)}."


def show_scalar(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
