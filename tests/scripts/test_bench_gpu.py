"""bench/gpu.sh: all that it measures on a GPU, measured on tiny models on a CPU."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

from ads.decode import engine

sys.path.append(str(ROOT / "bench"))

import gpu

ROWS = {
    "equal to the peer's",
    "traces, plain",
    "traces, plain, captured",
    "traces, ADS",
    "traces, ADS, captured",
    "one batch, ADS",
    "one batch, ADS, captured",
    "the peer's one batch, ADS",
    "the peer's traces, plain",
    "the peer's traces, ADS",
    "step, plain",
    "step, plain, captured",
    "step, ADS",
    "step, ADS, captured",
    "gradient, float32",
    "gradient, bfloat16",
    "distillation",
}


def test_every_section_runs_and_traces_are_the_peer_s(monkeypatch):
    monkeypatch.setattr(engine, "Decoder", engine.Decoder)  # decode.py times it
    torch.manual_seed(0)  # as each section's process does
    rows = {name: found for measure in gpu.SECTIONS for name, found in measure(gpu.TINY, "cpu")}
    assert set(rows) == ROWS
    equal = rows.pop("equal to the peer's")
    assert equal["plain"] == equal["ADS"] == 1.0 and equal["ADS is plain"] < 0.5
    for name, found in rows.items():
        figures = [found[key] for key in gpu.FIGURES if key in found]
        assert len(figures) > 1 and all(figure > 0 for figure in figures), (name, found)
    assert "there is no GPU" in rows["step, ADS, captured"]["note"]
    assert list(gpu.table(rows | {"lost": {"failed": "why"}}))[-1].endswith("failed: why")
    # what was not captured is not compared as if it were
    assert ["over the peer's" in line for line in gpu.conclusions(rows)] == [True] * 3
    captured = {name: {k: v for k, v in found.items() if k != "note"} for name, found in rows.items()}
    assert len(list(gpu.conclusions(captured))) == 7


def test_both_ways_stop_at_the_same_lengths():
    prompts, limits = gpu.draw_rows(64, 150, 1024)
    assert all(75 <= len(ids) <= 150 for ids in prompts.values())
    assert all(len(prompts[i]) + limits[i] <= 1024 for i in prompts)
    assert 250 < sorted(limits.values())[32] < 370 and max(limits.values()) > 600


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_run():
    found = run()
    assert found.returncode == 1 and found.stdout == ""
    assert found.stderr.startswith("error: no CUDA device") and found.stderr.count("\n") == 1


def run(*arguments):
    environment = os.environ | {"SKIP_SETUP": "1", "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_it_runs_as_a_user_runs_it():
    """30 seconds of a CPU, most of which six processes take to import torch."""
    found = run("--tiny")
    assert found.returncode == 0, found.stderr
    result = json.loads(found.stdout.splitlines()[-1])
    assert set(result["rows"]) == ROWS and result["tiny"]


def measure_nothing_then_fail(scale, device):
    yield "first", {"seconds": 1.0}
    raise RuntimeError("CUDA error: an illegal\nmemory access")


def measure_an_end(scale, device):
    yield "first", {}
    os._exit(7)


def measure_too_long(scale, device):
    yield "first", {}
    time.sleep(600)


@pytest.mark.slow
@pytest.mark.parametrize(
    "measure,seconds,reason",
    (
        (measure_nothing_then_fail, 60, "RuntimeError: CUDA error: an illegal memory access"),
        (measure_an_end, 60, "exit code 7"),
        (measure_too_long, 20, "not done after 20 s"),
    ),
)
def test_what_fails_is_a_row_and_what_was_found_is_kept(measure, seconds, reason):
    rows = dict(gpu.run_section(measure, gpu.TINY, "cpu", seconds))
    assert "first" in rows and rows[measure.__name__.removeprefix("measure_")] == {"failed": reason}
