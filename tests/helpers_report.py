"""Sidecars of experiments that never ran, as the stages write them, for the report to read."""

import functools
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from conftest import run_script

import report
from ads.data.traces import wilson_interval
from ads.report import figures, plots
from ads.report.curves import make_curves
from ads.report.experiments import load_experiments
from ads.report.points import collect_points, collect_undistilled
from ads.report.results import read_row
from ads.stage import sidecar
from ads.stage.config import to_dict
from ads.stage.settings import GenConfig, GradConfig, TrainConfig
from ads.stage.sidecar import write_sidecar

# what is the same while tests run is looked up once: most of the time that sidecars take is git's
for name in ("versions", "git_commit"):
    setattr(sidecar, name, functools.cache(getattr(sidecar, name)))

ROOT = Path(report.__file__).parent

N = 1200

TEACHER, STUDENT, PROXY = "owner/teacher-7B", "owner/student-3B", "owner/proxy-1B"

COMMIT = "c" * 40

PERTURBATION = {"share_changed": 0.99, "cosine": 0.9995, "relative_norm": 1.0}


def write_traces(
    exp_dir, name, forced, raw, n=N, more_stats=(), perturbation=None, parquet=False, inputs=(), **config
):
    """A trace sidecar, and perhaps its answers; forced and raw are shares (forced may be None: no answer
    forcing)."""
    if direction := config.pop("direction", None):
        config["defence"] = "ads" if direction == "gradient" else direction
    cfg = GenConfig(exp_dir=str(exp_dir), trace_name=name, **{"teacher": TEACHER, **config})
    stats = {
        "n": n,
        "num_prompts_too_long": 0,
        "raw": accuracy(raw, n),
        "af": None if forced is None else accuracy(forced, n),
        "finished": 0.975,
        "num_tokens": {"p10": 90, "p50": 214, "p90": 430, "p100": 1000},
        "teacher_nll": 0.31234,
        "num_grader_timeouts": 0,
        "tokens_per_second": 1234.5,
        **dict(more_stats),
    }
    notes = {"perturbation": perturbation or PERTURBATION} if cfg.lam else {}
    made_from = {"teacher": f"hub:{cfg.teacher}@{COMMIT}", **dict(inputs)}
    write_sidecar(cfg.sidecar_path, to_dict(cfg), made_from, stats, 360, **notes)
    if parquet:
        write_answers(cfg.parquet_path, stats)


def write_answers(path, stats):
    """id and is_*_correct of each problem: the easy ones are right, by a difficulty that all tests share."""
    n, columns = stats["n"], {}
    noise = np.random.default_rng(sum(path.stem.encode())).normal(size=n)
    order = np.argsort(np.random.default_rng(0).normal(size=n) + 0.5 * noise)
    for rule in ("raw", "af"):
        num_correct = stats[rule]["num_correct"] if stats[rule] else 0
        correct = np.isin(np.arange(n), order[:num_correct])
        columns[f"is_{rule}_correct"] = correct.tolist() if stats[rule] else [None] * n
    table = {"id": [f"gsm8k/test/{i}" for i in range(n)], **columns}
    pyarrow.parquet.write_table(pyarrow.table(table), path)


def accuracy(share, n):
    num_correct = round(share * n)
    low, high = wilson_interval(num_correct, n)
    numbers = {"accuracy": num_correct / n, "low": low, "high": high}
    return {key: round(value, 4) for key, value in numbers.items()} | {"num_correct": num_correct}


def write_model(exp_dir, name, train_name, student=STUDENT, losses=None, inputs=(), **config):
    path = f"{exp_dir}/traces/{train_name}.parquet"
    cfg = TrainConfig(exp_dir=str(exp_dir), model_name=name, student=student, train_traces=path, **config)
    stats = {"n": 5231, "num_cut": 0, "num_steps": 981, "train_loss": 0.21, "holdout_loss_start": 0.9}
    stats["holdout_loss"] = 0.4567
    losses = losses or {"train": [[1, 0.5]], "holdout": []}
    write_sidecar(cfg.sidecar_path, to_dict(cfg), dict(inputs), stats, 720, losses=losses)


def write_student_test(exp_dir, name, model, forced, raw, **more):
    made = {"teacher": f"{exp_dir}/models/{model}/final", "data_split": "gsm8k_test", "tau": 0.0}
    write_traces(exp_dir, name, forced, raw, is_teacher=False, **made | more)


def write_point(
    exp_dir, name, tau, lam, teacher_shares, student_shares, stages=4, dataset="gsm8k", losses=None, **more
):
    """The first `stages` stages of a grid point; shares are (forced, raw)."""
    if lam:
        more |= {"grad_path": f"{exp_dir}/student_grads.safetensors", "proxy_student": PROXY}
    sampled = {"tau": tau, "lam": lam, **more}
    write_traces(exp_dir, f"a{name}", *teacher_shares, **sampled | {"data_split": f"{dataset}_train"})
    test = {"data_split": f"{dataset}_test"}
    test |= {key: more[key] for key in ("parquet", "n") if key in more}
    if stages >= 2:
        write_model(exp_dir, f"b{name}", f"a{name}", seed=more.get("seed", 42), losses=losses)
    if stages >= 3:
        write_student_test(exp_dir, f"c{name}", f"b{name}", *student_shares, **test)
    if stages >= 4:
        stats = {k: v for k, v in dict(more.get("more_stats", ())).items() if k != "one_step"}
        write_traces(exp_dir, f"d{name}", *teacher_shares, **sampled | test | {"more_stats": stats})


def agreement(correlation):
    return {"correlation": correlation, "correlation_p10": 0.9, "sine": 0.1, "relative_error": 0.2}


DIAGNOSTICS = {
    "num_positions": 382, "dtype": "bfloat16", "rank": 16, "exact": agreement(0.99851),
    "central": {"0.001": agreement(0.5917), "0.01": agreement(0.9617)}, "best_eps": "0.01",
    "split_half": agreement(0.974), "delta_std": 53.42, "lam_of_spread": {"0.1": 0.001872, "0.3": 0.005616},
}  # fmt: skip


def write_stage_1_and_2(exp_dir, baseline=(0.31, 0.25), dataset="gsm8k", n=N, inputs=()):
    write_traces(exp_dir, "clean", 0.91, 0.9, data_split=f"{dataset}_holdout")
    cfg = GradConfig(
        exp_dir=str(exp_dir), proxy_student=PROXY, holdout_traces=f"{exp_dir}/traces/clean.parquet"
    )
    stats = {"n": 2242, "num_left_out": 0, "loss": 0.412345, "grad_norm": 7.412345, "num_response_tokens": 9}
    norms = {"lm_head.weight": 1.0} | {f"model.layers.{i}.mlp.up_proj.weight": 0.9**i for i in range(12)}
    write_sidecar(cfg.sidecar_path, to_dict(cfg), {}, stats, 60, norms=norms, diagnostics=DIAGNOSTICS)
    base = {
        "is_teacher": False,
        "teacher": STUDENT,
        "data_split": f"{dataset}_test",
        "n": n,
        "inputs": inputs,
    }
    write_traces(exp_dir, "base", *baseline, few_shot=4, few_shot_traces="clean.parquet", **base)


def write_both_arms(exp_dir, **more):
    """Two points an arm, written in no order, under names that say nothing."""
    write_stage_1_and_2(exp_dir)
    write_point(exp_dir, "1", 0.6, 0.03, (0.70, 0.50), (0.25, 0.20), **more)
    write_point(exp_dir, "2", 1.4, 0.0, (0.80, 0.75), (0.55, 0.50), **more)
    write_point(exp_dir, "3", 0.6, 0.015, (0.84, 0.70), (0.49, 0.41), **more)
    write_point(exp_dir, "4", 0.6, 0.0, (0.90, 0.88), (0.61, 0.58), **more)
    return exp_dir


def run(*arguments):
    """(exit code, stdout, stderr) of the script, as a user runs it."""
    result = run_script("report.py", *arguments, check=False, cwd=arguments[0].parent if arguments else None)
    return result.returncode, result.stdout, result.stderr


def baselines_of(experiments):
    return [point.row for point in collect_undistilled(experiments)]


def rows_of(*exp_dirs):
    """(lines of results.csv of the points, of the undistilled students)."""
    experiments = load_experiments(exp_dirs)
    points, baselines = collect_points(experiments), baselines_of(experiments)
    return [point.row.columns for point in points], [row.columns for row in baselines]


def is_complete(columns):
    return read_row(columns).is_complete


def curves_of(*exp_dirs):
    return make_curves(collect_points(load_experiments(exp_dirs)))


def draw(*exp_dirs):
    """The figure of the trade-off."""
    baselines = baselines_of(load_experiments(exp_dirs))
    panels = plots.make_panels(curves_of(*exp_dirs), baselines, [])
    return figures.compose(panels["tradeoff"], "")


def drawn_points(figure):
    """Per panel, the (x, y) lists of each curve."""
    lines = [[container.lines[0] for container in axis.containers] for axis in figure.axes]
    return [[list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in panel] for panel in lines]
