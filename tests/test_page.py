"""report.html in a real browser, from file://, and what a planted text could do there."""

import json
import math

import numpy as np
from test_report import write_point, write_stage_1_and_2

from ads import store

# A realistic experiment, after the figures of a prototype: (tau, lam, teacher, student, direction)
DEMO = (
    (0.5, 0.0, 0.95, 0.925, "gradient"),
    (0.7, 0.0, 0.89, 0.89, "gradient"),
    (0.8, 0.0, 0.79, 0.90, "gradient"),
    (0.9, 0.0, 0.735, 0.84, "gradient"),
    (1.0, 0.0, 0.605, 0.84, "gradient"),
    (0.4, 0.15, 0.94, 0.87, "gradient"),
    (0.4, 0.25, 0.92, 0.77, "gradient"),
    (0.4, 0.35, 0.885, 0.66, "gradient"),
    (0.4, 0.5, 0.86, 0.65, "gradient"),
    (0.4, 0.7, 0.71, 0.54, "gradient"),
    (0.4, 0.9, 0.525, 0.36, "gradient"),
    (0.4, 7.0, 0.83, 0.84, "random"),
    (0.4, 0.7, 0.80, 0.82, "permuted"),
    (0.4, -0.35, 0.65, 0.57, "gradient"),
)
ONE_STEP = {"temperature": -0.015, "ADS": 0.009, "negative": -0.0146, "random": -0.014, "permuted": -0.0138}


def write_demo(folder, seeds=(1, 2, 3), num_problems=600):
    """Folders of one experiment per seed, complete with answers, losses, one-step test and contrasts."""
    for seed in seeds:
        write_demo_seed(folder / f"seed{seed}", seed, num_problems)
    return [folder / f"seed{seed}" for seed in seeds]


def write_demo_seed(exp_dir, seed, num_problems):
    rng = np.random.default_rng(seed)
    write_stage_1_and_2(exp_dir, baseline=(0.07, 0.06), dataset="arithmetic", n=num_problems)
    for i, (tau, lam, teacher, student, direction) in enumerate(DEMO):
        shares = [float(np.clip(share + rng.normal(0, 0.015), 0, 1)) for share in (teacher, student)]
        kind = direction if direction != "gradient" else "ADS" if lam > 0 else "negative"
        change = ONE_STEP[kind if lam else "temperature"] * (1 + 0.2 * rng.normal())
        stats = {
            "teacher_nll": 0.06 + 0.5 * (1 - teacher),
            "num_tokens": {"p10": 30, "p50": 44 + round(12 * (1 - teacher)), "p90": 60, "p100": 80},
            "one_step": {
                "n": 300,
                "step_length": 0.1,
                "loss_before": 0.61,
                "loss_after": 0.61 + change,
                "change": change,
            },
        }
        more = {"direction": direction, "seed": seed, "dataset": "arithmetic", "n": num_problems}
        write_point(
            exp_dir,
            str(i),
            tau,
            lam,
            (shares[0], shares[0] - 0.02),
            (shares[1], shares[1] - 0.03),
            losses=make_losses(student, rng),
            more_stats=stats,
            parquet=True,
            **more,
        )
        if lam:
            write_contrast(exp_dir, f"a{i}", lam if direction == "gradient" else 0.4, rng)


def make_losses(student, rng):
    steps = range(7, 76, 7)
    train = [[s, float(1.1 * math.exp(-s / 20) + 0.25 + rng.normal(0, 0.01))] for s in steps]
    holdout = [
        [s, float(0.9 * math.exp(-s / 25) + 0.3 + 0.5 * (1 - student) * s / 75)] for s in (0, 19, 38, 57, 75)
    ]
    return {"train": train, "holdout": holdout}


WORDS = [
    "Let",
    "us",
    "see",
    ".",
    "Tom",
    "starts",
    "with",
    "2",
    "3",
    ".",
    "He",
    "buys",
    "7",
    "more",
    ",",
    "so",
    "2",
    "3",
    "+",
    "7",
    "=",
    "3",
    "0",
    ".",
    "Then",
    "he",
    "gives",
    "away",
    "4",
    ",",
    "so",
    "3",
    "0",
    "-",
    "4",
    "=",
    "2",
    "6",
    ".",
    "Now",
    "the",
    "number",
    "is",
    "doubled",
    ":",
    "2",
    "6",
    "*",
    "2",
    "=",
    "5",
    "2",
    ".",
    "So",
    "the",
    "answer",
    "is",
    "\\boxed{",
    "5",
    "2",
    "}",
    ".",
]


def write_contrast(exp_dir, name, lam, rng, num_problems=5, text=None):
    problems = []
    for i in range(num_problems):
        problem = text or f"Tom has {20 + i} apples. He buys 7, gives 4 away, then doubles them. How many?"
        sides = {side: make_side(lam, rng, text) for side in ("clean", "ads")}
        problems.append(
            {"id": f"arithmetic/train/{i}", "problem": problem, "solution": f"#### {52 + i}", **sides}
        )
    path = exp_dir / "traces" / f"{name}.contrast.json"
    store.write_text(path, json.dumps({"trace_name": name, "problems": problems}))


def make_side(lam, rng, text):
    tokens = []
    for word in [text] if text else WORDS:
        clean, delta = float(rng.beta(5, 0.6)), float(rng.normal())
        weight = clean * math.exp(lam * delta)
        tokens.append([f"{word} ", clean, weight / (weight + 1 - clean), delta])
    return {"finished": True, "is_correct": bool(rng.random() < 0.7), "tokens": tokens}
