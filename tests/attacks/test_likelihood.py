"""What the undistilled student makes of traces, against plain loops."""

import pytest
import torch
from conftest import ROOT, tiny_model
from helpers_training import examples

from ads import chat
from ads.attacks import likelihood
from ads.data.examples import fill_up
from ads.loading import load_model

STUDENT = str(ROOT / "demo" / "models" / "student")


def log_probs(model, example):
    """log p of each label of one example, in the plainest way."""
    ids, labels = torch.tensor(example["input_ids"]), torch.tensor(example["labels"])
    log_p_TV = torch.log_softmax(model(ids[None]).logits[0, :-1].float(), -1)
    log_p_T = log_p_TV.gather(1, ids[1:, None]).squeeze(1)
    return log_p_T[labels[1:] != chat.IGNORED_LABEL]


@pytest.mark.parametrize("batch_size", (1, 3, 8))
def test_losses_of_labels_are_those_of_one_row_at_a_time(batch_size):
    """In the order of the examples, whatever the batches; one that is filled up with has none."""
    model, rows = tiny_model(), fill_up(examples(7), 8)
    found = likelihood.label_losses(model, rows, batch_size, batch_tokens=80)
    assert len(found) == 8 and len(found[-1]) == 0
    for losses_N, example in zip(found[:-1], rows, strict=False):
        wanted_N = -log_probs(model, example).detach()
        assert losses_N.dtype == torch.float32
        torch.testing.assert_close(losses_N, wanted_N, atol=6e-5, rtol=1e-5)
    assert likelihood.mean_nll(model, rows[:2]) == [
        pytest.approx(x.mean().item(), abs=1e-4) for x in found[:2]
    ]


def student_examples(first, number):
    """Demo problems with wrong and right results, in the student's chat format."""
    tokenizer = chat.load_tokenizer(STUDENT)
    made = []
    for i in range(first, first + number):
        trace = f"start with {i} . double : {i} * 2 = {2 * i + i % 3} . the answer is \\boxed{{ {2 * i} }} ."
        ids, labels = chat.student_example(tokenizer, f"Ann has {i} coins .", trace, i % 2 == 0)
        made.append({"input_ids": ids, "labels": labels})
    return made


def plain_loss(model, rows):
    """The mean over sequences of their token means, as distill.py evaluates it."""
    return -torch.stack([log_probs(model, row).mean() for row in rows]).mean()


def test_derivatives_are_those_of_a_plain_autograd_loop():
    """On the demo's student: <g, gradient of log p> summed over each trace, to a share of 1e-4."""
    model, parameters = load_model(STUDENT, "float32", "cpu"), []
    rows, holdout = student_examples(3, 8), student_examples(20, 6)
    parameters = list(model.parameters())
    g = torch.autograd.grad(plain_loss(model, holdout), parameters)
    wanted = []
    for row in rows:
        h = torch.autograd.grad(log_probs(model, row).sum(), parameters)
        wanted.append(sum((a * b).sum() for a, b in zip(g, h, strict=True)).item())
    gradients = likelihood.loss_gradient(model, holdout, batch_size=4, batch_tokens=2048)
    found = likelihood.derivatives(model, gradients, rows)
    assert found == pytest.approx(wanted, rel=1e-4) and max(map(abs, found)) > 0.1
    assert all(p.grad is None for p in parameters)


def test_a_step_along_a_trace_changes_the_holdout_loss_by_its_derivative():
    """Its sign: above 0 learning the trace raises the loss."""
    model, holdout = load_model(STUDENT, "float32", "cpu"), student_examples(20, 6)
    gradients = likelihood.loss_gradient(model, holdout, batch_size=4, batch_tokens=2048)
    for row in student_examples(3, 3):
        [along] = likelihood.derivatives(model, gradients, [row])
        h = torch.autograd.grad(log_probs(model, row).sum(), list(model.parameters()))
        losses = []
        for step in (1e-6, -2e-6, 1e-6):  # forth, back, and home
            losses.append(plain_loss(model, holdout).item())
            with torch.no_grad():
                for p, x in zip(model.parameters(), h, strict=True):
                    p += step * x
        before, after = losses[1], losses[2]
        assert (before - after) / 2e-6 == pytest.approx(along, rel=0.05, abs=0.02)


def test_an_example_without_a_label_teaches_nothing():
    model, empty = load_model(STUDENT, "float32", "cpu"), student_examples(3, 1)[0]
    empty["labels"] = [chat.IGNORED_LABEL] * len(empty["labels"])
    assert likelihood.mean_nll(model, [empty]) == [float("inf")]
    assert likelihood.derivatives(model, [], [empty]) == [0.0]
