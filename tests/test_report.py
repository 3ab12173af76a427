"""report.py on folders of sidecars, as gentraces.py, save_grad.py and distill.py write them."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import report
import utils
from ads import store
from ads.config import GenConfig, GradConfig, TrainConfig, to_dict

ROOT = Path(report.__file__).parent
N = 1200
TEACHER, STUDENT, PROXY = "owner/teacher-7B", "owner/student-3B", "owner/proxy-1B"
PERTURBATION = {"share_changed": 0.99, "cosine": 0.9995, "relative_norm": 1.0}


def write_traces(exp_dir, name, forced, raw, n=N, more_stats=(), perturbation=None, **config):
    """A trace sidecar; forced and raw are shares (forced may be None: no answer forcing)."""
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
    store.write_sidecar(
        cfg.sidecar_path, to_dict(cfg), {"teacher": f"hub:{cfg.teacher}"}, stats, 360, **notes
    )


def accuracy(share, n):
    num_correct = round(share * n)
    low, high = utils.wilson_interval(num_correct, n)
    numbers = {"accuracy": num_correct / n, "low": low, "high": high}
    return {key: round(value, 4) for key, value in numbers.items()} | {"num_correct": num_correct}


def write_model(exp_dir, name, train_name, student=STUDENT, **config):
    path = f"{exp_dir}/traces/{train_name}.parquet"
    cfg = TrainConfig(exp_dir=str(exp_dir), model_name=name, student=student, train_traces=path, **config)
    stats = {"n": 5231, "num_cut": 0, "num_steps": 981, "train_loss": 0.21, "holdout_loss_start": 0.9}
    stats["holdout_loss"] = 0.4567
    store.write_sidecar(
        cfg.sidecar_path, to_dict(cfg), {}, stats, 720, losses={"train": [[1, 0.5]], "holdout": []}
    )


def write_student_test(exp_dir, name, model, forced, raw, **more):
    teacher = f"{exp_dir}/models/{model}/final"
    write_traces(
        exp_dir,
        name,
        forced,
        raw,
        is_teacher=False,
        teacher=teacher,
        data_split="gsm8k_test",
        tau=0.0,
        **more,
    )


def write_point(exp_dir, name, tau, lam, teacher, student, stages=4, **more):
    """The first `stages` stages of a grid point; teacher and student are (forced, raw) shares."""
    if lam:
        more |= {"grad_path": f"{exp_dir}/student_grads.safetensors", "proxy_student": PROXY}
    sampled = {"tau": tau, "lam": lam, **more}
    write_traces(exp_dir, f"a{name}", *teacher, data_split="gsm8k_train", **sampled)
    if stages >= 2:
        write_model(exp_dir, f"b{name}", f"a{name}")
    if stages >= 3:
        write_student_test(exp_dir, f"c{name}", f"b{name}", *student)
    if stages >= 4:
        write_traces(exp_dir, f"d{name}", *teacher, data_split="gsm8k_test", **sampled)


def write_stage_1_and_2(exp_dir, baseline=(0.31, 0.25)):
    write_traces(exp_dir, "clean", 0.91, 0.9, data_split="gsm8k_holdout")
    cfg = GradConfig(
        exp_dir=str(exp_dir), proxy_student=PROXY, holdout_traces=f"{exp_dir}/traces/clean.parquet"
    )
    stats = {"n": 2242, "num_left_out": 0, "loss": 0.412345, "grad_norm": 7.412345, "num_response_tokens": 9}
    store.write_sidecar(cfg.sidecar_path, to_dict(cfg), {}, stats, 60, norms={"lm_head.weight": 1.0})
    base = {"is_teacher": False, "teacher": STUDENT, "data_split": "gsm8k_test"}
    write_traces(exp_dir, "base", *baseline, few_shot=4, few_shot_traces="clean.parquet", **base)


def write_both_arms(exp_dir):
    """Two points an arm, written in no order, under names that say nothing."""
    write_stage_1_and_2(exp_dir)
    write_point(exp_dir, "1", 0.6, 0.03, (0.70, 0.50), (0.25, 0.20))
    write_point(exp_dir, "2", 1.4, 0.0, (0.80, 0.75), (0.55, 0.50))
    write_point(exp_dir, "3", 0.6, 0.015, (0.84, 0.70), (0.49, 0.41))
    write_point(exp_dir, "4", 0.6, 0.0, (0.90, 0.88), (0.61, 0.58))
    return exp_dir


def run(*exp_dirs):
    """(exit code, stdout, stderr) of the script, as a user runs it."""
    command = [sys.executable, str(ROOT / "report.py"), *map(str, exp_dirs)]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=exp_dirs[0].parent if exp_dirs else None
    )
    return result.returncode, result.stdout, result.stderr
