"""What an attacker sees in a trace's text: equations that do not hold, loops, foreign script.

Only what is written is used, no label and no model.
"""

import re
import unicodedata
from collections import Counter
from decimal import Decimal, InvalidOperation

NUMBER = r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?|-?\d+(?:\.\d+)?"
EQUATION = re.compile(
    rf"(?<![\w.,])({NUMBER})(\s*)([-+*/\u00d7\u00f7])(\s*)({NUMBER})(\s*=\s*\$?\s*)({NUMBER})(?!\d)"
)
CHAIN = re.compile(
    r"[-+*/\u00d7\u00f7=]\s*$"
)  # before an equation: its first number belongs to what precedes it
BOX = re.compile(rf"(\\boxed\s*\{{\s*\$?\s*)({NUMBER})(\s*\}})")
LOOP_WORDS, LOOP_TIMES = 12, 4  # so many words, so many times over, are a loop
FOREIGN_SHARE = 0.01  # of a trace's letters


def repair(text):
    """(the text with every equation `a op b = c` put right, how many were wrong).

    What is put right is worked on with: where a later equation or the final box repeats the wrong result, it
    gets the right one. Chains such as 2 + 3 * 4 = 14 are left as they are.
    """
    parts, end, renamed, num_wrong = [], 0, {}, 0
    for match in EQUATION.finditer(text):
        if CHAIN.search(text[: match.start()]):
            continue
        first, gap, sign, space, second, equals, stated = match.groups()
        # one of the two numbers is an earlier result, if any: the first, more often
        left, right = renamed.get(first, first), second if first in renamed else renamed.get(second, second)
        value = compute(left, sign, right)
        if value is None:
            continue
        num_wrong += not holds(compute(first, sign, second), stated)
        result = stated if holds(value, stated) else show(value, stated)
        renamed[stated] = result
        parts += [text[end : match.start()], left, gap, sign, space, right, equals, result]
        end = match.end()
    rest = BOX.sub(lambda box: box[1] + renamed.get(box[2], box[2]) + box[3], text[end:])
    return "".join([*parts, rest]), num_wrong


def compute(left, sign, right):
    """The value of an operation on two written numbers; None of a division by 0."""
    a, b = number(left), number(right)
    try:
        return {"+": a + b, "-": a - b, "*": a * b, "\u00d7": a * b}[sign] if sign not in "/\u00f7" else a / b
    except (InvalidOperation, ZeroDivisionError):
        return None


def number(text):
    return Decimal(text.replace(",", ""))


def holds(value, stated):
    """Whether a written result is the value, to the digits that are written."""
    unit = Decimal(1).scaleb(-len(stated.partition(".")[2]))
    return abs(value - number(stated)) <= (unit / 2 if "." in stated else 0)


def show(value, like):
    """A number written like another: with its decimals, and with commas if it has some."""
    digits = len(like.partition(".")[2])
    text = f"{value:{',' if ',' in like else ''}.{max(digits, 2)}f}"
    while text[-1] == "0" and len(text.partition(".")[2]) > digits:
        text = text[:-1]
    return text.rstrip(".")


def num_equations(text):
    """(equations that can be checked, those that do not hold)."""
    found = [match for match in EQUATION.finditer(text) if not CHAIN.search(text[: match.start()])]
    values = [(compute(m[1], m[3], m[5]), m[7]) for m in found]
    values = [(value, stated) for value, stated in values if value is not None]
    return len(values), sum(not holds(value, stated) for value, stated in values)


def has_loop(text):
    """Whether a run of LOOP_WORDS words occurs LOOP_TIMES times or more."""
    words = text.split()
    runs = Counter(tuple(words[i : i + LOOP_WORDS]) for i in range(len(words) - LOOP_WORDS + 1))
    return max(runs.values(), default=0) >= LOOP_TIMES


def is_foreign(text):
    """Whether more than FOREIGN_SHARE of the letters are of another script than Latin or Greek."""
    letters = [c for c in text if c.isalpha()]
    foreign = sum(not unicodedata.name(c, "").startswith(("LATIN", "GREEK", "MATHEMATICAL")) for c in letters)
    return foreign > FOREIGN_SHARE * len(letters)
