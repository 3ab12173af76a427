"""Sidecars of an experiment, finished or not -> a table and EXP_DIR/report/: page, Markdown, CSV, plots

    python report.py runs/gsm8k
    python report.py runs/seed42 runs/seed43    # several seeds, or one sweep spread over machines

Stages are joined by the settings and path tails in their sidecars, as experiments get moved; the names of
grid points are never parsed. Where there is one seed, intervals at equal teacher accuracy need the tests'
.parquet files.
"""

import argparse
from pathlib import Path

import utils
from ads.data.tables import read_columns
from ads.report import claims, page, plots, reader
from ads.report.compare import PRICES, choose_levels, compare, draw_accuracies, pair_up, parts_of
from ads.report.curves import ONE_SEED, RULES, by_setting, is_complete, make_curves, values_of
from ads.report.doubts import unpaired_lines, warning_lines
from ads.report.points import collect_baselines, collect_points, load_experiments, sidecars_of
from ads.report.tables import (
    ASKED,
    ONE_STEP_TABLE,
    aligned,
    baseline_lines,
    claim_line,
    comparison,
    gradient_lines,
    legend_of,
    provenance,
    results,
    shared_settings,
    show_sizes,
    small_tables,
    table,
    text_table,
    to_csv,
    to_markdown,
)
from ads.report.words import controls, finding, finding_doubt, second_finding, show_match
from ads.stage import files, layout
from ads.stage.errors import UserError
from ads.stage.inputs import fingerprint_model
from ads.stage.settings import expand_home
from ads.stage.world import print0
from utils import print_result

DEMO_MODELS = utils.ROOT / "demo" / "models"
DEMO_NOTES = utils.ROOT / "demo" / "notes.txt"  # what is known of experiments with these models


def main(arguments):
    exp_dirs, folder, levels = parse_arguments(arguments)
    experiments = load_experiments(exp_dirs)
    if not any(map(sidecars_of, experiments)):
        raise UserError(f"no stage has finished in {', '.join(map(str, exp_dirs))}: no sidecar is there")
    points, baselines = collect_points(experiments), collect_baselines(experiments)
    rows = [point.row for point in points]
    notes = [*baseline_lines(baselines), *gradient_lines(experiments), *warning_lines(experiments, points)]
    curves = make_curves(points)
    notes += unpaired_lines(curves)
    drawn = load_draws(curves)
    matches = compare_arms(curves, levels, drawn)
    claimed = claims.make_claims(curves, baselines, *drawn)
    tables = small_tables(curves, baselines, claimed)
    print0(*text_table(rows), *notes, *map(show_match, matches), sep="\n")
    for caption, cells in tables.items():
        print0(f"{caption.removesuffix('.')}:", *aligned(cells, str.ljust), sep="\n")
    first = finding(curves, matches)
    more = (finding_doubt, second_finding, controls)
    sentences = [first, claims.failures(claimed), *(sentence(matches) for sentence in more)]
    print0(*filter(None, sentences), sep="\n")

    utils.prepare_exp_dir(folder)
    with files.stage_lock(folder if folder.parent != exp_dirs[0] else exp_dirs[0], "report"):
        files.write_text(folder / "results.csv", to_csv(results(points, baselines)))
        files.write_text(folder / "comparisons.csv", to_csv(map(comparison, matches)))
        files.write_text(folder / "claims.csv", to_csv(map(claim_line, claimed)))
        panels = plots.make_panels(curves, baselines, matches)
        plots.write_plots(folder, panels, plot_title(curves, baselines))
        files.write_text(
            folder / "report.md",
            to_markdown(exp_dirs, experiments, rows, notes, sentences, matches, tables, panels),
        )
        files.write_text(
            folder / "report.html",
            to_page(experiments, points, baselines, notes, curves, matches, claimed, panels),
        )
    paths = {"report": str(folder / "report.md"), "page": str(folder / "report.html")}
    print0(*(f"{name}: {path}" for name, path in paths.items()), sep="\n")
    print_result(**paths, finding=first, num_points=len(rows), num_complete=sum(map(is_complete, rows)))


def parse_arguments(arguments):
    """(experiment folders, folder to write to, teacher accuracies to compare at or None)."""
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("exp_dirs", nargs="+", metavar="EXP_DIR")
    parser.add_argument("--out", metavar="FOLDER", help="default: report/ in the first EXP_DIR")
    parser.add_argument("--at", metavar="0.85,0.75", help="teacher accuracies to compare the arms at")
    parsed = parser.parse_args(arguments)
    levels = None if parsed.at is None else parse_levels(parsed.at)
    exp_dirs = [Path(expand_home("EXP_DIR", text)) for text in parsed.exp_dirs]
    out = layout.path_of("report", exp_dirs[0])
    if parsed.out is not None:
        out = Path(expand_home("--out", parsed.out))
    return exp_dirs, out, levels


def parse_levels(text):
    try:
        levels = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        levels = ()
    if not levels or not all(0 < level < 1 for level in levels):
        raise UserError(f"--at {text}: must be shares between 0 and 1, such as 0.85,0.75")
    return levels


def compare_arms(curves, levels, drawn):
    """The arms at equal teacher accuracies, those given or else the usual ones, and at equal teacher NLL.

    `drawn` comes from load_draws.
    """
    pairs, matches = pair_up(curves), []
    for price in PRICES:
        given = levels if price == "accuracy" else None
        chosen = {rule: given or choose_levels(pairs, rule, price) for rule in RULES}
        matches += compare(pairs, chosen, *drawn, price)
    return matches


def load_draws(curves):
    """(accuracies of all tests under resampled problems, why some are missing)."""
    pairs = pair_up(curves)
    points = [part for c in curves for p in [*c.start, *c.points] for part in parts_of(p)]
    stages = [point.stages[who] for point in points for who in ("teacher", "student")]
    answers, missing = {}, []
    for stage in {stage["path"]: stage for stage in stages}.values() if pairs else ():
        found, problem = read_answers(stage)
        answers |= {(stage["path"], rule): correct for rule, correct in found.items()}
        missing += [problem] if problem else []
    return draw_accuracies(pairs, answers), missing[0] if missing else ""


def read_answers(stage):
    """({rule: {problem id: correct}}, why there are none) of a test, from the parquet beside its sidecar."""
    path = stage["path"].with_suffix(".parquet")
    name = f"{path.parent.name}/{path.name}"
    if not path.is_file():
        return {}, f"{name} is not there"
    try:
        table = read_columns(path, ("id", *(f"is_{rule}_correct" for rule in RULES)))
    except ValueError as error:
        return {}, str(error)
    answers = {}
    for rule in RULES:
        correct = table[f"is_{rule}_correct"]
        if stage["stats"].get(rule) and None not in correct:
            if sum(correct) != stage["stats"][rule]["num_correct"]:
                return {}, f"{name} does not hold the answers that its sidecar counts"
            answers[rule] = dict(zip(table["id"], correct, strict=True))
    return answers, ""


def is_demo(experiments):
    """Whether anything was made with the models that are part of this repository, as they are now."""
    shipped = {fingerprint_model(str(path.parent)) for path in DEMO_MODELS.glob("*/config.json")}
    read = [sidecar.get("inputs") or {} for e in experiments for sidecar in sidecars_of(e)]
    return any(shipped & {str(inputs.get(name)) for name in ("teacher", "student")} for inputs in read)


def plot_title(curves, baselines):
    tested = [point.row for curve in curves for point in curve.points] or baselines
    data = ", ".join(values_of(tested, "data")) or "no test has finished"
    most = max((len(rows) for c in curves for rows in by_setting(c.points).values()), default=1)
    kind = ONE_SEED if most == 1 else f"over up to {most} seeds"
    return f"{data}: n = {show_sizes(tested, ' to ')} problems, 95 % intervals, {kind}"


def to_page(experiments, points, baselines, notes, curves, matches, claimed, panels):
    """report.html."""
    rows = [point.row for point in points]
    return page.render(
        title=plot_title(curves, baselines),
        curves=curves,
        baselines=baselines,
        matches=matches,
        claimed=claimed,
        asked=(ASKED, claims.asked_cells(baselines)),
        one_step=(ONE_STEP_TABLE, claims.one_step_cells(curves)),
        svgs=plots.inline_svgs(panels),
        cells=table(rows) if rows else [],
        legend=legend_of(rows).splitlines(),
        summary=shared_settings(rows) if rows else "no grid point has finished a stage",
        notes=notes,
        gradients=list({repr(g["stats"]): g for e in experiments for g in e.gradients.values()}.values()),
        contrasts=reader.load_contrasts(points),
        about=DEMO_NOTES.read_text(encoding="utf-8").splitlines() if is_demo(experiments) else (),
        made_from=provenance(experiments),
    )


if __name__ == "__main__":
    utils.run_script(main)
