"""Sidecars and tables of sweeps with several attackers, as the stages write them, for the report to read."""

import numpy as np
import pyarrow
import pyarrow.parquet
import yaml
from helpers_report import STUDENT, write_model, write_point, write_stage_1_and_2, write_student_test

from ads.stage import files
from ads.stage.sidecar import write_sidecar

RECIPES = {  # {attack: (label, threat, words for attack.py)}
    "naive": ("as published", dict(labels=False, clean_traces=0, queries=1, models="none"), {}),
    "full": ("all weights", dict(labels=False, clean_traces=0, queries=1, models="none"), {}),
    "correct": (
        "right answers only",
        dict(labels=True, clean_traces=0, queries=1, models="none"),
        dict(attack="correct"),
    ),
    "mix25": (
        "a quarter clean",
        dict(labels=False, clean_traces=0.25, queries=1, models="none"),
        dict(attack="mix", share=0.25),
    ),
    "resample4": (
        "likeliest right one of 4",
        dict(labels=True, clean_traces=0, queries=4, models="student"),
        dict(attack="resample", num_samples=4),
    ),
    "solo": (
        "own right answers",
        dict(labels=True, clean_traces=0, queries=0, models="student"),
        dict(attack="solo"),
    ),
}


def write_recipes(exp_dir, names=RECIPES):
    """EXP_DIR/attacks/NAME.yaml."""
    for name in names:
        label, threat, words = RECIPES[name]
        record = {"label": label, "threat": threat} | ({"attack": words} if words else {})
        files.write_text(exp_dir / "attacks" / f"{name}.yaml", yaml.safe_dump(record))


def write_attack(exp_dir, name, words, traces, n=5231, inputs=(), outputs=(), more_stats=(), **config):
    """The sidecar of what attack.py made of traces/TRACES.parquet."""
    paths = {"exp_dir": str(exp_dir), "traces": f"{exp_dir}/traces/{traces}.parquet", "trace_name": name}
    config = {**paths, "seed": 42, "batch_size": 8, "dtype": "auto", **words, **config}
    stats = {
        "n": n,
        "num_published": 7473,
        "num_dropped": 7473 - n,
        "tokens": 200 * n,
        "tokens_read": 300 * n,
        **dict(more_stats),
    }
    path = exp_dir / "traces" / f"{name}.yaml"
    write_sidecar(path, config, {"traces": "t", **dict(inputs)}, stats, 30, [])
    if outputs:
        change_sidecar(path, outputs=dict(outputs))


def change_sidecar(path, **parts):
    """Parts of a sidecar with other values."""
    record = files.read_yaml(path)
    for part, values in parts.items():
        record[part] = {**(record[part] or {}), **values}
    files.write_text(path, yaml.safe_dump(record, sort_keys=False))


def write_attacked(exp_dir, name, attack, train, shares, words=None, **more):
    """A student of an attack on the traces of a point and its test; words: what attack.py was asked for."""
    rows = train
    if words:
        rows = f"f{name}_{attack}"
        write_attack(exp_dir, rows, words, train, seed=more.get("seed", 42))
    model_more = {key: more.pop(key) for key in ("lora", "lr") if key in more}
    write_model(exp_dir, f"b{name}_{attack}", rows, seed=more.pop("seed", 42), **model_more)
    test = f"c{name}_{attack}"
    write_student_test(exp_dir, test, f"b{name}_{attack}", *shares, **more)
    change_sidecar(exp_dir / "traces" / f"{test}.yaml", config={"attacker": attack})


def write_training_table(path, rng, n=300, wrong=0.0, nll=0.1):
    """traces/NAME.parquet of training traces: so large a share of their sums does not hold."""
    rows = []
    for i in range(n):
        a, b = (int(v) for v in rng.integers(10, 99, 2))
        total = a + b + (int(rng.integers(1, 9)) if rng.random() < wrong else 0)
        rows.append(
            {
                "id": f"arithmetic/train/{i}",
                "trace": f"There are {a} and {b}, so {a} + {b} = {total}. The answer is \\boxed{{{total}}}.",
                "num_tokens": int(30 + rng.integers(0, 9)),
                "teacher_nll": float(nll * rng.gamma(4, 0.25)),
                "finished": True,
            }
        )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


# (tau, lam, direction, teacher, {attack: student})
SWEEP = (
    (0.4, 0.0, "gradient", 0.96, dict(naive=0.95, full=0.95, correct=0.95, mix25=0.95, resample4=0.96)),
    (1.0, 0.0, "gradient", 0.83, dict(naive=0.88, full=0.89, correct=0.91, mix25=0.92, resample4=0.95)),
    (1.4, 0.0, "gradient", 0.70, dict(naive=0.74, full=0.76, correct=0.84, mix25=0.86, resample4=0.90)),
    (0.4, 8.0, "gradient", 0.84, dict(naive=0.55, full=0.60, correct=0.52, mix25=0.76, resample4=0.72)),
    (0.4, 14.0, "gradient", 0.69, dict(naive=0.32, full=0.40, correct=0.29, mix25=0.55, resample4=0.50)),
    (0.4, 2.0, "poe", 0.85, dict(naive=0.80, full=0.82, correct=0.81, mix25=0.88, resample4=0.90)),
    (0.4, 4.0, "poe", 0.72, dict(naive=0.66, full=0.70, correct=0.71, mix25=0.80, resample4=0.82)),
    (0.4, 0.4, "corrupt", 0.93, dict(naive=0.45, full=0.47, correct=0.45, mix25=0.60, resample4=0.62)),
    (0.4, 0.7, "corrupt", 0.74, dict(naive=0.15, full=0.16, correct=0.15, mix25=0.41, resample4=0.38)),
)


def write_sweep(folder, seeds=(1, 2, 3), num_problems=600, attacks=RECIPES, sweep=SWEEP):
    """Folders of one experiment a seed, with students of all attacks, their answers and training tables."""
    for seed in seeds:
        write_sweep_seed(folder / f"seed{seed}", seed, num_problems, attacks, sweep)
    return [folder / f"seed{seed}" for seed in seeds]


def write_sweep_seed(exp_dir, seed, n, attacks, sweep):
    rng = np.random.default_rng(seed)
    test = {"data_split": "arithmetic_test", "n": n, "parquet": True, "answer_force": False}
    write_stage_1_and_2(exp_dir, (None, 0.05), dataset="arithmetic", n=n)
    write_recipes(exp_dir, attacks)
    for i, (tau, lam, direction, teacher, students) in enumerate(sweep):
        stats = {"teacher_nll": 0.04 + 0.6 * (0.97 - teacher) * (1 + 0.1 * (direction == "poe"))}
        taught = shaken(teacher, 0.01, seed, i)
        point = {"tau": tau, "lam": lam, "direction": direction, "seed": seed, "more_stats": stats}
        write_point(exp_dir, str(i), teacher_shares=(None, taught), student_shares=(None, 0), stages=1,
                    dataset="arithmetic", answer_force=False, **point)  # fmt: skip
        write_training_table(
            exp_dir / "traces" / f"a{i}.parquet", rng, wrong=0.9 * (0.97 - teacher), nll=stats["teacher_nll"]
        )
        write_teacher_test(exp_dir, f"d{i}", taught, **point, **test)
        for attack in (name for name in attacks if name in students):
            share = shaken(students[attack], 0.02, seed, i, *attack.encode())
            words, more = RECIPES[attack][2], {"lora": False, "lr": 1e-5} if attack == "full" else {}
            stats = {"loops": 0.05 * (1 - share), "finished": 0.99 - 0.1 * (1 - share)}
            write_attacked(exp_dir, str(i), attack, f"a{i}", (None, share), words, seed=seed,
                           more_stats=stats, **more, **test)  # fmt: skip
    if "solo" in attacks:
        write_solo(exp_dir, shaken(0.12, 0.02, seed), seed, **test)


def shaken(share, by, *key):
    """A share as it comes out in one seed, whatever else is drawn."""
    return float(np.clip(share + np.random.default_rng(key).normal(0, by), 0, 1))


def write_teacher_test(exp_dir, name, share, **more):
    from helpers_report import PROXY, write_traces

    if more["lam"]:
        more |= {"grad_path": f"{exp_dir}/student_grads.safetensors", "proxy_student": PROXY}
    write_traces(exp_dir, name, None, share, **more)


def write_solo(exp_dir, share, seed, **test):
    from helpers_report import write_traces

    own = {"is_teacher": False, "teacher": STUDENT, "data_split": "arithmetic_train", "tau": 1.0}
    write_traces(exp_dir, "own", None, 0.05, seed=seed, answer_force=False, **own)
    write_attacked(exp_dir, "solo", "solo", "own", (None, share), RECIPES["solo"][2], seed=seed, **test)
