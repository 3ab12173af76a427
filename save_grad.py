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
from ads.data.tables import check_traces, read_parquet
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
    import torch

    from ads import cpu
    from ads.decode import memory_plan
    from ads.delta import gradient
    from ads.loading import load_model, recomputed
    from ads.trials import try_batches

    start = time.time()
    cpu.keep_freed_memory(world.device)
    sequences, num_left_out = load_sequences(cfg)
    vocabulary = check_vocabulary(cfg)
    memory_plan.check_gradient(cfg, sequences, memory_plan.room(world.device))
    print0(f"loading {cfg.proxy_student}")
    model = load_model(cfg.proxy_student, "float32", world.device, cfg.attn_implementation)
    num_rows = model.get_input_embeddings().weight.shape[0]
    check_ids(sequences, num_rows, cfg)
    try_batches(model, max(len(s.ids) for s in sequences), getattr(torch, cfg.dtype))

    with recomputed(model, cfg.gradient_checkpointing):
        loss, half = accumulate(cfg, model, sequences, world)
    seconds = {"gradient": time.time() - start}
    norms = gradient.norms(model)
    stats = {
        "n": len(sequences),
        "num_left_out": num_left_out,
        "loss": round(loss, 6),
        "grad_norm": round(gradient.total_norm(norms), 6),
        "num_response_tokens": sum(len(s.ids) - s.num_prompt_tokens for s in sequences),
    }
    if world.is_main:
        compressed, energy = compress(cfg, model, norms, seconds)
        found = diagnose(cfg, model, compressed, half, sequences, seconds)
        more = {
            "energy": energy,
            "diagnostics": found,
            "seconds_of": {k: round(v, 2) for k, v in seconds.items()},
        }
        save(cfg, inputs, compressed, stats, norms, vocabulary, time.time() - start, more)


def accumulate(cfg, model, sequences, world):
    """(mean loss, half): the mean gradient is left in the parameters' .grad.

    half is the compressed share of every other sequence, for the diagnostics; None where they are off.
    """
    from ads.delta import gradient

    step = 2 if cfg.num_diagnosed and len(sequences) >= 2 else 1
    loss, half = 0.0, None
    for first in range(step):
        if first:
            gradient.finite_norms(model)  # no factors of what is not finite
            half = gradient.compress(model, cfg.grad_rank or 16, cfg.seed, is_share=True)
        mine = sequences[first::step][world.rank :: world.size]  # the same halves for any number of processes
        loss += gradient.add_gradient_(
            model, mine, len(sequences), cfg.batch_size, progress_bar, cfg.batch_tokens, cfg.dtype
        )
    if world.size > 1:
        gradient.all_reduce_(model)
    return world.sum(loss), half


def compress(cfg, model, norms, seconds):
    """(gradients as they are stored, {parameter name: share of the squared norm kept})."""
    from ads.delta import gradient
    from ads.dual.factors import square_norm

    start = time.time()
    compressed = gradient.compress(model, cfg.grad_rank, cfg.seed)
    seconds["compression"] = time.time() - start
    kept = {name: square_norm(g) for name, g in compressed.items()}
    energy = {name: round(kept[name] / norm**2, 5) if norm else 1.0 for name, norm in norms.items()}
    energy["all"] = round(sum(kept.values()) / gradient.total_norm(norms) ** 2, 5)
    print0(f"grad_rank {cfg.grad_rank or 'full'}: {energy['all']:.4f} of the gradient's squared norm is kept")
    return compressed, energy


def diagnose(cfg, model, compressed, half, sequences, seconds):
    """Delta's agreement with the exact one, printed; None where it is switched off or does not work."""
    from ads.delta import agreement, agreement_table

    if not cfg.num_diagnosed:
        return None
    start = time.time()
    chosen = take_subset(sequences, cfg.num_diagnosed, cfg.seed)
    try:
        found = agreement.diagnose(cfg, model, compressed, half, chosen)
    except (ValueError, RuntimeError) as error:  # not covered, too little memory: g is worth keeping
        print0(f"WARNING: no diagnostics: {' '.join(str(error).split())[:300]}")
        return None
    seconds["diagnostics"] = time.time() - start
    print0(*agreement_table.table(found, cfg.eps), sep="\n")
    return found


def load_sequences(cfg):
    """(holdout sequences, how many had no room for a response token within max_length)."""
    from ads.delta.loss import make_sequences

    rows = read_parquet(Path(cfg.holdout_traces))
    check_traces(cfg.holdout_traces, rows, ids=("prompt_ids", "response_ids"))
    rows = take_subset(rows, cfg.max_samples, cfg.seed)
    kept = make_sequences(rows, cfg.max_length)
    if not kept:
        raise UserError(f"{cfg.holdout_traces}: no response token within max_length={cfg.max_length}")
    return kept, len(rows) - len(kept)


def traces_tokenizer(cfg):
    """Name of the tokenizer whose ids the holdout traces hold: as configured, else as their sidecar says."""
    sidecar = Path(cfg.holdout_traces).with_suffix(".yaml")
    made_with = files.read_yaml(sidecar)["config"] if sidecar.is_file() else {}
    name = cfg.tokenizer or made_with.get("tokenizer") or made_with.get("teacher")
    if name is None:
        raise UserError(f"{sidecar} is not there to name the tokenizer of the traces: set tokenizer")
    return name


def check_vocabulary(cfg):
    """The traces' token ids must mean the same to the proxy; returns the added tokens that differ."""
    ours = chat.load_tokenizer(traces_tokenizer(cfg), need_chat_template=False)
    theirs = chat.load_tokenizer(cfg.proxy_student, need_chat_template=False)
    return chat.match_vocabularies(ours, theirs).differing


def check_ids(sequences, num_rows, cfg):
    largest = max(max(s.ids) for s in sequences)
    if largest >= num_rows:
        raise UserError(
            f"{cfg.holdout_traces} has token id {largest}, {cfg.proxy_student} only {num_rows} embedding rows"
        )


def progress_bar(batches):
    from tqdm import tqdm

    return tqdm(batches, desc="gradient", unit="batch", disable=not is_main_process(), mininterval=2)


def save(cfg, inputs, compressed, stats, norms, vocabulary, seconds, more):
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
    write_sidecar(
        cfg.sidecar_path,
        to_dict(cfg),
        inputs,
        stats,
        seconds,
        [cfg.grad_path],
        loss_weighting=LOSS_WEIGHTING,
        differing_tokens=[list(entry) for entry in vocabulary],
        norms={name: float(f"{norm:.6g}") for name, norm in norms.items()},
        **more,
    )
    print_result(grad_path=str(cfg.grad_path), sidecar=str(cfg.sidecar_path), **stats)


if __name__ == "__main__":
    utils.run_script(main)
