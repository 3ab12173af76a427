"""Stages run as scripts on tiny models."""

import socket

import pyarrow.parquet
from conftest import run_script

SMALL = ["max_length=140", "max_prompt_length=115", "batch_size=5", "tau=0.8"]

TIMING = {"seconds", "tokens_per_second", "rows_at_once"}


def gentraces(models, problems, exp_dir, name, *more, **keywords):
    arguments = [f"exp_dir={exp_dir}", f"teacher={models['teacher']}", f"trace_name={name}", *SMALL, *more]
    if not any(a.startswith("data_split") for a in more):
        arguments.append(f"data_split={problems}_train")
    return run_script("gentraces.py", *arguments, **keywords)


def rows_of(exp_dir, name):
    return pyarrow.parquet.read_table(exp_dir / "traces" / f"{name}.parquet").to_pylist()


def save_grad(models, exp_dir, *more, holdout_of=None, **keywords):
    traces = f"holdout_traces={holdout_of or exp_dir}/traces/holdout.parquet"
    arguments = [f"exp_dir={exp_dir}", f"proxy_student={models['proxy']}", traces, *more]
    return run_script("save_grad.py", *arguments, **keywords)


def free_port():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return str(place.getsockname()[1])


def ads_arguments(models, exp_dir):
    return ["lam=0.05", f"proxy_student={models['proxy']}", f"grad_path={exp_dir}/student_grads.safetensors"]
