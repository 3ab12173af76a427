"""Attackers: the files attacks/NAME.yaml, read, checked, and printed for pipeline.sh.

A recipe has a label, a `threat:` (what the attacker takes) and up to three sections of settings: `attack:`
for attack.py, `distill:` and `gentraces:` for the training and the test of the student (docs/attackers.md).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ads.attacks import rows
from ads.stage import files
from ads.stage.config import check_keys, make_config
from ads.stage.errors import MissingInputError, UserError
from ads.stage.fields import expand_home
from ads.stage.settings import AttackConfig, GenConfig, TrainConfig

FOLDER = Path(__file__).resolve().parents[2] / "attacks"
SECTIONS: dict[str, type[Any]] = {"attack": AttackConfig, "distill": TrainConfig, "gentraces": GenConfig}
# settings that pipeline.sh gives: which stage it is, what it reads
SET_BY_PIPELINE = {
    "attack": ("exp_dir", "trace_name", "traces", "seed", "tokenizer", *rows.INPUTS),
    "distill": ("exp_dir", "model_name", "seed", "student", "tokenizer", "train_traces", "holdout_traces")
    + ("solutions", "data_dir", "max_samples"),
    "gentraces": (
        "exp_dir",
        "trace_name",
        "seed",
        "teacher",
        "tokenizer",
        "is_teacher",
        "data_split",
        "data_dir",
    )
    + ("attacker", "lam", "defence", "published", "proxy_student", "grad_path", "few_shot_traces"),
}
THREAT = {
    "labels": "true or false: are right answers known",
    "clean_traces": "a share of the rows, 0 to 1, or words: clean traces of the teacher that it holds",
    "queries": "a whole number from 0: published traces asked for, per problem",
    "models": "words: models that it runs besides training its student, or none",
}


@dataclass(frozen=True)
class Recipe:
    """An attacker, by the name of its file."""

    name: str
    path: Path
    label: str
    threat: dict[str, Any]
    words: dict[str, dict[str, Any]]  # {section: {setting: value}}


def print_recipe(*words: str) -> str:
    """Lines NAME, tab, what, tab, value for pipeline.sh: file, attack, distill, gentraces, needs.

    words: names of attacks/ or paths of .yaml files. UserError on the first mistake in any of them.
    """
    if not words:
        raise UserError(
            f"ATTACKS is empty: give names of {', '.join(known_names())}, or paths of .yaml files"
        )
    recipes = [read_recipe(find_file(word)) for word in words]
    names = [recipe.name for recipe in recipes]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"ATTACKS has {twice[0]} twice: leave one out, or give its file another name")
    return "\n".join("\t".join((recipe.name, *line)) for recipe in recipes for line in lines_of(recipe))


def lines_of(recipe: Recipe) -> Iterable[tuple[str, str]]:
    yield "file", str(recipe.path)
    for section, settings in recipe.words.items():
        for key, value in settings.items():
            yield section, f"{key}={shown(recipe.path, key, value)}"
    if "attack" in recipe.words:
        for need in needs_of(recipe.words["attack"]):
            yield "needs", need


def needs_of(settings: dict[str, Any]) -> list[str]:
    """What attack.py reads besides the published traces, by the settings that name it.

    own: its traces are the undistilled student's, and none are published.
    """
    attack = rows.ATTACKS[settings["attack"]]
    found = [f"samples {settings['num_samples']}" if name == "samples" else name for name in attack.reads]
    return found + (["own"] if attack.is_own else [])


def shown(path: Path, key: str, value: Any) -> str:
    """A value as a word of the command line."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    if re.search(r"[\t\n\r]", text):
        raise UserError(f"{path}: {key}={value!r}: holds a tab or a line break, as no word may; leave it out")
    return text


def known_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find_file(word: str) -> Path:
    """The file of a word of ATTACKS: a name in attacks/, or a path."""
    path = FOLDER / f"{word}.yaml"
    if word.endswith((".yaml", ".yml")):
        path = Path(expand_home("ATTACKS", word))
    if not path.is_file():
        raise MissingInputError(
            f"ATTACKS: {word!r} is neither one of {', '.join(known_names())} nor a .yaml file that is there"
        )
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", path.stem):
        raise UserError(
            f"ATTACKS: {word!r}: a recipe's name has letters, digits, _, - and . alone; rename the file"
        )
    if path.stem in known_names() and path.resolve() != FOLDER / f"{path.stem}.yaml":
        raise UserError(f"ATTACKS: {word!r}: attacks/ has a recipe of that name; give the file another one")
    return path


def read_recipe(path: Path) -> Recipe:
    """A recipe, every setting checked as its stage would; UserError in one line with file, key and value."""
    content = files.read_yaml(path)
    known = ("label", "threat", *SECTIONS)
    if unknown := [key for key in content if key not in known]:
        raise UserError(f"{path}: unknown key {unknown[0]!r}; known keys: {', '.join(known)}")
    label = content.get("label")
    if not isinstance(label, str) or not label.strip() or "\n" in label:
        raise UserError(
            f"{path}: label={label!r}: must be one line of text, as the report calls the attacker"
        )
    check_threat(path, content.get("threat"))
    words = {
        name: read_section(path, name, content[name]) for name in SECTIONS if content.get(name) is not None
    }
    return Recipe(path.stem, path, label, content["threat"], words)


def check_threat(path: Path, threat: Any) -> None:
    if not isinstance(threat, dict) or threat.keys() != THREAT.keys():
        raise UserError(f"{path}: threat={threat!r}: must have the keys {', '.join(THREAT)} and no others")
    share, queries = threat["clean_traces"], threat["queries"]
    is_right = {
        "labels": isinstance(threat["labels"], bool),
        "clean_traces": isinstance(share, str) or (is_number(share) and 0 <= share <= 1),
        "queries": isinstance(queries, int) and is_number(queries) and queries >= 0,
        "models": isinstance(threat["models"], str),
    }
    for key in (key for key, right in is_right.items() if not right):
        raise UserError(f"{path}: threat: {key}={threat[key]!r}: must be {THREAT[key]}")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_section(path: Path, section: str, settings: Any) -> dict[str, Any]:
    """The settings of a section as they are given, once they are found right."""
    place = f"{path}, {section}"
    if not isinstance(settings, dict):
        raise UserError(f"{place}: must hold `key: value` lines, but holds {settings!r}")
    check_keys(SECTIONS[section], settings, place)
    if taken := [key for key in settings if key in SET_BY_PIPELINE[section]]:
        raise UserError(f"{taken[0]}={settings[taken[0]]!r} in {place}: pipeline.sh sets it; leave it out")
    config = make_config(SECTIONS[section], settings, dict.fromkeys(settings, place))
    if isinstance(config, AttackConfig):
        if "attack" not in settings:
            raise UserError(f"{place}: attack is not set: give one of {', '.join(rows.ATTACKS)}")
        try:
            rows.attack_of(config)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
    return settings
