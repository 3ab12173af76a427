"""The sidecars and recipes of an experiment's folder, and which stage read what another wrote.

Stages are joined by the settings and the ends of paths in their sidecars, as experiments get moved; the
names of grid points are never parsed.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ads.arms import DEFENCES
from ads.data.tables import read_columns
from ads.report.curves import group_by
from ads.stage import files, hub, layout
from ads.stage.errors import MissingInputError, UserError
from ads.stage.sidecar import upgraded

Sidecar = dict[str, Any]
Stages = dict[str, Sidecar]  # of a point, by role
SAMPLING_KEYS = ("tau", "lam", "eps", "top_k", "top_p", "seed")
TRACE_KEYS = ("exp_dir", "teacher", "is_teacher", "data_split", "few_shot", *SAMPLING_KEYS)
ATTACK_KEYS = ("attack", "traces", "seed")
MODEL_KEYS = ("student", "train_traces", "seed")
CLEAN = "clean_traces"
NAIVE = "naive"  # the attack that curves and claims are about
ATTACK_TRACES = ("traces", CLEAN, "samples", "holdout_traces")  # what an attack may read of others


@dataclass(frozen=True)
class Recipe:
    """attacks/NAME.yaml, as far as a report needs it."""

    label: str
    threat: Mapping[str, Any] = field(default_factory=dict)
    attack: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """The sidecars of one folder, by name."""

    traces: dict[str, Sidecar]
    models: dict[str, Sidecar]
    gradients: dict[str, Sidecar]
    attacks: dict[str, Sidecar] = field(default_factory=dict)
    recipes: dict[str, Recipe] = field(default_factory=dict)

    @functools.cached_property
    def tests_by_model(self) -> dict[str | None, list[Sidecar]]:
        """Students' tests by the name of the model."""
        return group_by(self.traces_of(False, "test"), self.model_behind)

    @property
    def sidecars(self) -> list[Sidecar]:
        kinds = (self.traces, self.models, self.gradients, self.attacks)
        return [sidecar for kind in kinds for sidecar in kind.values()]

    def traces_of(self, is_teacher: bool, split: str) -> list[Sidecar]:
        """A teacher's traces, or students', on one split."""
        found = [trace for trace in self.traces.values() if trace["config"]["is_teacher"] == is_teacher]
        return [trace for trace in found if trace["config"]["data_split"].endswith(f"_{split}")]

    def attack_behind(self, model: Sidecar) -> Sidecar | None:
        """The sidecar of the attack whose rows a model was trained on; None: on traces as they are."""
        return self.attacks.get(table_name(model, "train_traces"))

    def traces_behind(self, model: Sidecar) -> Sidecar | None:
        """The sidecar of the published traces that a model was trained on, be it on what an attack made of
        them; None where it is not in the experiment."""
        attack = self.attack_behind(model)
        name = table_name(attack, "traces") if attack else table_name(model, "train_traces")
        return self.traces.get(name)

    def model_behind(self, student_test: Sidecar) -> str | None:
        """Name of the model that was tested, its sidecar being there or not; None: an undistilled student."""
        path = Path(student_test["config"]["teacher"])
        name, is_final = path.parent.name, path.parts[-3::2] == ("models", "final")
        is_ours = name in self.models or path.is_relative_to(student_test["config"]["exp_dir"])
        return name if is_final and is_ours else None

    def traces_changed(self, model: Sidecar) -> bool:
        """Whether what a model was trained on has changed since, or what an attack made that of."""
        attack = self.attack_behind(model)
        if attack and (has_changed(model, "train_traces", attack) or self.attack_changed(attack)):
            return True
        train = None if attack else self.traces_behind(model)
        return train is not None and has_changed(model, "train_traces", train)

    def attack_changed(self, attack: Sidecar) -> bool:
        read = {key: self.traces.get(table_name(attack, key)) for key in ATTACK_TRACES}
        return any(trace and has_changed(attack, key, trace) for key, trace in read.items())

    def model_changed(self, student_test: Sidecar) -> bool:
        name = self.model_behind(student_test)
        model = self.models.get(str(name))
        return model is not None and has_changed(student_test, "teacher", model, f"{name}/final")


def table_name(sidecar: Sidecar, key: str) -> str:
    """The name of the traces in EXP_DIR/traces that a stage read by this setting; empty where it is none."""
    path = Path(sidecar["config"].get(key) or "")
    return path.stem if path.parent.name == "traces" and path.suffix == ".parquet" else ""


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
    found = {file.stem: load_sidecar(file, TRACE_KEYS) for file in traces}
    return Experiment(
        {name: sidecar for name, sidecar in found.items() if not is_attack(sidecar)},
        {file.stem: load_sidecar(file, MODEL_KEYS) for file in models},
        {file.stem: load_sidecar(file, ("proxy_student",)) for file in gradients},
        {name: sidecar for name, sidecar in found.items() if is_attack(sidecar)},
        {file.stem: read_recipe(file) for file in layout.all_of("recipe", path)},
    )


def is_attack(sidecar: Sidecar) -> bool:
    """Whether a sidecar of traces is one of what attack.py made of others."""
    return "attack" in sidecar["config"]


def load_sidecar(path: Path, config_keys: Iterable[str]) -> Sidecar:
    """A sidecar; ValueError if the file is none or its config lacks a key."""
    sidecar = files.read_yaml(path)
    sidecar |= {part: sidecar.get(part) or {} for part in ("inputs", "outputs")}  # old ones have none
    if not all(isinstance(sidecar.get(part), dict) for part in ("config", "stats", "inputs", "outputs")):
        raise UserError(f"{path} is not a sidecar (no config, no stats): move it elsewhere")
    config_keys = ATTACK_KEYS if is_attack(sidecar) else config_keys
    if missing := [key for key in config_keys if key not in sidecar["config"]]:
        raise UserError(f"{path}: config has no {', '.join(missing)}: delete it to redo the stage")
    config = upgraded(sidecar["config"])
    if "defence" in config and config["defence"] not in DEFENCES:
        raise UserError(f"{path}: defence={config['defence']!r}: must be one of {', '.join(DEFENCES)}")
    return {**sidecar, "config": config, "path": path}


def read_beside(sidecar: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, list] | None:
    """Columns of the table beside a sidecar; None where they are not there."""
    try:
        return read_columns(sidecar["path"].with_suffix(".parquet"), names)
    except UserError:
        return None


def has_changed(reader: Sidecar, name: str, writer: Sidecar, output: str = "") -> bool:
    """Whether what one stage read is no longer what another wrote, its table of traces unless `output` names
    something else; old sidecars do not say."""
    output = output or writer["path"].with_suffix(".parquet").name
    read, written = reader["inputs"].get(name), writer["outputs"].get(output)
    return None not in (read, written) and read != written


def is_published(train: Sidecar) -> bool:
    """Whether traces are a teacher's, and no attacker's own."""
    return train["config"]["is_teacher"]


def trained(experiment: Experiment) -> list[Stages]:
    """Training traces with what was made of them: a model, on them as they are now or on what an attack made
    of them; an attack that no model was trained on; nothing."""
    found = []
    for model in experiment.models.values():
        train, attack = experiment.traces_behind(model), experiment.attack_behind(model)
        if train is not None and not experiment.traces_changed(model):
            found.append({"train": train, "attack": attack or {}, "model": model})
    used = [id(stages["attack"]) for stages in found]
    for attack in experiment.attacks.values():
        train = experiment.traces.get(table_name(attack, "traces"))
        if train is not None and id(attack) not in used and not experiment.attack_changed(attack):
            found.append({"train": train, "attack": attack})
    found = [stages | read_besides(experiment, stages) for stages in found]
    known = {id(sidecar) for stages in found for sidecar in stages.values()}
    unread = [train for train in experiment.traces_of(True, "train") if id(train) not in known]
    # several samples a problem are what an attacker asked for, and no grid point
    return found + [{"train": train} for train in unread if train["config"].get("num_samples", 1) == 1]


def read_besides(experiment: Experiment, stages: Stages) -> Stages:
    """The samples and the clean traces that an attack took."""
    attack = stages["attack"]
    if not attack:
        return {}
    names = {key: table_name(attack, key) for key in ("samples", CLEAN)}
    found = {key: experiment.traces[name] for key, name in names.items() if name in experiment.traces}
    return found if is_published(stages["train"]) else {"samples": stages["train"]}


def students_of(experiment: Experiment, stages: Stages) -> list[Sidecar]:
    """The tests of a model as it is now; an empty one where there is none."""
    if not stages.get("model"):
        return [{}]
    name = stages["model"]["path"].stem
    tests = experiment.tests_by_model.get(name, [])
    return [test for test in tests if not experiment.model_changed(test)] or [{}]


def attack_names(experiment: Experiment, stages: Stages, student: Sidecar) -> list[str]:
    """The attack that a student was made by, as its test says.

    Where none says so, or leaves it at naive though an attack's rows were trained on, it is the recipes that
    ask for these rows; "" for published traces.
    """
    attack, named = stages.get("attack"), student and student["config"].get("attacker", NAIVE)
    if named and not (attack and named == NAIVE):
        return [named]
    return recipes_of(experiment.recipes, attack["config"]) if attack else [""]


def title_of(recipes: Mapping[str, Recipe], attack: str) -> str:
    """An attack by its name, and its label where there is one."""
    label = recipes[attack].label if attack in recipes else attack
    return attack if label == attack else f"{attack}: {label}"


def all_recipes(experiments: Iterable[Experiment]) -> dict[str, Recipe]:
    """The recipes of several experiments; of one name, the first."""
    return {name: recipe for e in reversed(list(experiments)) for name, recipe in e.recipes.items()}


def read_recipe(path: Path) -> Recipe:
    found = files.read_yaml(path)
    parts = {name: found.get(name) or {} for name in ("threat", "attack")}
    if not all(isinstance(part, dict) for part in parts.values()):
        raise UserError(f"{path} is not the recipe of an attack: threat and attack hold key: value")
    return Recipe(str(found.get("label", path.stem)), **parts)


def recipes_of(recipes: Mapping[str, Recipe], config: Mapping[str, Any]) -> list[str]:
    """The recipes that ask attack.py for these settings, by name; where none does, its own name."""
    asked = {name: recipe.attack for name, recipe in recipes.items() if recipe.attack}
    fitting = [
        name for name, words in asked.items() if all(agrees(words[key], config.get(key)) for key in words)
    ]
    return fitting or [config["attack"]]


def agrees(asked: object, done: object) -> bool:
    """Whether a value of a recipe is that of a stage, which read it as a word."""
    try:
        return float(str(asked)) == float(str(done))
    except ValueError:
        return str(asked) == str(done)
