"""LoRA adapters (Hu et al., 2021): adding them to a student, and merging them into its weights for good.

What PEFT cannot adapt, or merges into other logits than those that were trained, is refused before training.

Shapes: O outputs, K rank, T tokens, V vocabulary.
"""

import contextlib

import torch
from transformers import PreTrainedModel

from ads.stage import errors
from ads.stage.errors import UserError
from ads.trials import TRIED, agrees, is_out_of_memory, logits_of, tried_ids

FILLING = 0.3  # what adapters that are tried out add to a layer's output, about


def add_adapters(model, cfg):
    """The model with adapters on all its linear layers, as PEFT makes them, tried out.

    cfg: the TrainConfig. ValueError for a model that adapters cannot be trained in and merged into.
    """
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=cfg.lora_r,
        lora_alpha=cfg.lora_alpha,
        lora_dropout=cfg.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    kind = model.config.model_type
    try:
        model = get_peft_model(model, settings)
        beside_TV, merged_TV = try_out(model)
    except Exception as error:  # whatever PEFT raises for modules, and modules for being replaced
        if is_out_of_memory(error):
            raise
        problem = f"adapters do not work in a {kind!r} model ({errors.reason(error)})"
        raise UserError(f"student {cfg.student}: {problem}; set lora=false") from error
    if not agrees(merged_TV, beside_TV):
        problem = f"adapters cannot be merged into the weights of a {kind!r} model: its logits would change"
        raise UserError(f"student {cfg.student}: {problem}; set lora=false")
    return model


def try_out(model):
    """Logits (T, V) of a few tokens by adapters that do something, beside the weights and merged into them.

    The model is then as it was.
    """
    ids = tried_ids(model, TRIED)
    with float32_copies(model):
        fill_(model)
        beside_TV = logits(model, ids)
        model.merge_adapter()
        merged_TV = logits(model, ids)
        model.unmerge_adapter()
    return beside_TV, merged_TV


@torch.no_grad()
def fill_(model):
    """Put random numbers for the zeros that adapters begin with."""
    from peft.tuners.lora import LoraLayer

    generator = torch.Generator().manual_seed(0)
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        for name, b in layer.lora_B.items():
            drawn_OK = torch.randn(b.weight.shape, generator=generator)
            b.weight.copy_(drawn_OK * FILLING / (layer.scaling[name] * layer.r[name] ** 0.5))


@contextlib.contextmanager
def float32_copies(model):
    """A context in which a model computes with float32 copies of its weights, which may be changed."""
    kept = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers())]
    for tensor, data in kept:
        if data.is_floating_point():
            tensor.data = data.to(torch.float32, copy=True)
    try:
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


def merge(model, rows):
    """The trained model in float32, its adapters merged into its weights.

    rows: a few lists of token ids. ValueError if merging changes their logits.
    """
    model = model.float()
    beside = [logits(model, ids) for ids in rows]
    model = model.merge_and_unload()
    for ids, beside_TV in zip(rows, beside, strict=True):
        if not agrees(logits(model, ids), beside_TV):
            kind = model.config.model_type
            raise UserError(f"merging the adapters changed the {kind!r} model's logits: set lora=false")
    return model


@torch.no_grad()
def logits(model, ids):
    """Logits (T, V) of one row, by a model in float32, which flash attention does not know."""
    library, was_training = next(m for m in model.modules() if isinstance(m, PreTrainedModel)), model.training
    attention = library.config._attn_implementation
    if "flash" in attention:
        library.set_attn_implementation("eager")
    logits_TV = logits_of(model.eval(), ids)
    if "flash" in attention:
        library.set_attn_implementation(attention)
    model.train(was_training)
    return logits_TV
