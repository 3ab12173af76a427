"""Static steps (few sizes, parked slots, the host a step late) sample what ordinary ones do; and captures."""

import functools

import pytest
import torch
from conftest import tiny_model
from helpers_models import (
    EOS,
    V,
    ads_models,
    plain_models,
    proxy_gradient,
    requests,
    same,
    step_with_little_memory,
    tail_of,
)

from ads.decode import engine, graph
from ads.decode.cached_model import CachedModel
from ads.decode.engine import Models, generate, static_counts
from ads.decode.rows import Forcing, Request
from ads.defences.scores import permuted
from ads.delta.exact import ExactDerivative
from ads.sampling import GREEDY, Sampling

pytestmark = pytest.mark.compiled

FORCING = Forcing(tail_of, max_ids=5, max_new_tokens=6)
NO_GPU = "cuda_graph: there is no GPU: steps run uncaptured"


@functools.cache
def exact_proxy():
    return ExactDerivative(tiny_model("qwen2", seed=3), proxy_gradient().__getitem__, torch.ones(V) > 0)


def exact_models(kind="qwen2"):
    return Models(CachedModel(tiny_model(kind)), exact_proxy(), torch.ones(V) > 0, EOS)


def decode(models, distribution, rows, batch_size, forcing=None, is_static=False):
    found = generate(models, distribution, 1, rows, batch_size, forcing, cuda_graph=is_static)
    return {completion.id: completion for completion in found}


WAYS = {
    "greedy": (plain_models, GREEDY),
    "sampled": (plain_models, Sampling(0.9, 0.0, 30, 0.9)),
    "central": (ads_models, Sampling(0.8, 0.3, 0, 0.9)),
    "exact": (exact_models, Sampling(0.8, 0.3, 30)),
    "exact greedy": (exact_models, Sampling(0.0, 0.5)),
    "permuted": (exact_models, Sampling(0.8, 0.3, score=permuted)),
    "by the library": (functools.partial(exact_models, "gemma3_text"), Sampling(0.8, 0.3)),
}


@pytest.mark.parametrize("forcing", (None, FORCING), ids=("alone", "forced"))
@pytest.mark.parametrize("way", WAYS)
def test_static_steps_sample_what_ordinary_ones_do(way, forcing, capsys):
    """With more rows than slots, rows that may have but one token, and rows that an eos ends early."""
    make, distribution = WAYS[way]
    models = make()
    rows = [Request(r.id, r.prompt_ids, 1 + 7 * k % 23) for k, r in enumerate(requests(num_rows=24))]
    wanted = decode(models, distribution, rows, 24, forcing)
    assert {c.finished for c in wanted.values()} == {True, False}
    assert min(len(c.ids) for c in wanted.values() if not c.finished) == 1
    for batch_size in (5, 20):
        found = decode(models, distribution, rows, batch_size, forcing, is_static=True)
        same(found, wanted)
        for i, completion in wanted.items():
            assert found[i].forced_ids == completion.forced_ids
            assert found[i].log_prob == pytest.approx(completion.log_prob, abs=1e-4)
    assert capsys.readouterr().out.splitlines() == [NO_GPU] * 2


@pytest.mark.parametrize("batch_size", (1, 4))
def test_rows_that_end_at_once(batch_size):
    """At their first token, by any id as an eos or by their limit, before the host has seen a step."""
    for eos, limit in ((frozenset(range(V)), 9), (frozenset(), 1)):
        models = Models(CachedModel(tiny_model()), None, torch.ones(V) > 0, eos)
        rows = [Request(r.id, r.prompt_ids, limit) for r in requests(num_rows=9)]
        pair = [decode(models, GREEDY, rows, batch_size, None, is_static) for is_static in (False, True)]
        same(*pair)
        assert {len(c.ids) for c in pair[1].values()} == {1}


class Sizes(engine.Decoder):
    """Notes the sizes of its steps, and how many rows were moved."""

    seen, num_moved = [], 0

    def advance(self, num_rows, length):
        self.seen.append((num_rows, length, len(self.active), len(self.pending)))
        return super().advance(num_rows, length)

    def close_ranks(self):
        before = {row: row.slot for row in self.active}
        super().close_ranks()
        Sizes.num_moved += sum(row.slot != slot for row, slot in before.items())


def test_static_steps_have_few_sizes(monkeypatch):
    monkeypatch.setattr(engine, "Decoder", Sizes)
    Sizes.seen, Sizes.num_moved = [], 0
    rows = [Request(f"r{k}", [7 + k % 80] * (1 + k % 30), 20 + 41 * k % 260) for k in range(150)]
    models = Models(CachedModel(tiny_model()), None, torch.ones(V) > 0, frozenset())
    decode(models, Sampling(0.9), rows, 90, is_static=True)
    longest = max(len(row.prompt_ids) + row.max_new_tokens for row in rows)
    counts, lengths = ({size[k] for size in Sizes.seen} for k in (0, 1))
    assert counts == {16, 23, 45, 90} and lengths == {128, 256, longest}
    assert any(num_rows > num_active for num_rows, _, num_active, _ in Sizes.seen), "none was parked"
    assert {num_pending for *_, num_pending in Sizes.seen} == {1}, "the host is a step late"
    assert Sizes.num_moved < 23 + 12 + 8, "rows move where their number halves alone"


def test_counts_of_slots():
    assert static_counts(192) == [0, 16, 48, 96, 192]
    assert static_counts(50) == [0, 13, 16, 25, 50]
    assert static_counts(1) == [0, 1] and static_counts(3) == [0, 1, 2, 3]


@pytest.mark.parametrize("is_static", (False, True))
def test_what_is_not_finite_later_on_names_its_problem_and_step(is_static):
    """The host looks at a step once the next is on its way, where other rows, and this one, have gone on."""
    models = plain_models()
    rows = requests(num_rows=9)
    found = decode(models, GREEDY, rows, 9)
    name, ids = max(((i, c.ids) for i, c in found.items()), key=lambda pair: len(pair[1]))
    given = {token for row in rows for token in row.prompt_ids}
    step, sick = next(
        (k, token) for k, token in enumerate(ids) if k > 2 and token not in given | set(ids[:k])
    )
    rows = [row for row in rows if row.id == name or sick not in found[row.id].ids]
    models.teacher.model.get_input_embeddings().weight.data[sick] = torch.nan
    words = f"problem {name}, response token {step + 1}: the teacher's logits are not finite"
    with pytest.raises(ValueError, match=words):
        decode(models, GREEDY, rows, 9, is_static=is_static)
    models = ads_models()
    models.proxy.plus.model.get_output_embeddings().weight.data[3, 0] = torch.inf
    with pytest.raises(ValueError, match="response token 0: the proxy's scores"):
        decode(models, Sampling(1.0, 0.1), requests(), 3, is_static=is_static)


def test_rows_that_ended_before_another_fails_are_not_lost():
    models, sick = plain_models(), 50
    models.teacher.model.get_input_embeddings().weight.data[sick] = torch.nan
    rows = [Request(f"row{i}", [7 + i] * 5 + [sick] * (i == 2), 1) for i in range(5)]
    ended = []
    with pytest.raises(ValueError, match="problem row2, response token 0: the teacher's logits"):
        for completion in generate(models, Sampling(1.0), 1, rows, 5, cuda_graph=True):
            ended.append(completion.id)
    assert sorted(ended) == ["row0", "row1", "row3", "row4"]


def test_out_of_memory_halves_static_steps_too(monkeypatch, capsys):
    rows, models = requests(num_rows=9), plain_models()
    wanted = decode(models, Sampling(1.0), rows, 2)
    monkeypatch.setattr(CachedModel, "step", step_with_little_memory)
    same(decode(models, Sampling(1.0), rows, 8, is_static=True), wanted)
    assert "batch_size=4" in capsys.readouterr().out


def test_a_capture_is_told_from_another_step():
    record, logits = torch.zeros(4, 20), torch.randn(20, V)
    assert graph.are_alike((record, logits, None), (record, logits + 1e-6, None))
    assert graph.are_alike((record, logits, logits), (record, logits, logits))
    assert not graph.are_alike((record, logits, logits), (record, logits, logits.flip(0)))
    assert not graph.are_alike((record, logits.flip(0), None), (record, logits, None))
    other = record.clone()
    other[0, :3] = 7
    assert not graph.are_alike((record, logits, None), (other, logits, None))
    assert not graph.are_alike((record, logits * torch.nan, None), (record, logits, None))


class Recomputed(graph.Graphs):
    """Graphs without a GPU: what would be captured is run instead, is_wrong: with another state after it."""

    def __init__(self, is_wrong):
        self.captured, self.is_wrong = {}, is_wrong

    def capture(self, decoder, sizes, before):
        found = decoder.advance(*sizes)
        decoder.state_6B[2] += self.is_wrong
        return None, found, decoder.state_6B.clone()


@pytest.mark.parametrize("is_wrong", (False, True))
def test_a_first_step_leaves_the_decoder_as_an_uncaptured_one_does(is_wrong, capsys):
    """A move of modules once made it ask a module for that state, which no test without a GPU saw."""
    row, pair = requests()[:1], []
    for graphs in (None, Recomputed(is_wrong)):
        decoder = engine.Decoder(plain_models(), Sampling(0.9), 1, 1, 60, None, True, False)
        with torch.inference_mode():
            list(decoder.admit(row))
            sizes = 1, decoder.num_positions
            decoder.graphs = graphs
            record_41 = graphs.first_step(decoder, sizes) if graphs else decoder.advance(*sizes)[0]
        pair.append((record_41, decoder.state_6B))
    assert all(map(torch.equal, *pair))
    assert (sizes in graphs.captured) == (decoder.graphs is not None) == (not is_wrong)
    assert ("captured computes something else: steps run uncaptured" in capsys.readouterr().out) == is_wrong


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: what is captured runs on one alone")
@pytest.mark.parametrize("forcing", (None, FORCING), ids=("alone", "forced"))
def test_captured_steps_sample_what_uncaptured_ones_do(forcing, capsys):
    models = Models(
        CachedModel(tiny_model().cuda()),
        ExactDerivative(tiny_model(seed=3).cuda(), proxy_gradient().__getitem__, torch.ones(V).cuda() > 0),
        torch.ones(V).cuda() > 0,
        EOS,
    )
    for distribution in (GREEDY, Sampling(0.8, 0.3, 30, 0.9), Sampling(0.8, 0.3, 0, 0.9)):
        pair = [
            decode(models, distribution, requests(num_rows=45), 40, forcing, is_on) for is_on in (False, True)
        ]
        same(*pair)
    assert "uncaptured" not in capsys.readouterr().out


class BrokenGraph(torch.cuda.CUDAGraph):
    """Its captures cannot be ended, as after an operation that breaks them."""

    def capture_end(self):
        super().capture_end()
        raise RuntimeError("operation failed due to a previous error during capture")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: what is captured runs on one alone")
def test_a_capture_that_breaks_leaves_the_stream_as_it_was(monkeypatch, capsys):
    """torch leaves the capture's stream once the capture has ended: all that followed ran on that one."""
    models = Models(CachedModel(tiny_model().cuda()), None, torch.ones(V).cuda() > 0, EOS)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", BrokenGraph)
    before = torch.cuda.current_stream()
    decode(models, GREEDY, requests(num_rows=5), 5, is_static=True)
    assert "cuda_graph: operation failed" in capsys.readouterr().out
    assert torch.cuda.current_stream() == before
