r"""Grade a response against a reference solution, by one rule for every dataset.

The answer is the last complete \boxed{...} of the response (never of the prompt); without one, the last number, or,
where the reference is a single letter A-J (multiple choice), the last stated letter. A box that the length limit cut
open counts as no box. Text equal after `normalize` and plain numbers are decided here, the rest by math-verify.

Units, currency signs, degrees and percent signs are ignored: 50\% is 50, and so it is not 0.5. Answers longer than
MAX_ANSWER_CHARS, with unbalanced braces, or with giant powers or factorials are compared as text only.
math-verify stops itself with signal.alarm: what the text comparison leaves open can be graded in the main thread only.
"""

import logging
import re
from dataclasses import dataclass
from fractions import Fraction

TIME_LIMIT = 5  # whole seconds (signal.alarm) to parse and compare one pair
MAX_ANSWER_CHARS = 400  # the longest reference of MATH has 159

_BOX = r"\\\\?(?:boxed|fbox)\s*"
_BRACES = re.compile(
    rf"(?P<open>(?P<box>{_BOX})?\{{)|(?P<close>\}})|{_BOX}(?P<bare>-?\d[\d.,/]*(?<=\d)|[A-Z]\b)|\\.", re.DOTALL
)
_DROPPED = re.compile(
    r"(?<!\\)\\[!,;:> ]|\\?[$%]|\^\s*\{?\s*\\circ\s*\}?|\\degree|\u00b0|\\(?:left|right|displaystyle)\b|^\\[(\[]|\\[)\]]$"
)
_TEXT_MACRO = r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf)|mbox|boxed|fbox)\s*\{([^{}]*)\}"
_SCALES = r"(?!\s*(?:hundred|thousand|[mb]illion|trillion|dozen|sin|cos|tan|log|exp|sqrt)\b)"
_UNIT_MACRO = re.compile(rf"(?<=[\d)}}i])\s*\\(?:text(?:rm|normal)?|mathrm|mbox)\s*\{{{_SCALES}[^{{}}]*\}}(?:\^\{{?\d\}}?)?$")
_NUMBER_WITH_UNIT = re.compile(
    rf"(-?[\d.,/]*\d)\s+{_SCALES}(?:[A-Za-z]{{3,}}|[ckm]m|m|kg|ft|in|mi|lb|oz|ml|hr|sq)\.?"
    r"(?:[ /-]+[A-Za-z]+\.?)*(?:\s?\^\{?\d\}?)?"
)
_PLAIN_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")
_IN_BASE = re.compile(r"(-?[\dA-Z.]+)_\{?(\d+)\}?")
_WORDS_OR_TIME = re.compile(r"(?=.*[A-Za-z]{3})[A-Za-z,'-]+|\d+:\d\d")
_GIANT = re.compile(r"\^[\s{(-]*(?:\d{6,}|\d+\s*(?:!|\^[\s{(-]*\d))|\d{6,}\s*!|![\s)}]*!")

_WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMBER_IN_TEXT = re.compile(
    rf"(?:(?<![\w)}}\]])-)?\$?(?:\\[dt]?frac\{{-?\d+\}}\{{\d+\}}|{_WHOLE}(?:\.\d+|/\d+)?|\.\d+)"
)
# "answer is (C)", "Answer: **C**", "C is correct"; an A or I before a lower-case word is an article or a pronoun
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
    """Outcome for one response: `answer` is what was extracted (None: nothing), `timed_out` implies not correct."""

    correct: bool
    answer: str | None
    timed_out: bool


def grade(response: str, solution: str) -> Grade:
    """Grade the model's raw response text, without its prompt; raises ValueError when `solution` has no answer."""
    reference = reference_answer(solution)
    return _grade_answer(extract_answer(response, is_choice(reference)), reference)


def grade_forced(continuation: str, solution: str) -> Grade:
    r"""Grade what the model wrote after the forced '\boxed{': the text up to the brace that closes it.

    Where the token limit left it open, the first line is the answer. Raises ValueError as `grade` does.
    """
    reference = reference_answer(solution)
    content = _until_closed(continuation).strip()
    answer = last_box(content) or content or None
    return _grade_answer(choice_letter(answer or "") or answer if is_choice(reference) else answer, reference)


def reference_answer(solution: str) -> str:
    r"""Return the answer of a solution: its final '#### x' line, else its last \boxed, else a single line of <= 100
    characters as it is. Raises ValueError when there is none."""
    text = solution.strip()
    final_line = re.search(r"^####[ \t]*(\S.*)\Z", text, re.MULTILINE)
    answer = final_line[1] if final_line else last_box(text)
    if answer is None and (not text or "\n" in text or len(text) > 100):
        raise ValueError(f"no answer (a final '#### x' line, \\boxed{{x}} or one short line) in solution {text[:80]!r}")
    return answer if answer is not None else text


def extract_answer(response: str, choices: bool) -> str | None:
    """Return the answer a response gives, None if it gives none; `choices`: the reference is a letter."""
    box = last_box(response)
    if box is not None:
        return choice_letter(box) or box if choices else box
    return _last_letter(response) if choices else _last_number(response)


def is_choice(reference: str) -> bool:
    """Whether a reference answer is a single capital letter A-J, possibly in parentheses or \\text{}."""
    return re.fullmatch(r"\(?[A-J]\)?", normalize(reference)) is not None


def choice_letter(answer: str) -> str | None:
    """Return the option that a boxed answer names: 'C', 'c', '(C)', 'C. 120', '(C) 120'; None for any other text."""
    text = normalize(answer)
    alone = re.fullmatch(r"\(?([A-Ja-j])\)?", text)
    leading = re.match(r"(?:\(([A-J])\)|([A-J])[.):])(?!.*\([A-J]\))", text, re.DOTALL)
    found = alone or leading
    return found[found.lastindex].upper() if found else None


def last_box(text: str) -> str | None:
    r"""Return the content of the last complete, non-blank \boxed or \fbox, the inner one where nested; linear time."""
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
    """Return an answer without markup, spacing commands, units, currency and percent signs, thousands commas."""
    text = answer.replace("\u2212", "-").replace("{,}", ",").strip().strip("*")
    text = re.sub(r",\\!\s*", "", re.sub(r"\\[dtc]frac", r"\\frac", text))
    text = _DROPPED.sub("", text).strip().rstrip(".,;")
    text = re.sub(_TEXT_MACRO, r"\1", _UNIT_MACRO.sub("", text)).strip().rstrip(".,;")
    with_unit = _NUMBER_WITH_UNIT.fullmatch(text)
    text = with_unit[1] if with_unit else text
    return text.replace(",", "") if re.fullmatch(r"-?" + _WHOLE + r"(?:\.\d+)?", text) else text


def _last_number(text: str) -> str | None:
    matches = [m[0] for m in _NUMBER_IN_TEXT.finditer(text.replace("\u2212", "-"))]
    return matches[-1] if matches else None


def _last_letter(text: str) -> str | None:
    """Return the last letter that an answer statement names, else the last one written as an option."""
    for pattern in (_STATED_LETTER, _OPTION_LETTER):
        letters = [m[m.lastindex] for m in pattern.finditer(text)]
        if letters:
            return letters[-1]
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
    correct = _same_text(answer, reference)
    if correct is not None:
        return Grade(correct, answer, False)
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
    bases = _IN_BASE.fullmatch(given), _IN_BASE.fullmatch(wanted)
    if all(bases):
        return bases[0].groups() == bases[1].groups()
    # math-verify multiplies the letters of a word (east = seat) and divides the parts of a time (5:00 = 5/0)
    if is_choice(reference) or _WORDS_OR_TIME.fullmatch(wanted) or _GIANT.search(given) or not _balanced(given):
        return False
    return None


def _balanced(text: str) -> bool:
    depth = 0
    for token in _BRACES.finditer(text):
        depth += bool(token["open"]) - bool(token["close"])
        if depth < 0:
            return False
    return depth == 0


def _same_value(answer: str, reference: str) -> bool | None:
    """Compare two normalized answers with math-verify; None when it ran past TIME_LIMIT.

    An answer that sympy cannot compare with a reference it can handle (0/0, say) is wrong, and logged. A grader that
    cannot even compare the reference with itself is broken: RuntimeError naming both.
    """
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout

    # it warns whenever its own limits are off; ours covers parsing and comparison together
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
            raise RuntimeError(f"the grader failed on answer {answer!r} against reference {reference!r}") from error
        logging.getLogger(__name__).warning("cannot compare %r with %r (%r): wrong", answer, reference, error)
        return False


def _equivalent(answer: str, reference: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Expr, Rational

    # only LaTeX in a box: the other extractors would pick any number out of the text
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    wanted, given = (
        parse(rf"\boxed{{{text}}}", config, parsing_timeout=None, raise_on_error=True) for text in (reference, answer)
    )
    if not verify(wanted, given, timeout_seconds=None, raise_on_error=True):
        return False
    if not isinstance(wanted[0], Expr) or not isinstance(given[0], Expr):
        return True
    # verify takes differences below 1e-15 for zero, so that 1/2^98 would equal 1/2^99
    difference = (wanted[0] - given[0]).doit()
    return not (isinstance(difference, Rational) and difference != 0)
