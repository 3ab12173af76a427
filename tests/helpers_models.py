"""Tiny models, their gradients, and decoding with them."""

import functools

import torch
from conftest import tiny_model

from ads.decode.cached_model import CachedModel
from ads.decode.engine import Models, generate
from ads.decode.rows import Request
from ads.delta import gradient
from ads.delta.central import CentralDifference, perturb_
from ads.delta.loss import Sequence

V = 97

EOS = frozenset(range(6))


def prompts(num_rows=7, seed=0):
    """Prompts of unequal length, without eos tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (num_rows,), generator=generator).tolist()
    return [torch.randint(6, V, (n,), generator=generator).tolist() for n in lengths]


def requests(num_new=20, **kwargs):
    return [Request(f"row{i}", ids, num_new) for i, ids in enumerate(prompts(**kwargs))]


def plain_models(kind="qwen2"):
    return Models(CachedModel(tiny_model(kind)), None, torch.ones(V, dtype=torch.bool), EOS)


def proxy_gradient(seed=3):
    """A proxy with the gradient of a few random sequences."""
    model = tiny_model("qwen2", seed=seed)
    sequences = [Sequence(ids + ids[::-1], len(ids)) for ids in prompts(6, seed=9)]
    gradient.add_gradient_(model, sequences, len(sequences), batch_size=3)
    return {name: p.grad for name, p in model.named_parameters()}


def perturbed_pair(eps=1e-3):
    plus, minus = tiny_model("qwen2", seed=3), tiny_model("qwen2", seed=3)
    perturb_(plus, minus, proxy_gradient().__getitem__, eps)
    return plus, minus


def ads_models(eps=1e-3):
    shared_V = torch.ones(V, dtype=torch.bool)
    shared_V[[2, 90]] = False
    plus, minus = perturbed_pair(eps)
    return Models(
        CachedModel(tiny_model("qwen2")), CentralDifference(plus, minus, eps, shared_V), shared_V | True, EOS
    )


def decode(models, distribution, rows, batch_size, seed=1):
    return {c.id: c for c in generate(models, distribution, seed, rows, batch_size)}


def same(a, b):
    assert a.keys() == b.keys()
    assert {i: c.ids for i, c in a.items()} == {i: c.ids for i, c in b.items()}
    assert {i: c.finished for i, c in a.items()} == {i: c.finished for i, c in b.items()}


def tail_of(request, response_ids):
    """Ids that differ from row to row, in number too, an eos among them."""
    return [3, *request.prompt_ids[:2], len(response_ids) % V, 5]


STEP = CachedModel.step


def step_with_little_memory(self, tokens_N, *args):
    if len(tokens_N) > 2:
        raise torch.OutOfMemoryError("out of memory")
    return STEP(self, tokens_N, *args)


def sequences(num_rows=7, seed=5):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(8, 40, (num_rows,), generator=generator).tolist()
    return [Sequence(torch.randint(0, V, (n,), generator=generator).tolist(), 1 + n // 4) for n in lengths]


def model_with_gradient(kind="qwen2", batch_size=3, rows=None, spread=0.1):
    model = tiny_model(kind, seed=3, spread=spread)
    rows = rows or sequences()
    loss = gradient.add_gradient_(model, rows, len(rows), batch_size)
    return model, loss


def gradient_of(model):
    return {name: p.grad for name, p in model.named_parameters()}


def mean_loss(model, rows):
    """The definition, one sequence at a time."""
    losses = []
    for s in rows:
        log_p_TV = torch.log_softmax(model(torch.tensor([s.ids])).logits[0, :-1], -1)
        nll_T = -log_p_TV.gather(1, torch.tensor(s.ids[1:])[:, None]).squeeze(1)
        losses.append(nll_T[s.num_prompt_tokens - 1 :].mean())
    return torch.stack(losses).mean()


def perturbed(model, eps, dtype=torch.float32):
    plus, minus = (tiny_model("qwen2", seed=3, spread=0.1).to(dtype) for _ in range(2))
    return plus, minus, perturb_(plus, minus, gradient_of(model).__getitem__, eps)


def next_log_probs(model, ids, parameters):
    output = torch.func.functional_call(model, parameters, (torch.tensor([ids]),), {"use_cache": False})
    return torch.log_softmax(output.logits[0, -1], -1)


def exact_delta(model, ids):
    """Directional derivative of every log-probability along g, by forward-mode autograd."""
    start = {name: p.detach() for name, p in model.named_parameters()}
    log_probs = functools.partial(next_log_probs, model, ids)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.func.jvp(log_probs, (start,), (gradient_of(model),))[1]


def tied_model(config):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


PROMPTS = [list(range(3, 14)), [5, 6, 7], [20, 21, 22, 23, 24, 25, 26]]


def random_gradient(model, name):
    generator = torch.Generator().manual_seed(len(name))
    return 0.1 * torch.randn(model.get_parameter(name).shape, generator=generator)


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()
