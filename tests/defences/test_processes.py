"""Every defence gives the same traces whatever the number of processes, batch size and order of rows."""

import dataclasses
import functools

import pytest
import torch
from conftest import run_script, tiny_model
from helpers_models import EOS, V, decode, proxy_gradient, requests, same
from helpers_scripts import SMALL, ads_arguments, rows_of

from ads.decode.cached_model import CachedModel
from ads.decode.engine import Models
from ads.defences import scores
from ads.delta.exact import ExactDerivative
from ads.dual.factors import random_tensor
from ads.sampling import Sampling

SHARED_V = torch.ones(V, dtype=torch.bool)
SHARED_V[[2, 90]] = False  # ids that the proxy does not know
ADS = Sampling(0.8, 0.3, top_k=30, top_p=0.9, shared_V=SHARED_V)
DELTA = {
    "ads": ADS,
    "random": ADS,
    "permuted": dataclasses.replace(ADS, score=scores.permuted),
    "ads, max_kl": dataclasses.replace(ADS, lam=2.0, max_kl=0.05),
    "ads, keep_top1": dataclasses.replace(ADS, lam=2.0, keep_top1=True),
}


def delta_models(name):
    gradient = proxy_gradient().__getitem__
    if name == "random":
        gradient = functools.partial(random_tensor, gradient, 7)
    proxy = ExactDerivative(tiny_model("qwen2", seed=3), gradient, SHARED_V)
    return Models(CachedModel(tiny_model("qwen2")), proxy, SHARED_V | True, EOS)


@pytest.mark.compiled
@pytest.mark.parametrize("name", DELTA)
def test_rows_of_delta_do_not_depend_on_one_another(name):
    """In one batch, one by one, the other way round, and dealt out as to two processes; what reads a plain
    proxy is in test_decoding.py, and corrupted results are in test_corruption.py."""
    models, rows = delta_models(name), requests(num_rows=9)
    wanted = decode(models, DELTA[name], rows, batch_size=1)
    assert len({len(c.ids) for c in wanted.values()}) > 1, "rows must end at different steps"
    same(decode(models, DELTA[name], rows[::-1], batch_size=4), wanted)
    dealt = [decode(models, DELTA[name], rows[rank::2], batch_size=3) for rank in (0, 1)]
    same(dealt[0] | dealt[1], wanted)


# Words of each defence after those of ads_arguments(), whose lam the last one overrides
DEFENCES = {
    "ads": ["lam=2"],
    "random": ["lam=2", "defence=random"],
    "permuted": ["lam=2", "defence=permuted"],
    "poe": ["lam=0.7", "defence=poe"],
    "gated_poe": ["lam=0.2", "defence=gated_poe"],
    "contrastive": ["lam=0.7", "defence=contrastive"],
    "corrupt": ["lam=0.5", "defence=corrupt"],
    "max_kl": ["lam=2", "defence=poe", "max_kl=0.05"],
    "keep_top1": ["lam=2", "keep_top1=true"],
    "answer_only": ["lam=0", "defence=answer_only"],
    "truncated": ["lam=0", "defence=truncated"],
}


def run_all(models, problems, exp, exp_dir, *more, **keywords):
    """A stage of each defence, all in one process, or in the same two."""
    common = [f"exp_dir={exp_dir}", f"teacher={models['teacher']}", f"data_split={problems}_train", *SMALL]
    words = []
    for name, settings in DEFENCES.items():
        stage = [*common, f"trace_name={name}", *ads_arguments(models, exp), *settings, *more]
        words += ["--", name, "gentraces.py", *stage]
    run_script("chain.py", *words[1:], **keywords)


@pytest.mark.slow
def test_one_process_and_two_give_the_same_traces_of_every_defence(
    model_folders, problem_folder, exp, tmp_path
):
    """That of ADS is in the default set (test_scripts.py); the rest shares its way of dealing out rows."""
    run_all(model_folders, problem_folder, exp, tmp_path / "one", "batch_size=3")
    run_all(model_folders, problem_folder, exp, tmp_path / "two", "batch_size=4", num_processes=2)
    traces = {}
    for name in DEFENCES:
        one, two = rows_of(tmp_path / "one", name), rows_of(tmp_path / "two", name)
        traces[name] = str([row["response_ids"] for row in one])
        for a, b in zip(one, two, strict=True):
            for key in ("teacher_nll", "kl", "lam"):
                assert a.pop(key, 0) == pytest.approx(b.pop(key, 0), rel=1e-3, abs=1e-5), (name, key)
            assert a == b, name
    assert len(set(traces.values())) == len(DEFENCES), "each defence must matter"
