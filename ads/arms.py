"""The arms of an experiment: a row for each way in which traces are sampled.

What depends on the arm asks its row: which settings it stands for, what a stage has to read for it, how it is
called and drawn. Nothing is imported here, so that all rooms can ask.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Arm:
    """A way in which traces are sampled."""

    name: str  # in the settings of search.py
    label: str  # in the report
    direction: str | None  # the value of the setting `direction`; None where that has no effect
    inputs: tuple[str, ...]  # what it reads besides the teacher, by the names that sidecars give it
    knob: str | None  # the setting by which search.py sets its price; None: it is not searched
    colour: str
    dark_colour: str  # on a dark page
    marker: str


DELTA = ("proxy_student", "gradient")  # inputs of an arm that adjusts the teacher by lam * Delta
# The colours are Okabe and Ito's, safe for colour-blind readers.
ARMS = (
    Arm("temperature", "temperature", None, (), "tau", "#0072b2", "#56b4e9", "o"),
    Arm("ads", "ADS", "gradient", DELTA, "lam", "#d55e00", "#ff8a3d", "s"),
    Arm("negative", "negative lambda", "gradient", DELTA, None, "#aa4499", "#d883c9", "v"),
    Arm("random", "random direction", "random", DELTA, "lam", "#009e73", "#2cc298", "D"),
    Arm("permuted", "permuted", "permuted", DELTA, "lam", "#8c6d1f", "#cfa945", "^"),
    Arm("corrupt", "corrupted results", "corrupt", (), None, "#56b4e9", "#f0e442", "P"),
    Arm("undistilled", "undistilled", None, (), None, "#595f69", "#a4acb8", "_"),
)
BY_NAME = {arm.name: arm for arm in ARMS}
LABELS = tuple(arm.label for arm in ARMS)
DIRECTIONS = tuple(dict.fromkeys(arm.direction for arm in ARMS if arm.direction))
SEARCHED = tuple(arm.name for knob in ("lam", "tau") for arm in ARMS if arm.knob == knob)


def arm_of(settings: Mapping[str, Any]) -> Arm:
    """The arm of a trace dataset's settings; without lam the direction has no effect.

    Settings of old sidecars may lack the direction. One that is not among DIRECTIONS is a KeyError.
    """
    if not settings["lam"]:
        return BY_NAME["temperature"]
    direction = settings.get("direction", "gradient")
    if direction == "gradient" and settings["lam"] < 0:
        return BY_NAME["negative"]
    first = {arm.direction: arm for arm in reversed(ARMS)}  # of two arms of one direction, the first row
    return first[direction]
