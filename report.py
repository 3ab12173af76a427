"""Sidecars of an experiment, finished or not -> a table and EXP_DIR/report/: page, Markdown, CSV, plots

    python report.py runs/gsm8k
    python report.py runs/seed42 runs/seed43    # several seeds, or one sweep spread over machines

Stages are joined by the settings and path tails in their sidecars, as experiments get moved; the names of
grid points are never parsed. Intervals at equal teacher accuracy need the tests' .parquet files.
"""

import argparse
import csv
import html
import io
import shlex
from dataclasses import dataclass
from pathlib import Path

import utils
from ads import delta_table, page, plots, store, tradeoff
from ads.config import LEAST_COSINE
from ads.delta_table import LEAST_CORRELATION
from ads.tradeoff import (
    ARMS,
    RULES,
    SETTINGS,
    Point,
    differing,
    is_complete,
    show_number,
    show_setting,
    values_of,
)
from utils import print0, print_result

SAMPLING_KEYS = ("tau", "lam", "eps", "top_k", "top_p", "seed")  # and direction, which old sidecars lack
TRACE_KEYS = ("exp_dir", "teacher", "is_teacher", "data_split", "few_shot", *SAMPLING_KEYS)
MODEL_KEYS = ("student", "train_traces", "seed")
NUMBERS = {  # heading in the table: column of results.csv
    "t.fin": "teacher_finished",
    "s.fin": "student_finished",
    "nll": "train_teacher_nll",
    "tokens": "train_num_tokens_p50",
    "loss": "model_holdout_loss",
}
ONE_STEP = "train_one_step_change"
LEGEND = """\
forced, raw: accuracy on the n test problems with and without answer forcing [95 % interval]
t.fin, s.fin: share of the teacher's and the student's test traces that finished
nll, tokens: of the training traces, mean nats/token under the unadjusted teacher and median length
loss: the student's on the holdout traces after training, nats/token"""
ONE_STEP_LEGEND = (
    "step: change of the proxy's holdout loss after one SGD step on the training traces, nats/token"
)
LEAST_FINISHED = 0.9
NUM_NAMED = 4  # cases that one warning names


def main(arguments):
    exp_dirs, folder, levels = parse_arguments(arguments)
    experiments = [load_experiment(path) for path in exp_dirs]
    if not any(map(sidecars_of, experiments)):
        raise ValueError(f"no stage has finished in {', '.join(map(str, exp_dirs))}: no sidecar is there")
    points, baselines = collect_points(experiments), collect_baselines(experiments)
    rows = [point.row for point in points]
    notes = [*baseline_lines(baselines), *gradient_lines(experiments), *warning_lines(experiments)]
    curves = tradeoff.make_curves(points)
    matches = compare_arms(curves, levels)
    print0(*text_table(rows), *notes, *map(tradeoff.show_match, matches), sep="\n")
    finding = tradeoff.finding(curves, matches)
    sentences = [finding, tradeoff.second_finding(matches), tradeoff.controls(matches)]
    print0(*filter(None, sentences), sep="\n")

    utils.prepare_exp_dir(folder)
    with store.stage_lock(folder if folder.parent != exp_dirs[0] else exp_dirs[0], "report"):
        store.write_text(folder / "results.csv", to_csv([*rows, *baselines]))
        panels = plots.make_panels(curves, baselines, matches)
        plots.write_plots(folder, panels, plot_title(curves, baselines))
        store.write_text(
            folder / "report.md", to_markdown(exp_dirs, experiments, rows, notes, sentences, matches, panels)
        )
        store.write_text(
            folder / "report.html", to_page(experiments, points, baselines, notes, curves, matches, panels)
        )
    paths = {"report": str(folder / "report.md"), "page": str(folder / "report.html")}
    print0(*(f"{name}: {path}" for name, path in paths.items()), sep="\n")
    print_result(**paths, finding=finding, num_points=len(rows), num_complete=sum(map(is_complete, rows)))


def parse_arguments(arguments):
    """(experiment folders, folder to write to, teacher accuracies to compare at or None)."""
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("exp_dirs", type=Path, nargs="+", metavar="EXP_DIR")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: report/ in the first EXP_DIR")
    parser.add_argument("--at", metavar="0.85,0.75", help="teacher accuracies to compare the arms at")
    parsed = parser.parse_args(arguments)
    levels = None if parsed.at is None else parse_levels(parsed.at)
    return parsed.exp_dirs, parsed.out or parsed.exp_dirs[0] / "report", levels


def parse_levels(text):
    try:
        levels = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        levels = ()
    if not levels or not all(0 < level < 1 for level in levels):
        raise ValueError(f"--at {text}: must be shares between 0 and 1, such as 0.85,0.75")
    return levels


# Sidecars, and which belong together


@dataclass(frozen=True)
class Experiment:
    """The sidecars of one folder, by name."""

    traces: dict
    models: dict
    gradients: dict


def load_experiment(path):
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder: give the EXP_DIR of an experiment")
    return Experiment(
        {file.stem: load_sidecar(file, TRACE_KEYS) for file in sorted(path.glob("traces/*.yaml"))},
        {file.stem: load_sidecar(file, MODEL_KEYS) for file in sorted(path.glob("models/*.yaml"))},
        {file.stem: load_sidecar(file, ("proxy_student",)) for file in path.glob("student_grads.yaml")},
    )


def load_sidecar(path, config_keys):
    """A sidecar; ValueError if the file is none or its config lacks a key."""
    sidecar = store.read_yaml(path)
    if not all(isinstance(sidecar.get(part), dict) for part in ("config", "stats")):
        raise ValueError(f"{path} is not a sidecar (no config, no stats): move it elsewhere")
    if missing := [key for key in config_keys if key not in sidecar["config"]]:
        raise ValueError(f"{path}: config has no {', '.join(missing)}: delete it to redo the stage")
    return {**sidecar, "path": path}


def sidecars_of(experiment):
    return [*experiment.traces.values(), *experiment.models.values(), *experiment.gradients.values()]


def select(experiment, is_teacher, split):
    """The sidecars of a teacher's or of students' traces on one split."""
    configs = [(trace, trace["config"]) for trace in experiment.traces.values()]
    return [t for t, c in configs if c["is_teacher"] == is_teacher and c["data_split"].endswith(f"_{split}")]


def sampling(trace):
    """The settings that all traces of one grid point share; without lam eps and direction play no part."""
    values = {key: trace["config"][key] for key in SAMPLING_KEYS}
    direction = trace["config"].get("direction", "gradient")
    has_delta = bool(values["lam"])
    return values | {
        "eps": values["eps"] if has_delta else None,
        "direction": direction if has_delta else None,
        "direction_seed": trace["config"].get("direction_seed")
        if has_delta and direction == "random"
        else None,
    }


def data_name(trace):
    return short_name(trace["config"]["data_split"], num_parts=1)


def traces_behind(experiment, model):
    """The sidecar of the traces that a model was trained on; None where it is not in the experiment."""
    path = Path(model["config"]["train_traces"])
    is_ours = path.parent.name == "traces" and path.suffix == ".parquet"
    return experiment.traces.get(path.stem) if is_ours else None


def model_behind(experiment, student_test):
    """Name of the model that was tested, its sidecar being there or not; None for an undistilled student."""
    path = Path(student_test["config"]["teacher"])
    name, is_final = path.parent.name, path.parts[-3::2] == ("models", "final")
    is_ours = name in experiment.models or path.is_relative_to(student_test["config"]["exp_dir"])
    return name if is_final and is_ours else None


# Points


def collect_points(experiments):
    """The grid points of all experiments, by arm, tau, lam and seed; exact repetitions once."""
    return in_order(point for e in experiments for point in points_of(e))


def collect_baselines(experiments):
    """The rows of the undistilled students."""
    students = [s for e in experiments for s in select(e, False, "test") if model_behind(e, s) is None]
    return [point.row for point in in_order(make_point(student=s) for s in students)]


def in_order(points):
    unique = {repr(point.row): point for point in reversed(list(points))}.values()
    order = ("tau", "lam", "seed")
    return sorted(
        reversed(unique), key=lambda p: (ARMS.index(p.row["arm"]), *(p.row.get(key, 0) for key in order))
    )


def points_of(experiment):
    """Training traces joined with their model, its test and the teacher's test, as far as these exist."""
    tests, students = select(experiment, True, "test"), select(experiment, False, "test")
    pairs = [(traces_behind(experiment, model), name) for name, model in experiment.models.items()]
    pairs = [(train, name) for train, name in pairs if train]
    used = [train for train, _ in pairs]
    pairs += [(train, None) for train in select(experiment, True, "train") if train not in used]
    points, shown = [], []
    for train, name in pairs:
        model, same_point = experiment.models.get(name), [t for t in tests if sampling(t) == sampling(train)]
        for student in [s for s in students if name and model_behind(experiment, s) == name] or [None]:
            same = [t for t in same_point if student is None or data_name(t) == data_name(student)]
            points += [
                make_point(teacher=t, student=student, train=train, model=model) for t in same or [None]
            ]
            shown += same
    return points + [make_point(teacher=test) for test in tests if test not in shown]


def make_point(teacher=None, student=None, train=None, model=None):
    """What the sidecars of a point say; the numbers of a missing stage are missing."""
    row = {"arm": "undistilled"}
    if sampled := train or teacher:
        row = {"arm": tradeoff.arm_of(sampled["config"]), **sampling(sampled)}
        row["teacher"] = short_name(sampled["config"]["teacher"])
    if test := student or teacher:
        row["data"] = data_name(test)
    if student:
        row["student"] = short_name(student["config"]["teacher"])
        row["student_few_shot"] = student["config"]["few_shot"]
        row["student_prefill"] = student["config"].get("prefill")
    if model:
        row |= {"student": short_name(model["config"]["student"]), "student_seed": model["config"]["seed"]}
    stages = {"teacher": teacher, "student": student, "train": train, "model": model}
    stages = {stage: sidecar for stage, sidecar in stages.items() if sidecar}
    for stage, sidecar in stages.items():
        row |= flatten(stage, sidecar["stats"])
        row |= flatten(f"{stage}_perturbation", sidecar.get("perturbation"))
    return Point(row, stages)


def flatten(prefix, value):
    """{prefix_key_key: number} of nested mappings, without what is null or depends on the machine."""
    if not isinstance(value, dict):
        return {} if value is None else {prefix: value}
    flat = {}
    for key, part in value.items():
        if key != "tokens_per_second":
            flat |= flatten(f"{prefix}_{key}", part)
    return flat


def short_name(path, num_parts=2):
    """The end of a path, which is all of a hub's OWNER/NAME, without characters that act on a terminal."""
    return "".join(c for c in "/".join(Path(path).parts[-num_parts:]) if c.isprintable())


# Text


def text_table(points):
    if not points:
        return ["no grid point has finished a stage"]
    cells = table(points)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.rjust, line, widths)) for line in cells]
    return [shared_settings(points), lines[0], "-" * len(lines[0]), *lines[1:], legend_of(points)]


def legend_of(points):
    return "\n".join([LEGEND, ONE_STEP_LEGEND] if has_one_step(points) else [LEGEND])


def has_one_step(points):
    return any(ONE_STEP in row for row in points)


def table(points):
    """Header and lines of cells; a setting has a column only where points differ in it."""
    settings = ["tau", "lam", *differing(points)]
    accuracies = [(who, rule) for who in ("teacher", "student") for rule in RULES]
    lines = [["arm", *settings, "n", *(f"{who} {RULES[rule]}" for who, rule in accuracies), *NUMBERS]]
    lines[0] += ["step"] if has_one_step(points) else []
    for row in points:
        cells = [row["arm"], *(show_setting(row.get(key)) for key in settings), show_sizes([row], "/")]
        cells += [show_accuracy(row, f"{who}_{rule}") for who, rule in accuracies]
        cells += [show_number(row.get(column)) for column in NUMBERS.values()]
        lines.append([*cells, *([tradeoff.show_signed(row.get(ONE_STEP))] if has_one_step(points) else [])])
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


def baseline_lines(baselines):
    return [
        f"undistilled {row['student']} on {row['data']}: forced {show_accuracy(row, 'student_af')}, "
        f"raw {show_accuracy(row, 'student_raw')}, few_shot {row['student_few_shot']}, "
        f"{'prefill ' + repr(row['student_prefill']) + ', ' if row['student_prefill'] else ''}"
        f"n {show_sizes([row], '/')}, finished {show_number(row.get('student_finished'))}"
        for row in baselines
    ] or ["undistilled student: -"]


def gradient_lines(experiments):
    lines = []
    for gradient in [g for e in experiments for g in e.gradients.values()]:
        n, loss, norm = (show_number(gradient["stats"].get(key)) for key in ("n", "loss", "grad_norm"))
        proxy = short_name(gradient["config"]["proxy_student"])
        line = f"gradient of {proxy}: n {n}, loss {loss} nats/token, ||g|| {norm}"
        if found := gradient.get("diagnostics"):
            ways = delta_table.rows(found).items()
            shown = (f"{way} {show_number(figures['correlation'])}" for way, figures in ways)
            line += f"; correlation with the exact Delta: {', '.join(shown)}"
        lines.append(line)
    return list(dict.fromkeys(lines)) or ["gradient: -"]


def warning_lines(experiments):
    """One line per kind of doubt, naming the worst cases first."""
    found, lines = {}, []
    for kind, badness, case in [doubt for e in experiments for doubt in doubts(e)]:
        found.setdefault(kind, set()).add((badness, short_name(case)))
    for kind, cases in found.items():
        named = ", ".join(case for _, case in sorted(cases, reverse=True)[:NUM_NAMED])
        more = f" and {len(cases) - NUM_NAMED} more" if len(cases) > NUM_NAMED else ""
        lines.append(f"WARNING: {kind}: {named}{more}")
    return lines


def doubts(experiment):
    """(kind, badness, case) of everything that puts a number in doubt or is in no row."""
    for name, trace in experiment.traces.items():
        stats = trace["stats"]
        finished, cosine = stats.get("finished", 1), trace.get("perturbation", {}).get("cosine", 1)
        if cosine < LEAST_COSINE:
            kind = f"theta +- eps g lost to rounding, cosine below {LEAST_COSINE}"
            yield kind, -cosine, f"{name} {show_number(cosine)}"
        if finished < LEAST_FINISHED:
            yield f"finished share below {LEAST_FINISHED}", -finished, f"{name} {show_number(finished)}"
        if num := stats.get("num_grader_timeouts"):
            yield "answers counted as wrong, the grader timed out", num, f"{name} {num}"
        if num := stats.get("num_without_answer"):
            yield "problems left out, no answer in their solution", num, f"{name} {num}"
        if num := stats.get("num_prompts_too_long"):
            yield "problems left out, prompts too long", num, f"{name} {num}"
    for name, gradient in experiment.gradients.items():
        found, eps = gradient.get("diagnostics"), gradient["config"].get("eps", 0)
        if found and (correlation := delta_table.used(found, eps)["correlation"]) < LEAST_CORRELATION:
            kind = f"Delta a poor one, correlation with the exact one below {LEAST_CORRELATION}"
            yield kind, -correlation, f"{name} {show_number(correlation)}"
    for name, model in experiment.models.items():
        if traces_behind(experiment, model) is None:
            yield "models left out, the sidecars of their training traces are not here", 0, name
    for name in {model_behind(experiment, s) for s in select(experiment, False, "test")}:
        if name and name not in experiment.models:
            yield "student tests left out, the sidecars of the models are not here", 0, name


def to_csv(rows):
    """All numbers, a line per row; empty where a stage is missing."""
    file = io.StringIO()
    columns = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: defuse(value) for key, value in row.items()} for row in rows)
    return file.getvalue()


def defuse(value):
    """Text that a spreadsheet would run as a formula gets a quote in front."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value


def to_markdown(exp_dirs, experiments, points, notes, sentences, matches, panels):
    lines = ["# Results", "", *map(inline, filter(None, sentences)), ""]
    if points:
        header, *body = table(points)
        cells = [header, ["---"] + ["---:"] * (len(header) - 1), *body]
        lines += [inline(shared_settings(points)), ""]
        lines += [f"| {' | '.join(map(inline, line))} |" for line in cells]
        lines += ["", *(f"- {inline(line)}" for line in legend_of(points).splitlines()), ""]
    lines += [f"- {inline(note)}" for note in notes]
    if matches:
        lines += ["", "At equal teacher accuracy (95 % bootstrap intervals):", ""]
        lines += [f"- {inline(tradeoff.show_match(match))}" for match in matches]
    lines += ["", *(f"![{name}]({name}.png)" for name, drawn in panels.items() if drawn)]
    lines += ["", "Made by", "", f"    {shlex.join(['python', 'report.py', *map(str, exp_dirs)])}", ""]
    return "\n".join([*lines, f"from {inline(provenance(experiments))}", ""])


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


# The comparison and the page


def compare_arms(curves, levels):
    """The arms at equal teacher accuracies: those given, else the usual ones."""
    pairs = tradeoff.pair_up(curves)
    chosen = {rule: levels or tradeoff.choose_levels(pairs, rule) for rule in RULES}
    stages = [p.stages[who] for c in curves for p in [*c.start, *c.points] for who in ("teacher", "student")]
    answers, missing = {}, []
    for stage in {stage["path"]: stage for stage in stages}.values() if pairs else ():
        found, problem = read_answers(stage)
        answers |= {(stage["path"], rule): correct for rule, correct in found.items()}
        missing += [problem] if problem else []
    return tradeoff.compare(pairs, chosen, answers, missing[0] if missing else "")


def read_answers(stage):
    """({rule: {problem id: correct}}, why there are none) of a test, from the parquet beside its sidecar."""
    path = stage["path"].with_suffix(".parquet")
    name = f"{path.parent.name}/{path.name}"
    if not path.is_file():
        return {}, f"{name} is not there"
    try:
        table = utils.read_columns(path, ("id", *(f"is_{rule}_correct" for rule in RULES)))
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


def plot_title(curves, baselines):
    tested = [point.row for curve in curves for point in curve.points] or baselines
    data = ", ".join(values_of(tested, "data")) or "no test has finished"
    return f"{data}: n = {show_sizes(tested, ' to ')} problems, 95 % intervals"


def to_page(experiments, points, baselines, notes, curves, matches, panels):
    """report.html."""
    rows = [point.row for point in points]
    return page.render(
        title=plot_title(curves, baselines),
        curves=curves,
        baselines=baselines,
        matches=matches,
        svgs=plots.inline_svgs(panels),
        cells=table(rows) if rows else [],
        legend=legend_of(rows).splitlines(),
        summary=shared_settings(rows) if rows else "no grid point has finished a stage",
        notes=notes,
        gradients=list({repr(g["stats"]): g for e in experiments for g in e.gradients.values()}.values()),
        contrasts=page.load_contrasts(points),
        is_toy=any(name.startswith("arithmetic_") for name in values_of([*rows, *baselines], "data")),
        made_from=provenance(experiments),
    )


if __name__ == "__main__":
    utils.run_script(main)
