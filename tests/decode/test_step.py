"""The step in few operations: each fused formula against torch.func.jvp, and how many there are."""

import pytest
import torch
from conftest import tiny_config, tiny_model
from helpers_models import PROMPTS, random_gradient
from torch.func import jvp
from torch.utils._python_dispatch import TorchDispatchMode

from ads import sampling
from ads.decode.cached_model import CachedModel
from ads.decode.llama_step import Workspace, attend_dual, dual_gate, rotations
from ads.decode.products import Norm, Stream, make_product
from ads.defences.scores import contrastive, permuted, poe
from ads.delta import gradient
from ads.dual.factors import Factors, dense
from ads.dual.model import DualCache, DualModel
from ads.dual.rules import make_weight, softmax
from ads.sampling import Sampling

# in torch, as on a GPU
pytestmark = [pytest.mark.compiled, pytest.mark.usefixtures("without_compiled_code")]


def pairs(*sizes, dtype=torch.float64):
    """Random values and derivatives."""
    generator = torch.Generator().manual_seed(sum(sizes))
    return torch.randn(2, *sizes, generator=generator, dtype=torch.float64).to(dtype)


def check(found, wanted, tolerance=1e-10):
    for half, part in zip(found, wanted, strict=True):
        assert half.dtype == torch.float64 or tolerance > 1e-10
        assert (half.double() - part.double()).norm() <= tolerance * part.double().norm()


@pytest.mark.parametrize("size", (1.0, 1e-3))  # with eps of no weight, and of much
def test_norm_of_a_stream(size):
    """A weight of 0 is no special case."""
    (x, dx), (w, dw), eps = size * pairs(5, 24), pairs(24), 1e-6
    w[3] = 0
    module = torch.nn.Module()
    module.weight, module.variance_epsilon = make_weight(w, dw), eps
    norm = Norm(module)
    norm.unit_scale = torch.stack([w, dw]) * 24**0.5  # in float64
    stream = Stream(torch.cat([x, dx]), eps)
    found = norm(stream, torch.full((10, 30), torch.nan, dtype=torch.float64))[:, :24]
    wanted = jvp(lambda x, w: torch.nn.functional.rms_norm(x, (24,), w, eps), (x, w), (dx, dw))
    check(found.chunk(2), wanted)


def test_norm_of_a_stream_in_bfloat16_rounds_no_more_than_thrice():
    """To 8 bits: the row of length 1, its product with w, and the sum."""
    (x, dx), (w, dw) = pairs(64, 256, dtype=torch.bfloat16), pairs(256, dtype=torch.bfloat16)
    module = torch.nn.Module()
    module.weight, module.variance_epsilon = make_weight(w, dw), 1e-6
    stream, room = Stream(torch.cat([x, dx]), 1e-6), torch.empty(128, 256, dtype=torch.bfloat16)
    found = Norm(module)(stream, room)
    given = [tuple(t.double() for t in pair) for pair in ((x, w), (dx, dw))]
    wanted = jvp(lambda x, w: torch.nn.functional.rms_norm(x, (256,), w, 1e-6), *given)
    assert found.dtype == torch.bfloat16
    check(found.chunk(2), wanted, tolerance=4e-3)


def test_softmax_and_its_derivative():
    """Rows of other pairs, which take part in between, leave no trace, not even of NaN."""
    (s, ds), mask = pairs(4, 3, 11), torch.zeros(11, dtype=torch.float64)
    mask[8:] = torch.finfo(torch.float64).min
    s[2], ds[2] = torch.nan, torch.nan
    found = softmax(torch.cat([s + mask, ds], dim=1)).split(3, dim=1)
    wanted = jvp(lambda s: torch.softmax(s + mask, -1), (s,), (ds,))
    rows = [0, 1, 3]
    check([part[rows] for part in found], [part[rows] for part in wanted])
    assert all((part[rows, :, 8:] == 0).all() for part in found) and found[0][2].isnan().all()


def test_gate():
    gate, up, room = pairs(5, 12), pairs(5, 12), torch.full((10, 16), torch.nan, dtype=torch.float64)
    found = dual_gate(gate.flatten(0, 1), up.flatten(0, 1), room)[:, :12]
    wanted = jvp(lambda g, u: torch.nn.functional.silu(g) * u, *zip(gate, up, strict=True))
    check(found.chunk(2), wanted)


def test_rotations():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x, angles = pairs(4, 3, 8)[0], torch.rand(4, 4, dtype=torch.float64).repeat(1, 2)
    found = torch.bmm(x, rotations(angles.cos(), angles.sin()))
    wanted, _ = apply_rotary_pos_emb(x, x, angles.cos(), angles.sin())
    assert torch.allclose(found, wanted, rtol=1e-12)


@pytest.mark.parametrize("has_bias", (False, True))
@pytest.mark.parametrize("rank", (0, 3))
def test_products_add_up_bias_and_factors(rank, has_bias):
    """Two layers of one input: weights, biases and their derivatives; and what is there already."""
    layers, parts = [], []
    for outs in (6, 10):
        layer = torch.nn.Linear(20, outs, bias=has_bias, dtype=torch.float64)
        w, dw = pairs(outs, 20)
        left, right = pairs(outs, rank or 1)[0], pairs(rank or 1, 20)[0]
        b, db = pairs(outs)
        del layer.weight, layer.bias
        layer.weight = make_weight(w, Factors(left, right) if rank else dw)
        layer.bias = make_weight(b, db) if has_bias else None
        layers.append(layer)
        parts.append((w, left @ right if rank else dw, b * has_bias, db * has_bias))
    w, dw, b, db = (torch.cat(part) for part in zip(*parts, strict=True))
    (x, dx), there = pairs(4, 20), pairs(4, 16)
    wanted = jvp(lambda x, w, b: x @ w.T + b, (x, w, b), (dx, dw, db))
    product = make_product(*layers)
    room, stream = product.make_input(8), there.flatten(0, 1).clone()
    for _ in range(2):  # the room is used again
        room[:, :20] = torch.cat([x, dx])
        check(product(room).chunk(2), wanted)
    product.add_to_(stream, room)
    check(stream.chunk(2), [a + b for a, b in zip(wanted, there, strict=True)])
    assert torch.equal(torch.cat([layer.weight.as_subclass(torch.Tensor) for layer in layers]), w)
    assert torch.allclose(torch.cat([dense(layer.weight.tangent) for layer in layers]), dw)


@pytest.mark.parametrize("num_groups", (1, 3))
def test_attention(num_groups):
    """Of rows of several lengths, whose keys lie in a cache with others; scores of what is hidden are cut."""
    num_keys, width, longest = 2, 8, 9
    num_heads, lengths_N = num_keys * num_groups, torch.tensor([9, 4, 0])
    cache = DualCache(Slots64, 4, 16)
    keys, values = pairs(4, num_keys, 16, width), pairs(4, num_keys, 16, width).flip(1)
    queries = pairs(3, num_heads, width)
    for stored, given in ((cache.storage.keys, keys), (cache.storage.values, values)):
        stored[0] = given.flip(0).permute(1, 2, 3, 0, 4).contiguous()
    hidden_NL = torch.arange(longest + 1) > lengths_N[:, None]
    mask = torch.zeros(3, num_keys, 2 * num_groups, longest + 1, dtype=torch.float64)
    mask[:, :, :num_groups].masked_fill_(hidden_NL[:, None, None], torch.finfo(torch.float64).min)
    rotations = torch.eye(width, dtype=torch.float64).repeat(6, 1, 1)
    work = Workspace(cache, lengths_N, longest, {}, rotations, num_heads)
    work.turned_RHD.copy_(queries.flatten(0, 1))
    room = torch.empty(6, num_heads * width + 8, dtype=torch.float64)
    found = attend_dual(work, 0, num_heads, mask, 0.3, room)[:, : num_heads * width]

    def attention(q, k, v):
        k, v = (x[:3, :, : longest + 1].repeat_interleave(num_groups, 1) for x in (k, v))
        scores = 0.3 * torch.einsum("nhd,nhld->nhl", q, k).masked_fill(hidden_NL[:, None], -torch.inf)
        return torch.einsum("nhl,nhld->nhd", scores.softmax(-1), v).flatten(1)

    check(found.chunk(2), jvp(attention, *zip(queries, keys, values, strict=True)))


class Slots64:
    """Of interest to a Workspace: what is stored, in two parts."""

    def __init__(self, num_slots, num_positions, num_parts):
        self.num_parts, self.keys, self.values = num_parts, {}, {}


class Operations(TorchDispatchMode):
    """Counts what would be a kernel on a GPU: operations that are no views; matrix products apart."""

    def __init__(self):
        super().__init__()
        self.num_products = self.num_others = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        aliases = [r.alias_info for r in function._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if not is_view and "empty" not in str(function):
            is_product = any(name in str(function) for name in ("mm.", "mm_.", "addmm", "bmm", "linear"))
            self.num_products += is_product
            self.num_others += not is_product
        return function(*arguments, **(keywords or {}))


def operations(is_dual, num_layers, dtype=torch.bfloat16):
    """(products, others) of a step."""
    from transformers import AutoModelForCausalLM

    config = tiny_config("qwen2", 97)
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1] * num_layers
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    cached = CachedModel(model)
    if is_dual:
        for name, p in model.named_parameters():
            p.grad = random_gradient(model, name).to(dtype)
        dual_model = DualModel(model, gradient.compress(model, 3, seed=0).__getitem__)
        cached = CachedModel(dual_model)
    cached.allocate(3, 40)
    cached.prefill(PROMPTS, 0)
    lengths = torch.tensor([len(prompt) for prompt in PROMPTS])
    with torch.inference_mode(), Operations() as counted, Questions():
        cached.own_step(torch.tensor([1, 2, 3]), lengths, int(lengths.max()), cached.cache)
    return torch.tensor([counted.num_products, counted.num_others])


@pytest.mark.parametrize("is_dual, products, others", ((False, 5, 7), (True, 11, 19)))
def test_a_layer_takes_few_operations(is_dual, products, others):
    """They once were 4 and 12, in dual numbers 12 and 43: on a GPU more time to launch than to compute."""
    found = operations(is_dual, 3) - operations(is_dual, 2)
    assert found[0] <= products and found[1] <= others, found


class Questions(TorchDispatchMode):
    """A context in which the host may not look at values, for which it would wait for a GPU."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        asks = ("_local_scalar_dense", "nonzero", "is_nonzero", "unique", "masked_select")
        assert function.overloadpacket.__name__ not in asks, f"the host would wait for {function}"
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("is_dual", (False, True))
def test_masks_are_not_copied(is_dual):
    """A GPU's fused kernel copies one whose rows do not start at multiples of 16 bytes, in every layer."""
    step = CachedModel(tiny_model("qwen2", seed=3, spread=0.1)).own_step
    step.is_dual = is_dual
    for longest in (7, 8, 12):
        mask = step.mask(torch.tensor([3, longest]), longest, None, torch.empty(0, dtype=torch.bfloat16))
        assert mask.shape[::3] == (2, longest + 1)
        if is_dual:
            assert mask.is_contiguous()
        else:
            assert all(stride % 8 == 0 for stride in mask.stride()[:-1]) and mask.stride(0) > longest
        seen = (mask[:, 0, 0] == 0).tolist()
        assert seen == [[i <= last for i in range(longest + 1)] for last in (3, longest)]


@pytest.mark.parametrize(
    "distribution",
    (
        Sampling(0.0, 0.5), Sampling(0.6, 0.5, 5, 0.9), Sampling(0.6, 0.5, 0, 0.9),
        Sampling(0.6, 0.5, 5), Sampling(1.0), Sampling(0.6, 0.5, 5, 0.9, permuted),
        Sampling(0.6, 0.5, 5, 0.9, poe, max_kl=0.05, keep_top1=True), Sampling(0.8, 2.0, score=contrastive),
    ),
)  # fmt: skip
def test_sampling_asks_a_gpu_nothing(distribution, monkeypatch):
    """With top_p and no top_k the host once waited for whether rows were flat; it draws the same without."""
    generator = torch.Generator().manual_seed(0)
    logits, delta = (3 * torch.randn(8, 60, generator=generator) for _ in range(2))
    keys, steps = torch.arange(8) * 7919, torch.arange(8)
    delta = delta[:, :50] if distribution.lam else None
    log_probs = sampling.log_probs(logits, torch.ones(50, dtype=torch.bool))
    wanted, _ = sampling.sample(log_probs, delta, distribution, keys, steps)
    monkeypatch.setattr(sampling, "may_ask", lambda device: False)
    with Questions():
        log_probs = sampling.log_probs(logits, torch.ones(50, dtype=torch.bool))
        assert torch.equal(sampling.sample(log_probs, delta, distribution, keys, steps)[0], wanted)
    with Questions(), pytest.raises(AssertionError, match="host would wait"):
        (delta if distribution.lam else logits).any().item()
