"""The demo's dataset `arithmetic`: generated word problems of a few steps, and worked solutions.

A problem is a computation (a start value and 4 steps, every value within 0..59) in one of many wordings.
At least two of its steps are of the skill that a student is to learn from traces: doubling and tripling.
The splits are disjoint by construction: a hash of the computation decides which split it belongs to,
`pretrain` (demo/pretrain.py) being one of them.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

SPLIT_SIZES = {"train": 2400, "test": 600, "holdout": 600}
SHARES = ("pretrain",) * 7 + ("train", "test", "holdout")  # of all computations, by hash
NUM_STEPS = 4
LARGEST = 59
SKILL = ("double", "triple")  # 50 facts: the doubles of 0..29 and the triples of 0..19
LEAST_SKILL = 2  # steps of the skill in a problem; where it has fewer steps than three, all but one
NAMES = ("Ann", "Ben", "Cara", "Dan", "Eve", "Finn", "Gina", "Hugo")
ITEMS = ("apples", "books", "cards", "coins", "marbles", "pens", "shells", "stamps")
OPENINGS = (
    "{name} has {value} {items} .",
    "{name} starts with {value} {items} .",
    "There are {value} {items} in a box .",
    "A shop has {value} {items} .",
)
TOLD = {  # how a problem tells a step; amounts of add and subtract are 2..9
    "add": ("{name} finds {amount} more .", "Then {amount} more are put in .", "{amount} more arrive ."),
    "subtract": ("{name} loses {amount} of them .", "Then {amount} are sold .", "{amount} are given away ."),
    "double": ("The number doubles .", "Now there are twice as many ."),
    "triple": ("The number triples .", "Now there are three times as many ."),
}
CLOSINGS = (
    "How many {items} are there now ?",
    "How many {items} are left ?",
    "What is the number of {items} at the end ?",
)
# A trace is worded in one way only: where wording is free, antidistillation raises the proxy's loss by
# wording alone, which harms no student.
BEGUN = "start with {value} ."
WORKED = {"add": "add {amount} :", "subtract": "minus {amount} :", "double": "double :", "triple": "triple :"}
SIGNS = {"add": "+", "subtract": "-", "double": "*", "triple": "*"}
CONCLUDED = "the answer is \\boxed{{ {value} }} ."


@dataclass(frozen=True)
class Step:
    """One step of a computation: `kind` is add, subtract, double or triple (amount 2 or 3 for those two)."""

    kind: str
    amount: int

    def apply(self, value: int) -> int:
        """The value after this step, which may leave 0..LARGEST."""
        if self.kind == "add":
            return value + self.amount
        return value - self.amount if self.kind == "subtract" else value * self.amount

    def equation(self, value: int | str) -> str:
        """`12 + 5 =`, without the result."""
        return f"{value} {SIGNS[self.kind]} {self.amount} ="


Computation = tuple[int, tuple[Step, ...]]  # the start value and the steps


def generate(split: str, seed: int | str, count: int | None = None) -> list[dict[str, str]]:
    """`count` problems of a split (default: SPLIT_SIZES) as dicts with id, problem, solution.

    They depend on (split, seed) alone; a smaller count gives the first of a larger one's problems.
    """
    rng = random.Random(f"{split}/{seed}")
    seen: set[Computation] = set()
    rows: list[dict[str, str]] = []
    while len(rows) < (SPLIT_SIZES[split] if count is None else count):
        start, steps = draw_computation(rng, NUM_STEPS)
        if split_of(start, steps) != split or (start, steps) in seen:
            continue
        seen.add((start, steps))
        row = {"problem": tell(rng, start, steps), "solution": solve(start, steps)}
        rows.append({"id": f"arithmetic/{split}/{seed}/{len(rows)}", **row})
    return rows


def pick(rng: random.Random, options: tuple[str, ...]) -> str:
    """One of the options. Random.random() alone is the same in every version of Python."""
    return options[int(rng.random() * len(options))]


def draw_computation(rng: random.Random, num_steps: int) -> Computation:
    """(start value, steps) with every value within 0..LARGEST and enough steps of the skill."""
    steps: list[Step] = []
    while sum(step.kind in SKILL for step in steps) < min(LEAST_SKILL, num_steps - 1) or not steps:
        start, steps = draw_number(rng), []
        value = start
        while len(steps) < num_steps:
            step = draw_step(rng)
            if 0 <= step.apply(value) <= LARGEST:
                value = step.apply(value)
                steps.append(step)
    return start, tuple(steps)


def draw_number(rng: random.Random) -> int:
    return int(rng.random() * (LARGEST + 1))


def draw_step(rng: random.Random) -> Step:
    kind = pick(rng, ("add", "subtract", "add", "subtract", "double", "triple"))
    return Step(kind, {"double": 2, "triple": 3}.get(kind) or 2 + int(rng.random() * 8))


def split_of(start: int, steps: Sequence[Step]) -> str:
    """The split that a computation belongs to, whatever its wording."""
    text = " ".join([str(start), *(step.equation("") for step in steps)])
    return SHARES[hashlib.sha256(text.encode()).digest()[0] % len(SHARES)]


def tell(rng: random.Random, start: int, steps: Sequence[Step]) -> str:
    """The word problem."""
    names = {"name": pick(rng, NAMES), "items": pick(rng, ITEMS)}
    parts = [pick(rng, OPENINGS).format(value=start, **names)]
    parts += [pick(rng, TOLD[step.kind]).format(amount=step.amount, **names) for step in steps]
    return " ".join([*parts, pick(rng, CLOSINGS).format(**names)])


def solve(start: int, steps: Sequence[Step]) -> str:
    """The worked solution: the equation of each step, then the boxed answer."""
    parts, value = [BEGUN.format(value=start)], start
    for step in steps:
        told = WORKED[step.kind].format(amount=step.amount)
        parts.append(f"{told} {step.equation(value)} {step.apply(value)} .")
        value = step.apply(value)
    return " ".join([*parts, CONCLUDED.format(value=value)])
