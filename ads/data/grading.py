r"""Grade a response against a reference solution, in the same way for every dataset.

The answer is the last complete \boxed{...} of the response (never of the prompt); without one, what follows
'####' in its last line, the response itself where it is one line of mathematics, else the last number, or the
last stated letter where the reference is a single letter A-J (multiple choice). A box that the length limit
cut open counts as no box. When two answers are the same is said in ads/answers.py.
"""

import re
from dataclasses import dataclass

from ads.data import answers, expressions
from ads.data.notation import normalize
from ads.data.quantities import WHOLE
from ads.stage.errors import UserError

_BOX = r"\\\\?(?:boxed|fbox)\s*"
_BRACES = re.compile(
    rf"(?P<open>(?P<box>{_BOX})?\{{)|(?P<close>\}})|{_BOX}(?P<bare>-?\d[\d.,/]*(?<=\d)|[A-Z]\b)|\\.",
    re.DOTALL,
)
_NUMBER_IN_TEXT = re.compile(
    rf"(?:(?<![\w)}}\]])[-\u2212])?\$?(?:\\[dt]?frac\{{-?\d+\}}\{{\d+\}}|{WHOLE}(?:\.\d+|/\d+)?|\.\d+)"
)
_RESULT = re.compile(rf"=\s*({_NUMBER_IN_TEXT.pattern})")
_STATED = re.compile(r"(?i)<answer>(.+?)</answer>|\banswer\s*(?:is\b|=|:)[\s:=]*(.+?)[.!]?\s*$")
_CHOICE_LINE = re.compile(r"\(?([A-J])[.)](?:\s.*)?")
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
    r"""Return the answer in a solution: what follows '####' in its last line, else its last \boxed.

    Without either, a solution of one line of up to 100 characters is its own answer ('3/4', '18 apples') or a
    sentence that says which of its numbers is the answer. Raises ValueError when there is no answer.
    """
    text = solution.strip()
    answer = marked_answer(text) or last_box(text)
    if answer is None and text and "\n" not in text and len(text) <= 100 and not re.search(_BOX, text):
        answer = one_line_answer(text)
    if answer is None:
        raise UserError(
            f"no '#### x' line, \\boxed{{x}} or one short line as answer in solution {text[:80]!r}"
        )
    return answer


def check_solution(solution: str) -> None:
    """Raise ValueError for a solution without an answer, or whose own text would be graded as wrong.

    Such a problem gives nothing to train or to measure with: right responses would be graded wrong.
    """
    own = grade(solution, solution)
    if not own.correct:
        raise UserError(
            f"its answer is {reference_answer(solution)!r}, but its text, graded as a response, answers "
            f"{own.answer!r} in solution {solution.strip()[:80]!r}"
        )


def marked_answer(text: str) -> str | None:
    """Return what follows the last '####' of the last line, None where there is none."""
    found = re.search(r"(?<!#)####(?!#)[ \t]*((?:(?!####).)*\S)\Z", text)
    return found[1] if found else None


def one_line_answer(text: str) -> str:
    """Return the answer that a line of text is or states.

    A sentence states it as 'answer is 4', in <answer> tags, as its only number, or as its last number where
    that is also the result of its last equation ('2 + 2 = 4, so 4 apples'). ValueError for other sentences.
    """
    stated, choice = _STATED.search(text), _CHOICE_LINE.fullmatch(text)
    bare = bare_answer(stated[1] or stated[2]) if stated else None
    answer = bare or (choice and choice[1]) or bare_answer(text)
    if answer is not None:
        return answer
    numbers, results = _NUMBER_IN_TEXT.findall(text), _RESULT.findall(text)
    if not numbers:
        raise UserError(f"a sentence that states no answer as solution {text!r}")
    last = normalize(numbers[-1])
    if len(set(map(normalize, numbers))) > 1 and not (results and normalize(results[-1]) == last):
        raise UserError(f"several numbers, none of them stated as the answer, in solution {text!r}")
    return numbers[-1]


def bare_answer(text: str) -> str | None:
    """Return a text that is an answer and nothing else, of '2 + 2 = 4' the result; None for sentences."""
    text = text.strip()
    if "\n" in text or len(text) > 100:
        return None
    result = text.rpartition("=")[2].strip() if re.search(r"\d\s*=", text) else text
    is_one = result == text or "," not in result
    return result if result and is_one and answers.is_bare(text) else None


def extract_answer(response: str, choices: bool) -> str | None:
    """Return the answer a response gives, None if it gives none; `choices`: the reference is a letter."""
    if answer := last_box(response):
        return answer
    if choices:
        return _last_match((_STATED_LETTER, _OPTION_LETTER), response)
    marked = bare_answer(marked_answer(response) or "")
    return marked or bare_answer(response) or _last_match((_NUMBER_IN_TEXT,), response)


def is_choice(reference: str) -> bool:
    r"""Tell whether a reference answer is a single capital letter A-J, possibly in parentheses or \text{}."""
    return re.fullmatch(r"\(?[A-J]\)?", normalize(reference)) is not None


def choice_letter(answer: str) -> str | None:
    """Return the option that a boxed answer names: 'C', 'c', '(C)', 'C. 120', '(C) 120'; else None."""
    text = normalize(answer)
    alone = re.fullmatch(r"\(?([A-Ja-j])\)?", text)
    found = alone or re.match(r"(?:\(([A-J])\)|([A-J])[.):])(?!.*\([A-J]\))", text, re.DOTALL)
    return found[found.lastindex or 0].upper() if found else None


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
    try:
        return Grade(answers.same_answer(answer, reference), answer, False)
    except expressions.OutOfTime:
        return Grade(False, answer, True)
