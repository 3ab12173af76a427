"""Sidecars of an experiment -> grid points and baselines."""

import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ads.arms import DELTA, LABELS, TEXTS, arm_of
from ads.report.curves import Point
from ads.report.experiments import (
    CLEAN,
    NAIVE,
    SAMPLING_KEYS,
    Experiment,
    Sidecar,
    attack_names,
    is_published,
    students_of,
    trained,
)
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
from ads.stage import fingerprint, hub
from ads.stage.config import ignored_keys, make_config, to_dict
from ads.stage.settings import GenConfig, GradConfig, TrainConfig

OTHER_STAGES = ("gradient", "samples", CLEAN)
POINT_STAGES = ("teacher", "student", "train", "model", "attack")  # whose numbers a point has
# Settings by which curves are not told apart. Those that ads.config does not compare (places, whose contents
# count by fingerprint, and what concerns speed alone) are left out as well.
NO_SETTING = {  # names, diagnostics, what changes rounding alone, and the seed, in which replicates differ
    GenConfig: {
        *("trace_name", "trace_colname", "one_step", "one_step_samples", "num_contrasts", "answer_force"),
        *("attn_implementation", "is_teacher", "seed", "attacker"),
    },
    GradConfig: {"attn_implementation", "seed"},
    TrainConfig: {"model_name", "do_eval", "eval_epochs", "attn_implementation", "seed"},
}
NO_ATTACK_SETTING = {  # of attack.py: places, names, what concerns speed alone, and the seed
    *("exp_dir", "traces", "clean_traces", "samples", "holdout_traces", "student", "tokenizer"),
    *("trace_name", "trace_colname", "dtype", "attn_implementation", "batch_size", "batch_tokens", "seed"),
}
MODEL_FILES = {  # columns of a model's name, and those of its files
    "teacher": (f"train.teacher{FILES}", f"teacher.teacher{FILES}"),
    "student": (f"model.student{FILES}", f"student.teacher{FILES}"),
}
OWN_COLUMNS = {  # settings of a stage that have a column without a dot, or that follow from another
    "train": (*SAMPLING_KEYS, "defence", "direction_seed", *CAPS),
    "teacher": (*SAMPLING_KEYS, "defence", "direction_seed", *CAPS, "data_split"),
    "student": ("lam", "few_shot", "data_split"),
}


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
    """The settings and the files that traces of one grid point are sampled with.

    Traces made elsewhere have a file for each split: of these the folder counts.
    """
    inputs = arm_of(trace["config"]).inputs
    folder = {"published": plain(trace["config"]["published"])} if "published" in inputs else {}
    return sampling(trace) | folder, files_of(trace, "teacher", *set(inputs) - {"published"})


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


def collect_points(experiments: Iterable[Experiment]) -> list[Point]:
    """The grid points of all experiments, by arm, tau, lam and seed; exact repetitions once."""
    return in_order(point for e in experiments for point in points_of(e))


def collect_undistilled(experiments: Iterable[Experiment]) -> list[Point]:
    """The undistilled students, as they were asked."""
    students = [test for e in experiments for test in e.tests_by_model.get(None, [])]
    return in_order(make_point({"student": s}) for s in students)


def collect_own(experiments: Iterable[Experiment]) -> list[Point]:
    """The students that were trained on no published trace, but on what an attack made of their own."""
    found = [(e, stages) for e in experiments for stages in trained(e) if not is_published(stages["train"])]
    return in_order(
        make_point({**stages, "train": {}, "student": test}, attack)
        for e, stages in found
        for test in students_of(e, stages)
        for attack in attack_names(e, stages, test)
    )


def with_one_name(*found: Iterable[Point]) -> list[list[Point]]:
    """The points, a model having its first name wherever its files are the same: a folder may have moved."""
    names: dict[str, str] = {}

    def renamed(point: Point) -> Point:
        columns = dict(point.row.columns)
        for role, places in MODEL_FILES.items():
            if made_of := next((columns[place] for place in places if columns.get(place)), None):
                columns[role] = names.setdefault(made_of, columns[role])
        return replace(point, row=read_row(columns))

    return [[renamed(point) for point in points] for points in found]


def in_order(points: Iterable[Point]) -> list[Point]:
    unique = {repr({**p.row.columns, SPEED: None}): p for p in reversed(list(points))}.values()
    return sorted(reversed(unique), key=lambda point: place_of(point.row))


def place_of(row: ResultRow) -> tuple:
    return LABELS.index(row.arm), row.tau, row.lam, row.seed, row.attack != NAIVE, row.attack or ""


def points_of(experiment: Experiment) -> Iterator[Point]:
    """Training traces joined with what an attack made of them, with their model, its test and the teacher's
    test, as far as these exist."""
    tests, shown = experiment.traces_of(True, "test"), list[Sidecar]()
    sampled = [(test, sampled_from(test)) for test in tests]
    at_point: dict[int, list[Sidecar]] = {}  # of training traces, which attackers share
    gradient: Sidecar = next(iter(experiment.gradients.values()), {})
    for stages in trained(experiment):
        train = stages["train"]
        if not is_published(train):
            continue
        stages |= {"gradient": gradient} if has_delta(train) else {}
        if id(train) not in at_point:
            wanted = sampled_from(train)
            at_point[id(train)] = [test for test, found in sampled if found == wanted]
        for student in students_of(experiment, stages):
            same = [t for t in at_point[id(train)] if not student or data_name(t) == data_name(student)]
            for teacher in same or [{}]:
                for attack in attack_names(experiment, stages, student):
                    yield make_point({"teacher": teacher, "student": student, **stages}, attack)
            shown += same
    yield from (make_point({"teacher": test}) for test in tests if test not in shown)


def make_point(stages: Mapping[str, Sidecar], attack: str = "") -> Point:
    """What the sidecars of a point say, by stage; the numbers of a missing stage are missing."""
    found = {stage: stages[stage] for stage in (*POINT_STAGES, *OTHER_STAGES) if stages.get(stage)}
    teacher, student, train, model, rows = map(found.get, POINT_STAGES)
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
    if attack:
        columns["attack"] = attack
        columns.setdefault("seed", (student or model or rows or {})["config"]["seed"])
    if train and (speed := train["stats"].get("tokens_per_second")):
        columns[SPEED] = round(1000 / speed, 3)
    columns |= setting_columns(found)
    found.pop("gradient", None)
    for stage in filter(found.get, POINT_STAGES):
        columns |= flatten(stage, found[stage]["stats"])
        columns |= flatten(f"{stage}_perturbation", found[stage].get("perturbation"))
    if train and columns["arm"] == "temperature" and NUM_MODELS in columns:  # older stages measured no price
        columns[KL] = 0.0  # what is sampled is p itself
    return Point(read_row(columns), found)


def setting_columns(stages: Mapping[str, Sidecar]) -> dict[str, Any]:
    """{STAGE.SETTING: value} of a point's stages, and `recipe`, the fingerprint of the student's."""
    columns: dict[str, Any] = {}
    for stage in (name for name in STAGES if name in stages):
        if stage == "attack":
            found = attack_settings(stages)
        else:
            found = settings_of(stages[stage], CONFIGS[stage]) | stage_files(stage, stages)
        own = OWN_COLUMNS.get(stage, ())
        columns |= {f"{stage}.{key}": value for key, value in found.items() if key not in own}
    recipe = {key: value for key, value in columns.items() if key.startswith("model.")}
    return columns | ({"recipe": fingerprint.fingerprint_json(recipe)[:8]} if recipe else {})


def attack_settings(stages: Mapping[str, Sidecar]) -> dict[str, Any]:
    """Of attack.py's settings, and how the clean traces that it took were made."""
    sidecar = stages["attack"]
    found = {k: v for k, v in sidecar["config"].items() if k not in NO_ATTACK_SETTING and v is not None}
    found |= {"dtype": dtype} if (dtype := sidecar.get("resolved_dtype")) else {}  # where a model was read
    if clean := stages.get(CLEAN):
        found[CLEAN] = fingerprint.fingerprint_json(settings_of(clean, GenConfig))[:8]
    return {key: plain(value) for key, value in found.items()}


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
