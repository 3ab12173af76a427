"""What the demo's models are pretrained on: worked solutions with slips and unknown results; all words."""

from ads.data.arithmetic import (
    BEGUN,
    CLOSINGS,
    CONCLUDED,
    ITEMS,
    LARGEST,
    NAMES,
    OPENINGS,
    SKILL,
    TOLD,
    WORKED,
    draw_number,
)

NOTICED = "wait , that is wrong :"


def work_out(start, steps, rng=None, slips=0.0, unknown=0.0):
    """(trace ending in a boxed answer, the results in it as (first, end) character spans).

    At a share `slips` of the steps (drawn from rng) a wrong result is written, noticed and corrected; at a
    share `unknown` of the skill's steps the result is a random number, which is worked on with.
    """
    text, spans, value = BEGUN.format(value=start), [], start
    for i, step in enumerate(steps):
        result = step.apply(value)
        text += f" {WORKED[step.kind].format(amount=step.amount)}"
        if slips and rng.random() < slips:
            text += f" {step.equation(value)} {wrong(rng, result)} . {NOTICED}"
        text += f" {step.equation(value)} "
        if unknown and step.kind in SKILL and rng.random() < unknown:
            result = draw_result(rng, steps[i + 1 :])
        spans.append((len(text), len(text) + len(str(result))))
        text += f"{result} ."
        value = result
    return f"{text} {CONCLUDED.format(value=value)}", spans


def draw_result(rng, steps):
    """A random number with which the steps to come stay within 0..LARGEST."""
    while not stays_within(number := draw_number(rng), steps):
        pass
    return number


def wrong(rng, value):
    """A number within 0..LARGEST other than `value`."""
    return (value + 1 + int(rng.random() * LARGEST)) % (LARGEST + 1)


def words():
    """Every word of problems and traces, sorted; digits and punctuation apart."""
    texts = [*OPENINGS, *CLOSINGS, *(text for told in TOLD.values() for text in told)]
    found = " ".join([*texts, BEGUN, *WORKED.values(), NOTICED, CONCLUDED]).split()
    return sorted({word for word in [*found, *NAMES, *ITEMS] if word.isalpha()})


def stays_within(value, steps):
    """Whether a value and all that the steps make of it are within 0..LARGEST."""
    for step in steps:
        if not 0 <= value <= LARGEST:
            return False
        value = step.apply(value)
    return 0 <= value <= LARGEST
