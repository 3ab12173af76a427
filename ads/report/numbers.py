"""How a report shows numbers, and the 95 % intervals it gives them."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ads.data.traces import wilson_interval

NBSP = "\N{NO-BREAK SPACE}"
Z = 1.959964  # of a 95 % normal interval
ONE_SEED = "this seed's problems only"  # what an interval of one seed is about


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


def show_setting(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value + 0:g}" if isinstance(value, int | float) else str(value)  # -0.0 + 0 is 0


def fixed(value: float, digits: int, sign: str = "") -> str:
    """A number to so many decimals; what rounds to 0 is 0, without a sign. `sign`: "+" shows both signs."""
    text = f"{value:{sign}.{digits}f}"
    return text if text.strip("+-0.") else f"{0:.{digits}f}"


def show_number(value: object, digits: int = 3) -> str:
    """A float without the zero before its point, as in .838 or -.020; all else as a setting."""
    if not isinstance(value, float):
        return show_setting(value)
    text = fixed(value, digits)
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def show_count(value: float | None) -> str:
    return "-" if value is None else fixed(value, 0)


def show_signed(value: float | None) -> str:
    return "-" if value is None else fixed(value, 4, "+")


def short_name(path: str | Path, num_parts: int = 2) -> str:
    """The end of a path, which is all of a hub's OWNER/NAME, without characters that act on a terminal."""
    return "".join(c for c in "/".join(Path(path).parts[-num_parts:]) if c.isprintable())


def show_percent(share: float | None, digits: int = 3, space: str = " ") -> str:
    return "-" if share is None else f"{float(f'{100 * share:.{digits}g}') + 0:g}{space}%"


def show_interval(low: float | None, high: float | None) -> str:
    return "-" if low is None else f"[{show_number(low)}, {show_number(high)}]"


def show_span(values: Iterable[Any], show: Callable[[Any], str] = str, separator: str = " to ") -> str:
    """The least and the largest value, as in "2 to 3"; one where both are shown alike."""
    ends = sorted(values)
    return separator.join(dict.fromkeys((show(ends[0]), show(ends[-1]))))


def show_seeds(num_seeds: int) -> str:
    return f"{num_seeds} seed{'' if num_seeds == 1 else 's'}"


def interval_kind(num_seeds: int) -> str:
    """What an interval stands on."""
    return f"t interval over {show_seeds(num_seeds)}" if num_seeds > 1 else ONE_SEED


def pooled_interval(shares: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of a share over seeds.

    One seed: Wilson's, of its problems. Several: the t interval over seeds, and no narrower than Wilson's of
    all their problems: seeds that happen to agree are no reason to be sure.
    """
    low, high = wilson_interval(round(shares.mean() * sizes.sum()), int(sizes.sum()))
    if len(shares) > 1:
        ends = seed_interval(shares, least=0.0)
        low, high = np.fmin(low, ends[0]), np.fmax(high, ends[1])
    return float(low), float(high)


def seed_interval(
    values: np.ndarray, least: float = -1.0, most: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) (...): 95 % t interval of the mean of values (..., S) of S seeds, two or more.

    It is cut off at `least` and `most`, beyond which no value can lie; nan where all S values are the same.
    """
    from scipy import stats  # half a second

    values = np.asarray(values, float)
    error = stats.sem(values, axis=-1)
    error = np.where(np.ptp(values, axis=-1) > 1e-9, error, np.nan)  # less is rounding
    low, high = stats.t.interval(0.95, values.shape[-1] - 1, values.mean(-1), error)
    return np.clip(low, least, most), np.clip(high, least, most)
