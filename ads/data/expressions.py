"""Comparing two expressions with math-verify, which counts only if its parser read both to the end.

math-verify's time limit is signal.alarm: outside the main thread, an answer that needs it is a RuntimeError.
"""

import functools
import logging
import re
from typing import Any

TIME_LIMIT = 5  # seconds to parse and compare one pair of expressions; signal.alarm takes whole ones
# what latex2sympy leaves out without a word: quotes, dots, a base, what follows an approximate sign; and a
# space between digits, for which it adds them up
_UNREAD = re.compile(r"['\"]|\\l?dots|[\d)}]\s*_|\\approx|(?<!_)\d\s+\d")
# 9^{9^9}, 10^{1000000}, 1000000!, 9!!: sympy would fill gigabytes with one number, in C, where an alarm waits
_GIANT = re.compile(r"\^[\s{(-]*(?:\d{6,}|\d+\s*(?:!|\^[\s{(-]*\d))|\d{6,}\s*!|![\s)}]*!")


class OutOfTime(Exception):
    """Two expressions could not be compared within TIME_LIMIT."""


def same_expression(given: str, wanted: str) -> bool:
    """Compare two expressions with math-verify.

    An answer without a value (0/0) may make sympy raise: that is wrong, and logged. Where the reference
    cannot be compared with itself either, grader or reference is broken: RuntimeError that names both.
    """
    if _GIANT.search(given) or _GIANT.search(wanted):
        return False
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout

    # it warns when its own limits, one for each step, are switched off in favour of one for all
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    limited = timeout(TIME_LIMIT)(equivalent)
    try:
        return limited(given, wanted)
    except TimeoutException as error:
        raise OutOfTime from error
    except Exception as error:
        try:
            limited(wanted, wanted)
        except (Exception, TimeoutException):
            raise RuntimeError(f"the grader failed on answer {given!r}, reference {wanted!r}") from error
        logging.getLogger(__name__).warning("no way to compare %r with %r: %r", given, wanted, error)
        return False


def equivalent(given: str, wanted: str) -> bool:
    """Tell whether two expressions, each read to its end, have the same value."""
    from math_verify import verify
    from math_verify.grader import is_equation
    from sympy import Expr, Rational, S

    ours, theirs = read(given), read(wanted)
    if ours is None or theirs is None:
        return False
    if is_equation(ours) and any(part.doit() is S.false for part in getattr(ours, "_unsorted_args", [ours])):
        return False  # 13 = 12
    if isinstance(ours, Expr) and isinstance(theirs, Expr) and differ_at_a_point(ours, theirs):
        return False
    settings = {"allow_set_relation_comp": True, "timeout_seconds": None, "raise_on_error": True}
    if not verify(theirs, ours, **settings):
        return False
    if not isinstance(ours, Expr) or not isinstance(theirs, Expr):
        return True
    # verify takes differences below 1e-15 for zero: 1/2^98 would equal 1/2^99
    difference = (theirs - ours).doit()
    return not (isinstance(difference, Rational) and difference != 0)


def differ_at_a_point(ours: Any, theirs: Any) -> bool:
    """Tell whether two exact expressions differ where each variable is some positive number.

    That saves simplifying them. False where one has decimals, which math-verify rounds, or is one letter.
    """
    from sympy import Float, Rational, Symbol

    if any(isinstance(one, Symbol) or one.has(Float) for one in (ours, theirs)):
        return False
    symbols = sorted(ours.free_symbols | theirs.free_symbols, key=str)
    place = {symbol: Rational(17 + 6 * i, 13) for i, symbol in enumerate(symbols)}
    values = [one.subs(place).evalf(30) for one in (ours, theirs)]
    if not all(value.is_number and value.is_finite for value in values):
        return False
    return bool(abs(values[0] - values[1]) > 1e-9 * (1 + abs(values[1])))


@functools.lru_cache(maxsize=64)
def read(text: str) -> Any:
    """Return the sympy object that an expression stands for, None where it cannot be read as a whole.

    math_verify.parse is not used: of what it cannot read it takes the part after the last equals sign.
    latex2sympy reads to the end or raises, but does not see what _UNREAD finds.
    """
    from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
    from math_verify.grader import should_treat_as_complex

    if _UNREAD.search(text):
        return None
    # no units: math-verify's make 5t equal 5
    config = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
    latex = normalize_latex(text, config)
    try:
        value = latex2sympy(latex, is_real=not should_treat_as_complex(latex), normalization_config=None)
        return as_union(value) if re.search(r"\bor\b", text) else value
    except Exception:  # its parser raises Exception itself
        return None


def as_union(value: Any) -> Any:
    """Return the set that a list of inequalities stands for, 'x < 2 or x > 3'; all else as it is."""
    from math_verify.grader import is_equation, is_relation
    from sympy import FiniteSet, Union

    is_list = isinstance(value, FiniteSet) and all(
        is_relation(part) and not is_equation(part) for part in value
    )
    return Union(*(part.as_set() for part in value)) if is_list else value
