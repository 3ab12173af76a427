"""Sidecars of an experiment, finished or not -> a table and EXP_DIR/report/: page, Markdown, CSV, plots

    python report.py runs/gsm8k
    python report.py runs/seed42 runs/seed43    # several seeds, or one sweep spread over machines
    python report.py runs/gsm8k --without repair --out runs/no_repair    # as if an attacker were not there
    python report.py runs/gsm8k --pair eval_student_a eval_student_b    # two tests, problem by problem

Stages are joined by the settings and path tails in their sidecars, as experiments get moved; the names of
grid points are never parsed. Where there is one seed, intervals at equal teacher accuracy need the tests'
.parquet files.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import utils
from ads.report import figures, findings, page, pairs, plots, scale, tables
from ads.report.findings import Findings
from ads.stage import files, layout
from ads.stage.errors import UserError
from ads.stage.fields import expand_home
from ads.stage.inputs import fingerprint_model
from ads.stage.world import print0
from utils import print_result

DEMO_MODELS = utils.ROOT / "demo" / "models"
DEMO_NOTES = utils.ROOT / "demo" / "notes.txt"  # what is known of experiments with these models


def main(arguments: Sequence[str]) -> None:
    exp_dirs, folder, levels, without, pair = parse_arguments(arguments)
    if pair:
        compared = pairs.compare_tests(pair, exp_dirs)
        print0(*map(pairs.show_pair, compared), sep="\n")
        print_result(**pairs.record(compared))
        return
    found = findings.gather(exp_dirs, levels, without)
    print0(*findings.terminal_lines(found), sep="\n")
    utils.prepare_exp_dir(folder)
    with files.stage_lock(folder if folder.parent != exp_dirs[0] else exp_dirs[0], "report"):
        write_report(folder, arguments, found)
    paths = {"report": str(folder / "report.md"), "page": str(folder / "report.html")}
    print0(*(f"{name}: {path}" for name, path in paths.items()), sep="\n")
    print_result(
        **paths,
        finding=findings.headline(found),
        num_points=len(found.rows),
        num_complete=sum(row.is_complete for row in found.rows),
    )


def write_report(folder: Path, arguments: Sequence[str], found: Findings) -> None:
    """All files of EXP_DIR/report/."""
    files.write_text(
        folder / "results.csv",
        tables.to_csv(tables.result_lines([*found.points, *found.own], found.baselines)),
    )
    files.write_text(folder / "comparisons.csv", tables.to_csv(map(tables.reading_line, found.matches)))
    files.write_text(folder / "claims.csv", tables.to_csv(map(tables.claim_line, found.claims)))
    if found.attacked.lines:
        attacked = [*found.attacked.lines, *found.attacked.own_lines]
        files.write_text(folder / "attackers.csv", tables.to_csv(attacked))
        matrix = map(tables.reading_line, found.attacked.cells)
        files.write_text(folder / "matrix.csv", tables.to_csv(matrix))
    panels = plots.make_panels(found.curves, found.baselines, found.matches)
    panels |= plots.worst_panels(found.attacked, found.baselines)
    figures.write_plots(folder, panels, findings.title(found))
    drawn = [name for name, shown in panels.items() if shown]
    files.write_text(folder / "report.md", findings.to_markdown(found, arguments, drawn))
    about = DEMO_NOTES.read_text(encoding="utf-8").splitlines() if is_demo(found) else ()
    words = scale.in_words(found.sidecars, found.curves, found.data, shipped_models())
    files.write_text(folder / "report.html", page.render(found, panels, words, about))


Parsed = tuple[list[Path], Path, tuple[float, ...] | None, list[str], list[str] | None]


def parse_arguments(arguments: Sequence[str]) -> Parsed:
    """(experiment folders, folder to write to, teacher accuracies to compare at, attackers to leave out,
    tests to compare)."""
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("exp_dirs", nargs="*", metavar="EXP_DIR")
    parser.add_argument("--out", metavar="FOLDER", help="default: report/ in the first EXP_DIR")
    parser.add_argument("--at", metavar="0.85,0.75", help="teacher accuracies to compare the arms at")
    parser.add_argument("--without", nargs="+", default=[], metavar="ATTACK", help="attackers to leave out")
    parser.add_argument(
        "--pair",
        nargs=2,
        metavar=("A", "B"),
        help="two tests, by name or path, to compare problem by problem",
    )
    parsed = parser.parse_args(arguments)
    if not (parsed.exp_dirs or parsed.pair):
        parser.error("the following arguments are required: EXP_DIR")
    levels = None if parsed.at is None else parse_levels(parsed.at)
    exp_dirs = [Path(expand_home("EXP_DIR", text)) for text in parsed.exp_dirs]
    out = layout.path_of("report", exp_dirs[0] if exp_dirs else "")
    if parsed.out is not None:
        out = Path(expand_home("--out", parsed.out))
    return exp_dirs, out, levels, parsed.without, parsed.pair


def parse_levels(text: str) -> tuple[float, ...]:
    try:
        levels = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        levels = ()
    if not levels or not all(0 < level < 1 for level in levels):
        raise UserError(f"--at {text}: must be shares between 0 and 1, such as 0.85,0.75")
    return levels


def is_demo(found: Findings) -> bool:
    """Whether anything was made with the models that are part of this repository, as they are now."""
    shipped = shipped_models()
    read = [sidecar.get("inputs") or {} for sidecar in found.sidecars]
    return any(shipped.keys() & {str(inputs.get(name)) for name in ("teacher", "student")} for inputs in read)


def shipped_models() -> dict[str, Path]:
    """{fingerprint: folder} of the models that are part of this repository."""
    return {fingerprint_model(str(path.parent)): path.parent for path in DEMO_MODELS.glob("*/config.json")}


if __name__ == "__main__":
    utils.run_script(main)
