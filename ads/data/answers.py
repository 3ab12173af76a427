r"""Whether two final answers are the same: normal form, labels and units, then comparison part by part.

Text is dropped only when it is known to be formatting, a label or a unit. What is left is compared as numbers
(exactly), clock times, numerals in a base, words, and element by element as lists, tuples, intervals and
matrices. Only single expressions that none of these decides go to math-verify, and count there only if its
parser read them to the end. Currency, percent and degree signs are ignored: 50\% is 50 and so is not 0.5.

math-verify's time limit is signal.alarm: outside the main thread, an answer that needs it is a RuntimeError.
"""

import functools
import logging
import re
from fractions import Fraction

from ads.stage.errors import UserError

TIME_LIMIT = 5  # seconds to parse and compare one pair of expressions; signal.alarm takes whole ones
MAX_ANSWER_CHARS = 400  # longer answers are compared as text; the longest in MATH has 159
SYMBOLS = {
    "\u2212": "-", "\u2013": "-", "\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ",
    "\u00f7": "/", "\u2044": "/", "\u2215": "/", "\u03c0": r"\pi ", "\u03b8": r"\theta ",
    "\u221e": r"\infty ", "\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ", "\u222a": r"\cup ",
    "\u2229": r"\cap ", "\u2208": r"\in ", "\u00b1": r"\pm ", "\u2248": r"\approx ", "\u00b0": r"^\circ ",
    "\u00a2": " cents", "\u200b": "", "\u00bd": r"\frac{1}{2}", "\u2153": r"\frac{1}{3}",
    "\u2154": r"\frac{2}{3}", "\u00bc": r"\frac{1}{4}", "\u00be": r"\frac{3}{4}", "\u215b": r"\frac{1}{8}",
}  # fmt: skip
_SYMBOL = re.compile("|".join(SYMBOLS))
_SUPERSCRIPTS = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+")
_SUBSCRIPTS = re.compile("[\u2080-\u2089]+")
_RAISED = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b", "0123456789-")
_LOWERED = str.maketrans("\u2080\u2081\u2082\u2083\u2084\u2085\u2086\u2087\u2088\u2089", "0123456789")
_ROOT = re.compile("\u221a\\s*(?:(\\d+(?:\\.\\d+)?|[A-Za-z])|\\(([^()]*)\\)|\\{([^{}]*)\\})")
_CURRENCY = r"\\?\$|[\u20ac\u00a3\u00a5\u20b9]|\\(?:euro|pounds|texteuro|yen)(?![A-Za-z])"
# in 11,\! 111 and 1\,234 and 1{,}234; an ordinary space stays, as "1 2" is not 12, but in 12 345
_IN_NUMBER = re.compile(
    r",\s*\\!\s*(?=\d)|\{,\}\s*(?=\d{3})|(?<=\d)(?:\\,|\\;|\\ |~|[\u202f\u2009])(?=\d{3}(?!\d))"
)
_SPACES = re.compile(
    r"(?<!\\)\\[,;:> ]|~|\\(?:qquad|quad|thinspace|enspace)(?![A-Za-z])|\\[hv]space\s*\{[^{}]*\}|\s+"
)
_DROPPED = re.compile(
    rf"{_CURRENCY}|\\?%|\^ ?(?:\{{ ?\\(?:circ|degree) ?\}}|\\(?:circ|degree)(?![A-Za-z]))"
    r"(?: ?(?:\\text ?\{ ?[CF] ?\}|[CF]\b))?|\\degree(?![A-Za-z])"
    r"|\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle)(?![A-Za-z])"
    r"|^\s*\\approx(?![A-Za-z])|^\s*\\[(\[]|\\[)\]]\s*$"
)
_TEXT = r"\\(?:text(?:bf|it|rm|sf|normal)?|math(?:rm|bf|it|sf)|mbox|hbox|boxed|fbox|underline|boldsymbol)\s*"
_TEXT_MACRO = re.compile(_TEXT + r"\{([^{}]*)\}")
_UNIT_LETTER = re.compile(rf"(?<=[\w)}}~ ]){_TEXT}\{{\s*([mgshlL])\s*\}}")
_LETTER_UNITS = {"m": "meter", "g": "gram", "s": "second", "h": "hour", "l": "liter", "L": "liter"}
_ALIASES = {
    "dfrac": r"\frac", "tfrac": r"\frac", "cfrac": r"\frac", "leq": r"\le ", "geq": r"\ge ",
    "leqslant": r"\le ", "geqslant": r"\ge ", "neq": r"\ne ", "lbrace": r"\{", "rbrace": r"\}",
    "lbrack": "[", "rbrack": "]", "varnothing": r"\emptyset ", "bar": r"\overline", "dot": r"\overline",
    "cdot": r"\times ", "ast": r"\times ", "langle": "(", "rangle": ")", "lt": "<", "gt": ">",
}  # fmt: skip
_ALIAS = re.compile(rf"\\({'|'.join(_ALIASES)})(?![A-Za-z])")
_GROUP = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
_ONE_ARGUMENT = re.compile(r"\\(frac|binom)\s*(\\[A-Za-z]+|[^\s{}\\])|\\(sqrt)\s*([^\s{}\\\[])")
_SECOND_ARGUMENT = re.compile(rf"(\\(?:frac|binom)\s*{_GROUP})\s*(\\[A-Za-z]+|[^\s{{}}\\])")
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,])(?<!\d )\d{1,3}(?: \d{3})+(?![\d/,]| ?[\d/])")
_MIXED = re.compile(r"(?<![\d.])(\d+) (\d+) ?/ ?(\d+)(?![\d.])")
_WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_GROUPED_DIGITS = re.compile(rf"(?<!\\)\{{({_WHOLE})\}}")


def normalize(answer: str) -> str:
    """Return an answer in one of the ways to write it: no markup, spacing, currency, percent sign, label."""
    text = _SYMBOL.sub(lambda found: SYMBOLS[found[0]], answer.strip().strip("*"))
    text = _ROOT.sub(lambda found: rf"\sqrt{{{found[found.lastindex]}}}", text)
    text = re.sub(r"(?<![A-Za-z\\])sqrt ?\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = _SUPERSCRIPTS.sub(lambda found: f"^{{{found[0].translate(_RAISED)}}}", text)
    text = _SUBSCRIPTS.sub(lambda found: f"_{{{found[0].translate(_LOWERED)}}}", text)
    text = _ALIAS.sub(lambda found: _ALIASES[found[1]], text)
    text = _SPACES.sub(" ", _DROPPED.sub("", _IN_NUMBER.sub(",", text).replace(r"\!", "")))
    text = _UNIT_LETTER.sub(lambda found: f" {_LETTER_UNITS[found[1]]} ", text)
    text = _TEXT_MACRO.sub(r" \1 ", _TEXT_MACRO.sub(r" \1 ", text))
    text = _SECOND_ARGUMENT.sub(r"\1{\2}", _ONE_ARGUMENT.sub(r"\\\1\3{\2\4}", text))
    text = _GROUPED_DIGITS.sub(lambda found: f"{{{found[1].replace(',', '')}}}", text)
    text = _SPACED_THOUSANDS.sub(lambda found: found[0].replace(" ", ""), text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", re.sub(r"\^(\d{2,})", r"^{\1}", text))
    text = re.sub(r"(?<=\d) ?: ?(?=\d)", ":", " ".join(text.split()).rstrip(".,; "))
    return drop_rounding(drop_label(text).strip())


def drop_rounding(text: str) -> str:
    r"""Return what stands before '\approx 1.41', unless that is a number far from it."""
    exact, sign, rounded = (part.strip() for part in text.rpartition(r"\approx"))
    rounded_value = number(rounded) if sign and exact else None
    if rounded_value is None:
        return text
    exact_value = number(exact)
    is_far = exact_value and abs(exact_value[0] - rounded_value[0]) > abs(exact_value[0]) / 20
    return text if is_far else exact


# by kind, the names of one unit between commas; different units differ, but for the last, nameless kind
UNITS = """
length: mm millimeter millimetre, cm centimeter centimetre, dm decimeter, m meter metre,
 km kilometer kilometre, in inch, ft foot feet, yd yard, mi mile
speed: mph, kph kmh, knot
mass: mg milligram, g gm gram, kg kilogram, oz ounce, lb pound, ton tonne
time: ms millisecond, s sec second, min minute, h hr hour, day, week, month,
 yr year, decade, century
money: dollar usd buck, cent penny pennies, euro eur, yen, rupee, peso
volume: ml milliliter millilitre, l liter litre, gal gallon, pint, cup, quart, tablespoon, teaspoon
angle: deg degree, rad radian
area: acre, hectare
: percent, unit, point, way, celsius, fahrenheit
"""
IRREGULAR_PLURALS = (
    "people",
    "children",
    "men",
    "women",
    "teeth",
    "geese",
    "mice",
    "fish",
    "sheep",
    "deer",
    "dice",
)
# words that change a number's value or lead on to another number: never part of a unit or a label
NUMERALS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred "
    "thousand million billion trillion dozen half halves third quarter fourth fifth sixth seventh "
    "eighth ninth tenth hundredth thousandth millionth double twice triple once thrice gross"
)
JOINERS = (
    "and or nor but plus minus times over divided multiplied by remainder out squared cubed factorial "
    "negative positive not no non less fewer more than least most about around almost nearly up down to "
    "from with without if as on for base mod modulo power root choose between until approximately "
    "roughly versus sin cos tan log exp"
)
CHANGES = frozenset(f"{NUMERALS} {JOINERS}".split())
_AFTER_UNIT = re.compile(
    r"\s(?:each|total|in total|in all|altogether|left|remaining|old|tall|long|wide|high|deep|apart|away)$"
)
_WITH_UNIT = re.compile(
    r"(?P<value>.*?(?:[\d)}\]]|\\pi))(?P<space> ?)(?<![\\A-Za-z])(?P<words>[A-Za-z/][A-Za-z ./-]*?)"
    r"(?: ?\^ ?\{?[234]\}?|(?<=[a-z])[23])?",
    re.DOTALL,
)
_PER = re.compile(r"(?:^| )(?:per|an?|every|of) | ?/ ?")
_LABEL = re.compile(
    r"(?:so|thus|hence|therefore)?,? ?([A-Za-z]{3,}(?: (?:[A-Za-z']{2,}|a))*) ?"
    r"(?:(?<=nswer) is\b ?[:=]?|[:=]) ?(?=\S)",
    re.IGNORECASE,
)


def read_units(table: str) -> dict[str, tuple[str, str]]:
    """{name: (kind, first name of that unit)}."""
    found = {}
    for line in table.replace("\n ", " ").strip().splitlines():
        kind, _, units = line.partition(":")
        for names in map(str.split, units.split(",")):
            found |= {name: (kind, names[0]) for name in names}
    return found


UNIT_OF = read_units(UNITS)


def drop_label(text: str) -> str:
    """Return what follows a label such as 'Answer:', 'The answer is' or 'Total area ='."""
    label = _LABEL.match(text)
    return text if label is None or changes_value(label[1]) else text[label.end() :]


def changes_value(words: str) -> bool:
    found = re.findall("[a-z]+", words.lower())
    return any(word in CHANGES or word.removesuffix("s") in CHANGES for word in found)


def split_unit(text: str) -> tuple[str, tuple[str, str] | None]:
    """Split '5 cm', '5 square feet', '12 red apples' or '5 miles per hour' into (value, unit or None).

    The unit is its kind and name where it is in UNITS, else ('', noun): a noun in the plural after a number
    (or in the singular after 1) is what that number counts.
    """
    found = _WITH_UNIT.fullmatch(text)
    if found is None:
        return text, None
    words = _AFTER_UNIT.sub("", f" {found['words']}".replace(".", "").lower().rstrip()).strip()
    if not words and found["space"]:  # '5 each', '16 left'
        return found["value"], None
    head, *others = _PER.split(words)
    if changes_value(head) or set(" ".join(others).split()) & set(JOINERS.split()):
        return text, None
    noun = re.split("[ -]", head)[-1]
    unit = next((UNIT_OF[name] for name in singulars(noun) if name in UNIT_OF), None)
    if unit is None:
        is_rate = head == "" and others != [] and others[-1] in UNIT_OF and len(others[-1]) > 2
        is_counted = is_plural(noun) or (len(noun) > 2 and number(found["value"]) == (1, 0))
        is_known = is_rate or (is_counted and found["space"])
        return (found["value"], ("", noun)) if is_known else (text, None)
    if len(noun) == 1 and not others and not (noun == "m" and found["space"] and number(found["value"])):
        return text, None  # 5x and 5 s are products; of single letters only '5 m' is taken for a unit
    return found["value"], ("", words) if others else unit


def singulars(noun: str) -> tuple[str, ...]:
    return noun, noun.removesuffix("s"), noun.removesuffix("es")


def is_plural(noun: str) -> bool:
    return noun in IRREGULAR_PLURALS or re.fullmatch("[a-z]{2,}[^su]s", noun) is not None


_DECIMAL = rf"(?:{_WHOLE}(?:\.\d*)?|\.\d+)"
_DECIMAL_NUMBER = re.compile(rf"([+-]?) ?({_DECIMAL})(?: ?\\times ?10 ?\^ ?\{{?(-?\d{{1,3}})\}}?)?")
_FRACTION = re.compile(
    rf"([+-]?) ?(\d+(?= ?\\frac))? ?"
    rf"(?:\\frac ?\{{ ?([+-]?{_DECIMAL}) ?\}} ?\{{ ?([+-]?{_DECIMAL}) ?\}}|({_DECIMAL}) ?/ ?({_DECIMAL}))"
)
_REPEATING = re.compile(r"([+-]?) ?(\d*)\.(\d*)(?:\\overline ?\{(\d+)\}|\((\d+)\))")
_NUMERAL_IN_BASE = re.compile(r"(-?[\dA-Z.]+)(?:_\{?(\d+)\}?)?")
_CLOCK = re.compile(r"(\d{1,2})(?::([0-5]\d))?(?::([0-5]\d))?(?: ?([ap])\.? ?m\.?| o'clock)?", re.I)


def number(text: str) -> tuple[Fraction, int] | None:
    """Return (value, decimals) of a number in digits, None for all else; a fraction has 0 decimals."""
    decimals = 0
    if found := _DECIMAL_NUMBER.fullmatch(text):
        sign, digits, exponent = found.groups()
        value = Fraction(digits.replace(",", "")) * Fraction(10) ** int(exponent or 0)
        decimals = len(digits.partition(".")[2])
    elif found := _FRACTION.fullmatch(text):
        sign, whole, *parts = found.groups()
        top, bottom = (Fraction(part.replace(",", "")) for part in parts if part)
        if bottom == 0:
            return None
        value = int(whole or 0) + top / bottom
    elif found := _REPEATING.fullmatch(text):
        sign, whole, fixed, *periods = found.groups()
        period = periods[0] or periods[1]
        value = Fraction(f"{whole or 0}.{fixed or 0}")
        value += Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fixed))
    else:
        return None
    return (-value if sign == "-" else value), decimals


def same_number(given: tuple[Fraction, int], wanted: tuple[Fraction, int]) -> bool:
    """Whether two numbers are equal, or one is a fraction and the other gives 6 or more decimals of it."""
    (ours, our_decimals), (theirs, their_decimals) = given, wanted
    if ours == theirs:
        return True
    decimals = max(our_decimals, their_decimals)
    if decimals < 6 or min(our_decimals, their_decimals) > 0 or ours * theirs <= 0:
        return False
    rounded, exact = (abs(ours), abs(theirs)) if our_decimals else (abs(theirs), abs(ours))
    error = (exact - rounded) * 10**decimals  # 0.666666 and 0.666667 are both taken for 2/3
    return rounded * 10**decimals >= 10**5 and Fraction(-1, 2) <= error < 1


def clock_time(text: str) -> tuple[tuple[int, ...], str] | None:
    """Return ((hour, minute, second), 'a', 'p' or '') of '9 a.m.', '4:30', '16:30'; None for all else."""
    found = _CLOCK.fullmatch(text)
    if found is None or (found[2] is None and text[-1].isdigit()):
        return None
    hour, *rest = (int(part or 0) for part in found.groups()[:3])
    if hour > (12 if found[4] else 23):
        return None
    is_afternoon = hour > 12
    return (hour - 12 * is_afternoon, *rest), "p" if is_afternoon else (found[4] or "").lower()


def same_time(given: str, wanted: str) -> bool | None:
    """Compare clock times; a.m. and p.m. count where both say it. None where neither is a time."""
    ours, theirs = clock_time(given), clock_time(wanted)
    if ours is None and theirs is None:
        return None
    ours, theirs = ours or clock_time(f"{given}:00"), theirs or clock_time(f"{wanted}:00")
    if ours is None or theirs is None or ours[0] != theirs[0]:
        return False
    return ours[1] == theirs[1] or "" in (ours[1], theirs[1])


_TOKEN = re.compile(r"\\[{}]|\\[A-Za-z]+|(?<![A-Za-z])(?:and|or)(?![A-Za-z])|\\.|.", re.DOTALL)
_TOKEN_OR_THOUSANDS = re.compile(rf"(?<![\d,.])\d{{1,3}}(?:,\d{{3}})+(?!\d|,\d)|{_TOKEN.pattern}", re.DOTALL)
_OPENING, _CLOSING = ("(", "[", "{", r"\{"), (")", "]", "}", r"\}")
_COMMAS = (",", ";", "and", "or")
_MATRIX = re.compile(r"\\begin ?\{[pb]?matrix\}(.*)\\end ?\{[pb]?matrix\}", re.DOTALL)
_VARIABLE = r"(?:\\[a-z]+|[A-Za-z])(?:_(?:\w|\{\w+\}))?'?"
_ASSIGNMENT = re.compile(
    rf"({_VARIABLE}(?: ?\({_VARIABLE}(?:, ?{_VARIABLE})*\))?|\( ?{_VARIABLE}(?: ?, ?{_VARIABLE})+ ?\)"
    r"|\\angle ?[A-Z]+|[A-Z]{2,}) ?(?:=|\\in(?![A-Za-z])) ?(?=\S)"
)
_RELATION = re.compile(r"[<>=]|\\(?:le|ge|ne|in)(?![A-Za-z])")


def split(text: str, separators: tuple[str, ...], tokens: re.Pattern = _TOKEN) -> list[str] | None:
    """Split at separators outside of all brackets; None where brackets do not close."""
    parts, depth = [""], 0
    for token in tokens.findall(text):
        depth += (token in _OPENING) - (token in _CLOSING)
        if depth < 0:
            return None
        if depth == 0 and token in separators:
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts if part.strip()] if depth == 0 else None


def inside(text: str, opening: str, closing: str) -> str | None:
    """Return what the brackets hold that open an answer and close at its end; None for other answers."""
    if not text.startswith(opening) or not text.endswith(closing) or len(text) < len(opening) + len(closing):
        return None
    inner = text[len(opening) : -len(closing)].strip()
    return inner if split(inner, ()) is not None else None


def elements(text: str, tokens: re.Pattern) -> list[str]:
    r"""Return the parts of a list or set, {a, b} or 'a, b and c'; a \pm b are two; else the answer alone."""
    inner = inside(text, r"\{", r"\}")
    found = []
    for part in split(text, _COMMAS, tokens) if inner is None else split(inner, _COMMAS):
        both = r"\pm" in part
        found += [re.sub(r"^\+", "", part.replace(r"\pm", sign).strip()) for sign in "+-"] if both else [part]
    return [strip_parentheses(part) for part in found] or [text]


def strip_parentheses(text: str) -> str:
    """Return '3' for '(3)' and '{3}', points and intervals as they are."""
    while True:
        inner = next(filter(None, (inside(text, *pair) for pair in ("()", "{}"))), None)
        if inner is None or len(split(inner, _COMMAS)) != 1:
            return text
        text = inner


def point(text: str) -> list[str] | None:
    """Return the coordinates of (a, b, ...), [a, b) and so on; None for all else."""
    inner = next(filter(None, (inside(text, *pair) for pair in ("()", "[]", "(]", "[)"))), None)
    parts = split(inner, (",", ";")) if inner else []
    return parts if len(parts) > 1 else None


def without_assignment(given: str, wanted: str) -> tuple[str, str]:
    r"""Drop 'x =' or 'x \in' where only one answer has it, or both the same."""
    ours, theirs = _ASSIGNMENT.match(given), _ASSIGNMENT.match(wanted)
    if ours and theirs:
        is_same = key(ours[1]) == key(theirs[1])
        return (given[ours.end() :], wanted[theirs.end() :]) if is_same else (given, wanted)
    if ours and not _RELATION.search(wanted):
        return given[ours.end() :], wanted
    if theirs and not _RELATION.search(given):
        return given, wanted[theirs.end() :]
    return given, wanted


_MACRO = re.compile(
    r"\\(?!l?dots|cdots)[A-Za-z]+"
    r"|(?<![A-Za-z])(?:sqrt|sin|cos|tan|log|exp|arcsin|arccos|arctan|sinh|cosh|tanh)(?![a-z])"
)
_WORDS = re.compile(r"[A-Za-z]{4,}|^[A-Za-z]{3,}$|^[A-Z]{2,}$")
_PROSE = re.compile(r"(?i)[a-z]{3,}|(?<![a-z])(?:is|it|so|we|he|of|to|in|at|by|as|be)(?![a-z])|[?!]$")
# what latex2sympy leaves out without a word: quotes, dots, a base, what follows an approximate sign; and a
# space between digits, for which it adds them up
_UNREAD = re.compile(r"['\"]|\\l?dots|[\d)}]\s*_|\\approx|(?<!_)\d\s+\d")
# 9^{9^9}, 10^{1000000}, 1000000!, 9!!: sympy would fill gigabytes with one number, in C, where an alarm waits
_GIANT = re.compile(r"\^[\s{(-]*(?:\d{6,}|\d+\s*(?:!|\^[\s{(-]*\d))|\d{6,}\s*!|![\s)}]*!")


class OutOfTime(Exception):
    """Two expressions could not be compared within TIME_LIMIT."""


def same_answer(answer: str, reference: str) -> bool:
    """Tell whether two answers agree. Raises OutOfTime, and RuntimeError where the reference is broken."""
    if max(len(answer), len(reference)) > MAX_ANSWER_CHARS:
        return answer.strip() == reference.strip()
    given, wanted = normalize(answer), normalize(reference)
    if given and key(given) == key(wanted):
        return True
    return split(given, ()) not in (None, []) and split(wanted, ()) is not None and same_parts(given, wanted)


def key(text: str) -> str:
    """Return the text without spaces and braces that mean nothing; a space between digits stays."""
    return re.sub(r"([\^_])\{(\w)\}", r"\1\2", re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text))


def same_parts(given: str, wanted: str) -> bool:
    """Compare two normalized answers: lists in any order, all else as one."""
    if key(given) == key(wanted):
        return True
    given, wanted = without_assignment(given, wanted)
    ours, theirs = elements(given, _TOKEN_OR_THOUSANDS), elements(wanted, _TOKEN_OR_THOUSANDS)
    if len(ours) != len(theirs):  # 1,234 is a number unless the other answer is a list
        ours, theirs = elements(given, _TOKEN), elements(wanted, _TOKEN)
    if len(ours) == len(theirs):
        return same_single(ours[0], theirs[0]) if len(ours) == 1 else same_list(ours, theirs)
    if _RELATION.search(given) or _RELATION.search(wanted):
        return same_expression(given, wanted)
    if r"\{" not in (given[:2], wanted[:2]):  # a point without its parentheses
        ours, theirs = point(given) or ours, point(wanted) or theirs
    return len(ours) == len(theirs) and all(map(same_parts, ours, theirs))


def same_list(ours: list[str], theirs: list[str]) -> bool:
    """Match each part with one that is left, in any order."""
    left = list(theirs)
    for part in ours:
        match = next((other for other in left if same_parts(part, other)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def same_single(given: str, wanted: str) -> bool:
    """Compare two answers that are no lists: matrices and points by their parts, unions in any order."""
    matrices = _MATRIX.fullmatch(given), _MATRIX.fullmatch(wanted)
    if all(matrices):
        ours, theirs = ([row.split("&") for row in found[1].rstrip("\\ ").split(r"\\")] for found in matrices)
        return same_shape(ours, theirs) and all(map(same_parts, sum(ours, []), sum(theirs, [])))
    ours, theirs = point(given), point(wanted)
    if ours and theirs:
        is_same = (given[0], given[-1], len(ours)) == (wanted[0], wanted[-1], len(theirs))
        return is_same and all(map(same_parts, ours, theirs))
    ours, theirs = split(given, (r"\cup",)), split(wanted, (r"\cup",))
    return (len(ours) == len(theirs) > 1 and same_list(ours, theirs)) or same_scalar(given, wanted)


def same_shape(ours, theirs) -> bool:
    return list(map(len, ours)) == list(map(len, theirs))


def same_scalar(given: str, wanted: str) -> bool:
    """Compare two answers of one part: times, numbers, numerals in a base, words, expressions."""
    verdict = same_time(given, wanted)
    if verdict is not None:
        return verdict
    (given, our_unit), (wanted, their_unit) = split_unit(given), split_unit(wanted)
    if our_unit and their_unit and our_unit != their_unit and "" not in (our_unit[0], their_unit[0]):
        return False
    numbers = number(given), number(wanted)
    if all(numbers):
        return same_number(*numbers)
    ours, theirs = key(given), key(wanted)
    numerals = _NUMERAL_IN_BASE.fullmatch(ours), _NUMERAL_IN_BASE.fullmatch(theirs)
    if all(numerals):  # an answer may leave out the base
        return numerals[0][1] == numerals[1][1] and numerals[0][2] in (None, "10", numerals[1][2])
    if ours == theirs:
        return True
    if has_words(given) or has_words(wanted):
        return ours.lower() == theirs.lower()
    return same_expression(given, wanted)


def has_words(text: str) -> bool:
    """Tell words from products of variables: math-verify multiplies the letters of a word, east = seat."""
    text = _MACRO.sub(" ", text)
    return _WORDS.search(text) is not None or changes_value(text)


def is_bare(text: str) -> bool:
    """Tell a text that is only an answer, mathematics with a unit or label, or one word, from a sentence."""
    text = normalize(text)
    if split(text, ()) is None:
        return False
    values = [_MACRO.sub(" ", split_unit(part)[0]) for part in elements(text, _TOKEN)]
    return all(re.fullmatch("[A-Za-z]+", value) or not _PROSE.search(value) for value in values)


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
            raise UserError(f"the grader failed on answer {given!r}, reference {wanted!r}") from error
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


def differ_at_a_point(ours, theirs) -> bool:
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
def read(text: str):
    """Return the sympy object that an expression stands for, None where it cannot be read as a whole.

    math_verify.parse is not used: of what it cannot read it takes the part after the last equals sign.
    latex2sympy reads to the end or raises, but does not see what _UNREAD finds.
    """
    from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
    from math_verify.grader import should_treat_as_complex

    if _UNREAD.search(text):
        return None
    # no units: math-verify's make 5t equal 5
    rules = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
    latex = normalize_latex(text, rules)
    try:
        value = latex2sympy(latex, is_real=not should_treat_as_complex(latex), normalization_config=None)
        return as_union(value) if re.search(r"\bor\b", text) else value
    except Exception:  # its parser raises Exception itself
        return None


def as_union(value):
    """Return the set that a list of inequalities stands for, 'x < 2 or x > 3'; all else as it is."""
    from math_verify.grader import is_equation, is_relation
    from sympy import FiniteSet, Union

    is_list = isinstance(value, FiniteSet) and all(
        is_relation(part) and not is_equation(part) for part in value
    )
    return Union(*(part.as_set() for part in value)) if is_list else value
