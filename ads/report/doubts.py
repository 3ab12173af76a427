"""What puts numbers of a report in doubt: a warning a kind."""

from ads.delta import agreement_table
from ads.delta.agreement_table import LEAST_CORRELATION
from ads.report.compare import pair_up
from ads.report.curves import NO_SHARE, POOLED, is_complete, lost_shares, point_name, pool_copies, show_number
from ads.report.points import (
    has_changed,
    model_behind,
    model_changed,
    select,
    short_name,
    sidecars_of,
    traces_behind,
    traces_changed,
    without_commit,
)
from ads.stage.settings import LEAST_COSINE

LEAST_FINISHED = 0.9
NUM_NAMED = 4  # cases that one warning names


def warning_lines(experiments, points=()):
    """One line per kind of doubt, naming the worst cases first."""
    found, lines = {}, []
    for kind, badness, case in [*(doubt for e in experiments for doubt in doubts(e)), *point_doubts(points)]:
        found.setdefault(kind, set()).add((badness, short_name(case)))
    for kind, cases in found.items():
        named = ", ".join(case for _, case in sorted(cases, reverse=True)[:NUM_NAMED])
        more = f" and {len(cases) - NUM_NAMED} more" if len(cases) > NUM_NAMED else ""
        lines.append(f"WARNING: {kind}: {named}{more}")
    return lines


def point_doubts(points):
    """(kind, badness, case) of points that are there more than once, or without an accuracy."""
    for point in pool_copies(point for point in points if is_complete(point.row)):
        if point.copies:
            yield POOLED, len(point.copies), f"{point_name(point.row)} ({len(point.copies)} times)"
    for point in points:
        for _, test in lost_shares(point.row):
            yield NO_SHARE, 0, f"{point_name(point.row)} ({test})"


def unpaired_lines(curves):
    """What to say of curves that have nothing to be compared with, where others have."""
    arms, paired = {curve.arm for curve in curves}, [curve for _, curve in pair_up(curves)]
    alone = [curve for curve in curves if curve.arm != "temperature" and curve not in paired]
    if not alone or "temperature" not in arms:
        return []
    labels = "; ".join(curve.label for curve in alone)
    return [f"WARNING: not compared, no temperature curve shares the settings: {labels}"]


def doubts(experiment):
    """(kind, badness, case) of everything that puts a number in doubt or is in no row."""
    for name in {name for sidecar in sidecars_of(experiment) for name in without_commit(sidecar)}:
        yield "of the hub at commits not recorded, taken for one and the same", 0, name
    for name, trace in experiment.traces.items():
        stats = trace["stats"]
        finished, cosine = stats.get("finished", 1), trace.get("perturbation", {}).get("cosine", 1)
        if cosine < LEAST_COSINE:
            kind = f"theta +- eps g lost to rounding, cosine below {LEAST_COSINE}"
            yield kind, -cosine, f"{name} {show_number(cosine)}"
        if not finished >= LEAST_FINISHED:
            yield f"finished share below {LEAST_FINISHED}", -finished, f"{name} {show_number(finished)}"
        if num := stats.get("num_grader_timeouts"):
            yield "answers counted as wrong, the grader timed out", num, f"{name} {num}"
        if num := stats.get("num_without_answer"):
            yield "problems left out, no answer in their solution", num, f"{name} {num}"
        if num := stats.get("num_prompts_too_long"):
            yield "problems left out, prompts too long", num, f"{name} {num}"
    for name, gradient in experiment.gradients.items():
        for trace_name, trace in experiment.traces.items():
            if trace["config"]["lam"] and has_changed(trace, "gradient", gradient, f"{name}.safetensors"):
                yield f"traces of another gradient than the one that {name} describes", 0, trace_name
        found, eps = gradient.get("diagnostics"), gradient["config"].get("eps", 0)
        if found and (correlation := agreement_table.used(found, eps)["correlation"]) < LEAST_CORRELATION:
            kind = f"Delta a poor one, correlation with the exact one below {LEAST_CORRELATION}"
            yield kind, -correlation, f"{name} {show_number(correlation)}"
    for name, model in experiment.models.items():
        if traces_behind(experiment, model) is None:
            yield "models left out, the sidecars of their training traces are not here", 0, name
        elif traces_changed(experiment, model):
            yield "models left out, their training traces have changed since", 0, name
    for student in select(experiment, False, "test"):
        if model_changed(experiment, student):
            name = model_behind(experiment, student)
            yield "student tests left out, the models have changed since", 0, name
    for name in {model_behind(experiment, s) for s in select(experiment, False, "test")}:
        if name and name not in experiment.models:
            yield "student tests left out, the sidecars of the models are not here", 0, name
