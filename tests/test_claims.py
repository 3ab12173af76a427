"""The claims of an experiment and their verdicts, from sidecars as the stages write them to report.py's files."""

import csv
import dataclasses

import numpy as np
import pytest
from test_report import STUDENT, run, write_point, write_stage_1_and_2, write_traces

import report
from ads import claims, store, tradeoff

# (tau, lam, direction): (teacher, student, NLL of the teacher's traces, one-step change)
GRID = {
    (0.4, 0.0, "gradient"): (0.97, 0.95, 0.03, -0.02),
    (1.1, 0.0, "gradient"): (0.86, 0.93, 0.12, -0.018),
    (1.4, 0.0, "gradient"): (0.70, 0.80, 0.40, -0.01),
    (0.4, 4.0, "gradient"): (0.93, 0.80, 0.06, 0.005),
    (0.4, 8.0, "gradient"): (0.84, 0.60, 0.15, 0.01),
    (0.4, 12.0, "gradient"): (0.72, 0.40, 0.35, 0.02),
    (0.4, -6.0, "gradient"): (0.87, 0.90, 0.05, -0.03),
    (0.4, -9.0, "gradient"): (0.70, 0.70, 0.20, -0.04),
    (0.4, 0.4, "corrupt"): (0.92, 0.70, 0.20, -0.01),
    (0.4, 0.8, "corrupt"): (0.70, 0.20, 0.50, -0.005),
}
DIRECTIONS = {1: (0.88, 0.92), 2: (0.86, 0.90), 3: (0.84, 0.88)}  # random ones at lam 80: (teacher, student)
ASKED = {"base": 0.004, "base_few_shot": 0.02, "base_prefill": 0.01}


def write_experiment(exp_dir, seed=1, shift=0.0, grid=GRID, has_nll=True, parquet=True, asked=ASKED):
    """A whole experiment of one seed; `shift` is added to every student."""
    write_stage_1_and_2(exp_dir, dataset="arithmetic", n=400)
    (exp_dir / "traces" / "base.yaml").unlink()
    ways = {"base_few_shot": {"few_shot": 2, "few_shot_traces": "x.parquet", "max_length": 400}}
    ways["base_prefill"] = {"prefill": "start with"}
    base = {"is_teacher": False, "teacher": STUDENT, "data_split": "arithmetic_test", "tau": 0.0, "n": 400}
    for name, share in asked.items():
        write_traces(exp_dir, name, share, share, seed=seed, **base, **ways.get(name, {}))
    rows = [(*key, None, *values) for key, values in grid.items()]
    rows += [
        (0.4, 80.0, "random", number, *shares, 0.1, -0.015)
        for number, shares in DIRECTIONS.items()
        if grid is GRID
    ]
    for i, (tau, lam, direction, number, teacher, student, nll, change) in enumerate(rows):
        stats = {"one_step": {"n": 9, "change": change}, "teacher_nll": nll if has_nll else None}
        more = {"direction": direction, "direction_seed": number, "seed": seed, "more_stats": stats}
        more |= {"dataset": "arithmetic", "n": 400, "parquet": parquet}
        shares = [(share, share) for share in (teacher, student + shift)]
        write_point(exp_dir, str(i), tau, lam, *shares, **more)
    return exp_dir


def load(*exp_dirs):
    """(claims by key, curves, baselines)."""
    experiments = [report.load_experiment(path) for path in exp_dirs]
    curves = tradeoff.make_curves(report.collect_points(experiments))
    baselines = report.collect_baselines(experiments)
    found = {}
    for claim in claims.make_claims(curves, baselines, *report.load_draws(curves)):
        found.setdefault(claim.key, []).append(claim)
    return found, curves, baselines


if __name__ == "__main__":
    import sys
    from pathlib import Path

    folder = Path(sys.argv[1])
    dirs = [write_experiment(folder / f"s{i}", i, 0.01 * i) for i in (1, 2, 3)]
    report.main(list(map(str, dirs[: int(sys.argv[2])])))
