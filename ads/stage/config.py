"""The settings of a stage from YAML and `key=value` words: the one grammar of all scripts.

Of defaults, YAML and words, each overrides those before it. What is wrong is said in one line that names the
key, its value, where it was given and what is allowed.
"""

import contextlib
import dataclasses
import os
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from ads.stage import files
from ads.stage.errors import UserError
from ads.stage.fields import expand_home
from ads.stage.settings import AttackConfig, GenConfig, GradConfig, SearchConfig, TrainConfig

Config = TypeVar("Config", GenConfig, GradConfig, AttackConfig, TrainConfig, SearchConfig)
NULL_WORDS = ("", "null", "None")  # on the command line, of keys that may be unset
# of gentraces.py: those that pipeline.sh sets for each stage and point, and those that a grid's line may set
SET_BY_PIPELINE = (
    "exp_dir",
    "trace_name",
    "data_split",
    "teacher",
    "tau",
    "lam",
    "eps",
    "seed",
    "is_teacher",
    "num_samples",
    "attacker",
)
SWEPT = GenConfig.__annotations__.keys() - set(SET_BY_PIPELINE)
# how a JSON schema says what a value may be, in words
TYPES = {
    "integer": "a whole number",
    "number": "a finite number",
    "boolean": "true or false",
    "string": "text (quote it in YAML)",
    "null": "null",
}
BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}


def native_setting() -> str:
    """ADS_NATIVE, what of the compiled code for CPUs to use: 0, avx512 (no matrix registers) or 1 (all)."""
    value = os.environ.get("ADS_NATIVE") or "1"
    if value not in ("0", "avx512", "1"):
        raise UserError(
            f"ADS_NATIVE={value}: use 0 (no compiled code), avx512 (no matrix registers) or 1 (all)"
        )
    return value


def load_config(cls: type[Config], default_yaml: str | Path, arguments: Iterable[str]) -> Config:
    """Checked, frozen settings of class `cls` from a YAML file and `key=value` words.

    The first word may name another YAML file. UserError, or MissingInputError for a file that is not there.
    """
    words, yaml_path = list(arguments), Path(default_yaml)
    if words and words[0].endswith((".yaml", ".yml")) and "=" not in words[0]:
        yaml_path = Path(expand_home("the YAML file", words.pop(0)))
    values = files.read_yaml(yaml_path)
    check_keys(cls, values, yaml_path.name)
    sources = dict.fromkeys(values, yaml_path.name)
    for word in words:
        key, equals, text = word.removeprefix("--").partition("=")
        if not equals:
            raise UserError(f"argument {word!r}: write key=value")
        check_keys(cls, [key], "the command line")
        if sources.get(key) == "the command line":  # the later word counts, but a typo in the first is one
            make_config(cls, {key: values[key]}, sources)
        values[key] = None if text in NULL_WORDS and is_optional(cls, key) else text
        sources[key] = "the command line"
    config = make_config(cls, values, sources)
    config.check()
    return config


def check_keys(cls: type, keys: Iterable[Any], source: str) -> None:
    known = sorted(cls.__annotations__)
    for key in keys:
        if key not in known:
            raise UserError(f"unknown key {key!r} in {source}; known keys: {', '.join(known)}")


def is_optional(cls: type, key: str) -> bool:
    return types.NoneType in typing.get_args(cls.__annotations__[key])


def make_config(cls: type[Config], values: dict[str, Any], sources: dict[str, str]) -> Config:
    """Settings of known keys; `sources` says for each where it was given.

    Text is read as what its key holds: from the command line all is text, and PyYAML reads 5e-4 as text.
    """
    given_as_text = {key: value for key, value in values.items() if isinstance(value, str)}
    others = {key: value for key, value in values.items() if key not in given_as_text}
    try:
        config = TypeAdapter(cls).validate_strings(given_as_text)
        return dataclasses.replace(config, **others)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    raised = first.get("ctx", {}).get("error")
    if isinstance(raised, UserError):
        raise raised
    key = str(first["loc"][0])
    allowed = in_words(TypeAdapter(cls).json_schema()["properties"][key])
    raise UserError(f"{key}={shown(values[key])} in {sources[key]}: must be {allowed}")


def shown(value: Any) -> str:
    """A value as a user writes it: text in quotes, but for numbers of the command line."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        float(value)
        return str(value).strip()
    return repr(value)


def in_words(schema: dict[str, Any]) -> str:
    """What a JSON schema allows."""
    if "description" in schema:
        return schema["description"]
    if "anyOf" in schema:
        return ", or ".join(map(in_words, schema["anyOf"]))
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if "const" in schema:
        return schema["const"]
    bounds = [f"{words} {schema[name]}" for name, words in BOUNDS.items() if name in schema]
    return TYPES[schema["type"]] + (", " + " and ".join(bounds) if bounds else "")


def to_dict(config: Any) -> dict[str, Any]:
    """The config's values, as the sidecar keeps them."""
    return dataclasses.asdict(config)


def ignored_keys(config: Any) -> set[str]:
    """Keys in which a finished stage and a new request for it may differ."""
    fields = config.__pydantic_fields__.items()
    return {key for key, field in fields if field.json_schema_extra == {"compare": False}} | config.idle_keys
