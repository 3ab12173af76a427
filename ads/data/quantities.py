r"""Numbers in digits, units of measurement and clock times: what a normalized answer can be without sympy."""

import re
from fractions import Fraction

# words that change a number's value or lead on to another number: never part of a unit or a label
CONNECTIVES = (
    "and or nor but plus minus times over divided multiplied by remainder out squared cubed factorial "
    "negative positive not no non less fewer more than least most about around almost nearly up down to "
    "from with without if as on for base mod modulo power root choose between until approximately "
    "roughly versus sin cos tan log exp"
)
NUMERALS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred "
    "thousand million billion trillion dozen half halves third quarter fourth fifth sixth seventh "
    "eighth ninth tenth hundredth thousandth millionth double twice triple once thrice gross"
)
JOINERS = frozenset(CONNECTIVES.split())
VALUE_WORDS = JOINERS.union(NUMERALS.split())
# the names of one unit between commas: two answers in different units differ
UNITS = """
mm millimeter millimetre, cm centimeter centimetre, dm decimeter, m meter metre, km kilometer kilometre,
in inch, ft foot feet, yd yard, mi mile, mph, kph kmh, knot, mg milligram, g gm gram, kg kilogram, oz ounce,
lb pound, ton tonne, ms millisecond, s sec second, min minute, h hr hour, day, week, month, yr year, decade,
century, dollar usd buck, cent penny pennies, euro eur, yen, rupee, peso, ml milliliter millilitre,
l liter litre, gal gallon, pint, cup, quart, tablespoon, teaspoon, deg degree, rad radian, acre, hectare
"""
UNIT_OF = {name: names.split()[0] for names in UNITS.split(",") for name in names.split()}
UNIT_OF |= dict.fromkeys(("percent", "unit", "point", "way", "celsius", "fahrenheit"), "")  # never differ
IRREGULAR_PLURALS = "people children men women teeth geese mice fish sheep deer dice"
_AFTER_UNIT = re.compile(
    r"\s(?:each|total|in total|in all|altogether|left|remaining|old|tall|long|wide|high|deep|apart|away)$"
)
_WITH_UNIT = re.compile(
    r"(?P<value>.*?(?:[\d)}\]]|\\pi))(?P<space> ?)(?<![\\A-Za-z])(?P<words>[A-Za-z/][A-Za-z ./-]*?)"
    r"(?: ?\^ ?\{?[234]\}?|(?<=[a-z])[23])?",
    re.DOTALL,
)
_PER = re.compile(r"(?:^| )(?:per|an?|every|of) | ?/ ?")

WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{WHOLE}(?:\.\d*)?|\.\d+)"
_DECIMAL_NUMBER = re.compile(rf"([+-]?) ?({_DECIMAL})(?: ?\\times ?10 ?\^ ?\{{?(-?\d{{1,3}})\}}?)?")
_FRACTION = re.compile(
    rf"([+-]?) ?(\d+(?= ?\\frac))? ?"
    rf"(?:\\frac ?\{{ ?([+-]?{_DECIMAL}) ?\}} ?\{{ ?([+-]?{_DECIMAL}) ?\}}|({_DECIMAL}) ?/ ?({_DECIMAL}))"
)
_REPEATING = re.compile(r"([+-]?) ?(\d*)\.(\d*)(?:\\overline ?\{(\d+)\}|\((\d+)\))")
_CLOCK = re.compile(r"(\d{1,2})(?::([0-5]\d))?(?::([0-5]\d))?(?: ?([ap])\.? ?m\.?| o'clock)?", re.I)


def changes_value(words: str) -> bool:
    found = re.findall("[a-z]+", words.lower())
    return any(word in VALUE_WORDS or word.removesuffix("s") in VALUE_WORDS for word in found)


def split_unit(text: str) -> tuple[str, str]:
    """Split '5 cm', '5 square feet', '12 red apples' or '5 miles per hour' into (value, unit).

    A noun in the plural after a number (or in the singular after 1) is what the number counts; it is dropped
    and the unit is ''. Text that does not end in a unit or such a noun is all value.
    """
    found = _WITH_UNIT.fullmatch(text)
    if found is None:
        return text, ""
    words = _AFTER_UNIT.sub("", f" {found['words']}".replace(".", "").lower().rstrip()).strip()
    if not words and found["space"]:  # '5 each', '16 left'
        return found["value"], ""
    head, *rates = _PER.split(words)
    if changes_value(head) or JOINERS.intersection(" ".join(rates).split()):
        return text, ""
    noun = re.split("[ -]", head)[-1]
    name = next(
        (name for name in (noun, noun.removesuffix("s"), noun.removesuffix("es")) if name in UNIT_OF), ""
    )
    if not name:
        is_rate = head == "" and rates != [] and rates[-1] in UNIT_OF and len(rates[-1]) > 2
        is_plural = noun in IRREGULAR_PLURALS.split() or re.fullmatch("[a-z]{2,}[^su]s", noun)
        is_counted = is_plural or (len(noun) > 2 and number(found["value"]) == (1, 0))
        return (found["value"], "") if is_rate or (is_counted and found["space"]) else (text, "")
    # 5x and 5 s are products; of single letters only '5 m' is taken for a unit
    if len(noun) == 1 and not rates and not (noun == "m" and found["space"] and number(found["value"])):
        return text, ""
    return found["value"], "" if rates else UNIT_OF[name]


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
        sign, whole, fixed, overlined, bracketed = found.groups()
        period = overlined or bracketed
        value = Fraction(f"{whole or 0}.{fixed or 0}")
        value += Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fixed))
    else:
        return None
    return (-value if sign == "-" else value), decimals


def same_number(given: tuple[Fraction, int], wanted: tuple[Fraction, int]) -> bool:
    """Whether two numbers are equal, or one is a fraction and the other gives 6 or more decimals of it."""
    (exact, no_decimals), (rounded, decimals) = sorted((given, wanted), key=lambda found: found[1])
    if exact == rounded:
        return True
    if decimals < 6 or no_decimals > 0 or exact * rounded <= 0:
        return False
    error = (abs(exact) - abs(rounded)) * 10**decimals  # 0.666666 and 0.666667 are both taken for 2/3
    return abs(rounded) * 10**decimals >= 10**5 and Fraction(-1, 2) <= error < 1


def same_time(given: str, wanted: str) -> bool | None:
    """Compare clock times; a.m. and p.m. count where both say it. None where neither is a time."""
    ours, theirs = clock_time(given), clock_time(wanted)
    if ours is None and theirs is None:
        return None
    ours, theirs = ours or clock_time(f"{given}:00"), theirs or clock_time(f"{wanted}:00")
    if ours is None or theirs is None or ours[0] != theirs[0]:
        return False
    return ours[1] == theirs[1] or "" in (ours[1], theirs[1])


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
