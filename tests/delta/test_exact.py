"""The exact derivative: against torch.func.jvp, cached against uncached; g in factors; the diagnostics."""

import functools

import pytest
import torch
from conftest import tiny_model
from helpers_models import (
    V,
    decode,
    exact_delta,
    gradient_of,
    model_with_gradient,
    perturbed,
    plain_models,
    prompts,
    requests,
    sequences,
    tied_model,
)

from ads import sampling
from ads.decode.cached_model import CachedModel
from ads.decode.engine import Models
from ads.delta import agreement, agreement_table, gradient, gradient_file
from ads.delta.central import CentralDifference, perturb_
from ads.delta.exact import ExactDerivative
from ads.delta.proxy import Proxy
from ads.dual.attention import ATTENTION, dual_attention
from ads.dual.factors import Factors, dense, factorise, random_tensor, square_norm
from ads.dual.norms import find_norms
from ads.dual.rules import Dual, halves, make_weight
from ads.sampling import GREEDY, Sampling
from ads.stage.settings import GradConfig

pytestmark = pytest.mark.compiled

KINDS = ("qwen2", "llama", "mistral", "gemma2", "gemma3_text", "gpt_neox", "gpt2")
ALL = torch.ones(V, dtype=torch.bool)


def exact_proxy(kind, read_gradient, shared_V=ALL, dtype=torch.float32, attention=None):
    model = tiny_model(kind, seed=3, spread=0.1).to(dtype)
    if attention:
        model.set_attn_implementation(attention)
    return ExactDerivative(model, read_gradient, shared_V)


def prefill(exact, rows, num_positions=64):
    exact.allocate(len(rows), num_positions)
    return exact.prefill(rows, 0)


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


@functools.cache
def reference(kind):
    """(model with g in .grad, attention written out)."""
    model, _ = model_with_gradient(kind)
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_exact_delta_is_that_of_torch_func_jvp(kind):
    model, rows = reference(kind), [s.ids for s in sequences()]
    delta_BV = prefill(exact_proxy(kind, gradient_of(model).__getitem__), rows)
    for row, ids in enumerate(rows):
        assert relative(delta_BV[row], exact_delta(model, ids)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_cached_decoding_equals_uncached_passes_in_moved_and_refilled_slots(kind):
    model, rows = reference(kind), [s.ids for s in sequences(4)]
    exact = exact_proxy(kind, gradient_of(model).__getitem__)
    with torch.inference_mode():  # as the engine's steps are; it once dropped all derivatives
        exact.allocate(3, 64)
        exact.prefill([rows[0][:5], rows[1][:3], rows[2][:7]], 0)
        slots = [rows[0][:5], rows[1][:3], rows[2][:7]]
        for token in (11, 12, 13):
            slots, delta_BV = step_all(exact, slots, token)
        check_rows(model, slots, delta_BV)
        exact.release(0, 2, len(slots[2]))  # row 0 ended; the last row takes its place, a new one the last
        exact.prefill([rows[3][:4]], 2)
        slots = [slots[2], slots[1], rows[3][:4]]
        for token in (21, 22):
            slots, delta_BV = step_all(exact, slots, token)
    check_rows(model, slots, delta_BV)


def step_all(exact, slots, token):
    """Append a token to every slot."""
    tokens_N = torch.arange(len(slots)) + token
    lengths = [len(ids) for ids in slots]
    delta_NV = exact.step(tokens_N, torch.tensor(lengths), max(lengths))
    return [[*ids, t] for ids, t in zip(slots, tokens_N.tolist(), strict=True)], delta_NV


def check_rows(model, slots, delta_BV):
    for row, ids in enumerate(slots):
        assert relative(delta_BV[row], exact_delta(model, ids)) < 1e-5


class OneProxy:
    """transformers' way: a logits processor with the uncached derivative of the whole row."""

    def __init__(self, model, lam):
        self.model, self.lam = model, lam

    def __call__(self, input_ids, scores):
        return torch.log_softmax(scores, -1) + self.lam * exact_delta(self.model, input_ids[0].tolist())


def test_greedy_decoding_equals_generate_with_a_logits_processor():
    from transformers import LogitsProcessorList

    model, plain = reference("qwen2"), plain_models()
    exact = exact_proxy("qwen2", gradient_of(model).__getitem__)
    models = Models(plain.teacher, exact, plain.allowed_V, plain.eos)
    found = decode(models, Sampling(0.0, 3.0), requests(num_rows=4, num_new=8), batch_size=2)
    clean = decode(plain_models(), GREEDY, requests(num_rows=4, num_new=8), batch_size=2)
    assert any(found[i].ids != clean[i].ids for i in found), "lam must matter"
    for row in requests(num_rows=4, num_new=8):
        wanted = plain.teacher.model.generate(
            torch.tensor([row.prompt_ids]),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=sorted(plain.eos),
            pad_token_id=0,
            logits_processor=LogitsProcessorList([OneProxy(model, 3.0)]),
        )
        assert found[row.id].ids == wanted[0, len(row.prompt_ids) :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_factors_give_the_delta_of_their_product(kind):
    factors = gradient.compress(reference(kind), rank=3, seed=0)
    assert sum(isinstance(g, Factors) for g in factors.values()) > 5
    rows = [s.ids for s in sequences(3)]
    full = {name: dense(g) for name, g in factors.items()}
    found, wanted = (prefill(exact_proxy(kind, g.__getitem__), rows) for g in (factors, full))
    assert relative(found, wanted) < 1e-5
    assert relative(found, prefill(exact_proxy(kind, gradient_of(reference(kind)).__getitem__), rows)) > 1e-3


def test_tied_head_and_embedding_both_move():
    config = tiny_model("qwen2").config
    config.tie_word_embeddings = True
    model = tied_model(config)
    gradient.add_gradient_(model, sequences(), 7, 7)
    model.set_attn_implementation("eager")
    rows = [s.ids for s in sequences(3)]
    for g in (gradient_of(model), gradient.compress(model, 3, 0)):
        delta_BV = prefill(ExactDerivative(tied_model(config), g.__getitem__, ALL), rows)
        for name, p in model.named_parameters():
            p.grad = dense(g[name])
        check_rows(model, rows, delta_BV)


def test_score_identity_and_ids_that_are_not_shared():
    """sum over x of p(x) Delta(x) = 0 over the shared ids; Delta is 0 elsewhere."""
    shared_V = torch.ones(V - 4, dtype=torch.bool)  # the proxy has 4 rows beyond the teacher's tokenizer
    shared_V[7] = False
    model, rows = reference("qwen2"), [s.ids for s in sequences()]
    delta_BV = prefill(exact_proxy("qwen2", gradient_of(model).__getitem__, shared_V), rows)
    assert delta_BV.shape == (7, V - 4) and (delta_BV[:, 7] == 0).all() and (delta_BV[:, 8] != 0).all()
    with torch.no_grad():
        logits_BR = torch.stack([model(torch.tensor([ids])).logits[0, -1] for ids in rows])
    probs_BV = sampling.log_probs(logits_BR, shared_V).exp()
    assert (probs_BV * delta_BV).sum(-1).abs().max() < 1e-4


def test_central_difference_tends_to_the_exact_derivative():
    model, rows = reference("qwen2"), [s.ids for s in sequences()]
    wanted = prefill(exact_proxy("qwen2", gradient_of(model).__getitem__), rows)
    errors = []
    for eps in (1e-1, 1e-2, 1e-3):
        plus, minus, _ = perturbed(model, eps)
        errors.append(relative(prefill(CentralDifference(plus, minus, eps, ALL), rows), wanted))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-3


def test_central_difference_accepts_factors():
    factors = gradient.compress(reference("qwen2"), rank=3, seed=0)
    plus, minus = (tiny_model("qwen2", seed=3, spread=0.1) for _ in range(2))
    perturb_(plus, minus, factors.__getitem__, 1e-2)
    for name, p in tiny_model("qwen2", seed=3, spread=0.1).named_parameters():
        moved = dict(plus.named_parameters())[name] - p
        assert torch.allclose(moved, 1e-2 * dense(factors[name]), atol=1e-7), name


def test_bfloat16_keeps_the_direction():
    """Where the central difference would lose it: the reason for this mode."""
    model, rows = reference("qwen2"), [s.ids for s in sequences()]
    read = gradient_of(model).__getitem__
    wanted = prefill(exact_proxy("qwen2", read), rows)
    found = prefill(exact_proxy("qwen2", read, dtype=torch.bfloat16), rows)
    cosine_B = torch.cosine_similarity(found, wanted)
    assert found.dtype == torch.float32 and cosine_B.min() > 0.995
    plus, minus = (tiny_model("qwen2", seed=3, spread=0.1).bfloat16() for _ in range(2))
    perturb_(plus, minus, read, 1e-4)
    central = prefill(CentralDifference(plus, minus, 1e-4, ALL), rows)
    assert torch.cosine_similarity(central, wanted).mean() < 0.9


@pytest.mark.parametrize("kind", ("gemma2", "gpt_neox"))
def test_eager_attention_gives_the_same(kind):
    read, rows = gradient_of(reference(kind)).__getitem__, [s.ids for s in sequences()]
    eager, ours = (exact_proxy(kind, read, attention="eager") for _ in range(2))
    ours.dual.model.library.set_attn_implementation(ATTENTION)  # Gemma 2 is eager by itself
    eager, ours = (prefill(exact, rows) for exact in (eager, ours))
    assert relative(ours, eager) < 1e-5 and not torch.equal(ours, eager)


def test_attention_of_other_kinds_is_refused():
    query = torch.zeros(1, 2, 1, 4)
    with pytest.raises(NotImplementedError, match="s_aux.*attn_implementation=eager"):
        dual_attention(None, query, query, query, torch.zeros(1, 1, 1, 1), s_aux=torch.zeros(2))


def test_zero_and_non_finite_gradients_are_refused():
    for factor, words in ((0.0, "zero"), (float("nan"), "not finite")):
        g = {name: factor * g for name, g in gradient_of(reference("qwen2")).items()}
        with pytest.raises(ValueError, match=f"gradient is {words}"):
            exact_proxy("qwen2", g.__getitem__)


def test_g_is_read_once():
    """It was once read three times: for its length, for the check of the derivative, and for the weights."""
    g, names = gradient_of(reference("llama")), []
    exact_proxy("llama", lambda name: names.append(name) or g[name])
    assert sorted(names) == sorted(g)


class PlainProxy(Proxy):
    """A kind of proxy is a constructor and a score: here log p of the teacher's own model."""

    def __init__(self):
        super().__init__(CachedModel(tiny_model("qwen2")))

    def score(self, logits_BR):
        return sampling.log_probs(logits_BR, ALL)


def test_the_engine_takes_any_kind_of_proxy():
    """log p - 2 log p is highest where the teacher's token is the least likely."""
    plain = plain_models()
    models = Models(plain.teacher, PlainProxy(), plain.allowed_V, plain.eos)
    rows = requests(num_rows=3, num_new=4)
    found = decode(models, Sampling(0.0, -2.0), rows, batch_size=2)
    for row in rows:
        ids = list(row.prompt_ids)
        for token in found[row.id].ids:
            with torch.no_grad():
                logits_V = plain.teacher.model(torch.tensor([ids])).logits[0, -1, :V]
            assert token == logits_V.argmin()
            ids.append(token)


def change_in_place(x):
    x = x * 1.0
    x += 1
    x += x * 2
    x -= 3
    x *= 0.5
    x /= 3
    return x


OPERATIONS = {
    "sums": lambda x, y, w, c: x + y - 2 * x + (1 - x) + c + (x - c) + torch.add(x, y, alpha=3) + (2 + x) + w,
    "a sum of constants of fewer dimensions": lambda x, y, w, c: x + c[0] - c[0, 0],
    "products": lambda x, y, w, c: x * y * c * 3.0 * (c * x) * (w * x) * (2 * y) * (x * w) * c[0],
    "products of columns": lambda x, y, w, c: x * y[..., :1] + x.mean(-1, keepdim=True) * y,
    "quotients": lambda x, y, w, c: x / c / 2.0 + x / (3 + y * y) + 1 / (2 + x * x),
    "powers": lambda x, y, w, c: x**2 + x.pow(3) + torch.rsqrt(x.square() + 1) + (x * x + 1).rsqrt() ** 0.5,
    "changes in place": lambda x, y, w, c: change_in_place(x),
    "weights": lambda x, y, w, c: x * (1 + w).float() + x * (w * w) + (w.float() + 2) * y,
    "reshaping": lambda x, y, w, c: x.view(-1, 6).reshape(len(x), 4, 6).transpose(1, 2).flatten(1)[:, 3:20:2],
    "parts": lambda x, y, w, c: torch.cat([x.chunk(2, -1)[1], -y.split(4, 1)[0][..., :2]], -1)[:, [0, 2]],
    "a dimension more": lambda x, y, w, c: x[:, None].expand(-1, 3, -1, -1).sum(1) + x.unsqueeze(2)[:, :, 0],
    "turned rows": lambda x, y, w, c: x.permute(0, 2, 1) @ y,
    "elementwise": lambda x, y, w, c: (
        torch.nn.functional.silu(x)
        + torch.nn.functional.gelu(y, approximate="tanh")
        + torch.nn.GELU()(x)
        + torch.tanh(y)
    ),
    "a softmax": lambda x, y, w, c: torch.softmax(x, -1, dtype=torch.float32) * y,
    "layer norm": lambda x, y, w, c: torch.nn.functional.layer_norm(x, (6,), w, w + 1),
    "comparisons": lambda x, y, w, c: torch.where(x > y, x, y) + x.clamp(min=0) + x.masked_fill(y > 0, 0.0),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_on_duals_are_those_of_forward_mode_ad(name):
    from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual

    torch.manual_seed(0)
    (x, dx), (y, dy), (w, dw) = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6), torch.randn(2, 6)
    c = torch.randn(3, 4, 6)
    operation, given = OPERATIONS[name], [torch.cat(pair) for pair in ((x, dx), (y, dy), (c, c))]
    with dual_level():
        wanted = unpack_dual(operation(make_dual(x, dx), make_dual(y, dy), make_dual(w, dw), c))
    with torch.no_grad():
        duals = [tensor.clone().as_subclass(Dual) for tensor in given]
        found = operation(*duals[:2], make_weight(w, dw), given[2])
        assert isinstance(found, Dual)
        for half, part in zip(halves(found.as_subclass(torch.Tensor)), wanted, strict=True):
            assert torch.allclose(half, part, rtol=1e-4, atol=1e-5)
        assert torch.equal(duals[0].as_subclass(torch.Tensor), given[0]), "x itself was changed"


@pytest.mark.parametrize(
    "operation, words",
    [
        (lambda x: x[torch.tensor([1, 0])], "picks rows"),
        (lambda x: x[0], "picks rows"),
        (lambda x: x.relu_(), "in place"),
        (lambda x: torch._C._nn.silu_(x), "in place"),
    ],
)
def test_operations_that_are_not_covered_say_so(operation, words):
    with pytest.raises(NotImplementedError, match=words):
        operation(torch.randn(4, 6).as_subclass(Dual))


def test_norms_are_found_by_what_they_compute():
    """A layer norm without bias has the same attributes as an RMS norm."""
    kinds = {kind: len(find_norms(tiny_model(kind, seed=3, spread=0.1))) for kind in KINDS}
    layers = tiny_model("llama").config.num_hidden_layers
    assert kinds["llama"] == kinds["qwen2"] == 2 * layers + 1 and kinds["gpt2"] == kinds["gpt_neox"] == 0
    assert kinds["gemma2"] == 4 * layers + 1 and kinds["gemma3_text"] == 6 * layers + 1
    layer_norm = torch.nn.LayerNorm(8, bias=False)
    assert not find_norms(torch.nn.ModuleList([layer_norm]))


def test_an_architecture_that_is_not_covered_says_so():
    model = tiny_model("mixtral")
    with pytest.raises(
        ValueError, match="does not cover model type 'mixtral' .the proxy's forward .*set eps above 0"
    ):
        prefill(ExactDerivative(model, lambda name: dict(model.named_parameters())[name], ALL), [[1, 2]])


def decaying_matrix(num_rows=300, num_columns=200):
    """Singular values 1, 1/2, 1/3, ..."""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(n, 200, generator=generator)).Q for n in (num_rows, num_columns)
    )
    return left / torch.arange(1, 201) @ right.T


@pytest.mark.parametrize("rank", (5, 60))
def test_factors_are_the_best_approximation_of_their_rank(rank):
    """Rank 5 is sketched, rank 60 decomposed as it is."""
    matrix = decaying_matrix()
    factors = factorise(matrix, rank, 7, "w")
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    best = left[:, :rank] * values[:rank] @ right[:rank]
    assert factors.left.shape == (300, rank) and factors.right.shape == (rank, 200)
    error, least = (matrix - dense(factors)).norm(), (matrix - best).norm()
    assert least > 0.1 and error < 1.002 * least
    assert square_norm(factors) == pytest.approx(dense(factors).square().sum().item(), rel=1e-4)
    again = factorise(matrix, rank, 7, "w")
    assert torch.equal(factors.left, again.left) and torch.equal(factors.right, again.right)


def test_only_what_shrinks_is_factored():
    compressed = gradient.compress(reference("qwen2"), rank=16, seed=0)
    for name, p in reference("qwen2").named_parameters():
        shrinks = p.dim() == 2 and 16 * sum(p.shape) < p.numel()
        assert isinstance(compressed[name], Factors) == shrinks, name
        if not shrinks:
            assert torch.equal(compressed[name], p.grad)
    assert any(isinstance(g, Factors) for g in compressed.values())


def test_factors_round_trip_through_the_file(tmp_path):
    path = tmp_path / "g.safetensors"
    compressed = gradient.compress(reference("qwen2"), rank=3, seed=0)
    gradient_file.save(path, compressed, {"proxy_student": "tiny", "proxy_fingerprint": "abc"})
    file = gradient_file.open_checked(path, "abc")
    gradient_file.check_matches(file, path, reference("qwen2"))
    for name, g in compressed.items():
        found = gradient_file.read(file, name)
        assert type(found) is type(g) and torch.equal(dense(found), dense(g)), name
    with pytest.raises(ValueError, match="does not fit the proxy"):
        gradient_file.check_matches(file, path, reference("llama"))


def test_random_direction_of_factors_has_their_norm_and_form():
    compressed = gradient.compress(reference("qwen2"), rank=3, seed=0)
    name = next(name for name, g in compressed.items() if isinstance(g, Factors))
    found, again = (random_tensor(compressed.__getitem__, 7, name) for _ in range(2))
    other = random_tensor(compressed.__getitem__, 8, name)
    assert found.left.shape == compressed[name].left.shape and torch.equal(found.left, again.left)
    g, directions = dense(compressed[name]), [dense(d) for d in (found, other)]
    assert directions[0].norm().item() == pytest.approx(g.norm().item(), rel=1e-4)
    for one, two in ((g, directions[0]), (directions[1], directions[0])):
        assert abs(torch.cosine_similarity(one.flatten(), two.flatten(), dim=0)) < 0.3


def test_agreement_is_what_it_says():
    """Correlation, sine and error written out, position by position."""
    torch.manual_seed(0)
    log_p = torch.log_softmax(4 * torch.randn(20, 50), -1)
    log_p[3] = torch.log_softmax(torch.tensor([50.0] + [0.0] * 49), -1)  # one likely token: left out
    truth, delta = torch.randn(20, 50), torch.randn(20, 50)
    delta += 3 * truth + 7
    correlations, errors = [], []
    for p, t, d in zip(log_p.exp(), truth, delta, strict=True):
        if (p > 1e-4).sum() >= 3:
            t, d = t[p > 1e-4] - t[p > 1e-4].mean(), d[p > 1e-4] - d[p > 1e-4].mean()
            correlations.append(torch.corrcoef(torch.stack([t, d]))[0, 1])
            errors.append(((d - t) / t).abs())
    correlation = torch.stack(correlations)
    found = agreement.agreement(delta, truth, log_p)
    assert 10 < len(correlation) < 20 and 0.8 < found["correlation"] < 0.99
    assert found["correlation"] == pytest.approx(correlation.mean().item(), abs=1e-4)
    assert found["correlation_p10"] == pytest.approx(correlation.quantile(0.1).item(), abs=1e-4)
    assert found["sine"] == pytest.approx((1 - correlation**2).sqrt().mean().item(), abs=1e-4)
    assert found["relative_error"] == pytest.approx(torch.cat(errors).median().item(), abs=1e-4)


@pytest.fixture(scope="module")
def diagnosed(tmp_path_factory):
    """(what stage 2 finds in float32, the uncached exact Delta and log p, the model)."""
    folder = tmp_path_factory.mktemp("proxy")
    tiny_model("qwen2", seed=3, spread=0.1).save_pretrained(folder)
    model, rows = model_with_gradient("qwen2")[0], sequences(3)
    half = {name: 0.25 * p.grad for name, p in model.named_parameters()}
    cfg = GradConfig(proxy_student=str(folder), proxy_dtype="float32", grad_rank=3)
    return agreement.diagnose(cfg, model, gradient.compress(model, 3, 0), half, rows), model, rows


def test_diagnostics_rank_the_ways_to_delta(diagnosed):
    found, _, rows = diagnosed
    assert found["num_positions"] == sum(len(s.ids) - s.num_prompt_tokens for s in rows)
    assert 0.5 < found["exact"]["correlation"] < 0.9999, "rank 3 loses something"
    assert found["best_eps"] in ("0.0001", "0.001") and len(found["central"]) == 4
    assert found["split_half"]["correlation"] == 1.0, "a half that is proportional to g"
    assert found["split_half"]["relative_error"] == pytest.approx(2 / 3, abs=1e-3)  # 0.25 against 0.75


def test_nothing_to_compare_is_said(tmp_path):
    """Where a proxy is sure of one token everywhere, or knows of none."""
    model = tiny_model("qwen2", seed=3, spread=0.1)
    gradient.add_gradient_(model, sequences(3), 3, 3)
    with torch.no_grad():
        model.model.norm.weight *= 1e4
    with pytest.raises(ValueError, match="nowhere in .* positions have three tokens"):
        agreement.diagnose(GradConfig(proxy_student="p"), model, {}, None, sequences(3))


def test_diagnosed_spread_is_that_of_the_exact_delta(diagnosed):
    found, model, rows = diagnosed
    model.set_attn_implementation("eager")
    squares = []
    for s in rows:
        for end in range(s.num_prompt_tokens, len(s.ids)):
            with torch.no_grad():
                p_V = torch.softmax(model(torch.tensor([s.ids[:end]])).logits[0, -1], -1)
            delta_V = exact_delta(model, s.ids[:end])[p_V > 1e-4]
            squares.append((delta_V - delta_V.mean()).square())
    deviation = torch.cat(squares).mean().sqrt().item()
    assert found["delta_std"] == pytest.approx(deviation, rel=1e-3)
    assert found["lam_of_spread"]["0.3"] == pytest.approx(0.3 / deviation, rel=1e-3)


def test_a_poor_delta_is_warned_of_with_what_to_change(diagnosed):
    found, *_ = diagnosed
    assert "raise grad_rank" in agreement_table.table(found, 0)[-1]
    central = {**found, "dtype": "bfloat16", "central": {"0.001": {**found["exact"], "correlation": 0.6}}}
    assert "0.600" in agreement_table.warning(central, 1e-3)
    assert "eps=0 (the exact derivative) or set proxy_dtype=float32" in agreement_table.warning(central, 1e-3)
    good = {**found, "exact": {**found["exact"], "correlation": 0.999}}
    assert agreement_table.warning(good, 0) is None and "WARNING" not in " ".join(
        agreement_table.table(good, 0)
    )


def test_prompts_of_the_engine_s_tests_are_long_enough():
    assert max(map(len, prompts())) > 8, "else no sliding window is ever left"
