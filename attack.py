"""What an attacker trains on: published traces -> EXP_DIR/traces/NAME (docs/attackers.md).

    python attack.py attack=correct traces=runs/x/traces/train.parquet trace_name=correct exp_dir=runs/x
    python attack.py attack=mix share=0.25 traces=runs/x/traces/train.parquet \\
        clean_traces=runs/x/traces/train_clean.parquet trace_name=mix25 exp_dir=runs/x

Settings: attack_config.yaml, then key=value. --check only says whether the stage is done (exit code 0) or not
(3). An attack that leaves no row is done, too, without a table: the exit code is 4.
"""

import functools
import itertools
import shutil
import time

import utils
from ads import chat
from ads.attacks import rows
from ads.data.examples import example_of, load_examples, num_tokens
from ads.data.traces import save_traces
from ads.stage import files
from ads.stage.settings import AttackConfig
from utils import print_result


def main(arguments):
    cfg, inputs = utils.begin_stage(AttackConfig, "attack_config.yaml", rows.fingerprint_inputs, arguments)
    utils.run_stage(cfg, inputs, attack_traces)


def attack_traces(cfg, inputs, world):
    start = time.time()
    attack, tables = rows.attack_of(cfg), rows.read_tables(cfg)
    made_with = resolve_numerics(cfg, world.device) if "student" in attack.reads else {}
    utils.begin_parts(cfg, cfg.parts_dir, inputs | made_with, world)
    found = attack.make(cfg, tables, functools.partial(measure, cfg, world))
    if world.is_main:
        finish(cfg, inputs, made_with, found[0], rows.count(cfg, tables, found), start)


def resolve_numerics(cfg, device):
    """What dtype "auto" stands for on this machine: parts made in another one are not gone on with."""
    from ads.loading import dtype_name

    return {"resolved_dtype": dtype_name(cfg.dtype, device)}


def measure(cfg, world, what, given):
    """{id: number} of rows by the undistilled student: "nll" (nats/token) or "derivative"; kept in parts.

    Batches are the same whatever has been measured before, and each is measured by one process.
    """
    from ads.attacks import likelihood

    if not given:
        return {}
    tokenizer = chat.load_tokenizer_for(cfg.student, cfg.tokenizer)
    examples = [example_of(cfg, tokenizer, row)[0] for row in given]
    folder, ids = cfg.parts_dir / what, [row["id"] for row in given]
    done = utils.rows_in_parts(folder, len(ids), world)
    batch_size = cfg.batch_size if what == "nll" else 1
    batches = likelihood.batches_of(examples, batch_size, cfg.batch_tokens)
    left = [batch for batch in batches if any(ids[i] not in done for i in batch)]
    if mine := left[world.rank :: world.size]:
        measure_to_parts(cfg, world, what, tokenizer, ids, examples, mine)
    world.barrier()
    found = world.ask_main(files.read_all_parts, folder, ids, world.size)
    return {name: found[name][what] for name in ids}


def measure_to_parts(cfg, world, what, tokenizer, ids, examples, batches):
    """Measure batches, lists of places in `examples`, and write in parts what is measured."""
    from tqdm import tqdm

    from ads import cpu
    from ads.attacks import likelihood
    from ads.decode import memory_plan

    cpu.keep_freed_memory(world.device)
    holdout = load_examples(cfg, tokenizer, cfg.holdout_traces)[0] if what == "derivative" else []
    longest, dtype = max(map(num_tokens, examples + holdout)), "float32" if holdout else cfg.dtype
    memory_plan.check_measuring(cfg, examples + holdout, memory_plan.room(world.device), bool(holdout))
    model = likelihood.load_student(cfg, tokenizer, longest, world.device, dtype)
    progress = functools.partial(tqdm, unit="batch", disable=not world.is_main, mininterval=2)
    of_batch = functools.partial(likelihood.mean_nll, model)
    if holdout:
        bar = functools.partial(progress, desc="gradient")
        gradients = likelihood.loss_gradient(model, holdout, cfg.batch_size, cfg.batch_tokens, bar)
        of_batch = functools.partial(likelihood.derivatives, model, gradients)
    each = itertools.chain.from_iterable
    values = each(of_batch([examples[i] for i in batch]) for batch in progress(batches, desc=what))
    found = ({"id": ids[i], what: value} for i, value in zip(each(batches), values, strict=True))
    files.write_parts(cfg.parts_dir / what, world.rank, found, 4 * cfg.batch_size)


def finish(cfg, inputs, made_with, found, stats, start):
    """The table, or none; and what ends every stage."""
    if found:
        save_traces(cfg, found)
    else:  # what an earlier run left
        shutil.rmtree(cfg.traces_path, ignore_errors=True)
        cfg.parquet_path.unlink(missing_ok=True)
    outputs = [cfg.parquet_path] if found else []
    utils.finish_stage(cfg, "trace", cfg.traces_path, inputs, stats, start, *outputs, **made_with)
    print_result(trace_name=cfg.trace_name, sidecar=str(cfg.sidecar_path), **stats)


if __name__ == "__main__":
    utils.run_script(main)
