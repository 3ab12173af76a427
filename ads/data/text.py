"""What can be seen in the text of a trace, without a label or a model: equations that do not hold, loops,
foreign script.
"""

import functools
import re
import unicodedata
from collections import Counter
from decimal import Decimal

NUMBER = r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?|-?\d+(?:\.\d+)?"
TIMES, OVER = ("*", "x", "\u00d7", "\\times", "\\cdot"), ("/", "\u00f7", "\\div")
SIGN = r"[-+*/\u00d7\u00f7]|(?<=\s)x(?=\s)|\\times|\\cdot|\\div"
EQUATION = re.compile(rf"(?<![\w.,])({NUMBER})(\s*)({SIGN})(\s*\$?)({NUMBER})(\s*=\s*\$?\s*)({NUMBER})(?!\d)")
# An equation is only part of a longer one where another operation stands on its line before or after it, or a
# mixed number such as 1 1/2. A dash that begins a line, and two stars, are of Markdown.
BEFORE = re.compile(rf"(?:(?<=[^*\s])[ \t]*(?:{SIGN})|[%^\d])[ \t]*\$?$")
AFTER = re.compile(rf"[A-Za-z]*[ \t]*(?:(?:{SIGN})[ \t]*\$?(?:[(\d]|[A-Za-z]\b)|\^)|%| \d+/\d|\\[dt]?frac")
BOX = re.compile(rf"(\\boxed\s*\{{\s*\$?\s*)({NUMBER})(\s*\}})")
RETRACTED = re.compile(r"(?i)\b(?:wait|wrong|incorrect|mistake|sorry|oops|actually|again)\b")
MOST_DIGITS = 28  # of two numbers together: so far their product is exact
LOOP_WORDS, LOOP_TIMES = 12, 4  # so many words, so many times over, are a loop
FOREIGN_SHARE = 0.01  # of a trace's letters


def repair(text: str) -> tuple[str, int]:
    """(the text with every equation `a op b = c` put right, how many were wrong).

    What is put right is worked on with: where a later equation or the final box repeats the wrong result, it
    gets the right one, unless the text goes on from the right result by itself, or takes the equation back
    and writes it once more. Chains such as 2 + 3 * 4 = 14 are left as they are.
    """
    parts, end, num_wrong = [], 0, 0
    last, left, right = ("", "", ""), "", ""
    renamed: dict[str, str] = {}  # {result as it stands: as it should}
    for match in equations(text):
        first, gap, sign, space, second, equals, stated = match.groups()
        is_again = (first, sign, second) == last and RETRACTED.search(text, end, match.start())
        if not is_again:  # else its numbers are those of the one before
            left, right = worked_on(renamed, first, second)
        last = first, sign, second
        value, written = compute(left, sign, right), compute(first, sign, second)
        if value is None or written is None:
            continue
        num_wrong += not holds(written, stated)
        result = stated if holds(value, stated) else show(value, stated)
        renamed.pop(stated, None)  # the last one stands last
        renamed[stated] = result
        parts += [text[end : match.start()], left, gap, sign, space, right, equals, result]
        end = match.end()
    rest = BOX.sub(functools.partial(put_right, renamed), text[end:])
    return "".join([*parts, rest]), num_wrong


def worked_on(renamed: dict[str, str], first: str, second: str) -> tuple[str, str]:
    """The two numbers of an equation, with the earlier result among them, if any, put right: more often the
    first.
    """
    right = as_it_should(renamed, first)
    return right, second if first in renamed or first in renamed.values() else renamed.get(second, second)


def as_it_should(renamed: dict[str, str], number: str) -> str:
    """A number that may be an earlier result: the last one, or else as it stands if that is a right one."""
    is_last = number == next(reversed(renamed), None)
    return number if number in renamed.values() and not is_last else renamed.get(number, number)


def put_right(renamed: dict[str, str], box: re.Match[str]) -> str:
    return box[1] + as_it_should(renamed, box[2]) + box[3]


def equations(text: str) -> list[re.Match[str]]:
    """What is written as `a op b = c` and is no part of a longer equation."""
    found = EQUATION.finditer(text)
    return [
        m for m in found if not (BEFORE.search(line_before(text, m.start())) or AFTER.match(text, m.end()))
    ]


def line_before(text: str, end: int) -> str:
    return text[text.rfind("\n", 0, end) + 1 : end]


def compute(left: str, sign: str, right: str) -> Decimal | None:
    """The value of an operation on two written numbers; None of a division by 0 or of very long ones."""
    a, b = number(left), number(right)
    if len(left) + len(right) > MOST_DIGITS or (sign in OVER and not b):
        return None
    if sign in ("+", "-"):
        return a + b if sign == "+" else a - b
    return a * b if sign in TIMES else a / b


def number(text: str) -> Decimal:
    return Decimal(text.replace(",", ""))


def holds(value: Decimal, stated: str) -> bool:
    """Whether a written result is the value, to the digits that are written."""
    unit = Decimal(1).scaleb(-len(stated.partition(".")[2]))
    return abs(value - number(stated)) <= (unit / 2 if "." in stated else 0)


def show(value: Decimal, like: str) -> str:
    """A number written like another: with its decimals, and with commas if it has some."""
    digits = len(like.partition(".")[2])
    text = f"{value:{',' if ',' in like else ''}.{max(digits, 2)}f}"
    while text[-1] == "0" and len(text.partition(".")[2]) > digits:
        text = text[:-1]
    return text.rstrip(".")


def num_equations(text: str) -> tuple[int, int]:
    """(equations that can be checked, those that do not hold)."""
    checked = checked_equations(text)
    return len(checked), sum(right is not None for _, right in checked)


def checked_equations(text: str) -> list[tuple[re.Match[str], str | None]]:
    """[(equation that can be checked, the right result where it does not hold, else None)]."""
    values = [(match, compute(match[1], match[3], match[5])) for match in equations(text)]
    return [
        (match, None if holds(value, match[7]) else show(value, match[7]))
        for match, value in values
        if value is not None
    ]


def has_loop(text: str) -> bool:
    """Whether a run of LOOP_WORDS words occurs LOOP_TIMES times or more."""
    words = text.split()
    runs = Counter(tuple(words[i : i + LOOP_WORDS]) for i in range(len(words) - LOOP_WORDS + 1))
    return max(runs.values(), default=0) >= LOOP_TIMES


def is_foreign(text: str) -> bool:
    """Whether more than FOREIGN_SHARE of the letters are of another script than Latin or Greek."""
    letters = [c for c in text if c.isalpha()]
    foreign = sum(not unicodedata.name(c, "").startswith(("LATIN", "GREEK", "MATHEMATICAL")) for c in letters)
    return foreign > FOREIGN_SHARE * len(letters)
