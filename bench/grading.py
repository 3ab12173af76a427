r"""Error rates and speed of the grader on mechanical variants of the answers of MATH and GSM8K.

    python bench/grading.py --data_dir data                     # 100 pairs of each kind: about 8,000
    python bench/grading.py --data_dir data --per_kind 1900     # about 85,000
    python bench/grading.py --data_dir data --show 5            # and 5 wrong verdicts of each kind

Each kind makes, of a reference answer, one that a reader takes for the same (EQUAL) or for another (UNEQUAL):
the label follows from how it was made, never from a grader. HELD_OUT kinds were written with the others, but
run only once the grader was right on those; one of theirs was mended then (67 p.m. was taken for 67: 0.17 %
of their unequal pairs). Times are of the processor. Beside ours: parse and verify of math-verify with its
defaults, both sides in \boxed{}. Reference answers come from the last \boxed{} or the '#### ' line.
"""

import argparse
import functools
import gzip
import json
import random
import re
import statistics
import sys
import time
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ads.data import grading

FILES = {
    "train": ("hendrycks_math_train", "gsm8k_train"),
    "test": ("hendrycks_math_test", "gsm8k_platinum_test"),
}
UNITS = (
    "cm", "km", "feet", "inches", "dollars", "hours", "pounds", "miles", "square feet", "units", "apples",
    "miles per hour", "meters", "minutes", "kg", "students",
)  # fmt: skip
INTEGER = re.compile(r"-?\d+")
FRACTION = re.compile(r"(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}")
POINT = re.compile(r"\(([^()\[\]{}\\]+),([^()\[\]{}\\,]+)\)")
LIST = re.compile(r"[^()\[\]{}:=]+(?:, ?[^()\[\]{}:=]+)+")
INTERVAL = re.compile(r"([(\[])(-?\d+), ?(-?\d+)([)\]])")
EXPRESSION = re.compile(r"(?=.*(?:\\sqrt|\\pi|[a-z]\^|\di\b))[^,:=<>(\[&]+")
LENGTHS = ("mm", "cm", "m", "km")


# Kinds by form, {name: (pattern, forms)}: an answer that is all pattern is written in one of the forms, with
# the groups of the pattern, a unit, a length or a digit.
WHOLE, NATURAL, RATIO = r"(-?\d+)", r"([1-9]\d*)", r"\\[dt]?frac\{(\d+)\}\{(\d+)\}"
EQUAL_FORMS = {
    "in_dollars": (r"([^$]+)", ("${}$",)),
    "with_period": (r"(.*[^.])", ("{}.",)),
    "with_unit": (
        WHOLE,
        (r"{} \text{{ {unit}}}", r"{}\text{{ {unit}}}", r"{}~\text{{{unit}}}", r"{}\,\mathrm{{{unit}}}")
        + (r"{}\mbox{{ {unit}}}", "{} {unit}"),
    ),
    "with_square_unit": (
        WHOLE,
        (r"{} \text{{ {length}}}^2", r"{} {length}^2", "{} {length}\u00b2", r"{}\ \text{{{length}}}^{{2}}")
        + (r"{} \text{{ square {length}}}",),
    ),
    "without_unit": (r"(\S+?)\s*\\(?:text|mbox)\{ ?(?![ap]\.m\.)[a-z ]+\}(?:\^\d)?", ("{}",)),
    "in_text": (WHOLE, (r"\text{{{}}}",)),
    "with_currency": (r"(\d+(?:\.\d+)?)", (r"\${}", "${}", "\u20ac{}", "\u00a3{}")),
    "with_zeros": (WHOLE, ("{}.0", "{}.00", "{}.000")),
    "slashed": ("(-?)" + RATIO, ("{}{}/{}",)),
    "minus_inside": ("-" + RATIO, (r"\frac{{-{}}}{{{}}}",)),
    "degrees": (r"(\d+)\^\\circ", ("{}", "{}\u00b0", r"{}^{{\circ}}", r"{} \text{{ degrees}}", "{} degrees")),
    "percents": (r"(\d+(?:\.\d+)?)\\%", ("{}", "{}%", r"{} \%", r"{} \text{{ percent}}", "{} percent")),
    "labelled": (
        r"(-?\d+|-?\\[dt]?frac\{\d+\}\{\d+\})",
        ("x = {}", "n={}", r"\text{{Answer: }}{}", r"\text{{Total}} = {}", "Answer: {}", r"\text{{Area}}={}"),
    ),
    "starred": (WHOLE, ("**{}**",)),
    "parenthesized": (WHOLE, ("({})",)),
    "braced_base": (r"(\d+)_(\d)", ("{}_{{{}}}",)),
}
UNEQUAL_FORMS = {
    "inverted": (r"(-?)\\[dt]?frac\{(?!0\})(\d+)\}\{(?!\2\})(\d+)\}", (r"{0}\frac{{{2}}}{{{1}}}",)),
    "longer": (r"(-?[1-9]\d*)", ("{}{digit}",)),
    "moved_point": (r"(\d+)([1-9])", ("{}.{}",)),
    "without_pi": (r"(\d+) ?\\pi", ("{}",)),
    "split_number": (r"(\d)(\d\d?)", ("{} {}",)),
    "infinite_open": (r"\[(-?\d+, ?\\infty\))", ("({}",)),
    "infinite_closed": (r"\((-?\d+, ?\\infty\))", ("[{}",)),
    "other_word": (r"\\text\{[A-Za-z]{3,}\}", (r"\text{{apple}}", r"\text{{Zed}}", r"\text{{none}}")),
    "mixed_up": (NATURAL, (r"{}\frac{{1}}{{2}}", r"{}\frac{{1}}{{3}}", r"{}\frac{{1}}{{7}}")),
}
HELD_OUT_EQUAL_FORMS = {
    "with_plus": (r"(\d+)", ("+{}",)),
    "in_bold": (WHOLE, (r"\mathbf{{{}}}", r"\textbf{{{}}}", r"\mathrm{{{}}}")),
    "sentence": (WHOLE, ("The answer is {}", r"\text{{The final answer is }} {}.")),
    "plain_word": (r"\\text\{([A-Za-z]{3,})\}", ("{}", r"\mathrm{{{}}}", r"\mbox{{{}}}")),
    "money_words": (r"\\\$ ?(\d+(?:\.\d+)?)", ("{} dollars", r"{}\text{{ dollars}}", r"{} \text{{ USD}}")),
    "thousands": (r"([1-9])000", (r"{} \times 10^{{3}}", r"{}.0 \times 10^{{3}}")),
}
HELD_OUT_UNEQUAL_FORMS = {
    "lost_digit": (r"[1-9]([1-9]\d*)", ("{}",)),
    "doubled_digit": (r"([1-9])(\d*)", ("{0}{0}{1}",)),
    "conjugate_down": (r"(-?\d+) ?\+ ?(\d*)i", ("{} - {}i",)),
    "conjugate_up": (r"(-?\d+) ?- ?(\d*)i", ("{} + {}i",)),
    "half_as_much": (
        NATURAL,
        (r"\frac{{{}}}{{2}}", r"\text{{half of }}{}", r"\text{{not }} {}", "2({})", "-({})"),
    ),
    "not_a_time": (r"(1[3-9]|[2-9]\d|[1-9]\d\d+)", (r"{}\text{{ p.m.}}",)),
}

# {name: (pattern, replacements)}: every match is replaced by one of them
EQUAL_REWRITES = {
    "display_fraction": (r"\\frac", (r"\\dfrac", r"\\tfrac")),
    "bare_fraction": (r"\\frac\{(\d)\}\{(\d)\}", (r"\\frac\1\2",)),
    "plain_brackets": (r"\\(?:left|right)(?![a-z])\s?", ("",)),
    "braced_powers": (r"\^(\d)", (r"^{\1}",)),
    "with_dot": (r"(?<=\d) ?(?=\\sqrt|\\pi)", (r" \\cdot ",)),
    "bare_root": (r"\\sqrt\{(\d)\}", (r"\\sqrt\1 ",)),
    "bracketed_matrix": ("pmatrix", ("bmatrix",)),
}
HELD_OUT_EQUAL_REWRITES = {"spaced_fraction": (r"\\frac\{(\w+)\}\{(\w+)\}", (r"\\frac {\1} { \2 }",))}
UNEQUAL_REWRITES = {"cube_root": (r"\\sqrt\{(?=[2-9])", (r"\\sqrt[3]{",))}

# what is written after a number, which makes it another one
TAILS = (
    r" \text{ and a half}", r"\text{ and a third}", r"\text{k}", "k", " squared", r"\text{ thousand}",
    " million", r" \text{ dozen}", r" \text{ out of 60}", r" \text{ remainder 3}",
    r" \text{ hours and 30 minutes}", r" \text{ feet 6 inches}", r"\text{ hundred}", "x", "!", "^2",
    r" \text{ or } 7", r" \text{ halves}", " R 3", "/7", r" \text{ less than half}",
    r" \text{ to the third power}", r"\times 10^3", r" \pm 1", r"\sqrt{2}", " + c", r"\text{ or more}",
)  # fmt: skip
HELD_OUT_TAILS = (
    r"\text{ tenths}", " minus 2", r" \text{ to } 700", "^\\circ 30'", r"\text{ days 4 hours}", "M",
    " choose 2", r" \text{ plus tax of 3}", " mod 7", r"\text{ and } \frac{1}{3}", r"\text{ times } x",
    ":45", " 1/2", r" \div 4", r"\text{ point five}",
)  # fmt: skip


def in_a_form(kind, text, rng):
    """The answer in one of the kind's forms; None unless it is all of the kind's pattern."""
    pattern, forms = kind
    found = re.fullmatch(pattern, text)
    extra = {
        "unit": rng.choice(UNITS),
        "length": rng.choice(("cm", "feet", "meters")),
        "digit": rng.randrange(10),
    }
    return found and rng.choice(forms).format(*found.groups(), **extra)


def rewritten(kind, text, rng):
    pattern, replacements = kind
    return changed(text, re.sub(pattern, rng.choice(replacements), text))


def appended(tail, text, rng):
    return text + tail if re.fullmatch(r"[3-9]|[1-9]\d+", text) else None  # 2! is 2


# Kinds by code. Each takes a reference and a random generator, and gives None where it does not
# apply; one that makes its own reference gives (reference, variant)


def spaced(text, rng):
    return None if has_words(text) or is_plain(text) else re.sub(r"(?<=[\w)}\]])([-+,=])", r" \1 ", text)


def tight(text, rng):
    """Without the spaces beside operators and brackets."""
    changed = re.sub(r" ?([-+=,()\[\]]) ?", r"\1", text)
    return (
        None if has_words(text) or changed == text or re.search(r"\\[a-z]+\Z|\\ |\d,\d", changed) else changed
    )


def macro_spaces(text, rng):
    return re.sub(r"([-+=,])", r"\\,\1\\;", text) if EXPRESSION.fullmatch(text) else None


def sized_brackets(text, rng):
    if r"\left" in text or r"\{" in text or not re.search(r"[(\[]", text):
        return None
    return re.sub(r"([(\[])", r"\\left\1", re.sub(r"([)\]])", r"\\right\1", text))


def expression_with_unit(text, rng):
    is_one = EXPRESSION.fullmatch(text) or FRACTION.fullmatch(text)
    ends = (
        is_one
        and not has_words(text)
        and re.search(r"(?:\}|\\pi|\d)$", text)
        and not re.search("[a-z]\\^", text)
    )
    return rf"{text} \text{{ {rng.choice(UNITS)}}}" if ends else None


def with_thousands(text, rng):
    comma = rng.choice((",", "{,}", r",\!", r"\,"))
    return f"{int(text):,}".replace(",", comma) if re.fullmatch(r"-?\d{4,}", text) else None


def without_thousands(text, rng):
    return re.sub(r"\D", "", text) if re.fullmatch(r"\d{1,3}(?:,(?:\\!)?\d{3})+", text) else None


def as_decimal(text, rng):
    value = fraction_of(text)
    if value is None or (10**6 * value).denominator != 1 or value.denominator == 1:
        return None
    return f"{float(value):.6f}".rstrip("0")


def decimal_as_fraction(text, rng):
    if not re.fullmatch(r"-?\d*\.\d+", text):
        return None
    value = Fraction(text)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}" if value.denominator > 1 else None


def unreduced(text, rng):
    found, factor = FRACTION.fullmatch(text), rng.randrange(2, 6)
    return rf"{found[1]}\frac{{{factor * int(found[2])}}}{{{factor * int(found[3])}}}" if found else None


def mixed(text, rng):
    value = fraction_of(text)
    if value is None or value < 1 or value.denominator == 1:
        return None
    whole, rest = divmod(value.numerator, value.denominator)
    form = rng.choice((r"{}\frac{{{}}}{{{}}}", r"{} \frac{{{}}}{{{}}}", "{} {}/{}"))
    return form.format(whole, rest, value.denominator)


def repeating(text, rng):
    value = fraction_of(text)
    if value is None or value.denominator not in (3, 9, 11, 27, 33, 37, 99) or value < 0:
        return None
    whole, rest = divmod(value, 1)
    return rf"{whole}.\overline{{{int(rest * 999999):06d}}}"


def reordered(text, rng):
    parts = list_parts(text)
    return ", ".join(rotated(parts, rng)) if parts and len(set(parts)) > 1 else None


def in_braces(text, rng):
    parts = list_parts(text)
    return rf"\{{{', '.join(parts)}\}}" if parts and len(set(parts)) == len(parts) else None


def joined_by_and(text, rng):
    parts = list_parts(text)
    word = rng.choice((r" \text{ and } ", " and ", r"\text{ or }"))
    return ", ".join(parts[:-1]) + word + parts[-1] if parts else None


def unicode_signs(text, rng):
    signs = {
        "-": "\u2212",
        r"\pi": "\u03c0",
        r"\infty": "\u221e",
        r"\cup": "\u222a",
        r"^\circ": "\u00b0",
        "^2": "\u00b2",
    }
    changed_text = re.sub(r"\\sqrt\{(\d+)\}", "\u221a\\1", text)
    for sign, mark in signs.items():
        changed_text = changed_text.replace(sign, mark) if not re.search(r"\^2\d", text) else changed_text
    return None if has_words(text) else changed(text, changed_text)


def turned_sum(text, rng):
    found = re.fullmatch(r"([^-+(){}=,]+?) ?\+ ?([^-+(){}=,]+)", text)
    return f"{found[2]} + {found[1]}" if found and not has_words(text) else None


def same_clock(text, rng):
    if not re.fullmatch(r"[1-9]|1[0-2]", text):
        return None
    half = rng.choice("ap")
    forms = rng.choice(("{}:00 {}.m.", r"{} \text{{ {}.m.}}", r"\text{{{}:00 {}m}}"))
    return rf"{text}\text{{ {half}.m.}}", forms.format(text, half)


# Variants that are not equal


def off_by_one(text, rng):
    return str(int(text) + rng.choice((-1, 1))) if INTEGER.fullmatch(text) else None


def other_number_inside(text, rng):
    """One number of an expression, point, list or matrix is one more."""
    if INTEGER.fullmatch(text) or re.search(
        r"binom|\{ ?0|(?<![\d.])0(?![\d.])|circ|%|[_:!]|\\text|mbox", text
    ):
        return None
    spots = list(re.finditer(r"(?<![\d.,^{!])\d+(?![\d.,!])", text))
    spot = rng.choice(spots) if spots else None
    return f"{text[: spot.start()]}{int(spot[0]) + 1}{text[spot.end() :]}" if spot else None


def opposite(text, rng):
    if (
        not (INTEGER.fullmatch(text) or FRACTION.fullmatch(text) or re.fullmatch(r"-?\d*\\sqrt\{\d+\}", text))
        or text == "0"
    ):
        return None
    return text[1:] if text.startswith("-") else f"-{text}"


def swapped_digits(text, rng):
    spots = [i for i in range(len(text) - 1) if text[i] != text[i + 1] and (i > 0 or text[i + 1] != "0")]
    i = rng.choice(spots) if INTEGER.fullmatch(text) and "-" not in text and spots else None
    return None if i is None else text[:i] + text[i + 1] + text[i] + text[i + 2 :]


def dropped_element(text, rng):
    parts = list_parts(text)
    return ", ".join(parts[:-1]) if parts and len(set(parts)) == len(parts) else None


def added_element(text, rng):
    parts = list_parts(text)
    return ", ".join([*parts, "1234"]) if parts else None


def turned_point(text, rng):
    found = POINT.fullmatch(text)
    parts = [part.strip() for part in found.groups()] if found and found[1].count(",") == 0 else None
    return f"({parts[1]},{parts[0]})" if parts and parts[0] != parts[1] else None


def other_power(text, rng):
    found = re.search(r"(?<=[a-z])\^(\d)(?!\d)", text)
    return (
        f"{text[: found.start()]}^{int(found[1]) + 1}{text[found.end() :]}"
        if found and found[1] < "9"
        else None
    )


def other_bracket(text, rng):
    found = INTERVAL.fullmatch(text)
    if not found or int(found[2]) >= int(found[3]):
        return None
    return (
        ("[" if found[1] == "(" else "(") + text[1:]
        if rng.random() < 0.5
        else text[:-1] + (")" if found[4] == "]" else "]")
    )


def other_half_of_day(text, rng):
    if not re.fullmatch(r"[1-9]|1[0-2]", text):
        return None
    return rf"{text}\text{{ a.m.}}", rng.choice(
        (r"{}\text{{ p.m.}}", "{}:00 p.m.", r"\text{{{} PM}}")
    ).format(text)


def other_variable(text, rng):
    letters = set(re.findall(r"(?<![\\A-Za-z])[a-z](?![A-Za-z])", text))
    if len(letters) != 1 or has_words(text) or re.search(r"=|^[a-z]$", text) or letters & set("ie"):
        return None
    return re.sub(r"(?<![\\A-Za-z])[a-z](?![A-Za-z])", "q" if letters != {"q"} else "r", text)


def without_root(text, rng):
    return (
        changed(text, re.sub(r"\\sqrt\{([2-9]|\d\d)\}", r" \\cdot \1", text))
        if re.match(r"\d+ ?\\sqrt\{\d+\}$", text)
        else None
    )


def other_base(text, rng):
    found = re.fullmatch(r"(\d+)_\{?([2-8])\}?", text)
    return f"{found[1]}_{int(found[2]) + 1}" if found else None


def other_unit(text, rng):
    first, second = rng.sample(LENGTHS, 2)
    return (rf"{text}\text{{ {first}}}", rf"{text} \text{{ {second}}}") if INTEGER.fullmatch(text) else None


def rounded(text, rng):
    """A fraction to two decimals, where that is not exact."""
    value = fraction_of(text)
    return None if value is None or (100 * value).denominator == 1 else f"{float(value):.2f}"


# Variants of kinds that the grader was not tuned on


def integer_as_fraction(text, rng):
    k = rng.randrange(2, 9)
    return rf"\frac{{{int(text) * k}}}{{{k}}}" if re.fullmatch(r"[1-9]\d*", text) else None


def product(text, rng):
    divisors = [k for k in range(2, 10) if int(text) % k == 0] if re.fullmatch(r"[1-9]\d+", text) else []
    return rf"{divisors[0]} \times {int(text) // divisors[0]}" if divisors else None


def inequality(text, rng):
    found = INTERVAL.fullmatch(text)
    if not found or int(found[2]) >= int(found[3]) or found[1] + found[4] == "()":  # (1, 2) may be a point
        return None
    low, high = (r"\le" if bracket in "[]" else "<" for bracket in (found[1], found[4]))
    return f"{found[2]} {low} x {high} {found[3]}"


def member(text, rng):
    return rf"x \in {text}" if re.search(r"\\infty|\\cup", text) and r"\in " not in text else None


def transposed(text, rng):
    found = re.fullmatch(r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}", text)
    rows = [[cell.strip() for cell in row.split("&")] for row in found[1].split(r"\\")] if found else []
    columns = (
        [list(column) for column in zip(*rows, strict=True)] if len({len(row) for row in rows}) == 1 else rows
    )
    body = r" \\ ".join(" & ".join(column) for column in columns)
    return rf"\begin{{pmatrix}} {body} \end{{pmatrix}}" if columns != rows else None


def negated_coordinate(text, rng):
    found = POINT.fullmatch(text)
    is_plain = found and re.fullmatch(r"\d+", found[2].strip()) and found[2].strip() != "0"
    return f"({found[1]},-{found[2].strip()})" if is_plain else None


def intersection(text, rng):
    return text.replace(r"\cup", r"\cap") if text.count(r"\cup") == 1 and r"\infty" in text else None


def other_decimal(text, rng):
    found = re.fullmatch(r"(-?\d*\.\d*)(\d)", text)
    return f"{found[1]}{(int(found[2]) + 1) % 10}" if found else None


def squared_inside(text, rng):
    return (
        changed(text, re.sub(r"\\sqrt\{(\d+)\}", r"\\sqrt{\1}^3", text))
        if re.fullmatch(r"\d*\\sqrt\{[2-9]\d?\}", text)
        else None
    )


# What the kinds share


def has_words(text):
    return (
        re.search(r"\\text|\\mbox|[A-Za-z]{4,}", re.sub(r"\\[a-z]+(?<!\\text)(?<!\\mbox)", "", text))
        is not None
    )


def is_plain(text):
    return re.fullmatch(r"[-\d.,]*", text) is not None


def changed(text, variant):
    return None if variant == text else variant


def fraction_of(text):
    found = FRACTION.fullmatch(text)
    return Fraction(int(found[1] + found[2]), int(found[3])) if found else None


def list_parts(text):
    """The elements of a list whose order means nothing; None where a comma may separate thousands."""
    is_list = LIST.fullmatch(text) and not re.search(r"\d,\d|text|mbox|\\pm|\\,|!|[<>]", text)
    return re.split(r", ?", text) if is_list else None


def rotated(parts, rng):
    k = rng.randrange(1, len(parts))
    return parts[k:] + parts[:k]


EQUAL = (
    spaced, tight, macro_spaces, sized_brackets, expression_with_unit, with_thousands, without_thousands,
    as_decimal, decimal_as_fraction, unreduced, mixed, repeating, reordered, in_braces, joined_by_and,
    unicode_signs, turned_sum, same_clock,
)  # fmt: skip
UNEQUAL = (
    off_by_one, other_number_inside, opposite, swapped_digits, dropped_element, added_element, turned_point,
    other_power, other_bracket, other_half_of_day, other_variable, without_root, other_base, other_unit,
    rounded,
)  # fmt: skip
HELD_OUT_EQUAL = (integer_as_fraction, product, inequality, member)
HELD_OUT_UNEQUAL = (transposed, negated_coordinate, intersection, other_decimal, squared_inside)


def kinds(held_out):
    """{name: (make, label)}; make(answer, rng) gives a variant, or None where the kind does not apply."""
    if held_out:
        equal = by_table(in_a_form, HELD_OUT_EQUAL_FORMS) | by_table(rewritten, HELD_OUT_EQUAL_REWRITES)
        unequal, tails = by_table(in_a_form, HELD_OUT_UNEQUAL_FORMS), HELD_OUT_TAILS
        functions = HELD_OUT_EQUAL, HELD_OUT_UNEQUAL
    else:
        equal = by_table(in_a_form, EQUAL_FORMS) | by_table(rewritten, EQUAL_REWRITES)
        unequal = by_table(in_a_form, UNEQUAL_FORMS) | by_table(rewritten, UNEQUAL_REWRITES)
        functions, tails = (EQUAL, UNEQUAL), TAILS
    equal |= {make.__name__: make for make in functions[0]}
    unequal |= {make.__name__: make for make in functions[1]}
    unequal |= by_table(appended, {f"+ {tail.strip()}": tail for tail in tails})
    return {name: (make, True) for name, make in equal.items()} | {
        name: (make, False) for name, make in unequal.items()
    }


def by_table(make, table):
    return {name: functools.partial(make, kind) for name, kind in table.items()}


def read_answers(data_dir, part):
    """The reference answers of MATH and GSM8K, without repeats."""
    found = {}
    for name in [name for key, names in FILES.items() if part in (key, "both") for name in names]:
        with gzip.open(Path(data_dir) / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            for row in map(json.loads, file):
                solution = row.get("solution") or row["answer"]
                answer = grading.last_box(solution) or solution.rpartition("#### ")[2].strip()
                if "\n" not in answer and len(answer) < 100:
                    found[answer] = None
    return list(found)


def make_pairs(answers, made, per_kind, seed):
    """[(kind, label, reference, variant)], at most per_kind of a kind, in random order."""
    rng, pairs = random.Random(seed), []
    for kind, (make, label) in made.items():
        rng.shuffle(answers)
        count = 0
        for answer in answers:
            variant = make(answer, rng)
            if variant is not None and count < per_kind:
                reference, variant = variant if isinstance(variant, tuple) else (answer, variant)
                pairs.append((kind, label, reference, variant))
                count += 1
    rng.shuffle(pairs)
    return pairs


def ours(reference, variant):
    return grading.grade(rf"\boxed{{{variant}}}", rf"\boxed{{{reference}}}").correct


def math_verify(reference, variant):
    from math_verify import parse, verify

    return verify(parse(rf"\boxed{{{reference}}}"), parse(rf"\boxed{{{variant}}}"))


def run(pairs, judge):
    """(verdicts, milliseconds of CPU time) of a grader over all pairs; an exception is a wrong verdict."""
    verdicts, times = [], []
    judge("x + 1", "1 + x")  # imports
    for _, label, reference, variant in pairs:
        start = time.process_time()
        try:
            verdicts.append(judge(reference, variant))
        except Exception as error:
            print(f"{judge.__name__}: {error!r} for {variant!r} ~ {reference!r}", file=sys.stderr)
            verdicts.append(not label)
        times.append(1e3 * (time.process_time() - start))
    return verdicts, times


def rate(pairs, verdicts, label):
    """Share of the pairs of this label that were judged wrongly, in percent."""
    wrong = [verdict != label for pair, verdict in zip(pairs, verdicts, strict=True) if pair[1] == label]
    return 100 * sum(wrong) / max(len(wrong), 1)


def print_kinds(pairs, results, made):
    print(f"{'kind':34}{'label':>8}{'pairs':>7}" + "".join(f"{name:>14}" for name in results) + "   % wrong")
    for kind, (_, label) in made.items():
        chosen = [i for i, pair in enumerate(pairs) if pair[0] == kind]
        rows = [[verdicts[i] != label for i in chosen] for verdicts, _ in results.values()]
        cells = [f"{100 * sum(row) / max(len(row), 1):14.1f}" for row in rows]
        print(f"{kind[:33]:34}{'equal' if label else 'unequal':>8}{len(chosen):7}" + "".join(cells))


def print_wrong(pairs, verdicts, most):
    shown = {}
    for (kind, label, reference, variant), verdict in zip(pairs, verdicts, strict=True):
        if verdict != label and shown.setdefault(kind, 0) < most:
            shown[kind] += 1
            print(f"wrong: {kind}: {variant}   ~   {reference}")


def summary(pairs, verdicts, times):
    ordered = sorted(times)
    return {
        "false_negatives_percent": round(rate(pairs, verdicts, True), 2),
        "false_positives_percent": round(rate(pairs, verdicts, False), 2),
        "median_ms": round(statistics.median(times), 3),
        "p99_ms": round(ordered[int(0.99 * (len(ordered) - 1))], 1),
        "mean_ms": round(statistics.mean(times), 2),
    }


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data_dir",
        required=True,
        help="folder with the files that docs/reference.md lists (Data, Without a network)",
    )
    parser.add_argument("--part", choices=("train", "test", "both"), default="both")
    parser.add_argument("--per_kind", type=int, default=100, help="most pairs of a kind")
    parser.add_argument("--held_out", action="store_true", help="the kinds that the grader was not tuned on")
    parser.add_argument("--only_ours", action="store_true")
    parser.add_argument("--show", type=int, default=0, help="wrong verdicts of ours to show per kind")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main():
    args = parse_arguments()
    made = kinds(args.held_out)
    pairs = make_pairs(read_answers(args.data_dir, args.part), made, args.per_kind, args.seed)
    results = {
        judge.__name__: run(pairs, judge) for judge in ((ours,) if args.only_ours else (ours, math_verify))
    }
    print_kinds(pairs, results, made)
    print_wrong(pairs, results["ours"][0], args.show)
    counts = {"pairs": len(pairs), "equal": sum(pair[1] for pair in pairs), "kinds": len(made)}
    print(
        json.dumps(counts | vars(args) | {name: summary(pairs, *result) for name, result in results.items()})
    )


if __name__ == "__main__":
    main()
