"""The step of Llama's kind, compiled and in torch, against the library's forward; who gets it."""

import pytest
import torch
from conftest import tiny_model
from helpers_models import PROMPTS, random_gradient, relative

from ads import cpu
from ads.decode.cached_model import CachedModel
from ads.dual.model import DualModel
from ads.trials import agrees

pytestmark = pytest.mark.compiled

OURS = ("llama", "qwen2", "mistral", "qwen3")


@pytest.fixture(params=("compiled", "torch"))
def way(request):
    if request.param == "torch":
        request.getfixturevalue("without_compiled_code")
    elif not cpu.decodes(torch.zeros(1)):
        pytest.skip("no C compiler or no AVX-512 on this machine")
    return request.param


def make(kind, is_dual, rank=0, dtype=torch.float32):
    model = tiny_model(kind, seed=3, spread=0.1).to(dtype)
    if not is_dual:
        return CachedModel(model)
    from ads.delta.gradient import compress

    for name, p in model.named_parameters():
        p.grad = random_gradient(model, name).to(dtype)
    g = compress(model, rank, seed=0)
    dual_model = DualModel(model, g.__getitem__)
    return CachedModel(dual_model)


def decode(cached, num_steps=4):
    """Logits of some steps by the library and by us, in turn, after a slot was moved."""
    cached.allocate(4, 40)
    cached.prefill(PROMPTS, 0)
    cached.release(1, 2, len(PROMPTS[2]))
    lengths, pairs = torch.tensor([11, 7]), []
    with torch.inference_mode():
        for step in range(num_steps):
            given = torch.tensor([30 + step, 40 + step]), lengths + step, 11 + step
            pairs.append([cached.library_step(*given), cached.own_step(*given, cached.cache)])
    return [[x.as_subclass(torch.Tensor).clone() for x in pair] for pair in pairs]


@pytest.mark.parametrize("rank", (0, 3))
@pytest.mark.parametrize("kind", OURS)
def test_dual_steps_are_those_of_the_library(kind, rank, way):
    cached = make(kind, is_dual=True, rank=rank)
    assert bool(cached.own_step.compiled) == (way == "compiled")
    for wanted, found in decode(cached):
        for a, b in zip(found.chunk(2), wanted.chunk(2), strict=True):
            assert relative(a, b) < 1e-5


@pytest.mark.parametrize("kind", OURS)
def test_plain_steps_are_those_of_the_library(kind, way):
    cached = make(kind, is_dual=False)
    assert bool(cached.own_step.compiled) == (way == "compiled")
    pairs = decode(cached)
    assert all(relative(found, wanted) < 1e-5 for wanted, found in pairs)
    assert relative(pairs[0][0], pairs[1][0]) > 0.1, "each step must see other tokens"


@pytest.mark.parametrize("is_dual", (False, True))
def test_bfloat16(is_dual, way):
    """Compiled code rounds nothing but the weights, so it is nearer to float32 than the library is."""
    cached = make("qwen2", is_dual, rank=3, dtype=torch.bfloat16)
    assert bool(cached.own_step.compiled) == (way == "compiled")
    for wanted, found in decode(cached):
        assert found.dtype == (torch.float32 if way == "compiled" else torch.bfloat16)
        assert agrees(found, wanted)


def test_windows_count(way):
    """Mistral's window is shorter than the rows."""
    cached = make("mistral", is_dual=False)
    cached.windows = cached.own_step.windows = {"sliding_attention": 4}
    narrow = decode(cached)
    assert all(relative(found, wanted) < 1e-5 for wanted, found in narrow)
    assert relative(narrow[0][0], decode(make("mistral", is_dual=False))[0][0]) > 1e-3


@pytest.mark.parametrize(
    "kind", ("gpt2", "gpt_neox", "gemma2", "gemma3_text", "granite", "smollm3", "ministral3")
)
def test_other_kinds_are_left_to_the_library(kind):
    """Granite, SmolLM3 and Ministral3 have Llama's modules; one scales what they give, one skips some angles,
    one's queries grow beyond some position."""
    model = tiny_model(kind, seed=3, spread=0.1)
    assert CachedModel(model).own_step is None
    sharp = tiny_model(kind, seed=3, spread=0.3).bfloat16()  # where a difference is more than rounding
    assert CachedModel(sharp).own_step is None


def test_weights_stay_the_model_s():
    """The library's forward, which does prompts, reads the same memory."""
    model = tiny_model("qwen2", seed=3, spread=0.1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    cached = CachedModel(model)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.untyped_storage().data_ptr() == (
        cached.own_step.layers[0].qkv.base_PI.untyped_storage().data_ptr()
    )
