"""How large an experiment is, in words: its models, its problems, its seeds."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ads.data.problems import GENERATED
from ads.report.curves import Curve, by_setting
from ads.report.experiments import Sidecar
from ads.report.numbers import short_name, show_span

TOY = 10_000_000  # parameters: models of fewer are no language models
MODELS = ("teacher", "proxy_student", "student")  # settings of stages


def in_words(
    sidecars: Iterable[Sidecar], curves: Iterable[Curve], data: Iterable[str], shipped: Mapping[str, Path]
) -> str:
    """As in "Toy models of 170 thousand parameters, generated problems, 2 seeds".

    shipped: {fingerprint: folder} of models that are known wherever an experiment was made.
    """
    models = models_in_words(count_parameters(sidecars, shipped))
    names = list(data)
    are_generated = bool(names) and all(name.rpartition("_")[0] in GENERATED for name in names)
    parts = [models, "generated problems" if are_generated else "", seeds_in_words(curves)]
    return ", ".join(filter(None, parts))


def models_in_words(found: Mapping[str, int | None]) -> str:
    """Their numbers of parameters, or their names where those are not all known."""
    counts = sorted({count for count in found.values() if count is not None})
    if not found or None in found.values():
        return f"Models: {', '.join(found)}" if found else ""
    kind = "Toy models" if counts[-1] < TOY else "Models"
    return f"{kind} of {show_span(counts, show_size)} parameters"


def show_size(count: int) -> str:
    """A number of parameters in two digits."""
    for unit, word in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if count >= unit:
            return f"{float(f'{count / unit:.2g}'):g} {word}"
    return str(count)


def seeds_in_words(curves: Iterable[Curve]) -> str:
    """Of the settings with the fewest and with the most seeds."""
    found = {len(rows) for curve in curves for rows in by_setting(curve.points).values()}
    if not found:
        return "no setting finished"
    return f"{show_span(found)} seed{'' if max(found) == 1 else 's'}"


def count_parameters(sidecars: Iterable[Sidecar], shipped: Mapping[str, Path]) -> dict[str, int | None]:
    """{name of a model: its number of parameters} of all that were not distilled here; None: not known."""
    found: dict[str, int | None] = {}
    for sidecar in sidecars:
        for key in MODELS:
            name = sidecar["config"].get(key)
            if name and Path(name).parts[-3::2] != ("models", "final"):
                place = shipped.get(str(sidecar["inputs"].get(key)), Path(name))
                if found.get(short_name(name)) is None:
                    found[short_name(name)] = count_in(place)
    return found


def count_in(folder: Path) -> int | None:
    """The numbers in a folder's files of weights, by their headers; None without such files."""
    try:
        return sum(map(numbers_in, folder.glob("*.safetensors"))) or None
    except (OSError, SafetensorError):
        return None


def numbers_in(path: Path) -> int:
    with safe_open(path, "numpy") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (no mapping)
