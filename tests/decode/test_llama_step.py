"""The step of Llama's kind, compiled and in torch, against the library's forward; who gets it."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, tiny_model

from ads.cpu import native
from ads.decode.cached_model import CachedModel
from ads.dual.model import DualModel
from ads.kv_cache import SlotCache, Slots
from ads.trials import agrees

pytestmark = pytest.mark.compiled

OURS = ("llama", "qwen2", "mistral", "qwen3")
PROMPTS = [list(range(3, 14)), [5, 6, 7], [20, 21, 22, 23, 24, 25, 26]]


@pytest.fixture(params=("compiled", "torch"))
def way(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no C compiler or no AVX-512 on this machine")
    return request.param


def random_gradient(model, name):
    generator = torch.Generator().manual_seed(len(name))
    return 0.1 * torch.randn(model.get_parameter(name).shape, generator=generator)


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


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


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


needs_compiled = pytest.mark.skipif(native.library() is None, reason="no C compiler or no AVX-512 here")


def odd_model(is_dual, rank=5, dtype=torch.float32, **changes):
    """Sizes that are no multiples of a vector or a tile; three query heads to a head of keys."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from ads.delta.gradient import compress

    sizes = {"hidden_size": 78, "intermediate_size": 99, "vocab_size": 83, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 22}
    others = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False, "rms_norm_eps": 1e-5}
    torch.manual_seed(0)
    config = LlamaConfig(**{**sizes, **heads, **others, **changes}, dtype=dtype)
    model = LlamaForCausalLM(config).to(dtype).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    if not is_dual:
        return CachedModel(model)
    for name, p in model.named_parameters():
        p.grad = random_gradient(model, name).to(dtype)
    dual_model = DualModel(model, compress(model, rank, seed=0).__getitem__)
    return CachedModel(dual_model)


@torch.inference_mode()
def step_of(cached, rows, by_library=False):
    """Logits that follow one more token in each of the given rows, of 3 to 67 tokens."""
    prompts = [[(7 * row + i * i) % 80 for i in range(3 + 8 * row)] for row in rows]
    cached.allocate(len(rows), 80)
    cached.prefill(prompts, 0)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    given = torch.tensor([11 + row for row in rows]), lengths, int(lengths.max())
    logits = cached.library_step(*given) if by_library else cached.step(*given)
    return logits.as_subclass(torch.Tensor).clone()


@needs_compiled
@pytest.mark.parametrize("is_dual, rank", ((False, 0), (True, 0), (True, 5)))
@pytest.mark.parametrize("num_rows", (1, 2, 3, 5, 9))
def test_odd_sizes(num_rows, is_dual, rank):
    cached, rows = odd_model(is_dual, rank), range(num_rows)
    assert cached.own_step.compiled
    pairs = [step_of(cached, rows, by_library).chunk(1 + is_dual) for by_library in (False, True)]
    for found, wanted in zip(*pairs, strict=True):
        assert relative(found, wanted) < 1e-5


@needs_compiled
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("is_dual", (False, True))
def test_a_row_does_not_depend_on_the_others_or_on_threads(is_dual, dtype):
    """To the last bit, given the same caches.

    Derivatives of embeddings were once left to the BLAS, which on some CPUs adds up a few rows in another
    order than many.
    """
    sizes = {} if dtype == torch.float32 else {"hidden_size": 96, "intermediate_size": 128}
    cached, before = odd_model(is_dual, dtype=dtype, **sizes), torch.get_num_threads()
    assert cached.own_step.compiled
    together = step_of(cached, range(9)).unflatten(0, (1 + is_dual, -1))
    tokens, lengths = (
        torch.tensor([11 + row for row in range(9)]),
        torch.tensor([3 + 8 * r for r in range(9)]),
    )
    try:
        for num_rows, num_threads in ((4, 1), (7, 2), (9, 3)):
            torch.set_num_threads(num_threads)
            with torch.inference_mode():
                found = cached.own_step(tokens[:num_rows], lengths[:num_rows], 67, cached.cache)
            found = found.as_subclass(torch.Tensor).unflatten(0, (1 + is_dual, -1))
            assert torch.equal(found, together[:, :num_rows])
    finally:
        torch.set_num_threads(before)


@needs_compiled
def test_what_is_not_finite_stays_so():
    cached = odd_model(is_dual=False)
    cached.own_step.layers[0].norms[0].scale[3] = torch.nan
    assert step_of(cached, range(3)).isnan().all()
    cached = odd_model(is_dual=False)
    cached.allocate(2, 80)
    cached.prefill([[1, 2, 3], [4, 5, 6]], 0)
    cached.cache.storage.keys[1, 0, 0, 0, 0, 1] = torch.nan
    with torch.inference_mode():
        logits = cached.step(torch.tensor([7, 8]), torch.tensor([3, 3]), 3)
    assert logits[0].isfinite().all() and logits[1].isnan().all()


@needs_compiled
def test_nothing_is_written_beyond_the_cache():
    cached = odd_model(is_dual=False)
    cached.allocate(2, 80)
    cached.prefill([[1, 2, 3], [4, 5, 6]], 0)
    for tokens, lengths in (([7, 8], [3, 128]), ([7, 8], [-1, 3]), ([7, 8, 9], [3, 3, 3])):
        with pytest.raises(IndexError, match="beyond the cache"), torch.inference_mode():
            cached.step(torch.tensor(tokens), torch.tensor(lengths), 3)
    cached.cache = SlotCache(Slots, 2, 80)
    cached.prefill([[1, 2, 3], [4, 5, 6]], 0)
    with pytest.raises(TypeError, match="no such model or cache"), torch.inference_mode():
        cached.step(torch.tensor([7, 8]), torch.tensor([3, 3]), 3)


@needs_compiled
@pytest.mark.parametrize(
    "settings,prepare,said",
    (
        ({"CC": "false"}, None, "torch decodes instead"),
        ({"CC": "no-such-compiler"}, None, "torch decodes instead"),
        ({"CC": "gcc '"}, None, "torch decodes instead"),
        ({}, "os.chmod(folder, 0o777)", "can be written by others"),
        ({"ADS_NATIVE": "0"}, None, ""),
    ),
)
def test_without_compiled_code_torch_decodes(settings, prepare, said, tmp_path):
    done = run_native(tmp_path, settings, prepare)
    assert done.stdout.strip() == "None"
    assert said in done.stderr and len(done.stderr.splitlines()) == bool(said)


@needs_compiled
def test_each_other_way_computes_without_what_it_names(monkeypatch):
    """CI repeats the tests of compiled code by these: without it, and without AMX where there is AMX."""
    ways = native.other_ways()
    assert ways[0] == "0"
    found = {}
    for way in (*ways, "avx512"):
        monkeypatch.setenv("ADS_NATIVE", way)
        native.library.cache_clear()
        found[way] = native.library()
    native.library.cache_clear()
    assert found["0"] is None and not found["avx512"].ads_has_tiles()
    monkeypatch.setenv("ADS_NATIVE", "avx2")
    with pytest.raises(ValueError, match="ADS_NATIVE=avx2: use 0"):
        native.native_setting()


@needs_compiled
def test_a_library_that_cannot_be_loaded_is_made_again(tmp_path):
    assert "CDLL" in run_native(tmp_path, {}, None).stdout
    (path,) = tmp_path.rglob("*.so")
    path.write_text("no library")
    done = run_native(tmp_path, {}, None)
    assert "CDLL" in done.stdout and not done.stderr and path.stat().st_size > 1000


def run_native(cache, settings, prepare):
    folder = cache / "antidistillation-sampling"
    folder.mkdir(mode=0o700, exist_ok=True)
    code = (
        f"import os; folder = {str(folder)!r}; {prepare}; from ads.cpu import native; print(native.library())"
    )
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment | settings, capture_output=True, text=True, check=True
    )


@needs_compiled
@pytest.mark.parametrize("has_tiles", (True, False))
@pytest.mark.parametrize(
    "num_rows, ins, outs, rank", ((1, 64, 70, 5), (5, 70, 33, 0), (17, 96, 48, 16), (40, 32, 9, 3))
)
def test_products_of_bfloat16_round_only_the_weights(num_rows, ins, outs, rank, has_tiles):
    """Values and derivatives of W x, of weights that torch multiplies in float64."""
    if has_tiles and not native.library().ads_has_tiles():
        pytest.skip("no matrix registers on this machine")
    weight, g = torch.randn(outs + rank, ins).bfloat16(), torch.randn(outs, ins).bfloat16()
    left, x, y = torch.randn(rank, outs), torch.randn(2 * num_rows, ins), torch.empty(2 * num_rows, outs)
    thin, panels = torch.empty(num_rows, max(1, rank)), torch.empty(2 * native.PANEL * ins)
    packed = torch.empty(-(-2 * num_rows // 16) * 16 * ins) if has_tiles else None
    given = weight.data_ptr(), None if rank else g.data_ptr(), left.data_ptr()
    room = native.Halves(panels.data_ptr(), packed.data_ptr() if has_tiles else None)
    rooms = [tensor.data_ptr() for tensor in (x, y, thin)]
    native.library().ads_product(native.Product(outs, ins, rank, *given), True, num_rows, *rooms, room, 2)
    x, dx = x.double().chunk(2)
    w, right = weight.double().split((outs, rank))
    change = x @ right.T @ left.double() if rank else x @ g.double().T
    for found, wanted in zip(y.double().chunk(2), (x @ w.T, dx @ w.T + change), strict=True):
        assert relative(found, wanted) < 2e-5
