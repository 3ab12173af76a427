"""A line of results.csv, one grid point of one seed: its columns are declared here and nowhere else.

A new number in tables and plots is a line of NUMBERS; a new price to compare arms at is a line of PRICES.
"""

import dataclasses
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ads.report.numbers import (
    is_number,
    short_name,
    show_count,
    show_number,
    show_percent,
    show_setting,
    show_signed,
)
from ads.stage.settings import GenConfig, GradConfig, TrainConfig

Columns = Mapping[str, Any]
ANSWERS = {"af": "forced", "raw": "raw"}  # the answers of a test that are graded, in the columns and in words
TESTS = ("teacher", "student")  # who is tested
SEEDS = ("seed", "student_seed", "direction_seed")
SETTINGS = ("data", "teacher", "student", "student_few_shot", *SEEDS, "eps", "top_k", "top_p", "attack")
STAGES = dict(  # what a column STAGE.SETTING is called by
    **dict(model="", train="traces ", teacher="teacher test ", student="student test "),
    **dict(gradient="gradient ", attack="attack "),
)
FILES = " files"  # ends the name of a setting that is the fingerprint of files
CAPS = {  # columns of a defence by scores, empty where they are not set; in words
    "max_kl": "KL \N{LESS-THAN OR EQUAL TO} {}",
    "keep_top1": "top-1 kept",
    "plausibility": "plausibility {}",
}
# which play no part without lam
DEFENCE_SETTINGS = ("eps", "proxy_dtype", "proxy_student files", "grad_rank", *CAPS)
CONFIGS = {  # whose settings a column STAGE.SETTING, or SETTING, holds
    **dict.fromkeys(("", "train", "teacher", "student"), GenConfig),
    **{"model": TrainConfig, "gradient": GradConfig},
}
SYMBOLS = {"tau": "\N{GREEK SMALL LETTER TAU}", "lam": "\N{GREEK SMALL LETTER LAMDA}"}
POOLED = "same settings and seed more than once, pooled"
NO_SHARE = "left out, an accuracy that is no number from 0 to 1"
SPEED = "train_ms_per_token"  # which depends on the machine
KL, NUM_MODELS = "train_kl", "train_num_models"  # with SPEED, what a defence costs besides what it spoils
ONE_STEP = "train_one_step_change"
STEP_UNIT = "change of holdout loss, nats/token"


@dataclass(frozen=True)
class Price:
    """What traces cost the teacher; `column` is empty for its accuracy, by the answers that are compared."""

    words: str
    column: str = ""
    unit: str = ""
    axis: str = "teacher accuracy"
    wide: str = "10 points of teacher accuracy"  # more than this between two settings leaves doubt
    about: str = ""  # the page's words on it

    @property
    def short(self) -> str:
        return self.words.removeprefix("teacher ")

    def show(self, level: float | None, space: str = " ") -> str:
        """One such price, without its unit; an accuracy in percent."""
        return show_percent(level, space=space) if level is None or not self.unit else f"{level:.3g}"

    def show_with_unit(self, level: float | None) -> str:
        return f"{self.show(level)} {self.unit}".rstrip()


NLL_AXIS = "NLL of the teacher's test traces, nats/token"  # under the teacher without a defence
NLL_WIDE = "a quarter of the teacher NLL that both curves span"
NLL_ABOUT = (
    "mean NLL of the teacher's test traces under the teacher without a defence, in nats/token: how unlikely "
    "the traces are as its own"
)
PRICES = {
    "accuracy": Price("teacher accuracy"),
    "nll": Price("teacher NLL", "teacher_teacher_nll", "nats/token", NLL_AXIS, NLL_WIDE, NLL_ABOUT),
}


@dataclass(frozen=True)
class Number:
    """A column that is shown by itself: its heading among all points (none: left out there) and among
    settings, title and axis of its plot (none: not drawn)."""

    column: str
    heading: str = ""
    setting_heading: str = ""
    title: str = ""
    axis: str = ""
    show: Callable[[Any], str] = show_number
    is_always: bool = True  # else only where a row has it
    is_log: bool = False  # drawn on a log scale where it spans so much


NUMBERS = (
    Number("teacher_finished", "t.fin"),
    Number("student_finished", "s.fin"),
    Number(
        *("train_teacher_nll", "nll", "nll", "How unlikely the traces are", "nats/token under the teacher"),
        is_log=True,
    ),
    Number("train_num_tokens_p50", "tokens", "tokens", "Length of the traces", "median tokens", show_count),
    Number("train_finished", "", "finished", "Traces that finished", "share"),
    Number("model_holdout_loss", "loss", "student's loss"),
    Number(
        ONE_STEP, "step", "one step", "One step of the proxy on the traces", STEP_UNIT, show_signed, False
    ),
    Number(KL, "KL(q||p)", "KL(q||p)", is_always=False),
    Number("train_lam", "lam_t", "lam_t", is_always=False),
    Number("train_capped", "capped", "at a cap", is_always=False),
    Number(NUM_MODELS, "models", "models", show=show_count, is_always=False),
    Number(SPEED, "ms/token", "ms/token", is_always=False),
)


@dataclass(frozen=True)
class Accuracy:
    """A test's share of right answers with its 95 % Wilson interval, of `size` problems."""

    share: Any
    low: Any
    high: Any
    size: Any

    @property
    def is_share(self) -> bool:
        """Whether it is one: from 0 to 1, of a problem or more."""
        is_given = is_number(self.share) and is_number(self.size)
        return is_given and 0 <= self.share <= 1 and self.size > 0


@dataclass(frozen=True)
class ResultRow:
    """A line of results.csv: `columns` is all of it, and what is read by name has a field of the same name.

    Of an undistilled student, whom no traces were sampled for, tau and lam are 0.
    """

    columns: Columns
    arm: str
    tau: float = 0.0
    lam: float = 0.0
    eps: float | None = None
    seed: int = 0
    student_seed: int | None = None
    direction_seed: int | None = None
    data: str | None = None
    teacher: str | None = None
    student: str | None = None
    student_few_shot: int | None = None
    student_prefill: str | None = None
    attack: str | None = None
    teacher_n: int | None = None
    student_n: int | None = None
    student_finished: float | None = None

    def number(self, column: str) -> Any:
        """The value of another column; None where it is missing."""
        return self.columns.get(column)

    def accuracy(self, who: str, answers: str) -> Accuracy:
        """Of the teacher's or the student's test, by its forced or its raw answers."""
        parts = ("accuracy", "low", "high")
        share, low, high = (self.number(f"{who}_{answers}_{part}") for part in parts)
        return Accuracy(share, low, high, self.size(who))

    def size(self, who: str) -> int | None:
        """The number of problems in the teacher's or the student's test."""
        return self.teacher_n if who == "teacher" else self.student_n

    def share(self, who: str, answers: str) -> float:
        return self.accuracy(who, answers).share

    def price(self, name: str, answers: str) -> float:
        column = PRICES[name].column
        return self.number(column) if column else self.share("teacher", answers)

    @property
    def is_complete(self) -> bool:
        """Whether teacher and student have both been tested."""
        return None not in (self.teacher_n, self.student_n)

    @property
    def replicate(self) -> tuple[int, int | None]:
        """The seeds of one run of everything; its random directions are averaged."""
        return self.seed, self.student_seed

    @property
    def settings(self) -> list[str]:
        """The columns that tell curves apart: CAPS, SETTINGS, and those with a dot, STAGE.SETTING."""
        return [*CAPS, *SETTINGS, *(key for key in self.columns if "." in key)]

    @property
    def caps(self) -> list[str]:
        """The caps that are set, in words."""
        return [show_named(key, self.number(key)) for key in CAPS if self.number(key) is not None]


Rows = Sequence[ResultRow]


def read_row(columns: Columns) -> ResultRow:
    names = [field.name for field in dataclasses.fields(ResultRow) if field.name in columns]
    return ResultRow(columns, **{name: columns[name] for name in names})


def mean_row(rows: Rows) -> ResultRow:
    """A row with the mean of each number; what is no finite number in some is that of the others."""
    columns = dict(rows[0].columns)
    for key in dict.fromkeys(key for row in rows for key in row.columns):
        values = [value for value in (row.number(key) for row in rows) if is_number(value)]
        if key.endswith("_accuracy"):
            values = [value for value in values if 0 <= value <= 1]
        if len(set(values)) > 1:
            columns[key] = min(values) if key.endswith("_n") else float(np.mean(values))
        elif values:
            columns[key] = values[0]
    return read_row(columns)


def answers_of(rows: Rows) -> dict[str, str]:
    """The part of ANSWERS by which any of the rows' tests was graded; all where none was."""
    tests = [(row, who) for row in rows for who in TESTS]
    found = [answers for answers in ANSWERS if any(row.accuracy(who, answers).is_share for row, who in tests)]
    return {answers: ANSWERS[answers] for answers in found or ANSWERS}


def distinct_answers(rows: Rows) -> dict[str, str]:
    """answers_of the rows; where forced and raw ones agree in every test, one of them, named after both."""
    found = answers_of(rows)
    tests = [[row.accuracy(who, answers) for answers in found] for row in rows for who in TESTS]
    agree = all(one.share == first.share for first, *others in tests for one in others)
    is_tested = any(first.is_share for first, *_ in tests)
    is_one = len(found) > 1 and agree and is_tested
    return {next(iter(found)): " and ".join(found.values())} if is_one else dict(found)


def lost_shares(row: ResultRow) -> list[tuple[str, str]]:
    """[(answers, test and value)] of the tests whose accuracy should be there, and is none."""
    lost = []
    for who in TESTS:
        for answers, name in ANSWERS.items():
            # every test has raw answers, and forced ones where any number speaks of them
            is_due = answers == "raw" and row.size(who) is not None
            is_due = is_due or any(column.startswith(f"{who}_{answers}_") for column in row.columns)
            accuracy = row.accuracy(who, answers)
            if is_due and not accuracy.is_share:
                share = "missing" if accuracy.share is None else accuracy.share
                lost.append((answers, f"{who} {name} {share}"))
    return lost


def values_of(rows: Iterable[Columns], key: str) -> list[Any]:
    """The values of a column, in order; None is that of a row where it plays no part."""
    found = {row[key] for row in rows if row.get(key) is not None}
    return sorted(found, key=lambda value: (isinstance(value, str), value))


def identity(row: ResultRow, with_defence: bool = True) -> tuple[tuple[str, Any], ...]:
    """What tells a row's curve apart besides arm and knobs: all settings but the seeds, as a dict's key.

    with_defence=False: without those that play a part only where lam is not 0.
    """
    names = [key for key in row.settings if key not in SEEDS and row.number(key) is not None]
    return tuple(sorted((key, row.number(key)) for key in names if with_defence or not concerns_defence(key)))


def concerns_defence(key: str) -> bool:
    stage, _, name = key.rpartition(".")
    return stage == "gradient" or name in DEFENCE_SETTINGS


def differing(rows: Rows, but: Container[str]) -> list[str]:
    """The settings in which rows differ, as few as tell the rows apart, without those of `but`.

    A cap is one where any row sets it. The student's seed is one only where it is not the seed of the traces.
    Where a setting of several stages differs between the same rows, the first stage's is named. Fingerprints
    of files are named only where rows differ in nothing else.
    """
    columns = [row.columns for row in rows]
    has_own_seed = any(row.student_seed not in (None, row.seed) for row in rows)
    found: dict[tuple, str] = {}
    for key in dict.fromkeys(key for row in rows for key in row.settings):
        is_one = len(values_of(columns, key)) > (0 if key in CAPS else 1)
        if is_one and (key != "student_seed" or has_own_seed):
            found.setdefault((key.rpartition(".")[2], *(row.get(key) for row in columns)), key)
    names = [key for key in found.values() if not key.endswith(FILES)]
    for key in [*(key for key in found.values() if key.endswith(FILES)), "recipe"]:
        if num_groups(columns, [*names, key]) > num_groups(columns, names) and values_of(columns, key)[1:]:
            names.append(key)
    return [name for name in names if name not in but]


def num_groups(columns: Iterable[Columns], names: Iterable[str]) -> int:
    return len({tuple(row.get(name) for name in names) for row in columns})


def show_name(key: str) -> str:
    """A setting's column in words: "model.lr", of the student's recipe, is "lr"; "train.max_length", of the
    training traces, is "traces max_length"."""
    stage, dot, name = key.rpartition(".")
    return f"{STAGES[stage]}{name}" if dot else key


def show_named(key: str, value: object) -> str:
    """A setting with its value, as in "lr 0.0005"; a cap in the words that it is known by."""
    return CAPS[key].format(show_setting(value)) if key in CAPS else f"{show_name(key)} {show_setting(value)}"


def plain(value: object) -> Any:
    """A setting as a number or short text."""
    if isinstance(value, bool | int | float):
        return value
    return "null" if value is None else short_name(str(value))


def default_of(key: str) -> Any:
    """The default of a column's setting, as the column holds it; None where it is no key of a stage."""
    stage, _, name = key.rpartition(".")
    config: Any = CONFIGS.get(stage)
    field = config and config.__pydantic_fields__.get(name)
    return None if field is None else plain(field.default)


def show_knob(row: ResultRow, key: str = "") -> str:
    """A row's tau or lam with its symbol, such as that of its arm's curve."""
    key = key or ("lam" if row.lam else "tau")
    return f"{SYMBOLS[key]} {show_setting(row.number(key))}"


def knob_of(tau: float, lam: float) -> str:
    """The knob of an arm's curve with its symbol: lam where it is not 0."""
    key, value = ("lam", lam) if lam else ("tau", tau)
    return f"{SYMBOLS[key]} {show_setting(value)}"


def show_knobs(row: ResultRow) -> str:
    """Both knobs of an arm that has two."""
    return ", ".join(show_knob(row, key) for key in ("lam", "tau") if key == "tau" or row.lam)


def row_name(row: ResultRow) -> str:
    """A row in words: arm, knobs and seeds."""
    seeds = dict.fromkeys(row.number(key) for key in ("seed", "student_seed") if key in row.columns)
    direction = [] if row.direction_seed is None else [f"direction {row.direction_seed}"]
    parts = [row.arm, show_knob(row, "tau"), show_knob(row, "lam"), *row.caps, *direction]
    return ", ".join([*parts, f"seed {' and '.join(map(str, seeds))}"])


def show_accuracy(accuracy: Accuracy) -> str:
    """A share with its interval, as in .838 [.812, .861]."""
    bounds = f" [{show_number(accuracy.low)}, {show_number(accuracy.high)}]"
    return "-" if accuracy.share is None else f"{show_number(accuracy.share)}{bounds}"
