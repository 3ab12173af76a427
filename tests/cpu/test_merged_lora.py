"""Adapters by merged weights against PEFT's own forward and backward passes."""

import helpers_training
import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear

from ads import loading
from ads.attacks import training
from ads.cpu import merged_lora
from ads.delta.loss import collate, token_losses
from ads.stage.world import World


def adapted(kind="qwen2", spread=0.3, **more):
    """A tiny model with adapters that do something: PEFT begins with B = 0."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(tiny_model(kind, 264, spread=0.1), LoraConfig(**{**settings, **more}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=spread)
    return model


def layers(model):
    return [module for module in model.modules() if isinstance(module, Linear)]


def passes(model):
    """Loss and gradients of the adapters on a batch of two sequences."""
    model.zero_grad()
    batch = collate(helpers_training.examples(2))
    labels = batch.pop("labels")
    total = token_losses(model(**batch, use_cache=False).logits, labels).sum()
    total.backward()
    return float(total), [p.grad for p in model.parameters() if p.requires_grad]


def check_merged_passes(model):
    wanted, wanted_gradients = passes(model)
    with merged_lora.merged_adapters(model):
        assert all(type(layer.forward) is merged_lora.MergedLayer for layer in layers(model))
        found, gradients = passes(model)
    assert found == pytest.approx(wanted, rel=1e-6)
    for d, e in zip(gradients, wanted_gradients, strict=True):
        assert (d - e).norm() <= 2e-5 * e.norm() and e.norm() > 0


@pytest.mark.parametrize("kind", ("llama", "qwen2", "gemma3_text"))
@pytest.mark.parametrize("has_checkpoints", [False, True])
def test_loss_and_gradients_are_peft_s(kind, has_checkpoints):
    model = adapted(kind, use_rslora=kind == "llama")
    with loading.recomputed(model, has_checkpoints):
        check_merged_passes(model)


@pytest.mark.parametrize("has_checkpoints", [False, True])
def test_training_is_peft_s(tmp_path, has_checkpoints):
    """Losses of steps and of evaluations right after them: M is of the new adapters."""
    curves = []
    for train in (lambda trainer: trainer.train(), training.train_fast):
        settings = {"lr": 0.02, "eval_epochs": 1 / 3, "save_epochs": 9.0}
        cfg = helpers_training.config(tmp_path, **settings)
        model = adapted(spread=0.01)
        rows, world = helpers_training.examples(9), World(0, 1, "cpu")
        trainer = training.make_trainer(cfg, model, byte_tokenizer(), rows, rows[:3], 2, world)
        with loading.recomputed(model, has_checkpoints):
            train(trainer)
        curves.append(
            [
                entry[key]
                for entry in trainer.state.log_history
                for key in ("loss", "eval_loss")
                if key in entry
            ]
        )
    wanted, found = curves
    assert found == pytest.approx(wanted, rel=2e-4)
    assert len(wanted) == 13 and max(wanted) - min(wanted) > 0.2


@pytest.mark.parametrize(
    "settings",
    ({"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}),
    ids=("dropout", "dora", "bias of B"),
)
def test_what_has_more_to_it_is_left_to_peft(settings):
    model = adapted(**settings)
    with merged_lora.merged_adapters(model):
        assert not any("forward" in vars(layer) for layer in layers(model))


def test_so_are_adapters_that_are_off_merged_or_not_float32_and_trained_weights():
    model = adapted()
    one, two, three, four, *others = layers(model)
    one.enable_adapters(False)
    two.merge()
    three.to(torch.bfloat16)
    four.base_layer.weight.requires_grad_(True)
    with merged_lora.merged_adapters(model):
        assert not any("forward" in vars(layer) for layer in (one, two, three, four))
        assert others and all("forward" in vars(layer) for layer in others)


def test_a_model_is_left_as_it_was():
    model = adapted()
    with pytest.raises(KeyError), merged_lora.merged_adapters(model):
        passes(model)
        raise KeyError
    assert not any("forward" in vars(layer) for layer in layers(model))
    with merged_lora.merged_adapters(tiny_model()):
        pass
