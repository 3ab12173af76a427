"""Batches of like lengths and losses without the logits of prompts, against plain library losses."""

import math
import shutil

import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from helpers_models import sequences
from helpers_training import config, examples, flat_gradient
from transformers import AttentionInterface, TrainerCallback
from transformers.integrations import sdpa_attention

import save_grad
from ads import chat, loading
from ads.attacks import training
from ads.delta import gradient, loss
from ads.delta.loss import Sequence, make_batches, sequence_losses
from ads.stage.settings import GradConfig
from ads.stage.world import World

pytestmark = pytest.mark.compiled

KINDS = ("llama", "qwen2", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite")


def add_plainly_(model, rows):
    """The definition: the library's own loss, one sequence at a time."""
    for s in rows:
        ids_1T = torch.tensor([s.ids])
        labels_1T = ids_1T.clone()
        labels_1T[0, : s.num_prompt_tokens] = chat.IGNORED_LABEL
        (model(input_ids=ids_1T, labels=labels_1T).loss / len(rows)).backward()


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_in_batches_is_that_of_a_loop_over_the_library_s_loss(kind):
    rows = sequences(9)
    ours, plain = (tiny_model(kind, seed=3, spread=0.1) for _ in range(2))
    add_plainly_(plain, rows)
    gradient.add_gradient_(ours, rows, len(rows), batch_size=4, batch_tokens=100)
    assert max(map(len, make_batches(rows, 4, 100))) > 1
    difference = flat_gradient(ours) - flat_gradient(plain)
    assert difference.norm() < 1e-6 * flat_gradient(plain).norm()


def test_unequal_rows_of_a_batch_are_right_too(monkeypatch):
    """Padding up to 90 %, which only tests have."""
    monkeypatch.setattr(loss, "MAX_PADDING", 0.9)
    test_gradient_in_batches_is_that_of_a_loop_over_the_library_s_loss("gemma2")


def test_bfloat16_passes_leave_a_float32_gradient_of_nearly_the_same_direction():
    rows = sequences(9)
    ours, mixed = (tiny_model("llama", seed=3, spread=0.1) for _ in range(2))
    gradient.add_gradient_(ours, rows, len(rows), 4)
    gradient.add_gradient_(mixed, rows, len(rows), 4, dtype="bfloat16")
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in mixed.parameters())
    cosine = torch.cosine_similarity(flat_gradient(ours), flat_gradient(mixed), dim=0)
    assert 0.999 < cosine < 0.9999999


@pytest.mark.parametrize("batch_size,batch_tokens", ((1, math.inf), (8, math.inf), (64, 500)))
def test_batches_hold_every_sequence_once_and_little_padding(batch_size, batch_tokens):
    lengths = torch.randint(20, 600, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    rows = [Sequence([i] * length, 3) for i, length in enumerate(lengths)]
    batches = make_batches(rows, batch_size, batch_tokens)
    assert sorted(s.ids[0] for batch in batches for s in batch) == list(range(300))
    for batch in batches:
        longest, tokens = max(len(s.ids) for s in batch), sum(len(s.ids) for s in batch)
        assert len(batch) <= batch_size and 1 - tokens / (len(batch) * longest) <= 0.05
        assert len(batch) == 1 or len(batch) * longest <= batch_tokens
    assert batch_size != 8 or len(batches) < 80


def test_logits_are_made_for_no_token_of_the_prompt():
    """They were once made for all positions: for prompts of 500 tokens, most of the memory."""
    model, seen = tiny_model(), []
    model.lm_head.register_forward_hook(lambda module, given, output: seen.append(tuple(output.shape)))
    sequence_losses(model, [Sequence(list(range(50)), 40), Sequence([1] * 47, 42)])
    assert seen == [(2, 10, 97)]


def test_a_batch_has_at_most_batch_tokens_and_a_longer_sequence_is_alone(tmp_path):
    """max_length once bounded both: with 4,096 for the few long sequences, batches of 4,096 tokens."""
    cfg = GradConfig(holdout_traces="t", batch_size=8, batch_tokens=64, num_diagnosed=0)
    model, rows, shapes = tiny_model("llama", seed=3, spread=0.1), sequences(20), []
    rows += [Sequence(s.ids * 3, 5) for s in rows[:2]]
    model.get_input_embeddings().register_forward_hook(lambda _, ids, out: shapes.append(ids[0].shape))
    save_grad.accumulate(cfg, model, rows, World(0, 1, "cpu"))
    assert sum(len(shape) and shape[0] for shape in shapes) == 22 and max(shape[0] for shape in shapes) > 2
    assert all(num_rows == 1 or num_rows * width <= 64 for num_rows, width in shapes)
    assert max(width for _, width in shapes) == max(len(s.ids) for s in rows) > 64


@pytest.mark.parametrize("kind", KINDS)
def test_keys_repeated_for_a_gpu_s_kernel_leave_the_gradient_as_it_is(kind, monkeypatch):
    """In float32 on a GPU torch's kernels that save the scores of no row do not share keys among heads.

    2,048 tokens of a 3B proxy ran out of 80 GB. On a CPU the library's own way is kept.
    """
    assert AttentionInterface()["sdpa"] is loading.sdpa
    rows, repeated, inner = sequences(9), [], sdpa_attention.sdpa_attention_forward
    ours, plain = (tiny_model(kind, seed=3, spread=0.1) for _ in range(2))
    assert gradient.add_gradient_(plain, rows, len(rows), batch_size=4)
    monkeypatch.setattr(
        loading, "sdpa_attention_forward", lambda *x, **more: repeated.append(x) or inner(*x, **more)
    )
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", loading.sdpa_repeated)
    gradient.add_gradient_(ours, rows, len(rows), batch_size=4)
    assert bool(repeated) == (ours.config._attn_implementation == "sdpa")
    for module, query, key, value, *_ in repeated:
        assert query.shape[1] == key.shape[1] == value.shape[1] == 4
        assert not hasattr(module, "num_key_value_groups")
    difference = flat_gradient(ours) - flat_gradient(plain)
    assert difference.norm() < 1e-6 * flat_gradient(plain).norm()


def make_trainer(cfg, model, train):
    from transformers import set_seed

    set_seed(cfg.seed)
    return training.make_trainer(cfg, model, byte_tokenizer(), train, None, 2, World(0, 1, "cpu"))


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train_plainly(cfg, model, train):
    """The Trainer by itself: its random order, one sequence at a time, the model's own loss."""
    from transformers import Trainer

    arguments = training.training_arguments(cfg, len(train), False, 1, World(0, 1, "cpu"))
    arguments.train_sampling_strategy, arguments.num_train_epochs = "random", cfg.num_epochs
    trainer = Trainer(model=model, args=arguments, train_dataset=train, data_collator=tensors)
    trainer.train()
    return losses(trainer)


def tensors(rows):
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def test_sorted_steps_train_as_the_trainer_s_random_ones(tmp_path):
    """The same steps, the last of an epoch incomplete: the same loss curve and the same weights."""
    cfg, train = config(tmp_path, lr=1e-3), examples(9)
    ours, plain = (tiny_model("gemma2", 264, seed=3, spread=0.1) for _ in range(2))
    trainer = make_trainer(cfg, ours, train)
    training.train_fast(trainer)
    assert losses(trainer) == pytest.approx(train_plainly(cfg, plain, train), rel=1e-5)
    assert len(losses(trainer)) == 6 and losses(trainer)[-1] < losses(trainer)[0]
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, atol=2e-5)


def test_training_stopped_within_an_epoch_goes_on_as_if_it_had_not(tmp_path):
    cfg, train = config(tmp_path, lr=1e-3, save_epochs=1 / 3), examples(9)
    whole, first, second = (tiny_model("llama", 264, seed=3, spread=0.1) for _ in range(3))
    trainer = make_trainer(cfg, whole, train)
    trainer.train()
    curve = losses(trainer)
    shutil.rmtree(cfg.model_path)
    trainer = make_trainer(cfg, first, train)
    trainer.add_callback(StopAtStep4())
    trainer.train()
    checkpoint = training.newest_checkpoint(cfg.model_path)
    assert checkpoint.endswith("checkpoint-4")
    trainer = make_trainer(cfg, second, train)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert losses(trainer) == pytest.approx(curve, rel=1e-6) and len(curve) == 6
    for p, q in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


class StopAtStep4(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == 4


@pytest.mark.parametrize(
    "batch_size,most,num_processes,wanted",
    (
        (16, 2, 1, 2),
        (16, 8, 1, 8),
        (16, 7, 1, 4),
        (16, 99, 1, 16),
        (16, 99, 8, 2),
        (12, 5, 2, 3),
        (6, 4, 6, 1),
    ),
)
def test_a_device_s_batches_make_up_batch_size(batch_size, most, num_processes, wanted):
    assert training.per_device_batch(batch_size, most, num_processes) == wanted


def test_auto_is_two_sequences_at_once_on_a_cpu(tmp_path):
    world = World(0, 1, "cpu")
    assert training.most_per_device(config(tmp_path), None, 4096, world) == 2
    assert training.most_per_device(config(tmp_path, per_device_batch_size=8), None, 4096, world) == 8


def holdout_loss(model, rows):
    """The definition (nats/token): the mean over sequences of the library's own losses."""
    losses = []
    for row in rows:
        with torch.no_grad():
            losses.append(model(**tensors([row])).loss.item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("per_device", (1, 3, 4))
def test_holdout_loss_in_batches_is_the_mean_over_sequences(tmp_path, per_device):
    """At the start, the middle and the end. It once took every half epoch, a sequence at a time: a third of
    the time of training."""
    cfg, train, holdout = config(tmp_path, lr=1e-3, batch_size=12), examples(33), examples(10)
    model = tiny_model("gemma2", 264, seed=3, spread=0.1)
    shapes, wanted = [], [holdout_loss(model, holdout)]
    trainer = training.make_trainer(
        cfg, model, byte_tokenizer(), train, holdout, per_device, World(0, 1, "cpu")
    )
    model.get_input_embeddings().register_forward_hook(
        lambda module, ids, out: None if module.training else shapes.append(ids[0].shape)
    )
    training.train_fast(trainer)
    wanted.append(holdout_loss(model, holdout))
    found = [(e["step"], e["eval_loss"]) for e in trainer.state.log_history if "eval_loss" in e]
    assert [step for step, _ in found] == [0, 3, 6]
    assert [found[0][1], found[2][1]] == pytest.approx(wanted, rel=1e-6) and wanted[1] < wanted[0]
    evaluated = shapes[: -len(holdout)]  # the last are holdout_loss's
    assert len(evaluated) == 3 * math.ceil(10 / per_device) and {rows for rows, _ in evaluated} == {
        per_device
    }


@pytest.mark.parametrize(
    "num_epochs,eval_epochs,wanted",
    ((3.0, None, [0, 8, 15]), (1.0, None, [0, 3, 5]), (0.2, None, [0, 1]), (2.0, 0.75, [0, 4, 8, 10])),
)
def test_holdout_loss_is_taken_at_the_start_between_and_at_the_end(tmp_path, num_epochs, eval_epochs, wanted):
    cfg = config(tmp_path, num_epochs=num_epochs, eval_epochs=eval_epochs)
    world, model = World(0, 1, "cpu"), tiny_model("llama", 264)
    trainer = training.make_trainer(cfg, model, byte_tokenizer(), examples(20), examples(2), 4, world)
    trainer.train()
    assert [e["step"] for e in trainer.state.log_history if "eval_loss" in e] == wanted
