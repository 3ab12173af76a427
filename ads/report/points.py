"""Sidecars of an experiment -> grid points and baselines.

Stages are joined by the settings and the ends of paths in their sidecars, as experiments get moved; the
names of grid points are never parsed.
"""

import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ads.arms import DEFENCES, DELTA, LABELS, TEXTS, arm_of
from ads.report.curves import Point
from ads.report.numbers import short_name
from ads.report.results import (
    CAPS,
    CONFIGS,
    FILES,
    KL,
    NUM_MODELS,
    SPEED,
    STAGES,
    ResultRow,
    default_of,
    plain,
    read_row,
)
from ads.stage import files, fingerprint, hub, layout
from ads.stage.config import ignored_keys, make_config, to_dict
from ads.stage.errors import MissingInputError, UserError
from ads.stage.settings import GenConfig, GradConfig, TrainConfig
from ads.stage.sidecar import upgraded

Sidecar = dict[str, Any]
SAMPLING_KEYS = ("tau", "lam", "eps", "top_k", "top_p", "seed")
TRACE_KEYS = ("exp_dir", "teacher", "is_teacher", "data_split", "few_shot", *SAMPLING_KEYS)
POINT_STAGES = ("teacher", "student", "train", "model")  # whose numbers a point has
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
    "train": (*SAMPLING_KEYS, "defence", "direction_seed", *CAPS),
    "teacher": (*SAMPLING_KEYS, "defence", "direction_seed", *CAPS, "data_split"),
    "student": ("lam", "few_shot", "data_split"),
}


@dataclass(frozen=True)
class Experiment:
    """The sidecars of one folder, by name."""

    traces: dict[str, Sidecar]
    models: dict[str, Sidecar]
    gradients: dict[str, Sidecar]

    @property
    def sidecars(self) -> list[Sidecar]:
        return [*self.traces.values(), *self.models.values(), *self.gradients.values()]

    def traces_of(self, is_teacher: bool, split: str) -> list[Sidecar]:
        """A teacher's traces, or students', on one split."""
        found = [trace for trace in self.traces.values() if trace["config"]["is_teacher"] == is_teacher]
        return [trace for trace in found if trace["config"]["data_split"].endswith(f"_{split}")]

    def traces_behind(self, model: Sidecar) -> Sidecar | None:
        """The sidecar of the traces that a model was trained on; None where it is not in the self."""
        path = Path(model["config"]["train_traces"])
        is_ours = path.parent.name == "traces" and path.suffix == ".parquet"
        return self.traces.get(path.stem) if is_ours else None

    def model_behind(self, student_test: Sidecar) -> str | None:
        """Name of the model that was tested, its sidecar being there or not; None: an undistilled student."""
        path = Path(student_test["config"]["teacher"])
        name, is_final = path.parent.name, path.parts[-3::2] == ("models", "final")
        is_ours = name in self.models or path.is_relative_to(student_test["config"]["exp_dir"])
        return name if is_final and is_ours else None

    def traces_changed(self, model: Sidecar) -> bool:
        train, file = self.traces_behind(model), Path(model["config"]["train_traces"]).name
        return train is not None and has_changed(model, "train_traces", train, file)

    def model_changed(self, student_test: Sidecar) -> bool:
        name = self.model_behind(student_test)
        model = self.models.get(str(name))
        return model is not None and has_changed(student_test, "teacher", model, f"{name}/final")


def load_experiments(paths: Iterable[Path]) -> list[Experiment]:
    """The experiments that are reported together.

    Older sidecars name a repository of the hub without the commit that was read. If any stage does, the
    commit is dropped from that repository's name in all stages of all experiments, and `doubts` warns of it.
    Otherwise the traces and the test of a point, one made before commits were recorded and one after, would
    count as made from two models and not be joined.
    """
    experiments = [load_experiment(path) for path in paths]
    sidecars = [sidecar for experiment in experiments for sidecar in experiment.sidecars]
    bare = {name for sidecar in sidecars for name in without_commit(sidecar)}
    for sidecar in sidecars:
        for key, made_from in sidecar["inputs"].items():
            if (name := str(made_from).partition("@")[0]) in bare:
                sidecar["inputs"][key] = name
    return experiments


def without_commit(sidecar: Sidecar) -> list[str]:
    """Fingerprints of what a stage took from the hub that do not tell the commit."""
    found = map(str, sidecar["inputs"].values())
    return [text for text in found if text.startswith(hub.HUB) and "@" not in text]


def load_experiment(path: Path) -> Experiment:
    if not path.is_dir():
        raise MissingInputError(f"{path} is not a folder: give the EXP_DIR of an experiment")
    kinds = ("traces_sidecar", "model_sidecar", "gradient_sidecar")
    traces, models, gradients = (layout.all_of(kind, path) for kind in kinds)
    return Experiment(
        {file.stem: load_sidecar(file, TRACE_KEYS) for file in traces},
        {file.stem: load_sidecar(file, MODEL_KEYS) for file in models},
        {file.stem: load_sidecar(file, ("proxy_student",)) for file in gradients},
    )


def load_sidecar(path: Path, config_keys: Iterable[str]) -> Sidecar:
    """A sidecar; ValueError if the file is none or its config lacks a key."""
    sidecar = files.read_yaml(path)
    sidecar |= {part: sidecar.get(part) or {} for part in ("inputs", "outputs")}  # old ones have none
    if not all(isinstance(sidecar.get(part), dict) for part in ("config", "stats", "inputs", "outputs")):
        raise UserError(f"{path} is not a sidecar (no config, no stats): move it elsewhere")
    if missing := [key for key in config_keys if key not in sidecar["config"]]:
        raise UserError(f"{path}: config has no {', '.join(missing)}: delete it to redo the stage")
    config = upgraded(sidecar["config"])
    if "defence" in config and config["defence"] not in DEFENCES:
        raise UserError(f"{path}: defence={config['defence']!r}: must be one of {', '.join(DEFENCES)}")
    return {**sidecar, "config": config, "path": path}


def sampling(trace: Sidecar) -> Sidecar:
    """The settings that all traces of one grid point share; without lam eps and defence play no part."""
    values = {key: trace["config"][key] for key in SAMPLING_KEYS}
    defence = trace["config"]["defence"]
    defence = defence if values["lam"] or defence in TEXTS else None
    number = trace["config"].get("direction_seed") if defence == "random" else None
    eps = values["eps"] if has_delta(trace) else None
    return values | {"eps": eps, "defence": defence, "direction_seed": number} | caps_of(trace)


def caps_of(trace: Sidecar) -> dict[str, Any]:
    """The caps that are set and have an effect."""
    found = settings_of(trace, GenConfig)
    return {key: found[key] for key in CAPS if key in found and found[key] != default_of(key)}


def has_delta(trace: Sidecar) -> bool:
    """Whether the gradient took part in the sampling: it did not where results were corrupted, though the
    one-step test of the training traces reads the proxy."""
    return arm_of(trace["config"]).inputs == DELTA


def sampled_from(trace: Sidecar) -> tuple[dict, dict]:
    """The settings and the files that traces of one grid point are sampled with."""
    return sampling(trace), files_of(trace, "teacher", *arm_of(trace["config"]).inputs)


def files_of(sidecar: Sidecar, *names: str) -> dict[str, Any]:
    """{input: fingerprint} of what a stage was made from; old sidecars lack some."""
    found = sidecar["inputs"]
    return {f"{name}{FILES}": plain(found[name]) for name in names if found.get(name)}


def settings_of(sidecar: Sidecar, cls: type) -> dict[str, Any]:
    """{setting: value} of a stage by which curves are told apart, from the config of its sidecar.

    All keys of the stage's YAML but NO_SETTING and those without effect (lora_r where all weights are
    trained): for a student this is its recipe, be it a kind of training, a rate, a size of batch or of
    sequence, epochs or weight decay. dtype is what "auto" stood for. A key that an old sidecar lacks had its
    default, and of a path given the end counts.
    """
    known = typing.get_type_hints(cls)
    values = {key: value for key, value in sidecar["config"].items() if key in known}
    config = make_config(cls, values, dict.fromkeys(values, str(sidecar["path"])))
    dtypes = {key: sidecar.get(f"resolved_{key}") for key in ("dtype", "proxy_dtype")}
    values = to_dict(config) | sidecar["config"] | {key: value for key, value in dtypes.items() if value}
    left_out = ignored_keys(config) | NO_SETTING[cls]
    return {key: plain(value) for key, value in values.items() if key not in left_out}


def model_name(sidecar: Sidecar, key: str) -> str:
    """The short name of a stage's model; of the hub without its commit, which counts by fingerprint."""
    name = sidecar["config"][key]
    is_of_hub = str(sidecar["inputs"].get(key)).startswith(hub.HUB)
    return short_name((name.partition("@")[0] or name) if is_of_hub else name)


def data_name(trace: Sidecar) -> str:
    return short_name(trace["config"]["data_split"], num_parts=1)


def has_changed(reader: Sidecar, name: str, writer: Sidecar, output: str) -> bool:
    """Whether what one stage read is no longer what another wrote; old sidecars do not say."""
    read, written = reader["inputs"].get(name), writer["outputs"].get(output)
    return None not in (read, written) and read != written


def collect_points(experiments: Iterable[Experiment]) -> list[Point]:
    """The grid points of all experiments, by arm, tau, lam and seed; exact repetitions once."""
    return in_order(point for e in experiments for point in points_of(e))


def collect_baselines(experiments: Iterable[Experiment]) -> list[ResultRow]:
    """The rows of the undistilled students."""
    students = [s for e in experiments for s in e.traces_of(False, "test") if e.model_behind(s) is None]
    return [point.row for point in in_order(make_point({"student": s}) for s in students)]


def in_order(points: Iterable[Point]) -> list[Point]:
    unique = {repr({**p.row.columns, SPEED: None}): p for p in reversed(list(points))}.values()
    return sorted(reversed(unique), key=lambda p: (LABELS.index(p.row.arm), p.row.tau, p.row.lam, p.row.seed))


def points_of(experiment: Experiment) -> Iterator[Point]:
    """Training traces joined with their model, its test and the teacher's test, as far as these exist."""
    tests, shown = experiment.traces_of(True, "test"), list[Sidecar]()
    gradient: Sidecar = next(iter(experiment.gradients.values()), {})
    for train, name in trained(experiment):
        stages = {"train": train, "model": experiment.models.get(name, {})}
        stages |= {"gradient": gradient} if has_delta(train) else {}
        same_point = [test for test in tests if sampled_from(test) == sampled_from(train)]
        for student in students_of(experiment, name) or [{}]:
            same = [test for test in same_point if not student or data_name(test) == data_name(student)]
            for teacher in same or [{}]:
                yield make_point({"teacher": teacher, "student": student, **stages})
            shown += same
    yield from (make_point({"teacher": test}) for test in tests if test not in shown)


def trained(experiment: Experiment) -> list[tuple[Sidecar, str]]:
    """(training traces, name of a model that was trained on them as they are now); no name without one."""
    pairs = []
    for name, model in experiment.models.items():
        train = experiment.traces_behind(model)
        if train is not None and not experiment.traces_changed(model):
            pairs.append((train, name))
    used = [train for train, _ in pairs]
    return pairs + [(train, "") for train in experiment.traces_of(True, "train") if train not in used]


def students_of(experiment: Experiment, name: str) -> list[Sidecar]:
    """The tests of a model as it is now."""
    tests = experiment.traces_of(False, "test") if name else []
    return [t for t in tests if experiment.model_behind(t) == name and not experiment.model_changed(t)]


def make_point(stages: Mapping[str, Sidecar]) -> Point:
    """What the sidecars of a point say, by stage; the numbers of a missing stage are missing."""
    found = {stage: stages[stage] for stage in (*POINT_STAGES, "gradient") if stages.get(stage)}
    teacher, student, train, model = map(found.get, POINT_STAGES)
    columns: dict[str, Any] = {"arm": "undistilled"}
    if sampled := train or teacher:
        columns = {"arm": arm_of(sampled["config"]).label, **sampling(sampled)}
        columns["teacher"] = model_name(sampled, "teacher")
    if test := student or teacher:
        columns["data"] = data_name(test)
    if student:
        columns["student"] = model_name(student, "teacher")
        columns["student_few_shot"] = student["config"]["few_shot"]
        columns["student_prefill"] = student["config"].get("prefill")
        columns.setdefault("seed", student["config"]["seed"])
    if model:
        columns |= {"student": model_name(model, "student"), "student_seed": model["config"]["seed"]}
    if train and (speed := train["stats"].get("tokens_per_second")):
        columns[SPEED] = round(1000 / speed, 3)
    columns |= setting_columns(found)
    found.pop("gradient", None)
    for stage, sidecar in found.items():
        columns |= flatten(stage, sidecar["stats"])
        columns |= flatten(f"{stage}_perturbation", sidecar.get("perturbation"))
    if train and columns["arm"] == "temperature" and NUM_MODELS in columns:  # older stages measured no price
        columns[KL] = 0.0  # what is sampled is p itself
    return Point(read_row(columns), found)


def setting_columns(stages: Mapping[str, Sidecar]) -> dict[str, Any]:
    """{STAGE.SETTING: value} of a point's stages, and `recipe`, the fingerprint of the student's."""
    columns: dict[str, Any] = {}
    for stage in (name for name in STAGES if name in stages):
        found = settings_of(stages[stage], CONFIGS[stage]) | stage_files(stage, stages)
        own = OWN_COLUMNS.get(stage, ())
        columns |= {f"{stage}.{key}": value for key, value in found.items() if key not in own}
    recipe = {key: value for key, value in columns.items() if key.startswith("model.")}
    return columns | ({"recipe": fingerprint.fingerprint_json(recipe)[:8]} if recipe else {})


def stage_files(stage: str, stages: Mapping[str, Sidecar]) -> dict[str, Any]:
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


def flatten(prefix: str, value: object) -> dict[str, Any]:
    """{prefix_key_key: number} of nested mappings, without what is null or depends on the machine."""
    if not isinstance(value, dict):
        return {} if value is None else {prefix: value}
    flat: dict[str, Any] = {}
    for key, part in value.items():
        if key not in ("tokens_per_second", "rows_at_once"):
            flat |= flatten(f"{prefix}_{key}", part)
    return flat
