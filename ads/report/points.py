"""Sidecars of an experiment -> grid points and baselines."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ads.arms import ARMS, arm_of
from ads.report.curves import FILES, STAGES, Point
from ads.stage import files, fingerprint, hub, layout
from ads.stage.config import ignored_keys, make_config, to_dict
from ads.stage.errors import MissingInputError, UserError
from ads.stage.settings import GenConfig, GradConfig, TrainConfig

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
        raise MissingInputError(f"{path} is not a folder: give the EXP_DIR of an experiment")
    kinds = ("traces_sidecar", "model_sidecar", "gradient_sidecar")
    traces, models, gradients = (layout.all_of(kind, path) for kind in kinds)
    return Experiment(
        {file.stem: load_sidecar(file, TRACE_KEYS) for file in traces},
        {file.stem: load_sidecar(file, MODEL_KEYS) for file in models},
        {file.stem: load_sidecar(file, ("proxy_student",)) for file in gradients},
    )


def load_sidecar(path, config_keys):
    """A sidecar; ValueError if the file is none or its config lacks a key."""
    sidecar = files.read_yaml(path)
    parts = [sidecar.get(part) for part in ("config", "stats")]
    parts += [sidecar.get(part) or {} for part in ("inputs", "outputs")]  # old ones have none
    if not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{path} is not a sidecar (no config, no stats): move it elsewhere")
    if missing := [key for key in config_keys if key not in sidecar["config"]]:
        raise UserError(f"{path}: config has no {', '.join(missing)}: delete it to redo the stage")
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
    return {f"{name}{FILES}": plain(found[name]) for name in names if found.get(name)}


def settings_of(sidecar, cls):
    """{setting: value} of a stage by which curves are told apart, from the config of its sidecar.

    All keys of the stage's YAML but NO_SETTING and those without effect (lora_r where all weights are
    trained): for a student this is its recipe, be it a kind of training, a rate, a size of batch or of
    sequence, epochs or weight decay. dtype is what "auto" stood for. A key that an old sidecar lacks had its
    default, and of a path given the end counts.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    values = {key: value for key, value in sidecar["config"].items() if key in known}
    config = make_config(cls, values, dict.fromkeys(values, str(sidecar["path"])))
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
    return experiment.traces.get(path.stem) if layout.is_a("traces_table", path) else None


def model_behind(experiment, student_test):
    """Name of the model that was tested, its sidecar being there or not; None for an undistilled student."""
    path = Path(student_test["config"]["teacher"])
    name = path.parent.name
    is_ours = name in experiment.models or path.is_relative_to(student_test["config"]["exp_dir"])
    return name if layout.is_a("student", path) and is_ours else None


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
        row = {"arm": arm_of(sampled["config"]), **sampling(sampled)}
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
    for stage in (name for name in STAGES if name in stages):
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
