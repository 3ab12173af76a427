"""native.c: sizes, threads, rounding, who gets it. Against the library: test_llama_step.py."""

import subprocess
import sys
from ctypes import byref

import pytest
import torch
from conftest import ROOT
from helpers_models import random_gradient, relative

from ads.cpu import build, native
from ads.decode.cached_model import CachedModel
from ads.dual.model import DualModel
from ads.kv_cache import SlotCache, Slots

pytestmark = pytest.mark.compiled

needs_compiled = pytest.mark.skipif(build.library() is None, reason="no C compiler or no AVX-512 here")


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
    ways = build.other_ways()
    assert ways[0] == "0"
    found = {}
    for way in (*ways, "avx512"):
        monkeypatch.setenv("ADS_NATIVE", way)
        build.library.cache_clear()
        found[way] = build.library()
    build.library.cache_clear()
    assert found["0"] is None and not found["avx512"].ads_has_tiles()
    monkeypatch.setenv("ADS_NATIVE", "avx2")
    with pytest.raises(ValueError, match="ADS_NATIVE=avx2: use 0"):
        build.native_setting()


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
        f"import os; folder = {str(folder)!r}; {prepare}; from ads.cpu import build; print(build.library())"
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
    if has_tiles and not build.library().ads_has_tiles():
        pytest.skip("no matrix registers on this machine")
    weight, g = torch.randn(outs + rank, ins).bfloat16(), torch.randn(outs, ins).bfloat16()
    left, x, y = torch.randn(rank, outs), torch.randn(2 * num_rows, ins), torch.empty(2 * num_rows, outs)
    thin, panels = torch.empty(num_rows, max(1, rank)), torch.empty(2 * native.PANEL * ins)
    packed = torch.empty(-(-2 * num_rows // 16) * 16 * ins)
    rooms = {"thin": thin.data_ptr(), "panels": panels.data_ptr()}
    rooms["packed"] = packed.data_ptr() if has_tiles else None
    step = native.StepStruct(is_dual=True, rows=num_rows, **rooms)
    matrices = weight.data_ptr(), None if rank else g.data_ptr(), left.data_ptr()
    product = native.ProductStruct(outs, ins, rank, *matrices)
    build.library().ads_product(byref(product), byref(step), *map(native.address_of, (x, y)), 2)
    x, dx = x.double().chunk(2)
    w, right = weight.double().split((outs, rank))
    change = x @ right.T @ left.double() if rank else x @ g.double().T
    for found, wanted in zip(y.double().chunk(2), (x @ w.T, dx @ w.T + change), strict=True):
        assert relative(found, wanted) < 2e-5
