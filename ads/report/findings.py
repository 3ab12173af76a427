"""What a report says of some experiments: gathered once, then printed and written as Markdown."""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ads.delta import agreement_table
from ads.report import attack_tables, claims, detect, tables, words
from ads.report.attacked import Attacked, gather_attacked
from ads.report.attackers import defence_of, of_main_attack
from ads.report.bootstrap import load_draws
from ads.report.compare import Levels, Match, compare_arms
from ads.report.curves import Curve, Point, Points, all_rows, by_setting, make_curves
from ads.report.doubts import unpaired_lines, warning_lines
from ads.report.experiments import Experiment, Sidecar, all_recipes, load_experiments
from ads.report.numbers import ONE_SEED, short_name, show_number
from ads.report.points import collect_own, collect_points, collect_undistilled, with_one_name
from ads.report.results import PRICES, ResultRow, answers_of, show_accuracy, values_of
from ads.stage.errors import UserError

ASKED = "means over seeds [95 % interval]; the best way is the line in the plots and in claim a"
ONE_STEP = (
    "means over points and seeds; loss of accuracy: against the student of its seed's clean traces, by raw "
    "answers; rank correlation (Spearman) of one-step change and student's accuracy, over points: -1 if the "
    "step foretells the order of the students, 0 if it says nothing"
)
MATCHED = (
    f"95 % intervals over seeds (t) or, of one seed, over problems (bootstrap); {words.MARK} marks what is "
    "in doubt"
)


@dataclass(frozen=True)
class Findings:
    experiments: list[Experiment]
    points: list[Point]
    own: list[Point]
    baselines: list[ResultRow]
    curves: list[Curve]
    matches: list[Match]
    claims: list[claims.Claim]
    notes: list[str]
    attacked: Attacked
    detections: list[detect.Detection]

    @property
    def rows(self) -> list[ResultRow]:
        """Of the points, with the students of one attack."""
        return [point.row for point in of_main_attack(self.points)]

    @property
    def tested(self) -> list[ResultRow]:
        """Of points that are complete, copies as one."""
        return all_rows(self.curves)

    @property
    def graded_by(self) -> dict[str, str]:
        """The part of ANSWERS by which tests were graded."""
        return answers_of([*self.baselines, *self.tested])

    @property
    def data(self) -> list[str]:
        """The datasets of the tests."""
        return values_of([row.columns for row in self.tested or self.baselines], "data")

    @property
    def sidecars(self) -> list[Sidecar]:
        return [sidecar for experiment in self.experiments for sidecar in experiment.sidecars]

    @property
    def gradients(self) -> list[Sidecar]:
        return [sidecar for experiment in self.experiments for sidecar in experiment.gradients.values()]


def gather(exp_dirs: Sequence[Path], levels: Levels | None, without: Sequence[str] = ()) -> Findings:
    """All of it, from the folders' sidecars; `levels`: teacher accuracies to compare at, None: the usual;
    `without`: attackers to leave out, by name."""
    experiments = load_experiments(exp_dirs)
    if not any(experiment.sidecars for experiment in experiments):
        raise UserError(f"no stage has finished in {', '.join(map(str, exp_dirs))}: no sidecar is there")
    found = (f(experiments) for f in (collect_points, collect_undistilled, collect_own))
    points, undistilled, own = with_one_name(*found)
    points, own = leave_out(without, points, own)
    baselines, recipes = [point.row for point in undistilled], all_recipes(experiments)
    curves = make_curves(of_main_attack(points))
    draws = load_draws(curves)
    notes = [f"left out, as asked: {', '.join(without)}"] if without else []
    notes += [*map(baseline_line, baselines)] or ["undistilled student: -"]
    gradients = (gradient for experiment in experiments for gradient in experiment.gradients.values())
    notes += dict.fromkeys(map(gradient_line, gradients)) or ["gradient: -"]
    notes += [*warning_lines(experiments, points), *unpaired_lines(curves)]
    matches, claimed = compare_arms(curves, levels, draws), claims.make_claims(curves, baselines, draws)
    attacked = gather_attacked(points, undistilled, own, recipes, levels)
    labels = {defence_of(curve.points[0].row): curve.label for curve in curves}
    detections = detect.detect(points, labels)
    claimed += claims.worst_claim(attacked.matches)
    notes += attack_tables.warning_lines(attacked)
    parts = experiments, points, own, baselines, curves, matches, claimed, notes
    return Findings(*parts, attacked, detections)


def leave_out(names: Sequence[str], *found: Points) -> list[list[Point]]:
    """Points without the students of some attackers; UserError where a name is of none of them, or of all."""
    known = sorted({str(point.row.attack) for points in found for point in points})
    for name in names:
        if name not in known:
            raise UserError(f"--without {name}: it has no student here; {', '.join(known)} have some")
    kept = [[point for point in points if point.row.attack not in names] for points in found]
    if names and not any(kept):
        raise UserError(f"--without {' '.join(names)}: nothing is left; leave one of them in")
    return kept


def baseline_line(row: ResultRow) -> str:
    graded = answers_of([row]).items()
    shares = [f"{name} {show_accuracy(row.accuracy('student', answers))}" for answers, name in graded]
    prefill = f"prefill {row.student_prefill!r}, " if row.student_prefill else ""
    return (
        f"undistilled {row.student} on {row.data}: {', '.join(shares)}, few_shot {row.student_few_shot}, "
        f"{prefill}n {tables.show_sizes([row], '/')}, finished {show_number(row.student_finished)}, "
        f"seed {row.seed}"
    )


def gradient_line(gradient: Sidecar) -> str:
    n, loss, norm = (show_number(gradient["stats"].get(key)) for key in ("n", "loss", "grad_norm"))
    proxy = short_name(gradient["config"]["proxy_student"])
    line = f"gradient of {proxy}: n {n}, loss {loss} nats/token, ||g|| {norm}"
    if found := gradient.get("diagnostics"):
        ways = agreement_table.rows(found).items()
        shown = (f"{way} {show_number(figures['correlation'])}" for way, figures in ways)
        line += f"; correlation with the exact Delta: {', '.join(shown)}"
    return line


def sentences(findings: Findings) -> list[str]:
    """What was found, in the order of its weight."""
    matches = findings.matches
    found = [
        headline(findings),
        headline_doubt(findings),
        main_finding(findings),
        claims.failures(findings.claims),
    ]
    found += [sentence(matches) for sentence in (words.finding_doubt, words.second_finding, words.controls)]
    found += [attack_tables.gap_sentence(findings.attacked), *attack_tables.own_sentences(findings.attacked)]
    return list(dict.fromkeys(filter(None, found)))


def headline(findings: Findings) -> str:
    """The finding: what the best attacker is left with, or the students of the one attack there is."""
    return attack_tables.headline(findings.attacked) or words.finding(findings.curves, findings.matches)


def headline_doubt(findings: Findings) -> str:
    """Why the finding is in doubt, where it is marked."""
    matches = findings.attacked.matches
    return words.finding_doubt(matches if words.headline(matches) else findings.matches)


def main_finding(findings: Findings) -> str:
    """The finding on the students of one attack, where it is not the headline."""
    finding, attacks = words.finding(findings.curves, findings.matches), findings.attacked.attacks
    if headline(findings) == finding:
        return ""
    return f"The attack {attacks[0]} alone: {finding[:1].lower()}{finding[1:]}" if attacks else finding


def small_tables(findings: Findings, is_brief: bool = False) -> dict[str, tables.Cells]:
    """{caption: cells} of the tables besides that of all points; those without lines are left out."""
    found = {
        f"Claims. {' '.join(claims.VERDICTS.split())}".removesuffix("."): claims.cells(findings.claims),
        f"The undistilled student as it was asked, {ASKED}": tables.asked_cells(findings.baselines),
        f"One step of the proxy on the traces and what it says of students, {ONE_STEP}": (
            tables.one_step_cells(findings.curves)
        ),
        f"Detectability, {detect.CAPTION}": detect.cells(findings.detections),
        **attack_tables.small_tables(findings.attacked, is_brief),
    }
    return {caption: cells for caption, cells in found.items() if len(cells) > 1}


def terminal_lines(findings: Findings) -> Iterable[str]:
    """What report.py prints."""
    yield tables.shared_settings(findings.rows)
    if findings.rows:
        header, *lines = tables.aligned(tables.point_cells(findings.rows))
        yield from (header, "-" * len(header), *lines, *tables.legend_of(findings.rows))
    yield from findings.notes
    yield from map(words.show_match, findings.matches)
    for caption, cells in small_tables(findings, is_brief=True).items():
        yield from (f"{caption}:", *tables.aligned(cells, str.ljust))
    yield from sentences(findings)


def to_markdown(findings: Findings, arguments: Sequence[str], plots: Iterable[str]) -> str:
    """report.md; `arguments`: of the command; `plots`: the names of those that were drawn."""
    rows, inline = findings.rows, tables.inline
    lines = ["# Results", "", *map(inline, sentences(findings)), ""]
    for caption, cells in small_tables(findings).items():
        lines += [f"{inline(caption)}:", "", *tables.markdown_table(cells, "---"), ""]
    if rows:
        lines += [inline(tables.shared_settings(rows)), ""]
        lines += [*tables.markdown_table(tables.point_cells(rows)), ""]
        lines += [*(f"- {inline(line)}" for line in tables.legend_of(rows)), ""]
    lines += [f"- {inline(note)}" for note in findings.notes]
    for name, price in PRICES.items():
        if found := [words.show_match(match) for match in findings.matches if match.price == name]:
            lines += ["", f"At equal {price.words}, {MATCHED}:", "", *(f"- {inline(line)}" for line in found)]
    lines += ["", *(f"![{name}]({name}.png)" for name in plots)]
    lines += ["", "Made by", "", f"    {shlex.join(['python', 'report.py', *arguments])}", ""]
    return "\n".join([*lines, f"from {inline(provenance(findings.sidecars))}", ""])


def provenance(sidecars: Sequence[Sidecar]) -> str:
    """Commits, versions and time of the stages."""
    made_with = [{"commit": s.get("commit"), **s.get("versions", {})} for s in sidecars]
    names = dict.fromkeys(name for versions in made_with for name in versions)
    text = [f"{name} {' and '.join(map(str, values_of(made_with, name)))}" for name in names]
    hours = sum(s.get("seconds", 0) for s in sidecars) / 3600
    return f"{len(sidecars)} stages that took {hours:.1f} hours: {', '.join(text)}."


def title(findings: Findings) -> str:
    """The data, the number of problems, and what intervals stand on."""
    tested = findings.tested or findings.baselines
    data = ", ".join(findings.data) or "no test has finished"
    seeds = [len(rows) for curve in findings.curves for rows in by_setting(curve.points).values()]
    most = max(seeds, default=1)
    kind = ONE_SEED if most == 1 else f"over up to {most} seeds"
    return f"{data}: n = {tables.show_sizes(tested, ' to ')} problems, 95 % intervals, {kind}"
