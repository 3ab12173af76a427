"""What a setting may be: the types and bounds of keys, each with what an error says is allowed.

A path may begin with ~, a flag is true or false, and what becomes a file name may not leave its folder.
"""

import functools
import os
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationInfo

from ads.arms import DEFENCES, SEARCHED
from ads.stage.errors import UserError

# of report_to, as transformers knows them; and the modules it imports where they are named otherwise
TRACKERS = ("azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "mlflow",
            "neptune", "swanlab", "tensorboard", "trackio", "wandb")  # fmt: skip
TRACKER_MODULES = {
    "azure_ml": ("azureml",),
    "flyte": ("flytekit",),
    "tensorboard": ("tensorboard", "tensorboardX"),
}
# strict: true is no number, and 8.0 no whole one; a stage's schema is built when its settings are first made
STRICT = ConfigDict(strict=True, allow_inf_nan=False, defer_build=True)
# Field of a key in which a finished stage and a new request for it may differ: it concerns speed alone, or
# names a place whose contents are compared by fingerprint.
not_compared = functools.partial(Field, json_schema_extra={"compare": False})


def expand_home(key: str, text: str) -> str:
    """A path with its leading ~ or ~user replaced, as shells do where it stands unquoted."""
    if not text.strip():
        raise UserError(f"{key}={text!r}: is empty; give a path or a name")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise UserError(f"{key}={text!r}: has no such home folder; write ./{text} for what is named so")
    return expanded


def expand_path(value: Any, info: ValidationInfo) -> Any:
    is_path = isinstance(value, str | os.PathLike)  # the latter from code
    return expand_home(str(info.field_name), os.fspath(value)) if is_path else value


def parse_flag(value: Any) -> Any:
    """true and false in any case; by itself pydantic would take yes, on and 1 too."""
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


def several(*patterns: str) -> str:
    """The pattern of one or more texts that fit any of these patterns, parted by commas."""
    one = f"({'|'.join(patterns)})"
    return f"{one}(,{one})*"


def matching(pattern: str, description: str) -> Any:
    """The bound of a text; an error tells the description."""
    return Field(pattern=f"^({pattern})$", description=description)


def in_words(names: tuple[str, ...]) -> str:
    return f"one of {', '.join(names)}, or several parted by commas"


Flag = Annotated[bool, BeforeValidator(parse_flag)]
PathText = Annotated[str, BeforeValidator(expand_path)]  # ~ is the home folder; or a name on the hub
# it becomes a file name, so it may not leave its folder
PLAIN_NAME = r"[^./\\\x00\n-][^/\\\x00\n]*"
FileName = Annotated[str, matching(PLAIN_NAME, "a plain file name (no '/', no leading '.' or '-')")]
DATASET_SPLIT = "DATASET_SPLIT with SPLIT one of train, holdout, test"
SplitName = Annotated[
    str, matching("(?s:.+)_(train|holdout|test)", DATASET_SPLIT), BeforeValidator(expand_path)
]
Solutions = Annotated[
    str,
    matching("(?s:.+)_(train|pretrain)", "DATASET_SPLIT with SPLIT one of train, pretrain"),
    BeforeValidator(expand_path),
]
Targets = Annotated[str, matching(several(r" *(\d+\.?\d*|\.\d+) *"), "numbers, such as 0.9,0.8,0.7")]
Defence = Annotated[str, matching("|".join(DEFENCES), f"one of {', '.join(DEFENCES)}")]
WITH_WORDS = [rf" *{name}( +\w+=[^\s,]+)* *" for name in SEARCHED]  # as in the grid: poe max_kl=0.1
SearchedArms = Annotated[
    str, matching(several(*WITH_WORDS), f"{in_words(SEARCHED)}, each with words such as max_kl=0.1")
]
Trackers = Annotated[str, matching(f"none|all|{several(*TRACKERS)}", f"none, all or {in_words(TRACKERS)}")]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
RowsAtOnce = Annotated[int, Field(ge=1)] | Literal["auto"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["auto", "sdpa", "eager"]
Scheduler = Literal["cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt"]
