"""report.html: one file without any link to another, from the curves, their comparison and the plots.

Whatever a model, a dataset or a name says becomes text: escaped here, or a text node of the page's script.
"""

import base64
import hashlib
import json
import math
import re
from html import escape
from pathlib import Path

import numpy as np

from ads.delta import agreement_table
from ads.report import claims, plots
from ads.report.compare import PRICES
from ads.report.curves import RULES, by_setting, interval_kind, show_number, show_setting, show_signed
from ads.report.words import (
    MARK,
    controls,
    elicited,
    finding,
    finding_doubt,
    in_points,
    second_finding,
    show_seeds,
)

TEMPLATE = Path(__file__).with_suffix(".html")
NUM_NORMS = 10
NBSP = "\N{NO-BREAK SPACE}"
GLYPHS = {
    "o": "&#9679;",
    "s": "&#9632;",
    "v": "&#9660;",
    "D": "&#9670;",
    "^": "&#9650;",
    "P": "&#10010;",
    "_": "",
}  # markers
NUM_OPEN = 20  # a longer table of points is folded
ANY_NOTE = (
    "Students fine-tuned on the traces of one teacher, with one recipe; an attacker may choose another.",
    "A fall of the raw accuracy is part of the price, even where forced answers hide it.",
)
PAPER = (  # setting, teacher, student: arXiv 2504.13146
    ("GSM8K, greedy teacher", "91 %", "61 %"),
    ("GSM8K, undistilled, few-shot", "-", "31 %"),
    ("GSM8K, ADS", "70 %", "25 %"),
    ("GSM8K, ADS, small cost", "90 to 89 %", "65 to 56 %"),
    ("MMLU, 4 points of teacher by temperature", "68 %", "52 %"),
    ("MMLU, 4 points of teacher by ADS", "68 %", "40 %"),
)
INTERVALS = """\
Markers are settings with 95 % intervals. One seed: Wilson's, of this seed's problems only. Several: the t
interval of the mean over seeds, and no narrower than Wilson's of all their problems. Dots are single seeds. A
line starts at the same temperature without Delta where that was run."""
MATCHING = f"""\
Each seed's points are joined by straight lines and read off at the same teacher accuracy, never beyond their
ends; an arm of one setting is compared at its own. Difference: temperature minus arm, in points, with its
95 % interval. Several seeds: the t interval over their differences, cut off at 100 points. One seed: a
bootstrap over this seed's problems only, which knows nothing of how seeds differ. {MARK} marks what
is in doubt, and why."""
NLL_MATCHING = """\
The same at the same mean NLL of the teacher's test traces under the unadjusted teacher, in nats/token: how
unlikely the traces are as its own. Levels lie in the range that temperature and ADS both span. One seed: the
bootstrap resamples the students' answers and holds NLL at its measured value. A reading between settings more
than a quarter of the common range apart is marked."""
READING = """\
Each token is shaded by how much Delta changed its probability at its place, before truncation. Point at a
token, tap it, or go there with Tab and the arrow keys."""
ONE_STEP = """\
One step: the proxy takes one SGD step on the sampled traces, and its loss on clean holdout traces changes by
so much; above zero, the traces un-teach."""


def render(
    title,
    curves,
    baselines,
    matches,
    claimed,
    asked,
    one_step,
    svgs,
    cells,
    legend,
    summary,
    notes,
    gradients,
    contrasts,
    about,
    made_from,
):
    """The whole page as text; `cells` is the table of all points, `svgs` come from plots.inline_svgs.

    `asked`, `one_step`: (caption, cells) of the undistilled student's table and of the one-step test's.

    `about`: sentences on what the experiment is and is not, where more is known than of any.
    """
    settings, arms = setting_cells(curves), legend_list(curves, [])
    pale = "The paler a line, the weaker its setting; means over seeds."
    sections = {
        "Trade-off": first_section(curves, baselines, matches, svgs["tradeoff"], about),
        "Claims": claims_section(claimed, asked),
        **{f"Equal {words}": matched_section(matches, price) for price, words in PRICES.items()},
        "Trace reader": reader_section(contrasts),
        "Knobs": panel_section("The knobs", "", svgs["knobs"]),
        "Traces": panel_section("The training traces", trait_caption(curves), svgs["traces"], arms, settings),
        "One step": table_section("What one step of the proxy says of students", *one_step),
        "Losses": panel_section("The students' losses", pale, svgs["losses"], arms),
        "Gradient": gradient_section(gradients),
        "All points": points_section(cells, legend, summary, notes),
    }
    sections = {name: body for name, body in sections.items() if body}
    anchors = {name: name.lower().replace(" ", "-") for name in sections}
    warnings = [note for note in notes if note.startswith("WARNING")]
    parts = {
        "title": escape(title),
        "finding": sentence(finding(curves, matches)),
        "failures": sentence(claims.failures(claimed)),
        "doubt": sentence(finding_doubt(matches)),
        "navigation": "".join(f'<a href="#{anchors[name]}">{name}</a>' for name in sections),
        "sections": warning_section(warnings)
        + "".join(f'<section id="{anchors[name]}">{body}</section>\n' for name, body in sections.items()),
        "made_from": escape(made_from),
        "contrasts": embed_json(contrasts),
    }
    return fill(TEMPLATE.read_text(encoding="utf-8"), parts)


def sentence(text):
    """Escaped text in which no line ends before a percent sign."""
    return escape(text).replace(" %", "&nbsp;%")


def fill(template, parts):
    """The template with its {{names}} replaced, in one pass: inserted text is not looked at again."""
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = parts | {"script_hash": digest}
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def embed_json(value):
    """JSON that may stand in a <script> element: no character of it can end the element or open a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def warning_section(warnings):
    if not warnings:
        return ""
    items = "".join(f"<p>{escape(line)}</p>" for line in warnings)
    return f'<section class="warning">{items}</section>\n'


def first_section(curves, baselines, matches, panels, about):
    """The trade-off, its legend, and below it what to make of it."""
    notes = "".join(f"<li>{escape(line)}</li>" for line in (about or ANY_NOTE))
    paper = html_table([["", "teacher", "student"], *PAPER], "paper")
    return (
        f"{figure_grid(panels)}{legend_list(curves, baselines)}"
        f"<p>{sentence(second_finding(matches))} {sentence(controls(matches))}</p>"
        f'<p class="caption">{INTERVALS}</p><div class="panels">'
        f'<div class="note"><h3>What this is and is not</h3><ul>{notes}</ul></div>'
        f"<div><h3>The paper, with models of 3 to 7 billion parameters</h3>{paper}</div></div>"
    )


def legend_list(curves, baselines):
    styles = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "double"}
    lines = zip(curves, plots.line_styles(curves), strict=True)
    entries = [(curve.arm, styles[style], curve.label) for curve, style in lines]
    drawn = [label for rule in RULES for label in elicited(baselines, rule)]
    entries += [("undistilled", "dashed", label) for label in drawn]
    items = [
        f'<li><span style="color:var(--{plots.variable(arm)})"><span class="swatch" '
        f'style="border-top-style:{style}"></span>{GLYPHS[plots.MARKERS[arm]]}</span> {escape(label)}</li>'
        for arm, style, label in dict.fromkeys(entries)
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def figure_grid(panels):
    figures = [f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>" for title, svg in panels]
    return f'<div class="panels">{"".join(figures)}</div>'


def panel_section(heading, caption, panels, arms="", cells=()):
    """Plots under a heading, and perhaps a table; nothing without plots."""
    if not panels:
        return ""
    table = f'<div class="scroll">{html_table(cells)}</div>' if cells else ""
    caption = f'<p class="caption">{caption}</p>' if caption else ""
    return f"<h2>{heading}</h2>{caption}{figure_grid(panels)}{arms}{table}"


def html_table(cells, kind=""):
    """A table whose first line of cells is its header."""
    header, *body = [[escape(cell) for cell in line] for line in cells]
    lines = "".join(f"<tr><td>{'</td><td>'.join(line)}</td></tr>" for line in body)
    return f'<table class="{kind}"><thead><tr><th>{"</th><th>".join(header)}</th></tr></thead>{lines}</table>'


def claims_section(claimed, asked):
    """Each claim with what was found and its verdict, and the undistilled student by the way it was asked."""
    if not claimed:
        return table_section("The undistilled student", *asked)
    lines = "".join(map(claim_line, claims.cells(claimed)[1:]))
    header = '<th></th><th class="left">claim</th><th>found</th><th>seeds</th><th class="left">verdict</th>'
    caption, cells = asked
    return (
        f"<h2>The claims, and which of them hold</h2>"
        f'<p class="caption">{sentence(claims.RULES_OF_VERDICT)}</p>'
        f'<table class="claims"><thead><tr>{header}</tr></thead>{lines}</table>{claim_doubts(claimed)}'
        f"{table_section('The undistilled student as it was asked', caption, cells, 'h3')}"
    )


def claim_line(cells):
    """A row of the table, with the interval below the number."""
    key, text, found, interval, seeds, verdict = map(sentence, cells)
    verdict, *note = verdict.split(" (", 1)
    note = f'<br><span class="numbers">{note[0].removesuffix(")")}</span>' if note else ""
    number = f'{found}<br><span class="numbers">{interval}</span>'
    return (
        f'<tr><td>{key}</td><td class="left">{text}</td><td>{number}</td><td>{seeds}</td>'
        f'<td class="left">{verdict}{note}</td></tr>'
    )


def claim_doubts(claimed):
    """Why readings are marked, folded."""
    items = [f"({c.key}) {c.claim}: {'; '.join(c.flags)}." for c in claimed if c.flags]
    if not items:
        return ""
    items = "".join(f"<li>{sentence(item)}</li>" for item in items)
    return (
        f'<details><summary class="caption">Why readings are marked {MARK}</summary>'
        f'<ul class="caption">{items}</ul></details>'
    )


def table_section(heading, caption, cells, level="h2"):
    """A table with its caption under a heading; nothing without lines."""
    if not cells:
        return ""
    caption = sentence(f"{caption[0].upper()}{caption[1:]}.")
    return (
        f'<{level}>{heading}</{level}><p class="caption">{caption}</p>'
        f'<div class="scroll">{html_table(cells)}</div>'
    )


def doubt_line(flags, num_columns):
    if not flags:
        return ""
    text = small(f"{MARK} {'; '.join(flags)}.")
    return f'<tr><td colspan="{num_columns}" class="doubt">{text}</td></tr>'


def matched_section(matches, price):
    matches = [match for match in matches if match.price == price]
    if not matches:
        return ""
    tables = [
        f"<div><h3>{name.capitalize()} answers</h3>{matched_table(graded)}</div>"
        for rule, name in RULES.items()
        if (graded := [match for match in matches if match.rule == rule])
    ]
    caption = MATCHING if price == "accuracy" else NLL_MATCHING
    return (
        f"<h2>Students at equal {PRICES[price]}</h2>"
        f'<p class="caption">{caption}</p><div class="panels">{"".join(tables)}</div>'
    )


def matched_table(matches):
    """ADS by level, then the other arms: both students on a track from 0 to 100 %, and the difference."""
    arms = list(dict.fromkeys(match.name for match in matches))
    lines = map(matched_line, sorted(matches, key=lambda m: (arms.index(m.name), -(m.level or 0))))
    price = "teacher" if all(match.price == "accuracy" for match in matches) else "NLL"
    header = f'<th>{price}</th><th class="left">arm</th><th class="left">students</th><th>difference</th>'
    return f'<table class="matched"><thead><tr>{header}</tr></thead>{"".join(lines)}</table>'


def matched_line(match):
    students = [show_percent(share, 2) for share in (match.temperature, match.student)]
    difference, below = "-", [match.note]
    if match.difference is not None:
        difference, *ends = [number.replace("-", "\N{MINUS SIGN}") for number in in_points(match)]
        difference = f"<strong>{difference}</strong>{f' {MARK}' if match.flags else ''}"
        if ends:
            below = [f"[{f',{NBSP}'.join(ends)}]", interval_kind(match.num_seeds)]
    cells = (
        f"{show_level(match)}<br>{small(show_seeds(match))}",
        escape(match.name),
        f"{track(match)}{small(f',{NBSP}'.join(students))}",
        "<br>".join([difference, *map(small, below)]),
    )
    kinds = ("", ' class="left"', ' class="left"', "")
    line = f"<tr>{''.join(f'<td{kind}>{cell}</td>' for kind, cell in zip(kinds, cells, strict=True))}</tr>"
    return line + doubt_line(match.flags, 4)


def small(text):
    return f'<span class="numbers">{escape(text)}</span>'


def show_level(match):
    if match.price == "accuracy" or match.level is None:
        return show_percent(match.level)
    return f"{match.level:.3g}"


def show_percent(share, digits=3):
    return "-" if share is None else f"{100 * share:.{digits}g}{NBSP}%"


def track(match):
    """Two dots on a line from 0 to 100 %."""
    ends = [(match.temperature, "temperature"), (match.student, match.arm)]
    ends = [(100 * share, plots.variable(arm)) for share, arm in ends if share is not None]
    bar = ""
    if len(ends) == 2:
        low, high = sorted(share for share, _ in ends)
        bar = f'<i style="left:{low:.1f}%;width:{high - low:.1f}%"></i>'
    dots = [f'<b style="left:{share:.1f}%;background:var(--{name})"></b>' for share, name in ends]
    return f'<div class="track" aria-hidden="true">{bar}{"".join(dots)}</div>'


def trait_caption(curves):
    has_step = any(point.row.get("train_one_step_change") is not None for c in curves for point in c.points)
    return f"Of the traces that students were trained on; means over seeds. {ONE_STEP if has_step else ''}"


def setting_cells(curves):
    """Cells of a line per setting: means over seeds."""
    columns = {
        **{
            f"{who} {name}": f"{who}_{rule}_accuracy"
            for rule, name in RULES.items()
            for who in ("teacher", "student")
        },
        "tokens": "train_num_tokens_p50",
        "finished": "train_finished",
        "nll": "train_teacher_nll",
        "student's loss": "model_holdout_loss",
        "one step": "train_one_step_change",
    }
    rows = [point.row for curve in curves for point in curve.points]
    columns = {name: column for name, column in columns.items() if any(column in row for row in rows)}
    lines = [["arm", "\N{GREEK SMALL LETTER TAU}", "\N{GREEK SMALL LETTER LAMDA}", "seeds", *columns]]
    for curve in curves:
        for (tau, lam), group in by_setting(curve.points).items():
            cells = [curve.arm, show_setting(tau), show_setting(lam), str(len(group))]
            lines.append([*cells, *(show_mean(group, column) for column in columns.values())])
    return lines


def show_mean(rows, column):
    values = [row[column] for row in rows if row.get(column) is not None]
    if not values:
        return "-"
    mean = float(np.mean(values))
    if column == "train_one_step_change":
        return show_signed(mean)
    return f"{mean:.0f}" if column == "train_num_tokens_p50" else show_number(mean)


def gradient_section(gradients):
    return "<h2>The proxy's gradient</h2>" + "".join(map(gradient_part, gradients)) if gradients else ""


def gradient_part(gradient):
    """Whatever scalars the sidecar has, and the largest norms."""
    scalars = {k: v for k, v in gradient["stats"].items() if isinstance(v, int | float | str)}
    pairs = "".join(
        f"<div><dt>{escape(str(key).replace('_', ' '))}</dt><dd>{escape(show_scalar(value))}</dd></div>"
        for key, value in scalars.items()
    )
    norms = gradient.get("norms") or {}
    largest = sorted(norms.items(), key=lambda item: -item[1])[:NUM_NORMS]
    top = max((norm for _, norm in largest), default=0) or 1
    bars = "".join(
        f"<span>{escape(str(name).removesuffix('.weight'))}</span>"
        f'<div class="bar"><i style="width:{75 * norm / top:.1f}%"></i>{norm:.3g}</div>'
        for name, norm in largest
    )
    title = f"<h3>Largest norms of {len(norms)} tensors</h3>" if largest else ""
    return f'<dl>{pairs}</dl>{agreement_part(gradient)}{title}<div class="bars">{bars}</div>'


def agreement_part(gradient):
    """How well each way to Delta agrees with the exact one, where stage 2 has looked."""
    found = gradient.get("diagnostics")
    if not found:
        return ""
    cells = [["way to Delta", *agreement_table.FIGURES.values()]]
    for way, figures in agreement_table.rows(found).items():
        cells.append([way, *(show_scalar(figures[key]) for key in agreement_table.FIGURES)])
    return (
        f'<h3>Ways to Delta</h3><p class="caption">{escape(agreement_table.caption(found))}. '
        f'{escape(agreement_table.spread(found))}.</p><div class="scroll">{html_table(cells)}</div>'
    )


def show_scalar(value):
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def points_section(cells, legend, summary, notes):
    lines = "".join(f"<li>{escape(line)}</li>" for line in [*legend, *notes])
    table = f'<div class="scroll">{html_table(cells)}</div>' if cells else ""
    is_open = " open" if len(cells) <= NUM_OPEN else ""
    return (
        f'<h2>All points</h2><p class="caption">{escape(summary)}</p><details{is_open}>'
        f'<summary>Table and notes</summary>{table}<ul class="caption">{lines}</ul></details>'
    )


def reader_section(contrasts):
    if not contrasts["points"]:
        return ""
    factor = math.exp(contrasts["scale"])
    return f"""<h2>What Delta does to a trace</h2>
<p class="caption">{READING}</p>
<div class="scale"><span>less likely (&times; {1 / factor:.2g})</span><i></i>
<span>more likely (&times; {factor:.2g})</span></div>
<div class="controls"><label>Setting<select id="point"></select></label>
<label>Problem<select id="problem"></select></label>
<button type="button" id="previous" aria-label="Previous problem">&larr;</button>
<button type="button" id="next" aria-label="Next problem">&rarr;</button></div>
<noscript><p>The traces are shown by a script inside this file.</p></noscript>
<div class="problem" id="problem-text"></div>
<details><summary class="caption">Solution</summary><div class="problem" id="solution-text"></div></details>
<div class="traces" id="traces-box"></div>"""
