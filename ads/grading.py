r"""Grade a response against a reference solution, by one rule for every dataset.

The answer is the last complete \boxed{...} of the response (never of the prompt); without one, the last
number, or the last stated letter where the reference is a single letter A-J (multiple choice). A box that the
length limit cut open counts as no box. Equal text (after `normalize`) and plain numbers are decided here, the
rest by math-verify. Units, currency, degree and percent signs are ignored: 50\% is 50 and so is not 0.5.

math-verify's time limit is signal.alarm: outside the main thread, an answer that needs it is a RuntimeError.
"""

import logging
import re
from dataclasses import dataclass
from fractions import Fraction

TIME_LIMIT = 5  # seconds to parse and compare one pair; signal.alarm takes whole ones
MAX_ANSWER_CHARS = 400  # longer answers are compared as text; the longest in MATH has 159

_BOX = r"\\\\?(?:boxed|fbox)\s*"
_BRACES = re.compile(
    rf"(?P<open>(?P<box>{_BOX})?\{{)|(?P<close>\}})|{_BOX}(?P<bare>-?\d[\d.,/]*(?<=\d)|[A-Z]\b)|\\.",
    re.DOTALL,
)
_DROPPED = re.compile(
    r"(?<!\\)\\[!,;:> ]|\\?[$%]|\^\s*\{?\s*\\circ\s*\}?|\\degree|\u00b0"
    r"|\\(?:left|right|displaystyle)\b|^\s*\\approx\b|^\\[(\[]|\\[)\]]$"
)
_TEXT_MACRO = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf)|mbox|boxed|fbox)\s*\{([^{}]*)\}")
_NOT_UNIT = r"(?!\s*(?:hundred|thousand|[mb]illion|trillion|dozen|sin|cos|tan|log|exp|sqrt)\b)"
_UNIT_MACRO = re.compile(
    rf"(?<=[\w)}}])\s*\\(?:text(?:rm|normal)?|mathrm|mbox)\s*\{{{_NOT_UNIT}[^{{}}]*\}}(?:\^\{{?\d\}}?)?$"
)
_NUMBER_WITH_UNIT = re.compile(
    rf"(-?[\d.,/:]*\d)(?:\s*(?:[ckm]m|kg|ft|mi|lb|oz|ml|hr|mph)|\s+{_NOT_UNIT}(?:[A-Za-z]{{3,}}|m|in|sq|[ap]\.?m))"
    r"\b\.?(?:[ /-]+[A-Za-z]+\.?)*(?:\s?\^\{?\d\}?)?"
)
_PLAIN_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")
_NUMERAL_IN_BASE = re.compile(r"(-?[\dA-Z.]+)_\{?(\d+)\}?")
# math-verify multiplies the letters of a word (east = seat) and divides the parts of a time (5:00 = 5/0)
_WORDS_OR_TIME = re.compile(r"(?=.*[A-Za-z]{3})[A-Za-z,'-]+|\d+:[0-5]\d")
# 9^{9^9}, 10^{1000000}, 1000000!, 9!!: sympy would fill gigabytes with one number, in C, where an alarm waits
_GIANT = re.compile(r"\^[\s{(-]*(?:\d{6,}|\d+\s*(?:!|\^[\s{(-]*\d))|\d{6,}\s*!|![\s)}]*!")

_WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMBER_IN_TEXT = re.compile(
    rf"(?:(?<![\w)}}\]])[-\u2212])?\$?(?:\\[dt]?frac\{{-?\d+\}}\{{\d+\}}|{_WHOLE}(?:\.\d+|/\d+)?|\.\d+)"
)
# "answer is (C)", "Answer: **C**", "C is correct"; A or I before a lower-case word is an article or a pronoun
_STATED_LETTER = re.compile(
    r"(?i:\b(?:answer|option|choice)\b[^.\n]{0,60}?(?:\b(?:is|be)\b|[:=]))"
    r"(?:[\s*_$(\[]|\\[a-z]+\{|(?i:option|choice|letter)\b)*"
    r"(?:([B-HJ])(?![\w'])|([AI])(?![\w']|\s+(?!(?:because|since|as|for|which|and)\b)[a-z]))"
    r"|(?<![\w'])\(?([A-J])\)?\s+is\s+(?:the\s+)?(?:correct|right|best)\b"
)
# "(C)", "C) ...", a line "C. ..." or "C", "**C**", a line that ends in "is C."
_OPTION_LETTER = re.compile(
    r"(?<!\w)\(([A-J])\)|(?<![\w(])([A-J])\)|^[ \t>#*_-]*([A-J])(?:[.:]|[ \t*_]*$)|\*\*([A-J])[.:]?\*\*"
    r"|\b(?:is|be|choose|pick|select)\s+([A-J])[.!]?[ \t]*$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Grade:
    """One verdict; `answer` is what was extracted (None: nothing), a time-out counts as wrong."""

    correct: bool
    answer: str | None
    timed_out: bool


def grade(response: str, solution: str) -> Grade:
    """Grade the model's raw response text, without its prompt.

    Raises ValueError when `solution` has no answer, RuntimeError when math-verify fails on its own reference.
    """
    reference = reference_answer(solution)
    return _grade_answer(extract_answer(response, is_choice(reference)), reference)


def grade_forced(continuation: str, solution: str) -> Grade:
    r"""Grade what the model wrote after the forced '\boxed{': the text up to the brace that closes it.

    Where the token limit left it open, the first line is the answer. Raises as `grade` does.
    """
    reference = reference_answer(solution)
    content = _until_closed(continuation).strip()
    return _grade_answer(last_box(content) or content or None, reference)


def reference_answer(solution: str) -> str:
    r"""Return the answer in a solution: its final line '#### x', else its last \boxed, else itself if short.

    Short means one line of up to 100 characters. Raises ValueError when there is no answer.
    """
    text = solution.strip()
    final_line = re.search(r"^####[ \t]*(\S.*)\Z", text, re.MULTILINE)
    answer = final_line[1] if final_line else last_box(text)
    if answer is None and text and "\n" not in text and len(text) <= 100 and not re.search(_BOX, text):
        answer = text
    if answer is None:
        raise ValueError(
            f"no '#### x' line, \\boxed{{x}} or one short line as answer in solution {text[:80]!r}"
        )
    return answer


def extract_answer(response: str, choices: bool) -> str | None:
    """Return the answer a response gives, None if it gives none; `choices`: the reference is a letter."""
    patterns = (_STATED_LETTER, _OPTION_LETTER) if choices else (_NUMBER_IN_TEXT,)
    return last_box(response) or _last_match(patterns, response)


def is_choice(reference: str) -> bool:
    r"""Tell whether a reference answer is a single capital letter A-J, possibly in parentheses or \text{}."""
    return re.fullmatch(r"\(?[A-J]\)?", normalize(reference)) is not None


def choice_letter(answer: str) -> str | None:
    """Return the option that a boxed answer names: 'C', 'c', '(C)', 'C. 120', '(C) 120'; else None."""
    text = normalize(answer)
    alone = re.fullmatch(r"\(?([A-Ja-j])\)?", text)
    found = alone or re.match(r"(?:\(([A-J])\)|([A-J])[.):])(?!.*\([A-J]\))", text, re.DOTALL)
    return found[found.lastindex].upper() if found else None


def last_box(text: str) -> str | None:
    r"""Return the content of the last complete, non-blank \boxed or \fbox, the inner one where nested."""
    opened, answer, answer_start = [], None, -1
    for token in _BRACES.finditer(text):
        if token["open"]:
            opened.append((token.end(), token["box"]))
        elif token["bare"]:
            answer, answer_start = token["bare"], token.start()
        elif token["close"] and opened:
            start, box = opened.pop()
            if box and start > answer_start and text[start : token.start()].strip():
                answer, answer_start = text[start : token.start()].strip(), start
    return answer


def normalize(answer: str) -> str:
    """Return an answer without text macros, spacing, units, currency and percent signs, thousands commas."""
    text = re.sub(r",\s*\\!\s*", "", answer.strip().strip("*"))
    text = _DROPPED.sub("", text).strip().rstrip(".,;")
    text = _TEXT_MACRO.sub(r"\1", _UNIT_MACRO.sub("", text)).strip().rstrip(".,;")
    with_unit = _NUMBER_WITH_UNIT.fullmatch(text)
    text = with_unit[1] if with_unit else text
    return text.replace(",", "") if re.fullmatch(rf"-?{_WHOLE}(?:\.\d+)?", text) else text


def _last_match(patterns: tuple[re.Pattern, ...], text: str) -> str | None:
    """Return the last match, or its group if it has one, of the first pattern that matches at all."""
    for pattern in patterns:
        found = [match[match.lastindex or 0] for match in pattern.finditer(text)]
        if found:
            return found[-1]
    return None


def _until_closed(continuation: str) -> str:
    depth = 0
    for token in _BRACES.finditer(continuation):
        depth += bool(token["open"]) - bool(token["close"])
        if depth < 0:
            return continuation[: token.start()]
    return continuation.lstrip().partition("\n")[0]


def _grade_answer(answer: str | None, reference: str) -> Grade:
    if answer is None:
        return Grade(False, None, False)
    if is_choice(reference):
        letter = choice_letter(answer)
        return Grade(letter == choice_letter(reference), letter or answer, False)
    correct = _same_text(answer, reference)
    if correct is None:
        correct = _same_value(normalize(answer), normalize(reference))
    return Grade(bool(correct), answer, correct is None)


def _same_text(answer: str, reference: str) -> bool | None:
    """Decide without sympy whether two answers agree; None where only their mathematics can tell."""
    if max(len(answer), len(reference)) > MAX_ANSWER_CHARS:
        return answer.strip() == reference.strip()
    given, wanted = (re.sub(r"\s", "", normalize(text)) for text in (answer, reference))
    if given == wanted or (given.isalpha() and len(given) > 1 and given.lower() == wanted.lower()):
        return given != ""
    if _PLAIN_NUMBER.fullmatch(given) and _PLAIN_NUMBER.fullmatch(wanted):
        return Fraction(given) == Fraction(wanted)
    numerals = _NUMERAL_IN_BASE.fullmatch(given), _NUMERAL_IN_BASE.fullmatch(wanted)
    if all(numerals):
        return numerals[0].groups() == numerals[1].groups()
    balanced = _until_closed(given + "}") == given
    return None if balanced and not _GIANT.search(given) and not _WORDS_OR_TIME.fullmatch(wanted) else False


def _same_value(answer: str, reference: str) -> bool | None:
    """Compare two normalized answers with math-verify; None when that ran past TIME_LIMIT.

    An answer without a value (0/0) may make sympy raise: that is wrong, and logged. Where the reference
    cannot be compared with itself either, grader or reference is broken: RuntimeError that names both.
    """
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout

    # it warns when its own limits, one for each step, are switched off in favour of one for all
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    limited = timeout(TIME_LIMIT)(_equivalent)
    try:
        return limited(answer, reference)
    except TimeoutException:
        return None
    except Exception as error:
        try:
            limited(reference, reference)
        except (Exception, TimeoutException):
            raise RuntimeError(f"the grader failed on answer {answer!r}, reference {reference!r}") from error
        logging.getLogger(__name__).warning("no way to compare %r with %r: %r", answer, reference, error)
        return False


def _equivalent(answer: str, reference: str) -> bool:
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Expr, Rational

    # only LaTeX in a box: other extractors pick numbers out of text; no units: they make 5t equal 5
    rules = NormalizationConfig(units=False, malformed_operators=True, nits=True)
    config = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=rules)]
    boxes = [rf"\boxed{{{text}}}" for text in (reference, answer)]
    wanted, given = (parse(box, config, parsing_timeout=None, raise_on_error=True) for box in boxes)
    settings = {"allow_set_relation_comp": True, "timeout_seconds": None, "raise_on_error": True}
    if not verify(wanted, given, **settings):
        return False
    if not isinstance(wanted[0], Expr) or not isinstance(given[0], Expr):
        return True
    # verify takes differences below 1e-15 for zero: 1/2^98 would equal 1/2^99
    difference = (wanted[0] - given[0]).doit()
    return not (isinstance(difference, Rational) and difference != 0)


def wilson_interval(num_correct, num_total, z=1.959964):
    """95 % Wilson score interval of a proportion, as (low, high)."""
    if not num_total:
        return 0.0, 1.0
    share = num_correct / num_total
    center = (share + z**2 / (2 * num_total)) / (1 + z**2 / num_total)
    half = z / (1 + z**2 / num_total) * (share * (1 - share) / num_total + z**2 / (4 * num_total**2)) ** 0.5
    return max(0.0, center - half), min(1.0, center + half)
