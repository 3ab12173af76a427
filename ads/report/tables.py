"""Tables of a report: terminal, Markdown, CSV."""

import csv
import dataclasses
import html
import io
import shlex

from ads.delta import agreement_table
from ads.report import claims
from ads.report.compare import PRICES
from ads.report.curves import (
    NO_SHARE,
    ONE_SEED,
    POOLED,
    RULES,
    SETTINGS,
    differing,
    interval_kind,
    is_complete,
    lost_shares,
    pool_copies,
    rules_of,
    show_name,
    show_number,
    show_setting,
    show_signed,
    values_of,
)
from ads.report.points import short_name, sidecars_of
from ads.report.words import MARK, show_match

NUMBERS = {  # heading in the table: column of results.csv
    "t.fin": "teacher_finished",
    "s.fin": "student_finished",
    "nll": "train_teacher_nll",
    "tokens": "train_num_tokens_p50",
    "loss": "model_holdout_loss",
}
ONE_STEP = "train_one_step_change"
LEGEND = f"""\
forced, raw: accuracy on the n test problems with and without answer forcing
[low, high]: 95 % Wilson interval of one run; {ONE_SEED}
t.fin, s.fin: share of the teacher's and the student's test traces that finished
nll, tokens: of the training traces, mean nats/token under the unadjusted teacher and median length
loss: the student's on the holdout traces after training, nats/token"""
ONE_STEP_LEGEND = (
    "step: change of the proxy's holdout loss after one SGD step on the training traces, nats/token"
)
ASKED = "means over seeds [95 % interval]; the best way is the line in the plots and in claim a"
ONE_STEP_TABLE = (
    "means over points and seeds; loss of accuracy: against the student of its seed's clean traces, by raw "
    "answers; rank correlation (Spearman) of one-step change and student's accuracy, over points: -1 if the "
    "step foretells the order of the students, 0 if it says nothing"
)
MATCH_LEGEND = (
    f"95 % intervals over seeds (t) or, of one seed, over problems (bootstrap); {MARK} marks what is in doubt"
)


def text_table(points):
    if not points:
        return ["no grid point has finished a stage"]
    lines = aligned(table(points))
    return [shared_settings(points), lines[0], "-" * len(lines[0]), *lines[1:], legend_of(points)]


def aligned(cells, align=str.rjust):
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(align, line, widths)).rstrip() for line in cells]


def small_tables(curves, baselines, claimed):
    """{caption: cells} of the tables besides that of all points; those without lines are left out."""
    tables = {
        f"Claims. {' '.join(claims.RULES_OF_VERDICT.split())}": claims.cells(claimed) if claimed else [],
        f"The undistilled student as it was asked, {ASKED}": claims.asked_cells(baselines),
        f"One step of the proxy on the traces and what it says of students, {ONE_STEP_TABLE}": (
            claims.one_step_cells(curves)
        ),
    }
    return {caption: cells for caption, cells in tables.items() if cells}


def legend_of(points):
    return "\n".join([LEGEND, ONE_STEP_LEGEND] if has_one_step(points) else [LEGEND])


def has_one_step(points):
    return any(ONE_STEP in row for row in points)


def table(points):
    """Header and lines of cells; a setting has a column only where points differ in it."""
    settings = ["tau", "lam", *differing(points)]
    accuracies = [(who, rule) for who in ("teacher", "student") for rule in rules_of(points)]
    lines = [["arm", *map(show_name, settings), "n", *(f"{who} {RULES[rule]}" for who, rule in accuracies)]]
    lines[0] += NUMBERS
    lines[0] += ["step"] if has_one_step(points) else []
    for row in points:
        cells = [row["arm"], *(show_setting(row.get(key)) for key in settings), show_sizes([row], "/")]
        cells += [show_accuracy(row, f"{who}_{rule}") for who, rule in accuracies]
        cells += [show_number(row.get(column)) for column in NUMBERS.values()]
        lines.append([*cells, *([show_signed(row.get(ONE_STEP))] if has_one_step(points) else [])])
    return lines


def shared_settings(rows):
    shared = {key: values_of(rows, key) for key in SETTINGS}
    text = [f"{key} {show_setting(values[0])}" for key, values in shared.items() if len(values) == 1]
    return f"{sum(map(is_complete, rows))} of {len(rows)} points complete; {', '.join(text)}"


def show_sizes(rows, separator):
    """The number of test problems; the least and the largest where numbers differ."""
    sizes = sorted({*values_of(rows, "teacher_n"), *values_of(rows, "student_n")})
    return separator.join(map(str, dict.fromkeys(sizes[:1] + sizes[-1:]))) or "-"


def show_accuracy(row, name):
    """A share with its interval, as in .838 [.812, .861]."""
    share, low, high = (show_number(row.get(f"{name}_{part}")) for part in ("accuracy", "low", "high"))
    return "-" if share == "-" else f"{share} [{low}, {high}]"


def show_accuracies(row):
    """An undistilled student's, by each rule that it was graded by."""
    rules = rules_of([row]).items()
    return ", ".join(f"{name} {show_accuracy(row, f'student_{rule}')}" for rule, name in rules)


def baseline_lines(baselines):
    return [
        f"undistilled {row['student']} on {row['data']}: {show_accuracies(row)}, "
        f"few_shot {row['student_few_shot']}, "
        f"{'prefill ' + repr(row['student_prefill']) + ', ' if row['student_prefill'] else ''}"
        f"n {show_sizes([row], '/')}, finished {show_number(row.get('student_finished'))}, seed {row['seed']}"
        for row in baselines
    ] or ["undistilled student: -"]


def gradient_lines(experiments):
    lines = []
    for gradient in [g for e in experiments for g in e.gradients.values()]:
        n, loss, norm = (show_number(gradient["stats"].get(key)) for key in ("n", "loss", "grad_norm"))
        proxy = short_name(gradient["config"]["proxy_student"])
        line = f"gradient of {proxy}: n {n}, loss {loss} nats/token, ||g|| {norm}"
        if found := gradient.get("diagnostics"):
            ways = agreement_table.rows(found).items()
            shown = (f"{way} {show_number(figures['correlation'])}" for way, figures in ways)
            line += f"; correlation with the exact Delta: {', '.join(shown)}"
        lines.append(line)
    return list(dict.fromkeys(lines)) or ["gradient: -"]


def results(points, baselines):
    """The lines of results.csv: what the intervals are, the rows, and what puts each in doubt."""
    copies = [part for p in pool_copies(p for p in points if is_complete(p.row)) for part in p.copies]
    for point in points:
        lost = [f"{NO_SHARE}: {test}" for _, test in lost_shares(point.row)]
        flags = ([POOLED] if point in copies else []) + lost
        yield {**point.row, "interval": f"Wilson, {ONE_SEED}", "flags": "; ".join(flags)}
    for row in baselines:
        yield {**row, "interval": f"Wilson, {ONE_SEED}", "flags": ""}


def comparison(match):
    """A line of comparisons.csv."""
    values = dataclasses.asdict(match) | {"flags": "; ".join(match.flags)}
    kind = "" if match.low is None else interval_kind(match.num_seeds)
    return values | {"interval": kind if match.num_seeds > 1 or not kind else f"problem bootstrap, {kind}"}


def claim_line(claim):
    """A line of claims.csv."""
    kind = "" if claim.low is None else interval_kind(claim.num_seeds)
    left_out = ("least", "most")  # in words in the claim
    values = {key: value for key, value in dataclasses.asdict(claim).items() if key not in left_out}
    values |= {"flags": "; ".join(claim.flags)}
    return values | {"answers": RULES[claims.RULE], "interval": kind}


def to_csv(rows):
    """All numbers, a line per row; empty where a stage is missing."""
    rows, file = list(rows), io.StringIO()
    columns = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: defuse(value) for key, value in row.items()} for row in rows)
    return file.getvalue()


def defuse(value):
    """Text that a spreadsheet would run as a formula gets a quote in front."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value


def to_markdown(exp_dirs, experiments, points, notes, sentences, matches, tables, panels):
    lines = ["# Results", "", *map(inline, filter(None, sentences)), ""]
    for caption, cells in tables.items():
        lines += [f"{inline(caption.removesuffix('.'))}:", "", *markdown_table(cells, "---"), ""]
    if points:
        lines += [inline(shared_settings(points)), "", *markdown_table(table(points))]
        lines += ["", *(f"- {inline(line)}" for line in legend_of(points).splitlines()), ""]
    lines += [f"- {inline(note)}" for note in notes]
    for price, words in PRICES.items():
        if found := [match for match in matches if match.price == price]:
            lines += ["", f"At equal {words}, {MATCH_LEGEND}:", ""]
            lines += [f"- {inline(show_match(match))}" for match in found]
    lines += ["", *(f"![{name}]({name}.png)" for name, drawn in panels.items() if drawn)]
    lines += ["", "Made by", "", f"    {shlex.join(['python', 'report.py', *map(str, exp_dirs)])}", ""]
    return "\n".join([*lines, f"from {inline(provenance(experiments))}", ""])


def markdown_table(cells, others="---:"):
    header, *body = cells
    rule = ["---"] + [others] * (len(header) - 1)
    return [f"| {' | '.join(map(inline, line))} |" for line in (header, rule, *body)]


def provenance(experiments):
    """Commits, versions and time of the stages."""
    sidecars = [sidecar for e in experiments for sidecar in sidecars_of(e)]
    made_with = [{"commit": s.get("commit"), **s.get("versions", {})} for s in sidecars]
    names = dict.fromkeys(name for versions in made_with for name in versions)
    text = [f"{name} {' and '.join(map(str, values_of(made_with, name)))}" for name in names]
    hours = sum(s.get("seconds", 0) for s in sidecars) / 3600
    return f"{len(sidecars)} stages that took {hours:.1f} hours: {', '.join(text)}."


def inline(text):
    """Text that cannot end its table cell or start HTML or code."""
    return html.escape(text, quote=False).replace("|", "\\|").replace("`", "'")
