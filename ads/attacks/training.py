"""Fine-tuning a student on traces, as an attacker does with those that are published; saving it.

Shapes: B rows, C columns with logits.
"""

import contextlib
import functools
import json
import math
import os

import torch
from transformers import GenerationConfig, Trainer, TrainingArguments, set_seed

from ads import adapters, chat, cpu
from ads.attacks.weighting import weighted
from ads.data.examples import fill_up, longest_first, num_tokens, order_examples
from ads.decode import memory_plan
from ads.delta.loss import collate, token_losses
from ads.loading import check_loadable, dtype_name, free_bytes, load_model, recomputed, resolve_dtype
from ads.stage import files, layout
from ads.stage.errors import UserError
from ads.stage.fingerprint import importable
from ads.stage.world import print0
from ads.trials import agrees, logits_of, tried_ids, try_batches

CPU_BATCH = 2  # per_device_batch_size: auto. More sequences at once gain nothing on a CPU (bench/RESULTS.md)
DEVICE_TOKENS = 8192  # on a GPU: with more at once there is more padding, and no less time per token
SHARE_OF_FREE_MEMORY = 0.8  # the rest is for what the allocator cannot use


def train_student(cfg, tokenizer, train, holdout, world):
    """(the Trainer that has trained the student, from its newest checkpoint on; the weighted examples)."""
    memory_plan.check_distillation(cfg, train, memory_plan.room(world.device), world.size)
    model = load_student(cfg, tokenizer, world.device)
    longest = max(map(num_tokens, train + (holdout or [])))
    try_batches(model, longest, resolve_dtype(cfg.dtype, world.device))
    train = weighted(cfg, model, train, world)
    if checkpoint := world.ask_main(newest_checkpoint, cfg.model_path) or cfg.checkpoint:
        print0(f"resuming from {checkpoint}")
    with recomputed(model, cfg.gradient_checkpointing):
        most = most_per_device(cfg, model, longest, world)
        per_device = per_device_batch(cfg.batch_size, most, world.size)
        if cfg.per_device_batch_size == "auto":
            print0(f"per_device_batch_size: {per_device} sequences at once")
        trainer = make_trainer(cfg, model, tokenizer, train, holdout, per_device, world)
        result = train_fast(trainer, checkpoint)
    if not math.isfinite(result.training_loss):
        raise UserError(f"training loss is {result.training_loss}: lower lr={cfg.lr:g} or use dtype=float32")
    return trainer, train


def load_student(cfg, tokenizer, device):
    """The student, with LoRA adapters where cfg.lora; what is trained is float32."""
    print0(f"loading {cfg.student}")
    numerics = resolve_numerics(cfg, device)
    dtype = numerics["resolved_dtype"] if cfg.lora else "float32"
    model = load_model(cfg.student, dtype, device, numerics["attention"])
    chat.check_rows(tokenizer, model.get_input_embeddings().weight.shape[0], cfg.student)
    check_loadable(model)
    set_seed(cfg.seed)
    if not cfg.lora:
        return model
    model = adapters.add_adapters(model, cfg)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in trained), "adapters must be float32"
    print0(f"LoRA r={cfg.lora_r}: {sum(p.numel() for p in trained):,} trained weights")
    return model


def resolve_numerics(cfg, device):
    """What "auto" stands for on this machine: flash_attention_2 where it can run, for one."""
    dtype, attention = dtype_name(cfg.dtype, device), cfg.attn_implementation
    if attention == "auto" and device != "cpu" and importable("flash-attn") and dtype != "float32":
        attention = "flash_attention_2"
    return {"resolved_dtype": dtype, "attention": attention}


def most_per_device(cfg, model, longest, world):
    """The most sequences that a device takes at once: as configured, or of `longest` tokens by its memory."""
    if cfg.per_device_batch_size != "auto":
        return cfg.per_device_batch_size
    if world.device == "cpu":
        return CPU_BATCH
    fitting = num_fitting(model, longest, world.size > 1, resolve_dtype(cfg.dtype, world.device))
    return max(1, world.least(min(DEVICE_TOKENS // longest, fitting)))


def num_fitting(model, longest, is_shared, dtype):
    """How many sequences of `longest` tokens a GPU has room for in a training step, by trying one out.

    Beside them are gradients and AdamW's two moments, and once more the gradients where processes share them.
    """
    device = model.get_input_embeddings().weight.device
    ids = tried_ids(model, longest)
    batch = {key: x.to(device) for key, x in collate([{"input_ids": ids, "labels": ids}]).items()}
    labels = batch.pop("labels")
    for _ in range(2):  # the second time beside gradients, as are all but the first sequences of a step
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            total = token_losses(model(**batch, use_cache=False).logits, labels).sum()
        total.backward()
        row_bytes = torch.cuda.max_memory_allocated(device) - before
    model.zero_grad()
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    room = SHARE_OF_FREE_MEMORY * free_bytes(device) - (4 if is_shared else 3) * trained
    return int(room / row_bytes)


def per_device_batch(batch_size, most, num_processes):
    """The largest batch per device, up to `most`, that makes up batch_size exactly."""
    sizes = range(min(most, batch_size), 0, -1)
    return next(size for size in sizes if batch_size % (size * num_processes) == 0)


class RowTrainer(Trainer):
    """transformers.Trainer on batches that may have `weights` (B,): how much each row's loss counts."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        weights_B = inputs.pop("weights", None)  # which is no input of the model
        self.compute_loss_func = functools.partial(self.compute_loss_func, weights_B=weights_B)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def make_trainer(cfg, model, tokenizer, train, holdout, per_device, world):
    """A Trainer with completion-only loss: token mean over each step's sequences."""
    evaluated, scale = None, 1.0
    if holdout is not None:
        evaluated = fill_up(longest_first(holdout), per_device * world.size)
        scale = len(evaluated) / len(holdout)  # of means over sequences, some of which are there to fill up
    return RowTrainer(
        model=model,
        args=training_arguments(cfg, len(train), holdout is not None, per_device, world),
        train_dataset=order_examples(cfg, train),
        eval_dataset=evaluated,
        data_collator=functools.partial(collate_rows, pad_id=tokenizer.eos_token_id),
        compute_loss_func=functools.partial(mean_loss, num_processes=world.size, scale=scale),
    )


def train_fast(trainer, checkpoint=None):
    """trainer.train() with what makes it faster on a CPU."""
    cpu.keep_freed_memory(trainer.args.device)
    with cpu.merged_adapters(trainer.model):
        return trainer.train(resume_from_checkpoint=checkpoint)


def training_arguments(cfg, num_examples, is_evaluated, per_device, world):
    steps_per_epoch = math.ceil(num_examples / cfg.batch_size)
    num_steps = math.ceil(cfg.num_epochs * steps_per_epoch)
    half = math.ceil(num_steps / 2)
    autocast = resolve_dtype(cfg.dtype, world.device)
    # accelerate's launcher sets this from its own config, and the trainer would follow it
    precisions = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}
    os.environ["ACCELERATE_MIXED_PRECISION"] = precisions[autocast]
    return TrainingArguments(
        output_dir=str(cfg.model_path),
        per_device_train_batch_size=per_device,
        per_device_eval_batch_size=per_device,
        gradient_accumulation_steps=cfg.batch_size // (per_device * world.size),
        num_train_epochs=1,  # of order_examples, which has them all
        train_sampling_strategy="sequential",
        learning_rate=cfg.lr,
        weight_decay=cfg.weight_decay,
        max_grad_norm=cfg.max_grad_norm,
        warmup_steps=int(cfg.warmup * cfg.num_epochs * steps_per_epoch),
        lr_scheduler_type=cfg.lr_scheduler_type,
        eval_strategy="steps" if is_evaluated else "no",
        eval_on_start=is_evaluated,  # and at the end, which the trainer does by itself
        eval_steps=max(1, round(cfg.eval_epochs * steps_per_epoch)) if cfg.eval_epochs else half,
        prediction_loss_only=True,
        save_steps=max(1, round(cfg.save_epochs * steps_per_epoch)),
        save_total_limit=1,
        logging_steps=max(1, steps_per_epoch // 10),
        logging_nan_inf_filter=False,  # a loss that is not finite must be seen
        bf16=precisions[autocast] == "bf16",
        fp16=precisions[autocast] == "fp16",
        ddp_find_unused_parameters=False if world.size > 1 else None,
        dataloader_pin_memory=world.device != "cpu",
        use_cpu=world.device == "cpu",
        remove_unused_columns=False,
        report_to=cfg.report_to.split(","),
        run_name=cfg.model_name,
        seed=cfg.seed,
    )


def collate_rows(examples, pad_id):
    """What a model takes of the examples, and `weights` (B,), float32, where they have one."""
    weights = [example["weight"] for example in examples if "weight" in example]
    return collate(examples, pad_id) | ({"weights": torch.tensor(weights)} if weights else {})


def mean_loss(outputs, labels, num_items_in_batch, num_processes, scale=1.0, weights_B=None):
    """The Trainer's loss (nats/token): over a whole step's labels, each times its row's weight; in
    evaluation, the mean over sequences of their token means, as in stage 2, times `scale`.

    The Trainer counts num_items_in_batch, the labels, on all processes, and multiplies what it is given by
    their number. Weights do not count there: over the dataset their mean is 1.
    """
    losses_BC = token_losses(outputs.logits, labels)
    if torch.is_grad_enabled():
        losses_BC = losses_BC if weights_B is None else losses_BC * weights_B[:, None]
        return losses_BC.sum() / num_items_in_batch
    counts_B = (labels != chat.IGNORED_LABEL).sum(1).clamp(min=1)
    return (losses_BC.sum(1) / counts_B).mean() * scale / num_processes


def newest_checkpoint(model_path):
    """The last checkpoint written to its end, or None: trainer_state.json comes last, a kill may cut it."""
    folders = sorted(layout.checkpoints(model_path), key=lambda path: int(path.name.split("-")[1]))
    for folder in reversed(folders):
        with contextlib.suppress(FileNotFoundError, ValueError):
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            return str(folder)
    return None


def unwrap_model(trainer):
    """The trained model, with room to compare what is merged and saved.

    Accelerate's wrapper is left out: its logits are those of 16-bit passes, and called float32.
    """
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    trainer.accelerator.free_memory()
    trainer.optimizer = trainer.lr_scheduler = None
    return model


def save_student(cfg, model, tokenizer, device, rows):
    """Merge the adapters in float32, round once, and write model, tokenizer and generation config.

    rows: a few lists of token ids, whose logits must stay the same. ValueError, and nothing is kept, if not.
    """
    if cfg.lora:
        model = adapters.merge(model, rows)
    model = model.to(resolve_dtype(cfg.dtype, device)).eval()
    # The student learned to stop with the tokenizer's eos, which may not be the one its base config names.
    eos = sorted(chat.eos_ids(tokenizer, model))
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    model.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=eos, pad_token_id=pad)
    model.config.use_cache = True
    with files.atomic_folder(cfg.student_path) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        check_saved(cfg, model, folder, device, rows)


def check_saved(cfg, model, folder, device, rows):
    """ValueError unless what was saved is the model."""
    saved = load_model(str(folder), cfg.dtype, device, resolve_numerics(cfg, device)["attention"])
    with torch.no_grad():
        are_right = [agrees(logits_of(saved, ids), logits_of(model, ids)) for ids in rows]
    if not all(are_right):
        raise UserError(f"student {cfg.student}: loaded from where it was saved it is another model")
