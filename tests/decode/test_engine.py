"""Decoding against transformers' generate() and against uncached forward passes, on tiny random models."""

import functools

import pytest
import torch
from conftest import tiny_model
from helpers_models import (
    EOS,
    V,
    ads_models,
    decode,
    plain_models,
    prompts,
    requests,
    same,
    step_with_little_memory,
    tail_of,
)

from ads import cpu, sampling
from ads.decode.cached_model import CachedModel
from ads.decode.engine import choose_batch_size, generate
from ads.decode.rows import Forcing, Request
from ads.sampling import GREEDY, Sampling

pytestmark = pytest.mark.compiled

KINDS = ("qwen2", "llama", "gemma3_text", "gpt_neox", "mistral")


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_transformers_generate(kind):
    models = plain_models(kind)
    found = decode(models, GREEDY, requests(), batch_size=3)
    for i, ids in enumerate(prompts()):
        wanted = models.teacher.model.generate(
            torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=sorted(EOS), pad_token_id=0
        )
        assert found[f"row{i}"].ids == wanted[0, len(ids) :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_cached_log_probs_equal_an_uncached_pass(kind):
    """Rows of unequal length in refilled and moved slots: the recorded log-probability is that of one full
    forward."""
    models = plain_models(kind)
    found = decode(models, Sampling(1.0), requests(), batch_size=3)
    assert len({len(c.ids) for c in found.values()}) > 2, "rows must end at different steps"
    for i, ids in enumerate(prompts()):
        row = found[f"row{i}"]
        with torch.no_grad():
            logits_TV = models.teacher.model(torch.tensor([ids + row.ids])).logits[0, len(ids) - 1 : -1]
        wanted = torch.log_softmax(logits_TV, -1).gather(1, torch.tensor(row.ids)[:, None]).sum().item()
        assert row.log_prob == pytest.approx(wanted, abs=1e-4)


def sample_uncached(model, row, distribution, seed):
    """Temperature sampling of one row, written out: full forward, softmax, inverse CDF."""
    ids = list(row.prompt_ids)
    key = torch.tensor([sampling.row_key(seed, row.id)])
    for step in range(row.max_new_tokens):
        with torch.no_grad():
            logits_V = model(torch.tensor([ids])).logits[0, -1]
        cdf_V = torch.softmax(logits_V / distribution.tau, -1).cumsum(-1)
        ids.append(int((cdf_V <= sampling.uniforms(key, torch.tensor([step]))).sum()))
        if ids[-1] in EOS:
            break
    return ids[len(row.prompt_ids) :]


def test_temperature_sampling_equals_a_plain_loop():
    models, distribution = plain_models(), Sampling(0.9)
    found = decode(models, distribution, requests(), batch_size=4, seed=5)
    for row in requests():
        assert found[row.id].ids == sample_uncached(models.teacher.model, row, distribution, seed=5)


def test_traces_do_not_depend_on_batch_size_or_order():
    for models, distribution in (
        (plain_models(), Sampling(0.8, 0.0, 30, 0.9)),
        (ads_models(), Sampling(0.8, 0.3, 30, 0.9)),
    ):
        rows = requests(num_rows=20)
        wanted = decode(models, distribution, rows, batch_size=1)
        same(decode(models, distribution, rows, batch_size=3), wanted)
        same(decode(models, distribution, rows[::-1], batch_size=16), wanted)


def test_lam_zero_needs_no_proxy_and_changes_nothing():
    """With lam = 0 the traces of a run that carries a proxy along equal those of one that has none."""
    distribution = Sampling(0.8, 0.0)
    same(
        decode(ads_models(), distribution, requests(), 4), decode(plain_models(), distribution, requests(), 4)
    )


def test_seed_and_problem_decide_the_trace():
    models, distribution = plain_models(), Sampling(1.0)
    first = decode(models, distribution, requests(), 4, seed=1)
    second = decode(models, distribution, requests(), 4, seed=2)
    assert any(first[i].ids != second[i].ids for i in first)
    twins = [Request("a", prompts()[0], 20), Request("b", prompts()[0], 20)]
    found = decode(models, distribution, twins, 2)
    assert found["a"].ids != found["b"].ids


class TwoProxies:
    """transformers' way: a logits processor that runs the two perturbed proxies on the whole row,
    uncached."""

    def __init__(self, plus, minus, eps, lam, shared_V):
        self.plus, self.minus, self.eps, self.lam, self.shared_V = plus, minus, eps, lam, shared_V

    def __call__(self, input_ids, scores):
        log_p = [
            torch.log_softmax(m(input_ids).logits[:, -1].masked_fill(~self.shared_V, -torch.inf), -1)
            for m in (self.plus, self.minus)
        ]
        delta = ((log_p[0] - log_p[1]) / (2 * self.eps)).masked_fill(~self.shared_V, 0)
        return torch.log_softmax(scores, -1) + self.lam * delta


def test_greedy_ads_equals_generate_with_a_logits_processor():
    from transformers import LogitsProcessorList

    models = ads_models()
    proxy = models.proxy
    processor = TwoProxies(proxy.plus.model, proxy.minus.model, 1e-3, 0.5, proxy.shared_V)
    found = decode(models, Sampling(0.0, 0.5), requests(), batch_size=3)
    plain = decode(plain_models(), GREEDY, requests(), batch_size=3)
    assert any(found[i].ids != plain[i].ids for i in found), "lam must matter"
    for row in requests():
        wanted = models.teacher.model.generate(
            torch.tensor([row.prompt_ids]),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=sorted(EOS),
            pad_token_id=0,
            logits_processor=LogitsProcessorList([processor]),
        )
        assert found[row.id].ids == wanted[0, len(row.prompt_ids) :].tolist()


@pytest.mark.parametrize("batch_size", (1, 3))
def test_forced_answers_are_greedy_after_the_response_and_the_given_ids(batch_size):
    """They go through the cache that holds their trace, beside rows that are still sampled with Delta."""
    models, distribution = ads_models(), Sampling(0.8, 0.3)
    wanted = decode(models, distribution, requests(), batch_size)
    forcing = Forcing(tail_of, max_ids=5, max_new_tokens=6)
    rows = {c.id: c for c in generate(models, distribution, 1, requests(), batch_size, forcing)}
    same(rows, wanted)
    assert {c.finished for c in wanted.values()} == {True, False}
    plain = models.teacher.model
    for row in requests():
        response = wanted[row.id].ids[: -1 if wanted[row.id].finished else None]
        given = row.prompt_ids + response + tail_of(row, wanted[row.id].ids)
        found = plain.generate(
            torch.tensor([given]), max_new_tokens=6, do_sample=False, eos_token_id=sorted(EOS), pad_token_id=0
        )
        assert rows[row.id].forced_ids == found[0, len(given) :].tolist()
        assert rows[row.id].log_prob == pytest.approx(wanted[row.id].log_prob, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_in_chunks_are_prompts_in_one_pass(kind):
    whole, chunked = CachedModel(tiny_model(kind)), CachedModel(tiny_model(kind))
    chunked.prefill_tokens = 24  # three rows of at most 8, or chunks of 12 where two rows are longer
    for rows in (prompts(), [ids + ids[::-1] for ids in prompts(seed=1)]):
        logits = []
        for model in (whole, chunked):
            model.allocate(len(rows) + 2, 64)
            logits.append(model.prefill(rows, 2))
        assert torch.allclose(*logits, atol=1e-5)
        assert len(chunked.groups(rows)) > 1 and max(map(len, rows)) > 24
        lengths = torch.tensor([0, 0] + [len(ids) for ids in rows])
        steps = [m.step(torch.arange(len(lengths)), lengths, int(lengths.max())) for m in (whole, chunked)]
        assert torch.allclose(steps[0][2:], steps[1][2:], atol=1e-5), "the caches must agree too"


def test_batch_size_by_free_memory(monkeypatch):
    models, rows = ads_models(), requests(num_new=20)
    positions = max(len(row.prompt_ids) for row in rows) + 20
    # keys of 2 layers, 2 heads of 8 floats and values, which compiled code pads to 16, in three models; 64
    # bytes a logit
    row_bytes = 3 * positions * 2 * 2 * (8 + (16 if cpu.decodes(torch.zeros(1)) else 8)) * 4 + 64 * V
    for free, wanted in ((10 * row_bytes / 0.8 + 1, 10), (0, 1), (1e12, 64)):
        monkeypatch.setattr("ads.decode.engine.free_bytes", functools.partial(given_bytes, free))
        assert choose_batch_size(models, rows) == wanted
    monkeypatch.setattr(
        "ads.decode.engine.free_bytes", functools.partial(given_bytes, 10 * row_bytes / 0.8 + 1)
    )
    assert choose_batch_size(models, rows, num_processes=2) == 5


def given_bytes(free, device):
    return free


def test_out_of_memory_halves_the_batch_and_changes_no_trace(monkeypatch, capsys):
    models = plain_models()
    wanted = decode(models, Sampling(1.0), requests(num_rows=9), batch_size=2)
    monkeypatch.setattr(CachedModel, "step", step_with_little_memory)
    same(decode(models, Sampling(1.0), requests(num_rows=9), batch_size=8), wanted)
    assert "batch_size=4" in capsys.readouterr().out


def test_logits_that_are_not_finite_are_an_error_that_names_the_problem():
    models = plain_models()
    models.teacher.model.get_output_embeddings().weight.data[3, 0] = float("nan")
    with pytest.raises(
        ValueError, match="problem row.*response token 0: the teacher's logits are not finite"
    ):
        decode(models, Sampling(1.0), requests(), 3)
    models = ads_models()
    models.proxy.plus.model.get_output_embeddings().weight.data[3, 0] = float("inf")
    with pytest.raises(ValueError, match="proxy's scores"):
        decode(models, Sampling(1.0, 0.1), requests(), 3)


def test_rows_that_end_in_the_step_in_which_another_fails_are_not_lost():
    """The error once came before them, whichever row had it."""
    models, sick = plain_models(), 50
    models.teacher.model.get_input_embeddings().weight.data[sick] = float("nan")
    rows = [Request(f"row{i}", [7 + i] * 5 + [sick] * (i == 2), 1) for i in range(5)]
    ended = []
    with pytest.raises(ValueError, match="problem row2, response token 0: the teacher's logits"):
        for completion in generate(models, Sampling(1.0), 1, rows, 5):
            ended.append(completion.id)
    assert sorted(ended) == ["row0", "row1", "row3", "row4"]


def test_layers_without_keys_and_values_are_refused():
    config = tiny_model("qwen2").config
    config.layer_types = ["linear_attention", "full_attention"]
    from ads.decode.cached_model import attention_windows

    with pytest.raises(ValueError, match="linear_attention"):
        attention_windows(config)
