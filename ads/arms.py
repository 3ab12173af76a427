"""The arms of an experiment: a row for each way in which traces are sampled.

What depends on the arm asks its row: which settings it stands for, what a stage has to read for it, its
score, how it is called and drawn. Nothing is imported here, so that all rooms can ask. A new defence is a
row, and its score if it has one of its own (CONTRIBUTING.md).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PROXY = ("proxy_student",)  # inputs of an arm that reads a proxy's log-probabilities
DELTA = ("proxy_student", "gradient")  # of one that reads their derivative along the gradient
SCORES = "ads.defences.scores"
TEXTS = ("external", "answer_only", "truncated")  # defences that publish another text than was sampled


@dataclass(frozen=True)
class Arm:
    """A way in which traces are sampled."""

    name: str  # in the settings of search.py
    label: str  # in the report
    defence: str | None  # the value of the setting `defence`; None where that has no effect
    inputs: tuple[str, ...]  # what it reads besides the teacher, by the names that sidecars give it
    score: str | None  # "module:function" of s (docs/defences.md); None where the teacher is not tilted
    knob: str | None  # the setting by which search.py sets its price; None: it is not searched
    colour: str
    dark_colour: str  # on a dark page
    marker: str


# The first colours are Okabe and Ito's; colours may look alike to some readers, markers do not.
ARMS = (
    Arm("temperature", "temperature", None, (), None, "tau", "#0072b2", "#56b4e9", "o"),
    Arm("ads", "ADS", "ads", DELTA, f"{SCORES}:delta", "lam", "#d55e00", "#ff8a3d", "s"),
    Arm("negative", "negative lambda", "ads", DELTA, f"{SCORES}:delta", None, "#aa4499", "#d883c9", "v"),
    Arm("random", "random direction", "random", DELTA, f"{SCORES}:delta", "lam", "#009e73", "#2cc298", "D"),
    Arm("permuted", "permuted", "permuted", DELTA, f"{SCORES}:permuted", "lam", "#8c6d1f", "#cfa945", "^"),
    Arm("poe", "PoE", "poe", PROXY, f"{SCORES}:poe", "lam", "#332288", "#9d8cff", "X"),
    Arm(
        "gated_poe", "gated PoE", "gated_poe", PROXY, f"{SCORES}:gated_poe", "lam", "#117733", "#66c97f", "p"
    ),
    Arm(
        "contrastive",
        "contrastive",
        "contrastive",
        PROXY,
        f"{SCORES}:contrastive",
        "lam",
        "#882255",
        "#e07aa8",
        "*",
    ),
    Arm("corrupt", "corrupted results", "corrupt", (), None, None, "#56b4e9", "#f0e442", "P"),
    Arm("external", "made elsewhere", "external", ("published",), None, None, "#777700", "#cccc66", "<"),
    Arm("answer_only", "answer only", "answer_only", (), None, None, "#994455", "#ee99aa", ">"),
    Arm("truncated", "truncated", "truncated", (), None, None, "#004488", "#6699cc", "d"),
    Arm("undistilled", "undistilled", None, (), None, None, "#595f69", "#a4acb8", "_"),
)
BY_NAME = {arm.name: arm for arm in ARMS}
LABELS = tuple(arm.label for arm in ARMS)
DEFENCES = tuple(dict.fromkeys(arm.defence for arm in ARMS if arm.defence))
SEARCHED = tuple(arm.name for knob in ("lam", "tau") for arm in ARMS if arm.knob == knob)


def arm_of(settings: Mapping[str, Any]) -> Arm:
    """The arm of a trace dataset's settings; without lam a defence by scores has no effect.

    A defence that is not among DEFENCES is a KeyError.
    """
    if settings["defence"] in TEXTS:
        return BY_NAME[settings["defence"]]
    if not settings["lam"]:
        return BY_NAME["temperature"]
    if settings["defence"] == "ads" and settings["lam"] < 0:
        return BY_NAME["negative"]
    first = {arm.defence: arm for arm in reversed(ARMS)}  # of two arms of one defence, the first row
    return first[settings["defence"]]
