"""What puts numbers of a report in doubt: a warning a kind."""

from collections.abc import Iterable, Iterator, Sequence

from ads.delta import agreement_table
from ads.report.curves import Curve, Point, group_by, pair_up, pool_copies
from ads.report.experiments import Experiment, has_changed, without_commit
from ads.report.numbers import short_name, show_number
from ads.report.results import NO_SHARE, POOLED, lost_shares, row_name
from ads.stage.settings import LEAST_COSINE

LEAST_FINISHED = 0.9
NUM_NAMED = 4  # cases that one warning names
COUNTS = {  # of a sidecar's stats: what it means that one is not 0
    "num_grader_timeouts": "answers counted as wrong, the grader timed out",
    "num_without_answer": "problems left out, no answer in their solution",
    "num_prompts_too_long": "problems left out, prompts too long",
}
Doubt = tuple[str, float, str]  # kind, badness, case


def warning_lines(experiments: Iterable[Experiment], points: Sequence[Point] = ()) -> list[str]:
    """One line per kind of doubt, naming the worst cases first."""
    found = [doubt for e in experiments for doubt in experiment_doubts(e)]
    lines = []
    for kind, same in group_by([*found, *point_doubts(points)], lambda doubt: doubt[0]).items():
        cases = sorted({(badness, short_name(case)) for _, badness, case in same}, reverse=True)
        lines.append(f"WARNING: {kind}: {name_some([case for _, case in cases])}")
    return lines


def name_some(cases: Sequence[str]) -> str:
    """The first cases by name, and how many more there are."""
    more = f" and {len(cases) - NUM_NAMED} more" if len(cases) > NUM_NAMED else ""
    return f"{', '.join(cases[:NUM_NAMED])}{more}"


def point_doubts(points: Sequence[Point]) -> Iterator[Doubt]:
    """Of points that are there more than once, or without an accuracy."""
    for point in pool_copies(points):
        if point.copies:
            yield POOLED, len(point.copies), f"{row_name(point.row)} ({len(point.copies)} times)"
    for point in points:
        for _, test in lost_shares(point.row):
            yield NO_SHARE, 0, f"{row_name(point.row)} ({test})"


def unpaired_lines(curves: Sequence[Curve]) -> list[str]:
    """What to say of curves that have nothing to be compared with, where others have."""
    arms, paired = {curve.arm for curve in curves}, [curve for _, curve in pair_up(curves)]
    alone = [curve for curve in curves if curve.arm != "temperature" and curve not in paired]
    if not alone or "temperature" not in arms:
        return []
    labels = "; ".join(curve.label for curve in alone)
    return [f"WARNING: not compared, no temperature curve shares the settings: {labels}"]


def experiment_doubts(experiment: Experiment) -> Iterator[Doubt]:
    """Everything that puts a number in doubt or is in no row."""
    for name in {name for sidecar in experiment.sidecars for name in without_commit(sidecar)}:
        yield "of the hub at commits not recorded, taken for one and the same", 0, name
    yield from trace_doubts(experiment)
    yield from gradient_doubts(experiment)
    for name, model in experiment.models.items():
        if experiment.traces_behind(model) is None:
            yield "models left out, the sidecars of their training traces are not here", 0, name
        elif experiment.traces_changed(model):
            yield "models left out, their training traces have changed since", 0, name
    tests = [(test, experiment.model_behind(test)) for test in experiment.traces_of(False, "test")]
    for test, model_name in tests:
        if experiment.model_changed(test):
            yield "student tests left out, the models have changed since", 0, str(model_name)
    for model_name in {name for _, name in tests}:
        if model_name and model_name not in experiment.models:
            yield "student tests left out, the sidecars of the models are not here", 0, model_name


def trace_doubts(experiment: Experiment) -> Iterator[Doubt]:
    for name, trace in experiment.traces.items():
        stats = trace["stats"]
        finished, cosine = stats.get("finished", 1), trace.get("perturbation", {}).get("cosine", 1)
        if cosine < LEAST_COSINE:
            kind = f"theta +- eps g lost to rounding, cosine below {LEAST_COSINE}"
            yield kind, -cosine, f"{name} {show_number(cosine)}"
        if not finished >= LEAST_FINISHED:
            yield f"finished share below {LEAST_FINISHED}", -finished, f"{name} {show_number(finished)}"
        for key, kind in COUNTS.items():
            if num := stats.get(key):
                yield kind, num, f"{name} {num}"


def gradient_doubts(experiment: Experiment) -> Iterator[Doubt]:
    for name, gradient in experiment.gradients.items():
        for trace_name, trace in experiment.traces.items():
            if trace["config"]["lam"] and has_changed(trace, "gradient", gradient, f"{name}.safetensors"):
                yield f"traces of another gradient than the one that {name} describes", 0, trace_name
        found, eps = gradient.get("diagnostics"), gradient["config"].get("eps", 0)
        least = agreement_table.LEAST_CORRELATION
        if found and (correlation := agreement_table.used(found, eps)["correlation"]) < least:
            kind = f"Delta a poor one, correlation with the exact one below {least}"
            yield kind, -correlation, f"{name} {show_number(correlation)}"
