r"""Whether two final answers are the same, part by part.

Both are normalized (notation.py). Lists, sets, points and matrices are compared element by element; what is
left as numbers (exactly), clock times, numerals in a base or words (quantities.py). Only single expressions
that none of these decides go to math-verify (expressions.py).
"""

import re

from ads.data.expressions import same_expression
from ads.data.notation import normalize
from ads.data.quantities import changes_value, number, same_number, same_time, split_unit

MAX_ANSWER_CHARS = 400  # longer answers are compared as text; the longest in MATH has 159
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
_NUMERAL_IN_BASE = re.compile(r"(-?[\dA-Z.]+)(?:_\{?(\d+)\}?)?")
_MACRO = re.compile(
    r"\\(?!l?dots|cdots)[A-Za-z]+"
    r"|(?<![A-Za-z])(?:sqrt|sin|cos|tan|log|exp|arcsin|arccos|arctan|sinh|cosh|tanh)(?![a-z])"
)
_WORDS = re.compile(r"[A-Za-z]{4,}|^[A-Za-z]{3,}$|^[A-Z]{2,}$")
_PROSE = re.compile(r"(?i)[a-z]{3,}|(?<![a-z])(?:is|it|so|we|he|of|to|in|at|by|as|be)(?![a-z])|[?!]$")


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
    return False


def without_assignment(given: str, wanted: str) -> tuple[str, str]:
    r"""Drop 'x =' or 'x \in' where only one answer has it."""
    ours, theirs = _ASSIGNMENT.match(given), _ASSIGNMENT.match(wanted)
    if ours and not _RELATION.search(wanted):
        return given[ours.end() :], wanted
    if theirs and not _RELATION.search(given):
        return given, wanted[theirs.end() :]
    return given, wanted


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
    """Compare two answers that are no lists; points and matrices by their elements."""
    matrices = _MATRIX.fullmatch(given), _MATRIX.fullmatch(wanted)
    ours, theirs = point(given), point(wanted)
    if ours and theirs:  # math-verify can too, but slowly
        is_same = (given[0], given[-1], len(ours)) == (wanted[0], wanted[-1], len(theirs))
        return is_same and all(map(same_parts, ours, theirs))
    if not matrices[0] or not matrices[1]:
        return same_scalar(given, wanted)
    rows = [[row.split("&") for row in found[1].rstrip("\\ ").split(r"\\")] for found in matrices if found]
    is_same = [len(row) for row in rows[0]] == [len(row) for row in rows[1]]
    return is_same and all(map(same_parts, sum(rows[0], []), sum(rows[1], [])))


def same_scalar(given: str, wanted: str) -> bool:
    """Compare two answers of one part: times, numbers, numerals in a base, words, expressions."""
    verdict = same_time(given, wanted)
    if verdict is not None:
        return verdict
    (given, our_unit), (wanted, their_unit) = split_unit(given), split_unit(wanted)
    if our_unit and their_unit and our_unit != their_unit:
        return False
    our_number, their_number = number(given), number(wanted)
    if our_number and their_number:
        return same_number(our_number, their_number)
    ours, theirs = _NUMERAL_IN_BASE.fullmatch(key(given)), _NUMERAL_IN_BASE.fullmatch(key(wanted))
    if ours and theirs:  # an answer may leave out the base
        return ours[1] == theirs[1] and ours[2] in (None, "10", theirs[2])
    if key(given) == key(wanted):
        return True
    if has_words(given) or has_words(wanted):
        return key(given).lower() == key(wanted).lower()
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


def split(text: str, separators: tuple[str, ...], tokens: re.Pattern[str] = _TOKEN) -> list[str] | None:
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


def elements(text: str, tokens: re.Pattern[str]) -> list[str]:
    r"""Return the parts of a list or set, {a, b} or 'a, b and c'; a \pm b are two; else the answer alone."""
    inner = inside(text, r"\{", r"\}")
    parts = split(text, _COMMAS, tokens) if inner is None else split(inner, _COMMAS)
    found: list[str] = []
    for part in parts or []:
        both = r"\pm" in part
        found += [re.sub(r"^\+", "", part.replace(r"\pm", sign).strip()) for sign in "+-"] if both else [part]
    return found or [text]


def point(text: str) -> list[str]:
    """Return the coordinates of (a, b, ...), [a, b) and so on; nothing for all else."""
    inner = next(filter(None, (inside(text, *pair) for pair in ("()", "[]", "(]", "[)"))), "")
    parts = split(inner, (",", ";")) or []
    return parts if len(parts) > 1 else []
