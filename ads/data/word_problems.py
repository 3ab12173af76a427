"""The dataset `word_problems`: generated problems in ordinary language, and solutions worked in sentences.

A problem is an opening, up to two events and a question, of two to four operations in all; every number in it
is whole and within LEAST..MOST. A solution has a sentence for each, with its operations as equations, and
ends in a boxed answer. The splits are disjoint by construction: a hash of the computation, which is what
happens with which numbers and not its wording, decides which split a problem belongs to. `pretrain` is one of
them: a teacher may be trained on it (docs/small.md).
"""

import hashlib
import operator
import random
from dataclasses import dataclass
from typing import NamedTuple

from ads.data.arithmetic import pick

SPLIT_SIZES = {"train": 400, "test": 400, "holdout": 400, "pretrain": 6000}
SHARES = ("pretrain",) * 7 + ("train", "test", "holdout")  # of all computations, by hash
FEWEST, MOST_OPERATIONS = 2, 4
LEAST, MOST = 2, 100  # of every number: from 2 on, so that nouns are in the plural
DO = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}

Wording = tuple[str, str]  # how the problem tells it, and how the solution works it out


@dataclass(frozen=True)
class Kind:
    """Something that happens: its operations, the range of its numbers a and b, and how it is worded.

    An operation is `left sign right` of v, what there was before, r, the last result, a and b. Wordings
    have {x}, the first equation, and {y}, the second.
    """

    operations: tuple[str, ...]
    a: tuple[int, int]
    wordings: tuple[Wording, ...]
    b: tuple[int, int] | None = None


class Step(NamedTuple):
    """A kind by its name, with its numbers; b is 0 where it has only one."""

    kind: str
    a: int
    b: int = 0


Computation = tuple[Step, ...]

OPENINGS = {
    "has": Kind(
        (),
        (4, 70),
        (
            ("{name} has {a} {items}.", "{name} starts with {a} {items}."),
            ("There are {a} {items} on {name}'s table.", "At first there are {a} {items}."),
            ("{name} has collected {a} {items} so far.", "{name} has {a} {items} to begin with."),
            ("At the start of the week {name} owns {a} {items}.", "{name} begins the week with {a} {items}."),
        ),
    ),
    "buys": Kind(
        ("a * b",),
        (2, 9),
        (
            (
                "{name} buys {a} {boxes} of {b} {items}.",
                "{He} buys {a} {boxes} of {b} {items}, so {he} has {x} {items}.",
            ),
            (
                "{name} has {a} {boxes} with {b} {items} in each.",
                "The {a} {boxes} hold {b} {items} each, which is {x} {items}.",
            ),
            (
                "On {a} days in a row {name} gets {b} {items} a day.",
                "In {a} days {he} gets {x} {items}.",
            ),
        ),
        (2, 12),
    ),
}
EVENTS = {
    "gains": Kind(
        ("v + a",),
        (2, 50),
        (
            ("{He} finds {a} more.", "{He} finds {a} more, so now {he} has {x} {items}."),
            (
                "{His} {relative} gives {him} {a} {items}.",
                "With the {a} {items} from {his} {relative} {he} has {x} {items}.",
            ),
            ("Then {he} buys {a} more {items}.", "After {he} buys {a} more, there are {x} {items}."),
            ("{friend} brings {a} {items} along.", "{friend} adds {a} {items}, which makes {x} {items}."),
        ),
    ),
    "loses": Kind(
        ("v - a",),
        (2, 50),
        (
            ("{He} loses {a} of them.", "{He} loses {a}, so {x} {items} are left."),
            ("{He} gives {a} {items} to {friend}.", "After giving {a} to {friend}, {he} has {x} {items}."),
            ("Then {he} sells {a} of the {items}.", "{He} sells {a}, which leaves {x} {items}."),
            (
                "{His} {relative} takes {a} of them away.",
                "Without the {a} that {his} {relative} takes there are {x} {items}.",
            ),
        ),
    ),
    "grows": Kind(
        ("v * a",),
        (2, 4),
        (
            (
                "By the end of the month {he} has {a} times as many.",
                "{A} times as many is {x} {items}.",
            ),
            (
                "With {friend}'s help the number grows to {a} times what it was.",
                "That number times {a} is {x} {items}.",
            ),
        ),
    ),
    "packs": Kind(
        ("a * b", "v + r"),
        (2, 6),
        (
            (
                "{He} buys {a} {boxes} with {b} {items} in each.",
                "The {a} {boxes} hold {x} {items}. Together with what {he} had that is {y} {items}.",
            ),
            (
                "Each of {a} friends brings {him} {b} {items}.",
                "The friends bring {x} {items}, so now {he} has {y} {items}.",
            ),
            (
                "For {a} days {he} gets {b} new {items} a day.",
                "In {a} days that is {x} new {items}, and {y} {items} in all.",
            ),
        ),
        (2, 12),
    ),
    "gifts": Kind(
        ("a * b", "v - r"),
        (2, 6),
        (
            (
                "{He} gives {b} {items} to each of {a} friends.",
                "The friends get {x} {items}, so {he} keeps {y} {items}.",
            ),
            (
                "{He} sells {a} {boxes} of {b} {items}.",
                "The {a} {boxes} hold {x} {items}. After the sale {y} {items} are left.",
            ),
            (
                "On each of {a} days {he} uses {b} of them.",
                "In {a} days {he} uses {x} {items}, which leaves {y} {items}.",
            ),
        ),
        (2, 12),
    ),
}
QUESTIONS = {
    "now": Kind(
        (),
        (0, 0),
        (
            ("How many {items} are there now?", ""),
            ("How many {items} does {name} have in the end?", ""),
            ("What is the number of {items} after that?", ""),
        ),
    ),
    "shares": Kind(
        ("v / a",),
        (2, 9),
        (
            (
                "{He} shares all {items} equally among {a} children. How many {items} does each child get?",
                "Each of the {a} children gets {x} {items}.",
            ),
            (
                "{He} puts them into {boxes} of {a}. How many {boxes} does {he} fill?",
                "With {a} {items} in each, {he} fills {x} {boxes}.",
            ),
            (
                "They are laid out in {a} equal rows. How many {items} are in a row?",
                "In {a} equal rows there are {x} {items} each.",
            ),
        ),
    ),
    "sells": Kind(
        ("v * a",),
        (2, 9),
        (
            (
                "{He} sells all of them for {a} dollars each. How many dollars does {he} get?",
                "At {a} dollars each {he} gets {x} dollars.",
            ),
            (
                "Each of them weighs {a} grams. How many grams do they weigh together?",
                "At {a} grams each they weigh {x} grams.",
            ),
            (
                "{friend} has {a} times as many {items}. How many {items} does {friend} have?",
                "{friend} has {a} times as many, which is {x} {items}.",
            ),
        ),
    ),
    "together": Kind(
        ("v + a", "v + r"),
        (2, 30),
        (
            (
                "{friend} has {a} {items} more than that. How many {items} do the two have together?",
                "{friend} has {x} {items}. Together they have {y} {items}.",
            ),
            (
                "The next week there are {a} more {items} than in this one. How many is that in both weeks?",
                "The next week there are {x} {items}. In both weeks that is {y} {items}.",
            ),
        ),
    ),
}
KINDS = OPENINGS | EVENTS | QUESTIONS
SHE, HE = ("she", "her", "her"), ("he", "his", "him")
WOMEN = (
    "Ada Amy Anna Clara Diana Ella Emma Fiona Grace Hannah Iris Julia Kate Laura Lily Maria Mia Nora Olga "
    "Paula Rosa Ruth Sara Sofia Tina Vera Yuki Zoe"
)
MEN = (
    "Adam Alex Ali Carl Daniel David Eric Felix Frank George Henry Ivan Jack James Karl Leo Luis Mark Noah "
    "Omar Oscar Paul Peter Robert Sam Simon Tom Victor"
)
NAMES = dict.fromkeys(WOMEN.split(), SHE) | dict.fromkeys(MEN.split(), HE)
RELATIVES = ("mother", "father", "sister", "brother", "aunt", "uncle", "cousin", "neighbor", "teacher")
CONTAINED = {  # what there is, by what it comes in
    "boxes": ("pens", "pencils", "crayons", "candles", "chocolates", "tea bags", "nails", "light bulbs"),
    "bags": ("apples", "oranges", "marbles", "potatoes", "onions", "shells", "candies", "lemons"),
    "packs": ("cards", "stickers", "batteries", "stamps", "balloons", "notebooks", "seeds", "erasers"),
    "baskets": ("eggs", "peaches", "pears", "mushrooms", "plums", "flowers", "buns", "tomatoes"),
    "trays": ("cookies", "muffins", "cupcakes", "rolls", "plants", "glasses", "cups", "tarts"),
    "crates": ("bottles", "books", "jars", "bricks", "tiles", "cans", "melons", "toys"),
}
ITEMS = tuple((item, boxes) for boxes, items in CONTAINED.items() for item in items)
TIMES = {2: "Two", 3: "Three", 4: "Four"}
CONCLUDED = "The answer is \\boxed{{{value}}}."


class Equation(NamedTuple):
    """An operation on numbers, with its result."""

    left: int
    sign: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left} {self.sign} {self.right} = {self.result}"


def generate(split: str, seed: int | str, count: int | None = None) -> list[dict[str, str]]:
    """`count` problems of a split (default: SPLIT_SIZES) as dicts with id, problem, solution.

    They depend on (split, seed) alone; a smaller count gives the first of a larger one's problems. No two are
    of the same computation.
    """
    rng = random.Random(f"{split}/{seed}")
    seen: set[Computation] = set()
    rows: list[dict[str, str]] = []
    while len(rows) < (SPLIT_SIZES[split] if count is None else count):
        computation = draw_computation(rng)
        if split_of(computation) != split or computation in seen:
            continue
        seen.add(computation)
        problem, solution = tell(rng, computation)
        name = f"word_problems/{split}/{seed}/{len(rows)}"
        rows.append({"id": name, "problem": problem, "solution": solution})
    return rows


def draw_computation(rng: random.Random) -> Computation:
    """An opening, events and a question whose numbers fit, all sequences of kinds as likely as each other."""
    while True:
        opening, question = (pick(rng, tuple(kinds)) for kinds in (OPENINGS, QUESTIONS))
        events = [pick(rng, tuple(EVENTS)) for _ in range(int(rng.random() * 3))]
        names = (opening, *events, question)
        if FEWEST <= sum(len(KINDS[name].operations) for name in names) <= MOST_OPERATIONS:
            break
    while True:
        steps = tuple(Step(name, draw(rng, KINDS[name].a), draw(rng, KINDS[name].b)) for name in names)
        if work_out(steps) is not None:
            return steps


def draw(rng: random.Random, bounds: tuple[int, int] | None) -> int:
    """A number within bounds, both of them included; 0 where there are none."""
    low, high = bounds or (0, 0)
    return low + int(rng.random() * (high - low + 1))


def work_out(steps: Computation) -> list[tuple[Equation, ...]] | None:
    """The equations of each step; None where a result is not whole or not within LEAST..MOST."""
    found, value = [], steps[0].a
    for step in steps:
        equations: list[Equation] = []
        for operation in KINDS[step.kind].operations:
            left, sign, right = operation.split()
            known = {"v": value, "r": equations[-1].result if equations else 0, "a": step.a, "b": step.b}
            equation = Equation(known[left], sign, known[right], DO[sign](known[left], known[right]))
            is_whole = sign != "/" or equation.result * equation.right == equation.left
            if not (is_whole and LEAST <= equation.result <= MOST):
                return None
            equations.append(equation)
        value = equations[-1].result if equations else value
        found.append(tuple(equations))
    return found


def split_of(steps: Computation) -> str:
    """The split that a computation belongs to, whatever its wording."""
    text = " ".join(f"{step.kind} {step.a} {step.b}" for step in steps)
    return SHARES[hashlib.sha256(text.encode()).digest()[0] % len(SHARES)]


def tell(rng: random.Random, steps: Computation) -> tuple[str, str]:
    """(the word problem, its worked solution), in one of their wordings."""
    words, equations = draw_words(rng), work_out(steps)
    assert equations is not None, steps
    told, worked, value = [], [], steps[0].a
    for step, found in zip(steps, equations, strict=True):
        shown = dict(zip("xy", map(str, found), strict=False))
        numbers = {"a": str(step.a), "b": str(step.b), "A": TIMES.get(step.a, "")}
        problem, solution = pick_wording(rng, KINDS[step.kind].wordings)
        told.append(problem.format(**words, **numbers))
        worked += [solution.format(**words, **numbers, **shown)] if solution else []
        value = found[-1].result if found else value
    return " ".join(told), " ".join([*worked, CONCLUDED.format(value=value)])


def pick_wording(rng: random.Random, wordings: tuple[Wording, ...]) -> Wording:
    return wordings[int(rng.random() * len(wordings))]


def draw_words(rng: random.Random) -> dict[str, str]:
    """Who it is about, with what."""
    name, friend = (pick(rng, tuple(NAMES)) for _ in range(2))
    while friend == name:
        friend = pick(rng, tuple(NAMES))
    items, boxes = ITEMS[int(rng.random() * len(ITEMS))]
    he, his, him = NAMES[name]
    pronouns = {"he": he, "his": his, "him": him, "He": he.capitalize(), "His": his.capitalize()}
    return {"name": name, "friend": friend, "items": items, "boxes": boxes, **pronouns} | {
        "relative": pick(rng, RELATIVES)
    }
