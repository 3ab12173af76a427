"""Sidecars of an experiment, finished or not -> a table and EXP_DIR/report/{report.md,results.csv,tradeoff.*}

    python report.py runs/gsm8k
    python report.py runs/seed42 runs/seed43    # several seeds, or one sweep spread over machines

The first folder's report/ is written. Stages are joined by the settings and path tails in their sidecars, as
experiments get moved; the names of grid points are never parsed.
"""

import argparse
import csv
import html
import io
import itertools
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import utils
from ads import store
from ads.config import LEAST_COSINE
from utils import print0, print_result

SAMPLING_KEYS = ("tau", "lam", "eps", "top_k", "top_p", "seed")
TRACE_KEYS = ("exp_dir", "teacher", "is_teacher", "data_split", "few_shot", *SAMPLING_KEYS)
MODEL_KEYS = ("student", "train_traces", "seed")
RULES = {"af": "forced", "raw": "raw"}
ARMS = ("temperature", "ADS", "undistilled")
SETTINGS = ("data", "teacher", "student", "student_few_shot", "seed", "student_seed", "eps", "top_k", "top_p")
NUMBERS = {  # heading in the table: column of results.csv
    "t.fin": "teacher_finished",
    "s.fin": "student_finished",
    "nll": "train_teacher_nll",
    "tokens": "train_num_tokens_p50",
    "loss": "model_holdout_loss",
}
LEGEND = """\
forced, raw: accuracy on the n test problems with and without answer forcing [95 % interval]
t.fin, s.fin: share of the teacher's and the student's test traces that finished
nll, tokens: of the training traces, mean nats/token under the unadjusted teacher and median length
loss: the student's on the holdout traces after training, nats/token"""
LEAST_FINISHED = 0.9
NUM_NAMED = 4  # cases that one warning names
COLOURS = {"temperature": "#0072B2", "ADS": "#D55E00"}  # Okabe and Ito's, safe for colour-blind readers
LEGEND_WIDTH = 110  # characters
MARKERS = "osD^vP*X"
SYMBOLS = {"tau": "\N{GREEK SMALL LETTER TAU}", "lam": "\N{GREEK SMALL LETTER LAMDA}"}
PLOT_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ads",
    "text.parse_math": False,  # names may hold a dollar sign
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "figure.titlesize": "medium",
}


def main(arguments):
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("exp_dirs", type=Path, nargs="+", metavar="EXP_DIR")
    exp_dirs = parser.parse_args(arguments).exp_dirs
    experiments = [load_experiment(path) for path in exp_dirs]
    if not any(map(sidecars_of, experiments)):
        raise ValueError(f"no stage has finished in {', '.join(map(str, exp_dirs))}: no sidecar is there")
    rows = collect_rows(experiments)
    points = [row for row in rows if row["arm"] != "undistilled"]
    baselines = [row for row in rows if row["arm"] == "undistilled"]
    notes = [*baseline_lines(baselines), *gradient_lines(experiments), *warning_lines(experiments)]
    print0(*text_table(points), *notes, sep="\n")

    folder = exp_dirs[0] / "report"
    utils.prepare_exp_dir(folder)
    with store.stage_lock(exp_dirs[0], "report"):
        store.write_text(folder / "results.csv", to_csv(rows))
        write_plots(folder, points, baselines)
        store.write_text(folder / "report.md", to_markdown(exp_dirs, experiments, points, notes))
    path = str(folder / "report.md")
    print0(f"report: {path}")
    print_result(report=path, num_points=len(points), num_complete=sum(map(is_complete, points)))


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
    return sidecar


def sidecars_of(experiment):
    return [*experiment.traces.values(), *experiment.models.values(), *experiment.gradients.values()]


def select(experiment, is_teacher, split):
    """The sidecars of a teacher's or of students' traces on one split."""
    configs = [(trace, trace["config"]) for trace in experiment.traces.values()]
    return [t for t, c in configs if c["is_teacher"] == is_teacher and c["data_split"].endswith(f"_{split}")]


def sampling(trace):
    """The settings that all traces of one grid point share; without lam eps plays no part."""
    values = {key: trace["config"][key] for key in SAMPLING_KEYS}
    return values | {"eps": values["eps"] if values["lam"] else None}


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


# Rows


def collect_rows(experiments):
    """A flat dict per grid point and undistilled student, by arm, tau, lam; exact repetitions once."""
    rows = [row for e in experiments for row in [*point_rows(e), *baseline_rows(e)]]
    unique = list({repr(row): row for row in rows}.values())
    order = ("tau", "lam", "seed")
    return sorted(unique, key=lambda row: (ARMS.index(row["arm"]), *(row.get(key, 0) for key in order)))


def point_rows(experiment):
    """Training traces joined with their model, its test and the teacher's test, as far as these exist."""
    tests, students = select(experiment, True, "test"), select(experiment, False, "test")
    pairs = [(traces_behind(experiment, model), name) for name, model in experiment.models.items()]
    pairs = [(train, name) for train, name in pairs if train]
    used = [train for train, _ in pairs]
    pairs += [(train, None) for train in select(experiment, True, "train") if train not in used]
    rows, shown = [], []
    for train, name in pairs:
        model, same_point = experiment.models.get(name), [t for t in tests if sampling(t) == sampling(train)]
        for student in [s for s in students if name and model_behind(experiment, s) == name] or [None]:
            same = [t for t in same_point if student is None or data_name(t) == data_name(student)]
            rows += [make_row(teacher=t, student=student, train=train, model=model) for t in same or [None]]
            shown += same
    return rows + [make_row(teacher=test) for test in tests if test not in shown]


def baseline_rows(experiment):
    students = select(experiment, False, "test")
    return [make_row(student=s) for s in students if model_behind(experiment, s) is None]


def make_row(teacher=None, student=None, train=None, model=None):
    """What the sidecars of a point say; the numbers of a missing stage are missing."""
    row = {"arm": "undistilled"}
    if sampled := train or teacher:
        row = {"arm": "ADS" if sampled["config"]["lam"] else "temperature", **sampling(sampled)}
        row["teacher"] = short_name(sampled["config"]["teacher"])
    if test := student or teacher:
        row["data"] = data_name(test)
    if student:
        row["student"] = short_name(student["config"]["teacher"])
        row["student_few_shot"] = student["config"]["few_shot"]
    if model:
        row |= {"student": short_name(model["config"]["student"]), "student_seed": model["config"]["seed"]}
    stages = {"teacher": teacher, "student": student, "train": train, "model": model}
    for stage, sidecar in stages.items():
        if sidecar:
            row |= flatten(stage, sidecar["stats"])
            row |= flatten(f"{stage}_perturbation", sidecar.get("perturbation"))
    return row


def flatten(prefix, value):
    """{prefix_key_key: number} of nested mappings, without what is null or depends on the machine."""
    if not isinstance(value, dict):
        return {} if value is None else {prefix: value}
    flat = {}
    for key, part in value.items():
        if key != "tokens_per_second":
            flat |= flatten(f"{prefix}_{key}", part)
    return flat


def is_complete(row):
    """Whether teacher and student have both been tested."""
    return "teacher_n" in row and "student_n" in row


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
    return [shared_settings(points), lines[0], "-" * len(lines[0]), *lines[1:], LEGEND]


def table(points):
    """Header and lines of cells; a setting has a column only where points differ in it."""
    settings = ["tau", "lam", *differing(points)]
    accuracies = [(who, rule) for who in ("teacher", "student") for rule in RULES]
    lines = [["arm", *settings, "n", *(f"{who} {RULES[rule]}" for who, rule in accuracies), *NUMBERS]]
    for row in points:
        cells = [row["arm"], *(show_setting(row.get(key)) for key in settings), show_sizes([row], "/")]
        cells += [show_accuracy(row, f"{who}_{rule}") for who, rule in accuracies]
        lines.append([*cells, *(show_number(row.get(column)) for column in NUMBERS.values())])
    return lines


def values_of(rows, key):
    return sorted({row[key] for row in rows if row.get(key) is not None})


def differing(points):
    """The settings in which points differ; the student's seed only where it is not the traces' seed."""
    has_own_seed = any(row.get("student_seed", row["seed"]) != row["seed"] for row in points)
    names = [key for key in SETTINGS if key != "student_seed" or has_own_seed]
    return [key for key in names if len(values_of(points, key)) > 1]


def shared_settings(rows):
    shared = {key: values_of(rows, key) for key in SETTINGS}
    text = [f"{key} {show_setting(values[0])}" for key, values in shared.items() if len(values) == 1]
    return f"{sum(map(is_complete, rows))} of {len(rows)} points complete; {', '.join(text)}"


def show_sizes(rows, separator):
    """The number of test problems; the least and the largest where numbers differ."""
    sizes = sorted({*values_of(rows, "teacher_n"), *values_of(rows, "student_n")})
    return separator.join(map(str, dict.fromkeys(sizes[:1] + sizes[-1:]))) or "-"


def show_setting(value):
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:g}"


def show_number(value):
    return f"{value:.3f}".removeprefix("0") if isinstance(value, float) else show_setting(value)


def show_accuracy(row, name):
    """A share with its interval, as in .838 [.812, .861]."""
    share, low, high = (show_number(row.get(f"{name}_{part}")) for part in ("accuracy", "low", "high"))
    return "-" if share == "-" else f"{share} [{low}, {high}]"


def baseline_lines(baselines):
    return [
        f"undistilled {row['student']} on {row['data']}: forced {show_accuracy(row, 'student_af')}, "
        f"raw {show_accuracy(row, 'student_raw')}, few_shot {row['student_few_shot']}, "
        f"n {show_sizes([row], '/')}, finished {show_number(row.get('student_finished'))}"
        for row in baselines
    ] or ["undistilled student: -"]


def gradient_lines(experiments):
    lines = []
    for gradient in [g for e in experiments for g in e.gradients.values()]:
        n, loss, norm = (show_number(gradient["stats"].get(key)) for key in ("n", "loss", "grad_norm"))
        proxy = short_name(gradient["config"]["proxy_student"])
        lines.append(f"gradient of {proxy}: n {n}, loss {loss} nats/token, ||g|| {norm}")
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


def to_markdown(exp_dirs, experiments, points, notes):
    lines = ["# Results", ""]
    if points:
        header, *body = table(points)
        cells = [header, ["---"] + ["---:"] * (len(header) - 1), *body]
        lines += [inline(shared_settings(points)), ""]
        lines += [f"| {' | '.join(map(inline, line))} |" for line in cells]
        lines += ["", *(f"- {inline(line)}" for line in LEGEND.splitlines()), ""]
    lines += [f"- {inline(note)}" for note in notes]
    lines += ["", "![Student accuracy against teacher accuracy](tradeoff.png)", ""]
    lines += ["Made by", "", f"    {shlex.join(['python', 'report.py', *map(str, exp_dirs)])}", ""]
    return "\n".join([*lines, provenance(experiments), ""])


def provenance(experiments):
    """Commits, versions and time of the stages."""
    sidecars = [sidecar for e in experiments for sidecar in sidecars_of(e)]
    made_with = [{"commit": s.get("commit"), **s.get("versions", {})} for s in sidecars]
    names = dict.fromkeys(name for versions in made_with for name in versions)
    text = [f"{name} {' and '.join(map(str, values_of(made_with, name)))}" for name in names]
    hours = sum(s.get("seconds", 0) for s in sidecars) / 3600
    return f"from {len(sidecars)} stages that took {hours:.1f} hours: {inline(', '.join(text))}."


def inline(text):
    """Text that cannot end its table cell or start HTML or code."""
    return html.escape(text, quote=False).replace("|", "\\|").replace("`", "'")


# Plots


def write_plots(folder, points, baselines):
    """tradeoff.png and tradeoff.svg, byte for byte the same for the same rows."""
    import matplotlib

    with matplotlib.rc_context(PLOT_STYLE):
        figure = draw_tradeoff([row for row in points if is_complete(row)], baselines)
        for kind, metadata in (("png", {}), ("svg", {"Date": None})):
            with store.atomic_path(folder / f"tradeoff.{kind}") as path:
                figure.savefig(path, format=kind, dpi=200, metadata=metadata)


def draw_tradeoff(points, baselines):
    """Figure of student against teacher accuracy, a panel for forced and one for raw answers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.8), layout="constrained")
    panels = figure.subplots(1, len(RULES), sharex=True, sharey=True)
    legend = {}
    for axis, rule in zip(panels, RULES, strict=True):
        draw_panel(axis, rule, points, baselines)
        handles, labels = axis.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    panels[0].set_ylabel("student accuracy")
    tested = points or baselines
    data = ", ".join(values_of(tested, "data")) or "no test has finished"
    figure.suptitle(f"{data}: n = {show_sizes(tested, ' to ')} problems, 95 % intervals")
    num_columns = min(3, LEGEND_WIDTH // max(map(len, legend), default=1)) or 1
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=num_columns, frameon=False)
    return figure


def draw_panel(axis, rule, points, baselines):
    from matplotlib.ticker import PercentFormatter

    for (label, curve), marker in zip(curves(points).items(), itertools.cycle(MARKERS), strict=False):
        draw_curve(axis, rule, curve, color=COLOURS[curve[0]["arm"]], marker=marker, label=label)
    for row in baselines:
        if f"student_{rule}_accuracy" in row:
            share, low, high = (row[f"student_{rule}_{part}"] for part in ("accuracy", "low", "high"))
            label = f"undistilled student, {row['student_few_shot']}-shot"
            axis.axhline(share, color="0.35", linestyle="--", linewidth=1.2, label=label)
            axis.axhspan(low, high, color="0.35", alpha=0.12, linewidth=0)
    axis.set(title=f"{RULES[rule]} accuracy", xlabel="teacher accuracy")
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.grid(color="0.9", linewidth=0.6)


def curves(points):
    """{legend label: rows in the order of the arm's knob}; the points come sorted by arm, tau and lam."""
    groups, names = {}, differing(points)
    for row in points:
        tau = row["tau"] if row["arm"] == "ADS" else None
        groups.setdefault((row["arm"], tau, *(row.get(name) for name in names)), []).append(row)
    return {curve_label(curve, names): curve for curve in groups.values()}


def curve_label(curve, names):
    """The arm, the range of its knob, and the settings in which curves differ."""
    row, last = curve[0], curve[-1]
    parts = [row["arm"]]
    for key in ("tau", "lam") if row["arm"] == "ADS" else ("tau",):
        parts.append(f"{SYMBOLS[key]} = {' to '.join(map(show_setting, sorted({row[key], last[key]})))}")
    parts += [f"{name} {show_setting(row[name])}" for name in names if row.get(name) is not None]
    return ", ".join(parts)


def draw_curve(axis, rule, curve, **style):
    """A line with error bars both ways through the points that were graded under `rule`."""
    curve = [row for row in curve if f"teacher_{rule}_accuracy" in row and f"student_{rule}_accuracy" in row]
    if not curve:
        return
    x, x_bars = error_bars(curve, f"teacher_{rule}")
    y, y_bars = error_bars(curve, f"student_{rule}")
    drawn = axis.errorbar(x, y, y_bars, x_bars, markersize=5, linewidth=1.4, elinewidth=0.8, **style)
    for bars in drawn[2]:
        bars.set_alpha(0.4)


def error_bars(curve, name):
    """Shares (P,) of a curve's P points and their distances (2, P) to the bounds of the intervals."""
    values = np.array([[row[f"{name}_{part}"] for row in curve] for part in ("accuracy", "low", "high")])
    return values[0], abs(values[1:] - values[0])


if __name__ == "__main__":
    utils.run_script(main)
