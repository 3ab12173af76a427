"""The gradient and Delta: signs, identities, and the exact derivative by autograd."""

import functools

import pytest
import torch
from conftest import tiny_model
from helpers_models import (
    V,
    exact_delta,
    gradient_of,
    mean_loss,
    model_with_gradient,
    perturbed,
    sequences,
    tied_model,
)

from ads.delta import gradient, gradient_file
from ads.delta.central import CentralDifference, perturb_, warning
from ads.delta.loss import Sequence, sequence_losses
from ads.stage.settings import LEAST_COSINE

pytestmark = pytest.mark.compiled


@pytest.mark.parametrize("kind", ("qwen2", "gemma3_text", "gpt_neox"))
def test_gradient_is_that_of_the_mean_over_sequences_of_token_means(kind):
    model, loss = model_with_gradient(kind)
    plain = tiny_model(kind, seed=3, spread=0.1)
    wanted = mean_loss(plain, sequences())
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), rel=1e-6)
    for name, p in plain.named_parameters():
        assert torch.allclose(gradient_of(model)[name], p.grad, rtol=1e-4, atol=1e-7), name


def test_only_response_tokens_are_in_the_loss():
    """A longer prompt of the same tokens leaves fewer of them in the loss."""
    model, ids = tiny_model(seed=3, spread=0.1), sequences(1)[0].ids
    for num_prompt_tokens in (1, len(ids) // 2, len(ids) - 1):
        row = Sequence(ids, num_prompt_tokens)
        found = sequence_losses(model, [row]).item()
        assert found == pytest.approx(mean_loss(model, [row]).item(), rel=1e-5)


def test_perturbation_is_plus_and_minus_eps_g():
    """A bug once left minus unperturbed: .float() of a float32 weight is the weight itself, not a copy."""
    model, _ = model_with_gradient()
    plus, minus, realised = perturbed(model, 1e-2)
    start = dict(model.named_parameters())
    for up, down in zip(plus.named_parameters(), minus.named_parameters(), strict=True):
        name, g = up[0], gradient_of(model)[up[0]]
        assert torch.equal(up[1], start[name] + 1e-2 * g)
        assert torch.equal(down[1], start[name] - 1e-2 * g)
    assert realised.cosine == pytest.approx(1, abs=1e-4)
    assert realised.relative_norm == pytest.approx(1, abs=1e-3)


def test_loss_rises_along_g_and_falls_against_it():
    model, loss = model_with_gradient()
    plus, minus, _ = perturbed(model, 1e-3)
    with torch.no_grad():
        assert mean_loss(plus, sequences()).item() > loss > mean_loss(minus, sequences()).item()


def test_sixteen_bit_weights_lose_a_small_perturbation_and_it_is_said():
    model, _ = model_with_gradient()
    _, _, realised = perturbed(model, 1e-5, torch.bfloat16)
    assert realised.cosine < LEAST_COSINE
    assert "proxy_dtype=float32 or a larger eps" in warning(realised, 1e-5, "bfloat16")
    _, _, realised = perturbed(model, 1e-3)
    assert warning(realised, 1e-3, "float32") is None


def central_delta(model, eps, prompts, shared_V):
    plus, minus, _ = perturbed(model, eps)
    pair = CentralDifference(plus, minus, eps, shared_V)
    pair.allocate(len(prompts), 64)
    return pair, pair.prefill(prompts, 0)


def test_delta_is_the_directional_derivative_of_the_log_probabilities():
    model, _ = model_with_gradient()
    model.set_attn_implementation("eager")
    prompts = [s.ids for s in sequences()]
    _, delta_BV = central_delta(model, 1e-3, prompts, torch.ones(V, dtype=torch.bool))
    for row, ids in enumerate(prompts):
        wanted_V = exact_delta(model, ids)
        assert (delta_BV[row] - wanted_V).norm() / wanted_V.norm() < 2e-3


def test_score_identity():
    """sum over x of p(x) Delta(x) = 0."""
    model, _ = model_with_gradient()
    prompts = [s.ids for s in sequences()]
    _, delta_BV = central_delta(model, 1e-3, prompts, torch.ones(V, dtype=torch.bool))
    with torch.no_grad():
        probs_BV = torch.stack(
            [torch.softmax(model(torch.tensor([ids])).logits[0, -1], -1) for ids in prompts]
        )
    assert (probs_BV * delta_BV).sum(-1).abs().max() < 1e-4 * delta_BV.std()


def test_delta_is_zero_for_tokens_the_two_models_do_not_share():
    model, _ = model_with_gradient()
    shared_V = torch.ones(V - 4, dtype=torch.bool)  # the proxy has 4 rows beyond the teacher's tokenizer
    shared_V[7] = False
    pair, delta_BV = central_delta(model, 1e-3, [s.ids for s in sequences()], shared_V)
    assert delta_BV.shape[1] == V - 4
    assert (delta_BV[:, 7] == 0).all() and (delta_BV[:, 8] != 0).all()


def test_one_sgd_step_on_a_token_moves_the_loss_as_delta_says():
    """Delta ranks tokens by how much a training step on them raises the holdout loss."""
    model, loss = model_with_gradient()
    ids = sequences(1, seed=8)[0].ids
    _, delta_BV = central_delta(model, 1e-3, [ids], torch.ones(V, dtype=torch.bool))
    order = delta_BV[0].argsort()
    changes = []
    for token in (order[0], order[V // 2], order[-1]):
        student = tiny_model("qwen2", seed=3, spread=0.1)
        log_p = torch.log_softmax(student(torch.tensor([ids])).logits[0, -1], -1)[token]
        log_p.backward()
        with torch.no_grad():
            for p in student.parameters():
                p += 1e-5 * p.grad
            changes.append(mean_loss(student, sequences()).item() - loss)
    assert changes[0] < changes[1] < changes[2]
    assert changes[0] < 0 < changes[2]


def test_zero_and_non_finite_gradients_are_refused():
    model, _ = model_with_gradient()
    for p in model.parameters():
        p.grad.zero_()
    with pytest.raises(ValueError, match="gradient is zero"):
        gradient.norms(model)
    next(model.parameters()).grad[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        gradient.norms(model)


def test_gradient_file_round_trip_and_refusals(tmp_path):
    model, _ = model_with_gradient()
    path = tmp_path / "g.safetensors"
    with pytest.raises(FileNotFoundError, match="make it with save_grad.py"):
        gradient_file.open_checked(path, "abc")
    gradient_file.save(
        path, gradient.compress(model, 0, 0), {"proxy_student": "tiny", "proxy_fingerprint": "abc"}
    )
    file = gradient_file.open_checked(path, "abc")
    gradient_file.check_matches(file, path, model)
    for name, g in gradient_of(model).items():
        assert torch.equal(file.get_tensor(name), g)
    with pytest.raises(ValueError, match="another proxy"):
        gradient_file.open_checked(path, "def")
    with pytest.raises(ValueError, match="does not fit the proxy"):
        gradient_file.check_matches(file, path, tiny_model("llama", seed=3))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        gradient_file.open_checked(path, "abc")


def test_tied_embeddings_are_one_parameter_throughout(tmp_path):
    """The paper's proxy ties them: one gradient in the file, and both perturbed heads stay tied."""
    config = tiny_model("qwen2").config
    config.tie_word_embeddings = True
    model, plus, minus = (tied_model(config) for _ in range(3))
    gradient.add_gradient_(model, sequences(), 7, 7)
    path = tmp_path / "g.safetensors"
    gradient_file.save(
        path, gradient.compress(model, 0, 0), {"proxy_student": "tied", "proxy_fingerprint": "abc"}
    )
    file = gradient_file.open_checked(path, "abc")
    assert "lm_head.weight" not in file.keys()  # noqa: SIM118 (no mapping)
    gradient_file.check_matches(file, path, plus)
    realised = perturb_(plus, minus, functools.partial(gradient_file.read, file), 1e-3)
    assert realised.cosine > 0.999 and realised.relative_norm == pytest.approx(1, abs=1e-2)
    wanted = model.get_input_embeddings().weight + 1e-3 * model.get_input_embeddings().weight.grad
    assert torch.equal(plus.get_output_embeddings().weight, wanted)


def test_a_gradient_that_is_made_again_is_the_same_file(tmp_path):
    """Its metadata once came in another order each time: what had been made with it was then refused."""
    model, contents = model_with_gradient()[0], set()
    for i in range(4):
        gradient_file.save(tmp_path / str(i), gradient.compress(model, 4, 0), {str(k): k for k in range(8)})
        contents.add((tmp_path / str(i)).read_bytes())
    assert len(contents) == 1
