r"""The one way in which two answers are compared: without markup, spacing, currency, percent sign or label.

Text is dropped only when it is known to be formatting or a label. Currency, percent and degree signs are
ignored: 50\% is 50 and so is not 0.5.
"""

import re
import unicodedata

from ads.data.quantities import changes_value, number

SYMBOLS = {
    "\u2212": "-", "\u2013": "-", "\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ",
    "\u00f7": "/", "\u2044": "/", "\u2215": "/", "\u03c0": r"\pi ", "\u03b8": r"\theta ",
    "\u221e": r"\infty ", "\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ", "\u222a": r"\cup ",
    "\u2229": r"\cap ", "\u2208": r"\in ", "\u00b1": r"\pm ", "\u2248": r"\approx ", "\u00b0": r"^\circ ",
    "\u00a2": " cents", "\u200b": "", "\u00bd": r"\frac{1}{2}", "\u2153": r"\frac{1}{3}",
    "\u2154": r"\frac{2}{3}", "\u00bc": r"\frac{1}{4}", "\u00be": r"\frac{3}{4}", "\u215b": r"\frac{1}{8}",
}  # fmt: skip
_SYMBOL = re.compile("|".join(SYMBOLS))
_SCRIPTS = re.compile("([\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+)|[\u2080-\u2089]+")
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
_LABEL = re.compile(
    r"(?:so|thus|hence|therefore)?,? ?([A-Za-z]{3,}(?: (?:[A-Za-z']{2,}|a))*) ?"
    r"(?:(?<=nswer) is\b ?[:=]?|[:=]) ?(?=\S)",
    re.IGNORECASE,
)


def normalize(answer: str) -> str:
    """Return an answer in one of the ways to write it: no markup, spacing, currency, percent sign, label."""
    text = _ROOT.sub(lambda found: rf"\sqrt{{{found[found.lastindex or 0]}}}", answer.strip().strip("*"))
    text = _SCRIPTS.sub(on_the_line, text)
    text = _SYMBOL.sub(lambda found: SYMBOLS[found[0]], text)
    text = _ALIAS.sub(lambda found: _ALIASES[found[1]], text)
    text = _SPACES.sub(" ", _DROPPED.sub("", _IN_NUMBER.sub(",", text).replace(r"\!", "")))
    text = _UNIT_LETTER.sub(lambda found: f" {_LETTER_UNITS[found[1]]} ", text)
    text = _TEXT_MACRO.sub(r" \1 ", _TEXT_MACRO.sub(r" \1 ", text))
    text = _SECOND_ARGUMENT.sub(r"\1{\2}", _ONE_ARGUMENT.sub(r"\\\1\3{\2\4}", text))
    text = _SPACED_THOUSANDS.sub(lambda found: found[0].replace(" ", ""), text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", re.sub(r"\^(\d{2,})", r"^{\1}", text))
    text = re.sub(r"(?<=\d) ?: ?(?=\d)", ":", " ".join(text.split()).rstrip(".,; "))
    return drop_rounding(drop_label(text).strip())


def on_the_line(scripts: re.Match[str]) -> str:
    """Return ^{2} for a raised 2, _{2} for a lowered one."""
    return f"{'^' if scripts[1] else '_'}{{{unicodedata.normalize('NFKC', scripts[0])}}}"


def drop_label(text: str) -> str:
    """Return what follows a label such as 'Answer:', 'The answer is' or 'Total area ='."""
    label = _LABEL.match(text)
    return text if label is None or changes_value(label[1]) else text[label.end() :]


def drop_rounding(text: str) -> str:
    r"""Return what stands before '\approx 1.41', unless that is a number far from it."""
    exact, sign, rounded = (part.strip() for part in text.rpartition(r"\approx"))
    rounded_value = number(rounded) if sign and exact else None
    if rounded_value is None:
        return text
    exact_value = number(exact)
    is_far = exact_value and abs(exact_value[0] - rounded_value[0]) > abs(exact_value[0]) / 20
    return text if is_far else exact
