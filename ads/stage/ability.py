"""Whether a model can do a task, by the sidecar of its traces: one that cannot is no teacher."""

from pathlib import Path

from ads.stage.sidecar import read_sidecar


def is_any(least: str) -> bool:
    """Whether any model will do, able or not."""
    return float(least) == 0


def judge(sidecar: str, least: str) -> str:
    """`yes` or `no`, by whether at least such a share of raw answers is right, and then how many are."""
    stats = read_sidecar(Path(sidecar))["stats"]
    raw = stats["raw"]
    interval = f"{raw['low']:.3f} to {raw['high']:.3f}"
    told = f"{raw['accuracy']:.3f} of {stats['n']} holdout problems right (95 %: {interval})"
    return f"{'yes' if raw['accuracy'] >= float(least) else 'no'} {told}"
