"""Whether defended traces can be told from clean ones: the AUC of a classifier of single traces.

It sees how unlikely a trace is to the teacher, loops, foreign script, sums that do not hold, and length.
Clean are the traces of the same seed without a defence, at the lowest temperature.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ads.data.text import has_loop, is_foreign, num_equations
from ads.report.attackers import defence_of
from ads.report.curves import Point, Points, group_by
from ads.report.experiments import read_beside
from ads.report.numbers import Z, seed_interval, show_interval, show_number
from ads.report.results import knob_of
from ads.report.worst import HALVES, half_of

CAPTION = (
    "AUC of a classifier (logistic regression on the features and their products) of single training traces, "
    "defended against clean ones; .5: they cannot be told apart. Trained on the other seeds (t interval) or, "
    "of one seed, on one half of the problems and tested on the other (DeLong's interval)"
)
FEATURES = ("NLL under the teacher", "loops", "foreign script", "sums that do not hold", "length")
MOST_TRACES = 500  # of each dataset: reading their text is what takes time


@dataclass(frozen=True)
class Traces:
    """A training dataset: the features (N, F) of its traces and the half that each problem is in."""

    features_NF: np.ndarray
    halves_N: np.ndarray


@dataclass(frozen=True)
class Detection:
    """How well one setting's traces are told from clean ones; `alone`: by which feature alone, how well."""

    arm: str
    tau: float
    lam: float
    label: str
    auc: float
    low: float | None
    high: float | None
    num_seeds: int
    num_traces: int
    feature: str
    alone: float


def detect(points: Points, labels: Mapping[Any, str]) -> list[Detection]:
    """The Detection of each setting of each defence whose training traces are there with their text.

    labels: of defences, by their keys.
    """
    read = [(point, read_traces(point.stages["train"])) for point in one_each(points)]
    found = {id(point): traces for point, traces in read if traces is not None}
    clean = lowest_tau([point for point, _ in read])
    clean = {place: point for place, point in clean.items() if id(point) in found}
    points = [point for point, _ in read if id(point) in found]
    groups = group_by(points, lambda point: (defence_of(point.row), point.row.tau, point.row.lam))
    detections = []
    for (key, *_), same in groups.items():
        own = [point for point in same if clean.get(place_of(point)) not in (None, point)]
        pairs = [
            (found[id(clean[place])], together([found[id(point)] for point in of_seed]))
            for place, of_seed in group_by(own, place_of).items()
        ]
        if pairs:
            detections.append(measure(same[0], labels.get(key, same[0].row.arm), pairs))
    return detections


def together(parts: Sequence[Traces]) -> Traces:
    """The traces of one seed: of several random directions, all of them."""
    features = np.concatenate([traces.features_NF for traces in parts])
    return Traces(features, np.concatenate([traces.halves_N for traces in parts]))


def one_each(points: Points) -> list[Point]:
    """A point for each dataset of training traces: the first of its attackers."""
    trained = [point for point in points if point.stages.get("train")]
    return [same[0] for same in group_by(trained, lambda point: point.stages["train"]["path"]).values()]


def place_of(point: Point) -> tuple:
    """Where a point's clean traces are: its seed's, of the same teacher and data."""
    return point.row.seed, point.row.teacher, point.stages["train"]["config"]["data_split"]


def lowest_tau(points: Points) -> dict[tuple, Point]:
    plain = sorted((p for p in points if p.row.arm == "temperature"), key=lambda point: point.row.tau)
    return {place: same[0] for place, same in group_by(plain, place_of).items()}


def read_traces(train: Mapping[str, Any]) -> Traces | None:
    """The features of a dataset's traces, of MOST_TRACES of its problems; None where its table lacks them."""
    text = train["config"].get("trace_colname", "trace")
    table = read_beside(train, ("id", text, "teacher_nll", "num_tokens"))
    if table is None:
        return None
    chosen = sorted(range(len(table["id"])), key=lambda i: hashlib.sha256(table["id"][i].encode()).digest())
    chosen = chosen[:MOST_TRACES]
    rows = [features_of(table[text][i], table["teacher_nll"][i], table["num_tokens"][i]) for i in chosen]
    return (
        Traces(np.array(rows, float), np.array([half_of(table["id"][i]) for i in chosen])) if rows else None
    )


def features_of(trace: str, nll: float, num_tokens: int) -> tuple[float, ...]:
    """In the order of FEATURES; of sums the share that does not hold."""
    num, num_wrong = num_equations(trace)
    return nll, has_loop(trace), is_foreign(trace), num_wrong / max(num, 1), float(np.log(max(num_tokens, 1)))


def measure(point: Point, label: str, pairs: Sequence[tuple[Traces, Traces]]) -> Detection:
    """Over (clean, defended) of each seed: trained on the other seeds; of one seed, on the other half of its
    problems."""
    if len(pairs) > 1:
        others = [[pair for pair in pairs if pair is not own] for own in pairs]
        aucs = [score(stack(rest), stack([own]))[0] for rest, own in zip(others, pairs, strict=True)]
        low, high = map(float, seed_interval(np.array(aucs), least=0.0))
    else:
        clean, defended = pairs[0]
        halves = [stack([(of_half(clean, half), of_half(defended, half))]) for half in HALVES]
        found = [score(halves[1 - half], halves[half]) for half in HALVES]
        aucs = [auc for auc, _ in found]
        error = Z * float(np.sqrt(sum(variance for _, variance in found))) / len(found)
        low, high = max(0.0, float(np.mean(aucs)) - error), min(1.0, float(np.mean(aucs)) + error)
    features_NF, labels_N = stack(pairs)
    alone = [best_way(labels_N, column_N) for column_N in features_NF.T]
    best, row = int(np.argmax(alone)), point.row
    ends = (low, high) if np.isfinite(low) else (None, None)
    sizes = len(pairs), sum(len(defended.halves_N) for _, defended in pairs)
    about = row.arm, row.tau, row.lam, label
    return Detection(*about, float(np.mean(aucs)), ends[0], ends[1], *sizes, FEATURES[best], alone[best])


def of_half(traces: Traces, half: int) -> Traces:
    chosen = traces.halves_N == half
    return Traces(traces.features_NF[chosen], traces.halves_N[chosen])


Labelled = tuple[np.ndarray, np.ndarray]  # features (N, F), whether each trace is defended (N,)


def stack(pairs: Sequence[tuple[Traces, Traces]]) -> Labelled:
    """All traces of pairs (clean, defended)."""
    features = [traces.features_NF for pair in pairs for traces in pair]
    labels = [np.full(len(pair[i].halves_N), bool(i)) for pair in pairs for i in (0, 1)]
    return np.concatenate(features), np.concatenate(labels)


def score(train: Labelled, test: Labelled) -> tuple[float, float]:
    """(AUC on the test traces of a classifier of the training traces, its variance).

    Logistic regression on the features and their products: a defence may move a feature either way. Where one
    side has no trace it is as good as a coin.
    """
    from sklearn.linear_model import LogisticRegression  # a second
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    if min(len(set(labels_N)) for _, labels_N in (train, test)) < 2:
        return 0.5, 0.25
    model = make_pipeline(StandardScaler(), PolynomialFeatures(2), LogisticRegression(max_iter=1000))
    scores_N = model.fit(*train).decision_function(test[0])
    return float(roc_auc_score(test[1], scores_N)), auc_variance(test[1], scores_N)


def auc_variance(labels_N: np.ndarray, scores_N: np.ndarray) -> float:
    """DeLong's variance of an AUC, of traces that are independent of each other."""
    defended, clean = np.sort(scores_N[labels_N]), np.sort(scores_N[~labels_N])
    above = [share_below(clean, defended), 1 - share_below(defended, clean)]
    return float(sum(np.var(shares, ddof=1) / len(shares) if len(shares) > 1 else 0.25 for shares in above))


def share_below(sorted_N: np.ndarray, values_M: np.ndarray) -> np.ndarray:
    """For each value the share of the others that lie below it, those equal to it counting half."""
    found = [np.searchsorted(sorted_N, values_M, side=side) for side in ("left", "right")]
    return np.mean(found, axis=0) / len(sorted_N)


def best_way(labels_N: np.ndarray, feature_N: np.ndarray) -> float:
    """The AUC of one feature by itself, in whichever direction it tells the traces apart."""
    auc = float(np.mean(share_below(np.sort(feature_N[~labels_N]), feature_N[labels_N])))
    return max(auc, 1 - auc)


def cells(detections: Sequence[Detection]) -> list[list[str]]:
    """Header and lines of the table."""
    lines = [["defence", "setting", "AUC", "95 % interval", "best feature alone", "seeds", "traces"]]
    for found in detections:
        alone = f"{found.feature} {show_number(found.alone)}"
        numbers = [show_number(found.auc), show_interval(found.low, found.high), alone]
        sizes = [str(found.num_seeds), str(found.num_traces)]
        lines.append([found.label, knob_of(found.tau, found.lam), *numbers, *sizes])
    return lines if detections else []
