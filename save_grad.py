"""The proxy's mean gradient over holdout traces -> EXP_DIR/student_grads.safetensors (stage 2).

    python save_grad.py exp_dir=runs/x proxy_student=Qwen/Qwen2.5-3B holdout_traces=HOLDOUT.parquet
    accelerate launch --config_file acc_config.yaml save_grad.py ...

Settings: grad_config.yaml, then key=value. --check only says whether the stage is done (exit code 0) or not
(3).
"""

import time
from pathlib import Path

import utils
from ads import chat
from ads.data.problems import take_subset
from ads.stage import files
from ads.stage.config import to_dict
from ads.stage.errors import UserError
from ads.stage.inputs import fingerprint_existing, fingerprint_model, fingerprint_tokenizer
from ads.stage.settings import GradConfig
from ads.stage.sidecar import write_sidecar
from ads.stage.world import is_main_process, print0
from utils import print_result

LOSS_WEIGHTING = "mean over sequences of the mean over response tokens, eos included"


def main(arguments):
    cfg, inputs = utils.begin_stage(GradConfig, "grad_config.yaml", fingerprint_inputs, arguments)
    utils.run_stage(cfg, inputs, compute_gradient)


def fingerprint_inputs(cfg):
    """What the gradient depends on besides the settings."""
    return {
        "proxy_student": fingerprint_model(cfg.proxy_student),
        "holdout_traces": fingerprint_existing(cfg.holdout_traces, "make it with gentraces.py"),
        "tokenizer": fingerprint_tokenizer(traces_tokenizer(cfg)),
    }


def compute_gradient(cfg, inputs, world):
    from ads import cpu
    from ads.delta import gradient
    from ads.delta.loss import load_sequences
    from ads.loading import recomputed

    start = time.time()
    cpu.keep_freed_memory(world.device)
    sequences, num_left_out = load_sequences(cfg.holdout_traces, cfg.max_length, cfg.max_samples, cfg.seed)
    differing = differing_tokens(cfg)
    model = load_proxy(cfg, sequences, world)
    with recomputed(model, cfg.gradient_checkpointing):
        loss, half = accumulate(cfg, model, sequences, world)
    norms = gradient.norms(model)
    stats = {
        "n": len(sequences),
        "num_left_out": num_left_out,
        "loss": round(loss, 6),
        "grad_norm": round(gradient.total_norm(norms), 6),
        "num_response_tokens": sum(len(s.ids) - s.num_prompt_tokens for s in sequences),
    }
    if not world.is_main:
        return
    ends = [start, time.time()]
    compressed, energy = compress(cfg, model, norms)
    ends.append(time.time())
    found = diagnose(cfg, model, compressed, half, sequences)
    ends += [time.time()] if found else []
    spans = zip(("gradient", "compression", "diagnostics"), ends, ends[1:], strict=False)
    more = {
        "differing_tokens": [list(entry) for entry in differing],
        "norms": {name: float(f"{norm:.6g}") for name, norm in norms.items()},
        "energy": energy,
        "diagnostics": found,
        "seconds_of": {name: round(after - before, 2) for name, before, after in spans},
    }
    save(cfg, inputs, compressed, stats, time.time() - start, more)


def load_proxy(cfg, sequences, world):
    """The proxy in float32, tried out; what cannot be differentiated on the sequences is refused."""
    import torch

    from ads.decode import memory_plan
    from ads.loading import load_model
    from ads.trials import try_batches

    memory_plan.check_gradient(cfg, sequences, memory_plan.room(world.device))
    print0(f"loading {cfg.proxy_student}")
    model = load_model(cfg.proxy_student, "float32", world.device, cfg.attn_implementation)
    largest, num_rows = max(max(s.ids) for s in sequences), model.get_input_embeddings().weight.shape[0]
    if largest >= num_rows:
        raise UserError(
            f"{cfg.holdout_traces} has token id {largest}, {cfg.proxy_student} only {num_rows} embedding rows"
        )
    try_batches(model, max(len(s.ids) for s in sequences), getattr(torch, cfg.dtype))
    return model


def accumulate(cfg, model, sequences, world):
    """Leave the mean gradient g in the parameters' .grad; returns (mean loss, half).

    The diagnostics ask how far g depends on the data. For them every other sequence goes first, and `half` is
    what these have added to g by then, compressed. Without diagnostics, or with one sequence, it is None.
    """
    from ads.delta import gradient

    has_halves = cfg.num_diagnosed and len(sequences) >= 2
    first, rest = (sequences[::2], sequences[1::2]) if has_halves else (sequences, [])
    loss, half = add_share(cfg, model, first, len(sequences), world), None
    if has_halves:
        gradient.finite_norms(model)  # no factors of what is not finite
        half = gradient.compress(model, cfg.grad_rank or 16, cfg.seed, is_share=True)
        loss += add_share(cfg, model, rest, len(sequences), world)
    if world.size > 1:
        gradient.all_reduce_(model)
    return world.sum(loss), half


def add_share(cfg, model, sequences, num_total, world):
    """Add what this process's share of some sequences contributes to g; returns that to the mean loss."""
    from ads.delta import gradient

    mine, bar = sequences[world.rank :: world.size], progress_bar
    return gradient.add_gradient_(model, mine, num_total, cfg.batch_size, bar, cfg.batch_tokens, cfg.dtype)


def compress(cfg, model, norms):
    """(gradients as they are stored, {parameter name: share of the squared norm kept})."""
    from ads.delta import gradient
    from ads.dual.factors import square_norm

    compressed = gradient.compress(model, cfg.grad_rank, cfg.seed)
    kept = {name: square_norm(g) for name, g in compressed.items()}
    energy = {name: round(kept[name] / norm**2, 5) if norm else 1.0 for name, norm in norms.items()}
    energy["all"] = round(sum(kept.values()) / gradient.total_norm(norms) ** 2, 5)
    print0(f"grad_rank {cfg.grad_rank or 'full'}: {energy['all']:.4f} of the gradient's squared norm is kept")
    return compressed, energy


def diagnose(cfg, model, compressed, half, sequences):
    """Delta's agreement with the exact one, printed; None where it is switched off or does not work."""
    from ads.delta import agreement, agreement_table

    if not cfg.num_diagnosed:
        return None
    chosen = take_subset(sequences, cfg.num_diagnosed, cfg.seed)
    try:
        found = agreement.diagnose(cfg, model, compressed, half, chosen)
    except (ValueError, RuntimeError) as error:  # not covered, too little memory: g is worth keeping
        print0(f"WARNING: no diagnostics: {' '.join(str(error).split())[:300]}")
        return None
    print0(*agreement_table.table(found, cfg.eps), sep="\n")
    return found


def traces_tokenizer(cfg):
    """Name of the tokenizer whose ids the holdout traces hold: as configured, else as their sidecar says."""
    sidecar = Path(cfg.holdout_traces).with_suffix(".yaml")
    made_with = files.read_yaml(sidecar)["config"] if sidecar.is_file() else {}
    name = cfg.tokenizer or made_with.get("tokenizer") or made_with.get("teacher")
    if name is None:
        raise UserError(f"{sidecar} is not there to name the tokenizer of the traces: set tokenizer")
    return name


def differing_tokens(cfg):
    """The added tokens that differ between traces and proxy; UserError where ordinary ones do."""
    ours = chat.load_tokenizer(traces_tokenizer(cfg), need_chat_template=False)
    theirs = chat.load_tokenizer(cfg.proxy_student, need_chat_template=False)
    return chat.match_vocabularies(ours, theirs).differing


def progress_bar(batches):
    from tqdm import tqdm

    return tqdm(batches, desc="gradient", unit="batch", disable=not is_main_process(), mininterval=2)


def save(cfg, inputs, compressed, stats, seconds, more):
    """The gradient with what it belongs to inside it, then the sidecar."""
    from ads.delta import gradient_file

    metadata = {
        "proxy_student": cfg.proxy_student,
        "proxy_fingerprint": inputs["proxy_student"],
        "holdout_fingerprint": inputs["holdout_traces"],
        "loss_weighting": LOSS_WEIGHTING,
        "grad_rank": cfg.grad_rank,
        **stats,
    }
    gradient_file.save(cfg.grad_path, compressed, metadata)
    more = {"loss_weighting": LOSS_WEIGHTING, **more}
    write_sidecar(cfg.sidecar_path, to_dict(cfg), inputs, stats, seconds, [cfg.grad_path], **more)
    print_result(grad_path=str(cfg.grad_path), sidecar=str(cfg.sidecar_path), **stats)


if __name__ == "__main__":
    utils.run_script(main)
