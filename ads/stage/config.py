"""dataclass <- YAML <- key=value, checked; the one grammar of all scripts."""

import dataclasses
import os
import typing
from pathlib import Path

from ads.stage import files
from ads.stage.errors import UserError
from ads.stage.settings import AutoBool, AutoInt, PathText, expand_home


def native_setting():
    """ADS_NATIVE, what of the compiled code for CPUs to use: 0, avx512 (no matrix registers) or 1 (all)."""
    value = os.environ.get("ADS_NATIVE") or "1"
    if value not in ("0", "avx512", "1"):
        raise UserError(
            f"ADS_NATIVE={value}: use 0 (no compiled code), avx512 (no matrix registers) or 1 (all)"
        )
    return value


def load_config(cls, default_yaml, arguments):
    """Build a checked, frozen config from a YAML file and `key=value` arguments.

    The first argument may name another YAML file. Raises ValueError or FileNotFoundError in one line that
    names the key, the file and what is allowed.
    """
    arguments = list(arguments)
    yaml_path = Path(default_yaml)
    if arguments and arguments[0].endswith((".yaml", ".yml")) and "=" not in arguments[0]:
        yaml_path = Path(expand_home("the YAML file", arguments.pop(0)))
    values = {key: cast(cls, key, value, yaml_path.name) for key, value in files.read_yaml(yaml_path).items()}
    for argument in arguments:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not equals:
            raise UserError(f"argument {argument!r}: write key=value")
        values[key] = cast(cls, key, text, "the command line", from_text=True)
    config = cls(**values)
    config.check()
    return config


def cast(cls, key, value, source, from_text=False):
    """`value` as the type of field `key`; YAML values may be text too (PyYAML reads 5e-4 so)."""
    hints = typing.get_type_hints(cls)
    if key not in hints:
        raise UserError(f"unknown key {key!r} in {source}; known keys: {', '.join(sorted(hints))}")
    wanted, optional = unwrap_optional(hints[key])
    if optional and (value is None or (from_text and value in ("", "null", "None"))):
        return None
    if wanted is PathText and isinstance(value, str):
        return expand_home(key, value)
    try:
        return PARSERS[wanted](value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{key}={value!r} in {source}: must be {DESCRIPTIONS[wanted]}") from None


def unwrap_optional(hint):
    """(type, whether None is allowed) of a field's annotation."""
    arguments = typing.get_args(hint)
    return (arguments[0], True) if arguments else (hint, False)


def parse_bool(value):
    words = {"true": True, "false": False, True: True, False: False}
    key = value.lower() if isinstance(value, str) else value
    if not isinstance(key, str | bool) or key not in words:
        raise ValueError(value)
    return words[key]


def parse_int(value):
    if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
        raise ValueError(value)
    return int(value)


def parse_auto_int(value):
    return value if value == "auto" else parse_int(value)


def parse_auto_bool(value):
    return value if value == "auto" else parse_bool(value)


def parse_float(value):
    if isinstance(value, bool) or float(value) != float(value) or abs(float(value)) == float("inf"):
        raise ValueError(value)
    return float(value)


def parse_str(value):
    if not isinstance(value, str):
        raise ValueError(value)
    return value


PARSERS = {
    bool: parse_bool,
    int: parse_int,
    AutoInt: parse_auto_int,
    AutoBool: parse_auto_bool,
    float: parse_float,
    str: parse_str,
    PathText: parse_str,
}
DESCRIPTIONS = {
    bool: "true or false",
    int: "a whole number",
    AutoInt: "a whole number or auto",
    AutoBool: "true, false or auto",
    float: "a finite number",
    str: "text (quote it in YAML)",
    PathText: "text (quote it in YAML)",
}


def to_dict(config):
    """The config's values, as the sidecar keeps them."""
    return dataclasses.asdict(config)


def ignored_keys(config):
    """Keys in which a finished stage and a new request for it may differ."""
    static = {f.name for f in dataclasses.fields(config) if f.metadata.get("compare") is False}
    return static | config.idle_keys
