"""At which value of a setting a price hits a target: a search along lam or tau by measurements with noise.

What the settings `cfg` say of it: match, tolerance, max_evaluations (search_config.yaml).
"""

import operator
from dataclasses import dataclass

NARROW = 0.05  # width of a bracket, relative to its upper end, that is not searched further
ROUNDING = 1e-9  # 0.71 - 0.70 is above 0.01
HIT = "hit"
NEAREST = "nearest"
TOO_HIGH = "not reachable, above the accuracy at the least value"
TOO_FAR = "not reachable, not even at the greatest value"
UNFINISHED = "not found within max_evaluations"


@dataclass(frozen=True)
class Limits:
    """The values of x, lam or tau, along which the price grows: where the search begins, its first step from
    there, and the last value."""

    least: float
    start: float
    most: float


@dataclass(frozen=True)
class Measured:
    """The accuracy or NLL (nats per token) at one value, with its standard error, on n problems."""

    value: float
    standard_error: float
    n: int

    def __str__(self):
        return f"{self.value:.3f} (standard error {self.standard_error:.3f}, {self.n} problems)"


@dataclass(frozen=True)
class Found:
    """What the search of an arm found for one target: the nearest value, whether that will do, and what other
    problems say of it."""

    arm: str
    target: float
    x: float
    measured: Measured
    outcome: str
    again: Measured | None = None


def find_value(arm, target, limits, cfg, measured, evaluate):
    """What is Found for one target; `measured` ({x: Measured}) grows by at most cfg.max_evaluations."""
    num_left = cfg.max_evaluations
    while num_left and not judge(target, limits, cfg, measured):
        x = propose(target, limits, cfg, measured)
        measured[x] = evaluate(x)
        num_left -= 1
    x = nearest(target, measured)
    return Found(arm, target, x, measured[x], judge(target, limits, cfg, measured) or UNFINISHED)


def judge(target, limits, cfg, measured):
    """The outcome of the search for one target; None while another evaluation is needed."""
    if not measured:
        return None
    if abs(measured[nearest(target, measured)].value - target) <= cfg.tolerance + ROUNDING:
        return HIT
    low, high = bracket(target, cfg, measured)
    if low is None:
        return TOO_HIGH
    if high is None:
        return TOO_FAR if low >= limits.most else None
    return NEAREST if high - low <= NARROW * high else None


def nearest(target, measured):
    return min(measured, key=lambda x: (abs(measured[x].value - target), x))


def bracket(target, cfg, measured):
    """(low, high): the first x that is beyond the target, and the one before it; None for none.

    Accuracy falls with x. NLL rises with tau and lam of ads, and falls where poe or a plausible set leads to
    likelier tokens: beyond is what lies on the target's other side than the least x.
    """
    falls = cfg.match == "accuracy" or target < measured[min(measured)].value
    is_beyond = operator.lt if falls else operator.gt
    high = min((x for x in measured if is_beyond(measured[x].value, target)), default=None)
    low = max((x for x in measured if high is None or x < high), default=None)
    return low, high


def propose(target, limits, cfg, measured):
    """The next x: doubled until it brackets the target, then interpolated, well inside the bracket."""
    if not measured:
        return limits.least
    low, high = bracket(target, cfg, measured)
    if high is None:
        return min(limits.most, limits.start if low < limits.start else three_digits(2 * low))
    before, beyond = measured[low].value, measured[high].value
    share = min(max((target - before) / (beyond - before), 0.25), 0.75)
    return three_digits(low + share * (high - low))


def three_digits(x):
    return float(f"{x:.3g}")


def holds(found, cfg):
    """Whether other problems leave a hit a hit, but for chance; None where none were asked."""
    if found.again is None or found.outcome != HIT:
        return None
    return abs(found.again.value - found.target) <= cfg.tolerance + 2 * found.again.standard_error + ROUNDING
