"""Accuracies of tests under resampled problems: the interval of a comparison within one seed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ads.data.tables import read_columns
from ads.report.curves import Curve, Point, pair_up
from ads.report.results import ANSWERS, TESTS

NUM_DRAWS = 2000
BLOCK = 250  # draws resampled at once: bounds the memory for large test sets
Test = Mapping[str, float]  # {problem id: whether its answer is right, of several samples the share that is}


@dataclass(frozen=True)
class Draws:
    """Accuracies (B,) under B resamples by (replicate, path of the test's sidecar, answers).

    `missing` says why some are not there.
    """

    shares: Mapping[tuple, np.ndarray] = field(default_factory=dict)
    missing: str = ""

    def of(self, point: Point, who: str, answers: str) -> np.ndarray | None:
        """Of a point's test, the mean of its copies; None where the answers of one are missing."""
        keys = [(point.row.replicate, part.stages[who]["path"], answers) for part in point.parts]
        if any(key not in self.shares for key in keys):
            return None
        return np.mean([self.shares[key] for key in keys], axis=0)


def load_draws(curves: Sequence[Curve]) -> Draws:
    """The draws of all tests whose answers lie beside their sidecars; none where nothing is compared."""
    pairs = pair_up(curves)
    if not pairs:
        return Draws()
    tests, missing = read_tests(part for curve in curves for point in curve.line for part in point.parts)
    return Draws(draw_accuracies([curve for pair in pairs for curve in pair], tests), missing)


def read_tests(points: Iterable[Point]) -> tuple[dict[tuple, Test], str]:
    """({(path of the sidecar, answers): test} of points' tests, why one is not there)."""
    stages = {stage["path"]: stage for point in points for who in TESTS if (stage := point.stages.get(who))}
    tests: dict[tuple, Test] = {}
    missing: list[str] = []
    for path, stage in stages.items():
        found, problem = read_answers(stage)
        tests |= {(path, answers): test for answers, test in found.items()}
        missing += [problem] if problem else []
    return tests, missing[0] if missing else ""


def read_answers(stage: Mapping[str, Any]) -> tuple[dict[str, Test], str]:
    """({answers: test}, why there are none) of a test, from the parquet beside its sidecar."""
    path = stage["path"].with_suffix(".parquet")
    name = f"{path.parent.name}/{path.name}"
    if not path.is_file():
        return {}, f"{name} is not there"
    problem = "problem_id" if stage["config"].get("num_samples", 1) > 1 else "id"
    try:
        table = read_columns(path, (problem, *(f"is_{answers}_correct" for answers in ANSWERS)))
    except ValueError as error:
        return {}, str(error)
    tests: dict[str, Test] = {}
    for answers in ANSWERS:
        correct = table[f"is_{answers}_correct"]
        if stage["stats"].get(answers) and None not in correct:
            if sum(correct) != stage["stats"][answers]["num_correct"]:
                return {}, f"{name} does not hold the answers that its sidecar counts"
            tests[answers] = share_by_problem(table[problem], correct)
    return tests, ""


def share_by_problem(problems: Sequence[str], correct: Sequence[bool]) -> Test:
    """{problem: share of its answers that are right}."""
    found: dict[str, list[bool]] = {}
    for problem, is_correct in zip(problems, correct, strict=True):
        found.setdefault(problem, []).append(is_correct)
    return {problem: sum(answers) / len(answers) for problem, answers in found.items()}


def draw_accuracies(
    curves: Iterable[Curve], tests: Mapping[tuple, Test], others: Iterable[tuple] = ()
) -> dict[tuple, np.ndarray]:
    """{(replicate, path, answers): accuracies (B,)} of tests by (path, answers).

    All stages of a replicate see the same resamples: they were tested on the same problems; and so do
    `others`, tests that are set beside those of every replicate.
    """
    seen: dict[tuple, dict[tuple, None]] = {}
    for curve in curves:
        for point in [part for pooled in curve.line for part in pooled.parts]:
            keys = [(point.stages[who]["path"], answers) for who in TESTS for answers in ANSWERS]
            seen.setdefault(point.row.replicate, {}).update(dict.fromkeys(k for k in keys if k in tests))
    for found in seen.values():
        found.update(dict.fromkeys(others))
    draws: dict[tuple, np.ndarray] = {}
    for seed, (replicate, found) in enumerate(seen.items()):
        drawn = resample([tests[key] for key in found], np.random.default_rng(seed))
        draws |= {(replicate, *key): shares for key, shares in zip(found, drawn, strict=True)}
    return draws


def resample(tests: Sequence[Test], rng: np.random.Generator) -> np.ndarray:
    """Accuracies (S, B) of S tests under the same B bootstrap draws of problems."""
    ids = {i: position for position, i in enumerate(dict.fromkeys(i for test in tests for i in test))}
    correct_SN, present_SN = np.zeros((2, len(tests), len(ids)))
    for row, test in enumerate(tests):
        columns = [ids[i] for i in test]
        correct_SN[row, columns] = list(test.values())
        present_SN[row, columns] = 1
    shares = []
    for _ in range(0, NUM_DRAWS, BLOCK):
        drawn = rng.integers(len(ids), size=(BLOCK, len(ids))) + np.arange(BLOCK)[:, None] * len(ids)
        times_BN = np.bincount(drawn.ravel(), minlength=BLOCK * len(ids)).reshape(BLOCK, -1).astype(float)
        shares.append(correct_SN @ times_BN.T / np.maximum(present_SN @ times_BN.T, 1))
    return np.concatenate(shares, axis=1)
