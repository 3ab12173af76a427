"""Corrupted results: nothing but results changes, as many of them as asked for, by (seed, problem, step)."""

import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, byte_tokenizer
from scipy import stats

from ads import chat, sampling
from ads.data import arithmetic
from ads.decode import corruption
from ads.decode.cached_model import CachedModel
from ads.decode.corruption import Corruption
from ads.decode.engine import Models, generate
from ads.decode.rows import Request
from ads.loading import load_model
from ads.sampling import Sampling

TEACHER = str(ROOT / "demo" / "models" / "teacher")
DISTRIBUTION, SEED = Sampling(tau=0.8), 5


@pytest.fixture(scope="module")
def demo():
    """The shipped teacher, its tokenizer, and requests for problems."""
    tokenizer = chat.load_tokenizer(TEACHER)
    teacher = CachedModel(load_model(TEACHER, "float32", "cpu"))
    allowed_V = torch.ones(len(tokenizer), dtype=torch.bool)
    rows = arithmetic.generate("test", seed=11, count=100)
    requests = [Request(row["id"], chat.prompt_ids(tokenizer, row["problem"]), 90) for row in rows]
    eos = frozenset([tokenizer.eos_token_id])
    return SimpleNamespace(
        tokenizer=tokenizer, teacher=teacher, allowed_V=allowed_V, requests=requests, eos=eos
    )


def decode(demo, share, batch_size=100, **keywords):
    """{id: Completion} with a share of the results corrupted; None: without any corruption."""
    corrupted = None if share is None else Corruption(demo.tokenizer, demo.allowed_V, share)
    models = Models(demo.teacher, None, demo.allowed_V, demo.eos, corrupted)
    return {c.id: c for c in generate(models, DISTRIBUTION, SEED, demo.requests, batch_size, **keywords)}


def result_spans(text):
    """(first, end) of each number after an equals sign, the box apart."""
    return [match.span(1) for match in re.finditer(r"= (\d+)", text)]


def what_plain_sampling_draws(demo, request, ids):
    """The token that plain sampling draws after each prefix of a response, by an uncached pass."""
    inputs = torch.tensor([request.prompt_ids + ids])
    with torch.inference_mode():
        logits_TV = demo.teacher.model(inputs).logits[0, len(request.prompt_ids) - 1 : -1]
    keys_T = torch.full((len(ids),), sampling.row_key(SEED, request.id))
    log_probs_TV = sampling.log_probs(logits_TV, demo.allowed_V)
    return sampling.sample(log_probs_TV, None, DISTRIBUTION, keys_T, torch.arange(len(ids)))[0].tolist()


def is_likely(num_corrupted, num_results, share):
    """Whether so many of the results would be corrupted if each were with probability `share`."""
    return stats.binomtest(num_corrupted, num_results, share).pvalue > 1e-3


@pytest.mark.parametrize("share", (0.1, 0.4, 0.7, 1.0))
def test_nothing_but_results_differs_from_what_the_teacher_would_have_written(demo, share):
    """Token by token, given what stands before: what lies outside results is what plain sampling draws; a
    corrupted result differs in its first digit, and kept ones not at all. A share lam is corrupted, by a
    binomial test, which shares that are off by 0.12 do not pass."""
    corrupted, num_corrupted, num_results = decode(demo, share), 0, 0
    control = Corruption(demo.tokenizer, demo.allowed_V, share)
    for request in demo.requests:
        ids = corrupted[request.id].ids
        drawn = what_plain_sampling_draws(demo, request, ids)
        texts = chat.token_texts(demo.tokenizer, ids)
        spans, start = result_spans("".join(texts)), 0
        marked = control.places(ids, torch.tensor(sampling.row_key(SEED, request.id)))
        for k, text in enumerate(texts):
            start += len(text)
            at = next((span for span in spans if span[0] < start <= span[1]), None)
            if at and start - at[0] == 1:  # a result's first digit; the second is drawn after it
                num_results += 1
                is_corrupted = ids[k] != drawn[k]
                num_corrupted += is_corrupted
                assert is_corrupted == (k in marked), "the page marks what was corrupted"
                assert not is_corrupted or texts[k].strip() != "0"
            elif not at or not is_corrupted:
                assert ids[k] == drawn[k] and k not in marked, (request.id, k, texts[k])
    assert num_results > 300
    assert is_likely(num_corrupted, num_results, share), (num_corrupted, num_results)
    for other in (share - 0.12, share + 0.12):
        assert not 0 <= other <= 1 or not is_likely(num_corrupted, num_results, other)


def test_a_share_of_0_changes_nothing(demo):
    assert decode(demo, 0.0) == decode(demo, None)


def test_neither_batches_nor_order_change_what_is_corrupted(demo):
    reverse = SimpleNamespace(**{**vars(demo), "requests": demo.requests[::-1]})
    wanted = {i: c.ids for i, c in decode(demo, 0.5).items()}
    assert wanted == {i: c.ids for i, c in decode(reverse, 0.5, batch_size=7).items()}
    assert wanted != {i: c.ids for i, c in decode(demo, None).items()}


def test_static_steps_corrupt_what_ordinary_ones_do(demo, capsys):
    """The host then looks at each step before the next: it replaces what was sampled."""
    ordinary, static = (decode(demo, 0.5, 40, cuda_graph=is_static) for is_static in (False, True))
    assert {i: c.ids for i, c in static.items()} == {i: c.ids for i, c in ordinary.items()}
    assert "steps run uncaptured" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text,is_result",
    (
        ("so 3 + 4 = 7", True),
        ("x =7", True),
        ("costs = $7", True),
        ("= -7", True),
        ("\\boxed{3} and 4 = 7", True),
        ("\\boxed{x = 7", False),
        ("\\boxed{7", False),
        ("= 2 or 7", False),
        ("there are 7", False),
    ),
)
def test_what_a_result_is(text, is_result):
    """By text, whatever the tokens; here they are single bytes."""
    tokenizer = byte_tokenizer()
    ids = chat.encode(tokenizer, text)
    always = Corruption(tokenizer, torch.ones(272, dtype=torch.bool), 1.0)
    new = always.replace(ids, torch.tensor(sampling.row_key(1, "p")))
    assert (new != ids[-1]) == is_result
    assert new == ids[-1] or tokenizer.decode([new]) in "123456789"


def test_a_number_is_judged_once_whatever_its_tokens():
    """The tokens of a number share one draw, by the step of the first."""
    tokenizer, key = byte_tokenizer(), torch.tensor(sampling.row_key(1, "p"))
    ids = chat.encode(tokenizer, "a = 4321")
    first = len(ids) - 4
    edge, allowed_V = corruption.draw(key, first, 0), torch.ones(272, dtype=torch.bool)
    for share in (edge, edge + 1e-6):
        control = Corruption(tokenizer, allowed_V, share)
        found = [control.replace(ids[:end], key) for end in range(first + 1, len(ids) + 1)]
        assert (found[0] == ids[first]) == (share == edge) == (found == ids[first:])
        assert tokenizer.decode(found).isdigit()
