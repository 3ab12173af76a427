"""Two tests on the same problems, compared problem by problem."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ads.report.bootstrap import Test, read_answers
from ads.report.experiments import TRACE_KEYS, Sidecar, is_attack, load_sidecar
from ads.report.numbers import Z, show_interval, show_number
from ads.report.results import ANSWERS
from ads.stage import layout
from ads.stage.errors import MissingInputError, UserError


@dataclass(frozen=True)
class Pair:
    """Accuracies of two tests by one kind of answers; the difference is the first's minus the second's.

    only_first, only_second: problems that one of them alone answers right; p: McNemar's, exact and two-sided.
    """

    answers: str
    n: int
    first: float
    second: float
    difference: float
    low: float
    high: float
    only_first: int
    only_second: int
    p: float


def compare_tests(words: Sequence[str], exp_dirs: Sequence[Path]) -> list[Pair]:
    """The Pair of two tests by each kind of answers that both have; UserError where there is none to make.

    words: a sidecar, a table, or a name in EXP_DIR/traces.
    """
    sidecars = [read_test(find_test(word, exp_dirs)) for word in words]
    names = f"--pair {' '.join(str(sidecar['path']) for sidecar in sidecars)}"
    first, second = map(answers_of, sidecars)
    check_same_problems(names, sidecars, first, second)
    found = [answers for answers in ANSWERS if answers in first and answers in second]
    if not found:
        raise UserError(f"{names}: there is no kind of answers that both were graded by")
    return [compare_answers(ANSWERS[answers], first[answers], second[answers]) for answers in found]


def check_same_problems(
    names: str, sidecars: Sequence[Sidecar], first: Mapping[str, Test], second: Mapping[str, Test]
) -> None:
    """UserError where two tests were not of the same problems, by their ids and by what the data were."""
    ids = [{problem for test in tests.values() for problem in test} for tests in (first, second)]
    if ids[0] != ids[1]:
        sizes = f"{len(ids[0])} and {len(ids[1])} of which {len(ids[0] & ids[1])} are the same"
        raise UserError(f"{names}: tests of different problems, {sizes}; give two tests of one split")
    made_from = {str(data) for sidecar in sidecars if (data := sidecar["inputs"].get("data"))}
    if len(made_from) > 1:
        raise UserError(f"{names}: problems of the same ids from different files; give two tests of one file")


def find_test(word: str, exp_dirs: Sequence[Path]) -> Path:
    """The sidecar of a test, given as a path or as a name."""
    if Path(word).suffix in (".yaml", ".parquet"):
        path = Path(word).with_suffix(".yaml")
        if not path.is_file():
            raise MissingInputError(f"--pair {word}: there is no sidecar {path}")
        return path
    found = [path for e in exp_dirs if (path := layout.path_of("traces_sidecar", e, word)).is_file()]
    if len(found) != 1:
        where = (
            " and in ".join(map(str, exp_dirs))
            or "any folder: give EXP_DIR too, or a path that ends in .yaml"
        )
        what = f"is in {' and '.join(map(str, found))}: give one of these" if found else f"is not in {where}"
        raise MissingInputError(f"--pair {word}: {what}")
    return found[0]


def read_test(path: Path) -> Sidecar:
    """The sidecar of a test; UserError for what is none, or answered a problem more than once."""
    sidecar = load_sidecar(path, TRACE_KEYS)
    if is_attack(sidecar):
        raise UserError(f"--pair {path}: is what attack.py made, and no test")
    if sidecar["config"].get("num_samples", 1) > 1:
        raise UserError(f"--pair {path}: has several samples a problem; give a test with one answer each")
    return sidecar


def answers_of(sidecar: Sidecar) -> dict[str, Test]:
    found, problem = read_answers(sidecar)
    if problem:
        raise UserError(f"--pair {sidecar['path']}: {problem}")
    return found


def compare_answers(answers: str, first: Test, second: Test) -> Pair:
    from scipy import stats  # half a second

    only = [sum(a[p] > b[p] for p in first) for a, b in ((first, second), (second, first))]
    n = len(first)
    one, other = (sum(test.values()) / n for test in (first, second))
    low, high = paired_interval(only[0], only[1], n)
    p = float(stats.binomtest(only[0], sum(only)).pvalue) if sum(only) else 1.0
    return Pair(answers, n, one, other, one - other, low, high, only[0], only[1], p)


def paired_interval(only_first: int, only_second: int, n: int) -> tuple[float, float]:
    """95 % interval of a difference of paired shares: Bonett and Price's (2012), Wald's with an answer added
    to each of the two counts, which covers what it should where few answers differ."""
    a, b = (only_first + 1) / (n + 2), (only_second + 1) / (n + 2)
    half = Z * math.sqrt((a + b - (a - b) ** 2) / (n + 2))
    return max(-1.0, a - b - half), min(1.0, a - b + half)


def show_pair(pair: Pair) -> str:
    """A line for the terminal."""
    shares = f"{show_number(pair.first)} and {show_number(pair.second)}"
    interval = f"{show_interval(pair.low, pair.high)} (paired 95 % interval, these problems only)"
    return (
        f"{pair.answers} answers, n {pair.n}: {shares}, difference {show_number(pair.difference)} "
        f"{interval}; "
        f"right in the first alone {pair.only_first}, in the second alone {pair.only_second}: "
        f"p = {pair.p:.3g} (McNemar, exact)"
    )


def record(pairs: Sequence[Pair]) -> dict[str, Any]:
    """{answers: numbers}, for the last line."""
    return {pair.answers: {k: v for k, v in asdict(pair).items() if k != "answers"} for pair in pairs}
