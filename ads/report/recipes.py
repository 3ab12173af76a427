"""The recipes of attacks that an experiment kept: what each is called, takes, and asks of attack.py."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ads.stage import files, layout
from ads.stage.errors import UserError

NAIVE = "naive"  # the attack that curves and claims are about


@dataclass(frozen=True)
class Recipe:
    """attacks/NAME.yaml, as far as a report needs it."""

    label: str
    threat: Mapping[str, Any] = field(default_factory=dict)
    attack: Mapping[str, Any] = field(default_factory=dict)


def read_recipes(exp_dir: Path) -> dict[str, Recipe]:
    """{name: recipe} of EXP_DIR/attacks/."""
    return {path.stem: read_recipe(path) for path in layout.all_of("recipe", exp_dir)}


def title_of(recipes: Mapping[str, Recipe], attack: str) -> str:
    """An attack by its name, and its label where there is one."""
    label = recipes[attack].label if attack in recipes else attack
    return attack if label == attack else f"{attack}: {label}"


def all_recipes(experiments: Iterable[Any]) -> dict[str, Recipe]:
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
