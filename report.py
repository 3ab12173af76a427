"""Sidecars of an experiment, finished or not -> a table and EXP_DIR/report/: page, Markdown, CSV, plots

    python report.py runs/gsm8k
    python report.py runs/seed42 runs/seed43    # several seeds, or one sweep spread over machines

Stages are joined by the settings and path tails in their sidecars, as experiments get moved; the names of
grid points are never parsed. Where there is one seed, intervals at equal teacher accuracy need the tests'
.parquet files.
"""

import argparse
import csv
import dataclasses
import html
import io
import shlex
from dataclasses import dataclass
from pathlib import Path

import utils
from ads import claims, page, plots, tradeoff
from ads.data.tables import read_columns
from ads.delta import agreement_table
from ads.delta.agreement_table import LEAST_CORRELATION
from ads.stage import files, fingerprint, hub
from ads.stage.config import ignored_keys, to_dict
from ads.stage.inputs import fingerprint_model
from ads.stage.settings import LEAST_COSINE, GenConfig, GradConfig, TrainConfig, expand_home
from ads.stage.world import print0
from ads.tradeoff import (
    ARMS,
    ONE_SEED,
    RULES,
    SETTINGS,
    Point,
    differing,
    is_complete,
    point_name,
    show_name,
    show_number,
    show_setting,
    values_of,
)
from utils import print_result

SAMPLING_KEYS = ("tau", "lam", "eps", "top_k", "top_p", "seed")  # and direction, which old sidecars lack
TRACE_KEYS = ("exp_dir", "teacher", "is_teacher", "data_split", "few_shot", *SAMPLING_KEYS)
MODEL_KEYS = ("student", "train_traces", "seed")
# Settings by which curves are not told apart. Those that ads.config does not compare (places, whose contents
# count by fingerprint, and what concerns speed alone) are left out as well.
NO_SETTING = {  # names, diagnostics, what changes rounding alone, and the seed, in which replicates differ
    GenConfig: {
        *("trace_name", "trace_colname", "one_step", "one_step_samples", "num_contrasts", "answer_force"),
        *("attn_implementation", "is_teacher", "seed"),
    },
    GradConfig: {"attn_implementation", "seed"},
    TrainConfig: {"model_name", "do_eval", "eval_epochs", "attn_implementation", "seed"},
}
OWN_COLUMNS = {  # settings of a stage that have a column without a dot, or that follow from another
    "train": (*SAMPLING_KEYS, "direction", "direction_seed"),
    "teacher": (*SAMPLING_KEYS, "direction", "direction_seed", "data_split"),
    "student": ("lam", "few_shot", "data_split"),
}
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
    "95 % intervals over seeds (t) or, of one seed, over problems (bootstrap); "
    f"{tradeoff.MARK} marks what is in doubt"
)
LEAST_FINISHED = 0.9
DEMO_MODELS = utils.ROOT / "demo" / "models"
DEMO_NOTES = utils.ROOT / "demo" / "notes.txt"  # what is known of experiments with these models
NUM_NAMED = 4  # cases that one warning names


def main(arguments):
    exp_dirs, folder, levels = parse_arguments(arguments)
    experiments = load_experiments(exp_dirs)
    if not any(map(sidecars_of, experiments)):
        raise ValueError(f"no stage has finished in {', '.join(map(str, exp_dirs))}: no sidecar is there")
    points, baselines = collect_points(experiments), collect_baselines(experiments)
    rows = [point.row for point in points]
    notes = [*baseline_lines(baselines), *gradient_lines(experiments), *warning_lines(experiments, points)]
    curves = tradeoff.make_curves(points)
    notes += unpaired_lines(curves)
    drawn = load_draws(curves)
    matches = compare_arms(curves, levels, drawn)
    claimed = claims.make_claims(curves, baselines, *drawn)
    tables = small_tables(curves, baselines, claimed)
    print0(*text_table(rows), *notes, *map(tradeoff.show_match, matches), sep="\n")
    for caption, cells in tables.items():
        print0(f"{caption.removesuffix('.')}:", *aligned(cells, str.ljust), sep="\n")
    finding = tradeoff.finding(curves, matches)
    more = (tradeoff.finding_doubt, tradeoff.second_finding, tradeoff.controls)
    sentences = [finding, claims.failures(claimed), *(sentence(matches) for sentence in more)]
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
    print_result(**paths, finding=finding, num_points=len(rows), num_complete=sum(map(is_complete, rows)))


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
    out = Path(expand_home("--out", parsed.out)) if parsed.out is not None else exp_dirs[0] / "report"
    return exp_dirs, out, levels


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


def load_experiments(paths):
    """The experiments that are reported together.

    Commits of the hub were not always recorded. What lacks one may be of any, so where a stage of one of the
    experiments does, that repository counts as one in all (`doubts` says so): else a point begun before and
    finished after would fall apart.
    """
    experiments = [load_experiment(path) for path in paths]
    sidecars = [sidecar for experiment in experiments for sidecar in sidecars_of(experiment)]
    bare = {name for sidecar in sidecars for name in without_commit(sidecar)}
    for sidecar in sidecars:
        for key, made_from in (sidecar.get("inputs") or {}).items():
            if (name := str(made_from).partition("@")[0]) in bare:
                sidecar["inputs"][key] = name
    return experiments


def without_commit(sidecar):
    """Fingerprints of what a stage took from the hub that do not tell the commit."""
    found = (sidecar.get("inputs") or {}).values()
    return [text for text in map(str, found) if text.startswith(hub.HUB) and "@" not in text]


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
    sidecar = files.read_yaml(path)
    parts = [sidecar.get(part) for part in ("config", "stats")]
    parts += [sidecar.get(part) or {} for part in ("inputs", "outputs")]  # old ones have none
    if not all(isinstance(part, dict) for part in parts):
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
    direction = trace["config"].get("direction", "gradient") if values["lam"] else None
    return values | {
        "eps": values["eps"] if has_delta(trace) else None,
        "direction": direction,
        "direction_seed": trace["config"].get("direction_seed") if direction == "random" else None,
    }


def has_delta(trace):
    """Whether a proxy took part in the sampling: it did not where results were corrupted, though the one-step
    test of the training traces reads it."""
    config = trace["config"]
    return bool(config["lam"]) and config.get("direction") != "corrupt"


def sampled_from(trace):
    """The settings and the files that traces of one grid point are sampled with."""
    names = ("teacher", "proxy_student", "gradient") if has_delta(trace) else ("teacher",)
    return sampling(trace), files_of(trace, *names)


def files_of(sidecar, *names):
    """{input: fingerprint} of what a stage was made from; old sidecars lack some."""
    found = sidecar.get("inputs") or {}
    return {f"{name}{tradeoff.FILES}": plain(found[name]) for name in names if found.get(name)}


def settings_of(sidecar, cls):
    """{setting: value} of a stage by which curves are told apart, from the config of its sidecar.

    All keys of the stage's YAML but NO_SETTING and those without effect (lora_r where all weights are
    trained): for a student this is its recipe, be it a kind of training, a rate, a size of batch or of
    sequence, epochs or weight decay. dtype is what "auto" stood for. A key that an old sidecar lacks had its
    default, and of a path given the end counts.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    config = cls(**{key: value for key, value in sidecar["config"].items() if key in known})
    dtypes = {key: sidecar.get(f"resolved_{key}") for key in ("dtype", "proxy_dtype")}
    values = to_dict(config) | sidecar["config"] | {key: value for key, value in dtypes.items() if value}
    left_out = ignored_keys(config) | NO_SETTING[cls]
    return {key: plain(value) for key, value in values.items() if key not in left_out}


def plain(value):
    """A setting as a number or short text."""
    if isinstance(value, bool | int | float):
        return value
    return "null" if value is None else short_name(str(value))


def model_name(sidecar, key):
    """The short name of a stage's model; of the hub without its commit, which counts by fingerprint."""
    name = sidecar["config"][key]
    is_of_hub = str((sidecar.get("inputs") or {}).get(key)).startswith(hub.HUB)
    return short_name((name.partition("@")[0] or name) if is_of_hub else name)


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


def has_changed(reader, name, writer, output):
    """Whether what one stage read is no longer what another wrote; old sidecars do not say."""
    read, written = (reader.get("inputs") or {}).get(name), (writer.get("outputs") or {}).get(output)
    return None not in (read, written) and read != written


def traces_changed(experiment, model):
    train = traces_behind(experiment, model)
    return train and has_changed(model, "train_traces", train, f"{train['path'].stem}.parquet")


def model_changed(experiment, student_test):
    name = model_behind(experiment, student_test)
    model = experiment.models.get(name)
    return model and has_changed(student_test, "teacher", model, f"{name}/final")


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
    models = experiment.models.items()
    pairs = [
        (traces_behind(experiment, model), name)
        for name, model in models
        if not traces_changed(experiment, model)
    ]
    pairs = [(train, name) for train, name in pairs if train]
    used = [train for train, _ in pairs]
    pairs += [(train, None) for train in select(experiment, True, "train") if train not in used]
    students = [student for student in students if not model_changed(experiment, student)]
    gradient = next(iter(experiment.gradients.values()), None)
    points, shown = [], []
    for train, name in pairs:
        model = experiment.models.get(name)
        same_point = [test for test in tests if sampled_from(test) == sampled_from(train)]
        for student in [s for s in students if name and model_behind(experiment, s) == name] or [None]:
            same = [t for t in same_point if student is None or data_name(t) == data_name(student)]
            points += [
                make_point(t, student, train, model, gradient if has_delta(train) else None)
                for t in same or [None]
            ]
            shown += same
    return points + [make_point(teacher=test) for test in tests if test not in shown]


def make_point(teacher=None, student=None, train=None, model=None, gradient=None):
    """What the sidecars of a point say; the numbers of a missing stage are missing."""
    row = {"arm": "undistilled"}
    if sampled := train or teacher:
        row = {"arm": tradeoff.arm_of(sampled["config"]), **sampling(sampled)}
        row["teacher"] = model_name(sampled, "teacher")
    if test := student or teacher:
        row["data"] = data_name(test)
    if student:
        row["student"] = model_name(student, "teacher")
        row["student_few_shot"] = student["config"]["few_shot"]
        row["student_prefill"] = student["config"].get("prefill")
        row.setdefault("seed", student["config"]["seed"])
    if model:
        row |= {"student": model_name(model, "student"), "student_seed": model["config"]["seed"]}
    stages = {"teacher": teacher, "student": student, "train": train, "model": model}
    stages = {stage: sidecar for stage, sidecar in stages.items() if sidecar}
    row |= setting_columns(stages | ({"gradient": gradient} if gradient else {}))
    for stage, sidecar in stages.items():
        row |= flatten(stage, sidecar["stats"])
        row |= flatten(f"{stage}_perturbation", sidecar.get("perturbation"))
    return Point(row, stages)


def setting_columns(stages):
    """{STAGE.SETTING: value} of a point's stages, and `recipe`, the fingerprint of the student's."""
    classes = {"model": TrainConfig, "gradient": GradConfig}
    columns = {}
    for stage in (name for name in tradeoff.STAGES if name in stages):
        found = settings_of(stages[stage], classes.get(stage, GenConfig)) | stage_files(stage, stages)
        own = OWN_COLUMNS.get(stage, ())
        columns |= {f"{stage}.{key}": value for key, value in found.items() if key not in own}
    recipe = {key: value for key, value in columns.items() if key.startswith("model.")}
    return columns | ({"recipe": fingerprint.fingerprint_json(recipe)[:8]} if recipe else {})


def stage_files(stage, stages):
    """Fingerprints of what a stage was made from, as far as no other column follows from it."""
    sidecar = stages[stage]
    if stage == "model":
        return files_of(sidecar, "student", "tokenizer")
    if stage == "gradient":
        return {}
    if stage == "student":  # a distilled one's weights differ in every point
        return files_of(sidecar, "data", *(() if "model" in stages else ("teacher", "tokenizer")))
    names, rank = ("teacher", "tokenizer", "data"), sidecar.get("grad_rank")
    if not has_delta(sidecar):
        return files_of(sidecar, *names)
    return files_of(sidecar, *names, "proxy_student") | ({} if rank is None else {"grad_rank": rank})


def flatten(prefix, value):
    """{prefix_key_key: number} of nested mappings, without what is null or depends on the machine."""
    if not isinstance(value, dict):
        return {} if value is None else {prefix: value}
    flat = {}
    for key, part in value.items():
        if key not in ("tokens_per_second", "rows_at_once"):
            flat |= flatten(f"{prefix}_{key}", part)
    return flat


def short_name(path, num_parts=2):
    """The end of a path, which is all of a hub's OWNER/NAME, without characters that act on a terminal."""
    return "".join(c for c in "/".join(Path(path).parts[-num_parts:]) if c.isprintable())


# Text


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
    accuracies = [(who, rule) for who in ("teacher", "student") for rule in tradeoff.rules_of(points)]
    lines = [["arm", *map(show_name, settings), "n", *(f"{who} {RULES[rule]}" for who, rule in accuracies)]]
    lines[0] += NUMBERS
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


def show_accuracies(row):
    """An undistilled student's, by each rule that it was graded by."""
    rules = tradeoff.rules_of([row]).items()
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


def warning_lines(experiments, points=()):
    """One line per kind of doubt, naming the worst cases first."""
    found, lines = {}, []
    for kind, badness, case in [*(doubt for e in experiments for doubt in doubts(e)), *point_doubts(points)]:
        found.setdefault(kind, set()).add((badness, short_name(case)))
    for kind, cases in found.items():
        named = ", ".join(case for _, case in sorted(cases, reverse=True)[:NUM_NAMED])
        more = f" and {len(cases) - NUM_NAMED} more" if len(cases) > NUM_NAMED else ""
        lines.append(f"WARNING: {kind}: {named}{more}")
    return lines


def point_doubts(points):
    """(kind, badness, case) of points that are there more than once, or without an accuracy."""
    for point in tradeoff.pool_copies(point for point in points if is_complete(point.row)):
        if point.copies:
            yield tradeoff.POOLED, len(point.copies), f"{point_name(point.row)} ({len(point.copies)} times)"
    for point in points:
        for _, test in tradeoff.lost_shares(point.row):
            yield tradeoff.NO_SHARE, 0, f"{point_name(point.row)} ({test})"


def unpaired_lines(curves):
    """What to say of curves that have nothing to be compared with, where others have."""
    arms, paired = {curve.arm for curve in curves}, [curve for _, curve in tradeoff.pair_up(curves)]
    alone = [curve for curve in curves if curve.arm != "temperature" and curve not in paired]
    if not alone or "temperature" not in arms:
        return []
    labels = "; ".join(curve.label for curve in alone)
    return [f"WARNING: not compared, no temperature curve shares the settings: {labels}"]


def doubts(experiment):
    """(kind, badness, case) of everything that puts a number in doubt or is in no row."""
    for name in {name for sidecar in sidecars_of(experiment) for name in without_commit(sidecar)}:
        yield "of the hub at commits not recorded, taken for one and the same", 0, name
    for name, trace in experiment.traces.items():
        stats = trace["stats"]
        finished, cosine = stats.get("finished", 1), trace.get("perturbation", {}).get("cosine", 1)
        if cosine < LEAST_COSINE:
            kind = f"theta +- eps g lost to rounding, cosine below {LEAST_COSINE}"
            yield kind, -cosine, f"{name} {show_number(cosine)}"
        if not finished >= LEAST_FINISHED:
            yield f"finished share below {LEAST_FINISHED}", -finished, f"{name} {show_number(finished)}"
        if num := stats.get("num_grader_timeouts"):
            yield "answers counted as wrong, the grader timed out", num, f"{name} {num}"
        if num := stats.get("num_without_answer"):
            yield "problems left out, no answer in their solution", num, f"{name} {num}"
        if num := stats.get("num_prompts_too_long"):
            yield "problems left out, prompts too long", num, f"{name} {num}"
    for name, gradient in experiment.gradients.items():
        for trace_name, trace in experiment.traces.items():
            if trace["config"]["lam"] and has_changed(trace, "gradient", gradient, f"{name}.safetensors"):
                yield f"traces of another gradient than the one that {name} describes", 0, trace_name
        found, eps = gradient.get("diagnostics"), gradient["config"].get("eps", 0)
        if found and (correlation := agreement_table.used(found, eps)["correlation"]) < LEAST_CORRELATION:
            kind = f"Delta a poor one, correlation with the exact one below {LEAST_CORRELATION}"
            yield kind, -correlation, f"{name} {show_number(correlation)}"
    for name, model in experiment.models.items():
        if traces_behind(experiment, model) is None:
            yield "models left out, the sidecars of their training traces are not here", 0, name
        elif traces_changed(experiment, model):
            yield "models left out, their training traces have changed since", 0, name
    for student in select(experiment, False, "test"):
        if model_changed(experiment, student):
            name = model_behind(experiment, student)
            yield "student tests left out, the models have changed since", 0, name
    for name in {model_behind(experiment, s) for s in select(experiment, False, "test")}:
        if name and name not in experiment.models:
            yield "student tests left out, the sidecars of the models are not here", 0, name


def results(points, baselines):
    """The lines of results.csv: what the intervals are, the rows, and what puts each in doubt."""
    copies = [
        part for p in tradeoff.pool_copies(p for p in points if is_complete(p.row)) for part in p.copies
    ]
    for point in points:
        lost = [f"{tradeoff.NO_SHARE}: {test}" for _, test in tradeoff.lost_shares(point.row)]
        flags = ([tradeoff.POOLED] if point in copies else []) + lost
        yield {**point.row, "interval": f"Wilson, {ONE_SEED}", "flags": "; ".join(flags)}
    for row in baselines:
        yield {**row, "interval": f"Wilson, {ONE_SEED}", "flags": ""}


def comparison(match):
    """A line of comparisons.csv."""
    values = dataclasses.asdict(match) | {"flags": "; ".join(match.flags)}
    kind = "" if match.low is None else tradeoff.interval_kind(match.num_seeds)
    return values | {"interval": kind if match.num_seeds > 1 or not kind else f"problem bootstrap, {kind}"}


def claim_line(claim):
    """A line of claims.csv."""
    kind = "" if claim.low is None else tradeoff.interval_kind(claim.num_seeds)
    left_out = ("least", "most")  # in words in the claim
    values = {key: value for key, value in dataclasses.asdict(claim).items() if key not in left_out}
    values |= {"flags": "; ".join(claim.flags)}
    return values | {"answers": tradeoff.RULES[claims.RULE], "interval": kind}


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
    for price, words in tradeoff.PRICES.items():
        if found := [match for match in matches if match.price == price]:
            lines += ["", f"At equal {words}, {MATCH_LEGEND}:", ""]
            lines += [f"- {inline(tradeoff.show_match(match))}" for match in found]
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


# The comparison and the page


def compare_arms(curves, levels, drawn):
    """The arms at equal teacher accuracies, those given or else the usual ones, and at equal teacher NLL.

    `drawn` comes from load_draws.
    """
    pairs, matches = tradeoff.pair_up(curves), []
    for price in tradeoff.PRICES:
        given = levels if price == "accuracy" else None
        chosen = {rule: given or tradeoff.choose_levels(pairs, rule, price) for rule in RULES}
        matches += tradeoff.compare(pairs, chosen, *drawn, price)
    return matches


def load_draws(curves):
    """(accuracies of all tests under resampled problems, why some are missing)."""
    pairs = tradeoff.pair_up(curves)
    points = [part for c in curves for p in [*c.start, *c.points] for part in tradeoff.parts_of(p)]
    stages = [point.stages[who] for point in points for who in ("teacher", "student")]
    answers, missing = {}, []
    for stage in {stage["path"]: stage for stage in stages}.values() if pairs else ():
        found, problem = read_answers(stage)
        answers |= {(stage["path"], rule): correct for rule, correct in found.items()}
        missing += [problem] if problem else []
    return tradeoff.draw_accuracies(pairs, answers), missing[0] if missing else ""


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
    most = max((len(rows) for c in curves for rows in tradeoff.by_setting(c.points).values()), default=1)
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
        contrasts=page.load_contrasts(points),
        about=DEMO_NOTES.read_text(encoding="utf-8").splitlines() if is_demo(experiments) else (),
        made_from=provenance(experiments),
    )


if __name__ == "__main__":
    utils.run_script(main)
