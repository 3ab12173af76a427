"""Fine-tune a student on traces -> EXP_DIR/models/NAME/final, an ordinary Hugging Face model (stage 4).

    python distill.py train_traces=runs/x/traces/train.parquet holdout_traces=runs/x/traces/holdout.parquet \\
        student=meta-llama/Llama-3.2-3B tokenizer=meta-llama/Llama-3.2-3B-Instruct exp_dir=runs/x
    accelerate launch --config_file acc_config.yaml distill.py ...

Settings: train_config.yaml, then key=value. --check only says whether the stage is done (exit code 0) or not
(3).
"""

import functools
import json
import math
import os
import shutil
import time
from pathlib import Path

import utils
from ads import chat
from ads.data.tables import check_traces, read_parquet
from ads.stage import files, fingerprint, layout
from ads.stage.config import ignored_keys, to_dict
from ads.stage.errors import UserError
from ads.stage.inputs import fingerprint_existing, fingerprint_model, fingerprint_tokenizer
from ads.stage.settings import TrainConfig
from ads.stage.sidecar import open_parts, write_sidecar
from ads.stage.world import print0
from utils import print_result

NUM_COMPARED, COMPARED_TOKENS = 3, 256  # sequences, and tokens of each, that a saved student is checked on
CPU_BATCH = 2  # per_device_batch_size: auto. More sequences at once gain nothing on a CPU (bench/RESULTS.md)
DEVICE_TOKENS = 8192  # on a GPU: with more at once there is more padding, and no less time per token
SHARE_OF_FREE_MEMORY = 0.8  # the rest is for what the allocator cannot use


def main(arguments):
    cfg, inputs = utils.begin_stage(TrainConfig, "train_config.yaml", fingerprint_inputs, arguments)
    utils.run_stage(cfg, inputs, distil)


def fingerprint_inputs(cfg):
    """What the student depends on besides the settings."""
    inputs = {
        "student": fingerprint_model(cfg.student),
        "tokenizer": fingerprint_tokenizer(cfg.tokenizer or cfg.student),
        "train_traces": fingerprint_existing(cfg.train_traces, "make it with gentraces.py"),
    }
    if cfg.do_eval:
        inputs["holdout_traces"] = fingerprint_existing(cfg.holdout_traces, "make it with gentraces.py")
    return inputs


def distil(cfg, inputs, world):
    from ads import loading
    from ads.decode import memory_plan
    from ads.trials import try_batches

    start = time.time()
    tokenizer = chat.load_tokenizer_for(cfg.student, cfg.tokenizer)
    if place := chat.describe_place(tokenizer):
        print0(place)
    train, num_cut = load_examples(cfg, tokenizer, cfg.train_traces)
    holdout = load_examples(cfg, tokenizer, cfg.holdout_traces)[0] if cfg.do_eval else None
    numerics = resolve_numerics(cfg, world.device)
    made_with = numerics | {"sequences": fingerprint.fingerprint_json([train, holdout])}
    world.ask_main(open_parts, cfg.model_path, to_dict(cfg), inputs | made_with, ignored_keys(cfg))

    memory_plan.check_distillation(cfg, train, memory_plan.room(world.device), world.size)
    model = load_student(cfg, tokenizer, world.device)
    longest = max(map(num_tokens, train + (holdout or [])))
    try_batches(model, longest, loading.resolve_dtype(cfg.dtype, world.device))
    checkpoint = newest_checkpoint(cfg.model_path) or cfg.checkpoint
    if checkpoint:
        print0(f"resuming from {checkpoint}")
    with loading.recomputed(model, cfg.gradient_checkpointing):
        most = most_per_device(cfg, model, longest, world)
        per_device = per_device_batch(cfg.batch_size, most, world.size)
        if cfg.per_device_batch_size == "auto":
            print0(f"per_device_batch_size: {per_device} sequences at once")
        trainer = make_trainer(cfg, model, tokenizer, train, holdout, per_device, world)
        result = train_fast(trainer, checkpoint)
    if not math.isfinite(result.training_loss):
        raise UserError(f"training loss is {result.training_loss}: lower lr={cfg.lr:g} or use dtype=float32")
    if world.is_main:
        # without accelerate's wrapper, whose logits are of 16-bit passes and called float32
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        trainer.accelerator.free_memory()  # room to compare what is merged and saved
        trainer.optimizer = trainer.lr_scheduler = None
        rows = [example["input_ids"][:COMPARED_TOKENS] for example in train[:NUM_COMPARED]]
        save_student(cfg, model, tokenizer, world.device, rows)
        finish(cfg, inputs, made_with, trainer, len(train), num_cut, time.time() - start)


def load_examples(cfg, tokenizer, path):
    """(training sequences of a trace dataset, how many were cut to max_length)."""
    rows = read_parquet(Path(path))
    check_traces(path, rows, text=("problem", cfg.trace_colname), flags=("finished",))
    examples, num_cut = [], 0
    for row in rows:
        ids, labels = chat.student_example(tokenizer, row["problem"], row[cfg.trace_colname], row["finished"])
        num_cut += len(ids) > cfg.max_length
        if any(label != chat.IGNORED_LABEL for label in labels[: cfg.max_length]):
            examples.append({"input_ids": ids[: cfg.max_length], "labels": labels[: cfg.max_length]})
    if not examples:
        raise UserError(f"{path}: no trace has a token to train on within max_length={cfg.max_length}")
    if num_cut:
        print0(f"{path}: {num_cut} of {len(rows)} sequences are cut to max_length={cfg.max_length}")
    return examples, num_cut


def most_per_device(cfg, model, longest, world):
    """The most sequences that a device takes at once: as configured, or of `longest` tokens by its memory."""
    if cfg.per_device_batch_size != "auto":
        return cfg.per_device_batch_size
    if world.device == "cpu":
        return CPU_BATCH
    from ads.loading import resolve_dtype

    fitting = num_fitting(model, longest, world.size > 1, resolve_dtype(cfg.dtype, world.device))
    return max(1, world.least(min(DEVICE_TOKENS // longest, fitting)))


def num_fitting(model, longest, is_shared, dtype):
    """How many sequences of `longest` tokens a GPU has room for in a training step, by trying one out.

    Beside them are gradients and AdamW's two moments, and once more the gradients where processes share them.
    """
    import torch

    from ads import loading
    from ads.delta.loss import collate, token_losses
    from ads.trials import tried_ids

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
    room = SHARE_OF_FREE_MEMORY * loading.free_bytes(device) - (4 if is_shared else 3) * trained
    return int(room / row_bytes)


def per_device_batch(batch_size, most, num_processes):
    """The largest batch per device, up to `most`, that makes up batch_size exactly."""
    sizes = range(min(most, batch_size), 0, -1)
    return next(size for size in sizes if batch_size % (size * num_processes) == 0)


def load_student(cfg, tokenizer, device):
    """The student, with LoRA adapters where cfg.lora; what is trained is float32."""
    import torch
    from transformers import set_seed

    from ads import adapters
    from ads.loading import check_loadable, load_model, resolve_dtype

    print0(f"loading {cfg.student}")
    dtype = str(resolve_dtype(cfg.dtype, device)).removeprefix("torch.") if cfg.lora else "float32"
    model = load_model(cfg.student, dtype, device, resolve_numerics(cfg, device)["attention"])
    chat.check_rows(tokenizer, model.get_input_embeddings().weight.shape[0], cfg.student)
    check_loadable(model)
    set_seed(cfg.seed)
    if not cfg.lora:
        return model
    model = adapters.add_adapters(model, cfg)
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad), (
        "adapters must be float32"
    )
    print0(f"LoRA r={cfg.lora_r}: {num_trained:,} trained weights")
    return model


def resolve_numerics(cfg, device):
    """What "auto" stands for on this machine: flash_attention_2 where it can run, for one."""
    from ads.loading import resolve_dtype

    dtype = resolve_dtype(cfg.dtype, device)
    can_flash = device != "cpu" and fingerprint.importable("flash-attn") and dtype.itemsize == 2
    attention = (
        "flash_attention_2" if cfg.attn_implementation == "auto" and can_flash else cfg.attn_implementation
    )
    return {"resolved_dtype": str(dtype).removeprefix("torch."), "attention": attention}


def make_trainer(cfg, model, tokenizer, train, holdout, per_device, world):
    """transformers.Trainer with completion-only loss: token mean over each step's sequences."""
    from transformers import Trainer

    from ads.delta.loss import collate

    evaluated, scale = None, 1.0
    if holdout is not None:
        evaluated = fill_up(sorted(holdout, key=num_tokens, reverse=True), per_device * world.size)
        scale = len(evaluated) / len(holdout)  # of means over sequences, some of which are there to fill up
    return Trainer(
        model=model,
        args=training_arguments(cfg, len(train), holdout is not None, per_device, world),
        train_dataset=order_examples(cfg, train),
        eval_dataset=evaluated,
        data_collator=functools.partial(collate, pad_id=tokenizer.eos_token_id),
        compute_loss_func=functools.partial(mean_loss, num_processes=world.size, scale=scale),
    )


def train_fast(trainer, checkpoint=None):
    """trainer.train() with what makes it faster on a CPU."""
    from ads import matmul
    from ads.cpu import memory, merged_lora

    memory.keep_freed_memory(trainer.args.device)
    with matmul.in_tiles(), merged_lora.merged(trainer.model):
        return trainer.train(resume_from_checkpoint=checkpoint)


def training_arguments(cfg, num_examples, is_evaluated, per_device, world):
    import torch
    from transformers import TrainingArguments

    from ads.loading import resolve_dtype

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


def order_examples(cfg, examples):
    """All epochs' sequences, one step's batch_size after another, a step's from longest to shortest.

    An epoch is a random order by (seed, epoch). Processes and micro-batches take neighbours, and so get like
    lengths. What an epoch's last step lacks is filled with a sequence of one token and no label.
    """
    import torch

    steps = []
    for epoch in range(math.ceil(cfg.num_epochs)):
        generator = torch.Generator().manual_seed(cfg.seed + epoch)
        shuffled = [examples[i] for i in torch.randperm(len(examples), generator=generator).tolist()]
        for start in range(0, len(shuffled), cfg.batch_size):
            step = sorted(shuffled[start : start + cfg.batch_size], key=num_tokens, reverse=True)
            steps.append(fill_up(step, cfg.batch_size))
    num_steps = math.ceil(cfg.num_epochs * math.ceil(len(examples) / cfg.batch_size))
    return [example for step in steps[:num_steps] for example in step]


def fill_up(examples, size):
    """The examples, and sequences of one token and no label that make their number a multiple of size."""
    empty = {"input_ids": examples[0]["input_ids"][:1], "labels": [chat.IGNORED_LABEL]}
    return examples + [empty] * (-len(examples) % size)


def num_tokens(example):
    return len(example["input_ids"])


def mean_loss(outputs, labels, num_items_in_batch, num_processes, scale=1.0):
    """The Trainer's loss (nats/token): over a whole step's labels; in evaluation, the mean over sequences of
    their token means, as in stage 2, times `scale`.

    The Trainer counts num_items_in_batch on all processes, and multiplies what it is given by their number.
    """
    import torch

    from ads.delta.loss import token_losses

    losses_BC = token_losses(outputs.logits, labels)
    if torch.is_grad_enabled():
        return losses_BC.sum() / num_items_in_batch
    counts_B = (labels != chat.IGNORED_LABEL).sum(1).clamp(min=1)
    return (losses_BC.sum(1) / counts_B).mean() * scale / num_processes


def newest_checkpoint(model_path):
    """The last checkpoint written to its end, or None."""
    complete = [path for path in layout.checkpoints(model_path) if is_json(path / "trainer_state.json")]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


def is_json(path):
    """Whether a file holds JSON to its end: trainer_state.json comes last, and a kill may cut it."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return True


def save_student(cfg, model, tokenizer, device, rows):
    """Merge the adapters in float32, round once, and write model, tokenizer and generation config.

    rows: a few lists of token ids, whose logits must stay the same. ValueError, and nothing is kept, if not.
    """
    from transformers import GenerationConfig

    from ads import adapters
    from ads.loading import resolve_dtype

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
    import torch

    from ads.loading import load_model
    from ads.trials import agrees, logits_of

    saved = load_model(str(folder), cfg.dtype, device, resolve_numerics(cfg, device)["attention"])
    with torch.no_grad():
        are_right = [agrees(logits_of(saved, ids), logits_of(model, ids)) for ids in rows]
    if not all(are_right):
        raise UserError(f"student {cfg.student}: loaded from where it was saved it is another model")


def finish(cfg, inputs, made_with, trainer, num_examples, num_cut, seconds):
    """Registry, sidecar (last), and only then away with the checkpoints."""
    history = trainer.state.log_history
    losses = [[entry["step"], entry["loss"]] for entry in history if "loss" in entry]
    holdout_losses = [[entry["step"], entry["eval_loss"]] for entry in history if "eval_loss" in entry]
    stats = {
        "n": num_examples,
        "num_cut": num_cut,
        "num_steps": trainer.state.global_step,
        "train_loss": losses[-1][1] if losses else None,
        "holdout_loss_start": holdout_losses[0][1] if holdout_losses else None,
        "holdout_loss": holdout_losses[-1][1] if holdout_losses else None,
    }
    entry = {"name": cfg.model_name, "path": str(cfg.model_path), "config": to_dict(cfg), "stats": stats}
    files.append_jsonl(layout.path_of("registry", cfg.exp_dir, "model"), entry)
    curves = {"train": losses, "holdout": holdout_losses}
    write_sidecar(
        cfg.sidecar_path, to_dict(cfg), inputs, stats, seconds, [cfg.student_path], losses=curves, **made_with
    )
    for path in cfg.leftovers:
        shutil.rmtree(path)
    print_result(model_name=cfg.model_name, model=str(cfg.student_path), **stats)


if __name__ == "__main__":
    utils.run_script(main)
