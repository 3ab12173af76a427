"""Sample a model on a split, force answers, grade: problems -> EXP_DIR/traces/NAME (stages 1, 3, 5 and 6).

    python gentraces.py data_split=gsm8k_holdout trace_name=holdout exp_dir=runs/x
    python gentraces.py data_split=gsm8k_train tau=0.6 lam=0.03 grad_path=runs/x/student_grads.safetensors \\
        proxy_student=Qwen/Qwen2.5-3B trace_name=train exp_dir=runs/x

Settings: gen_config.yaml, then key=value. --check only says whether the stage is done (exit code 0) or not
(3).
"""

import functools
import json
import time

import utils
from ads import chat
from ads.arms import TEXTS
from ads.data import grading
from ads.data.problems import take_subset
from ads.data.prompts import choose_prefill, make_rows
from ads.data.published import answer_only, truncated
from ads.data.traces import columns_of, compute_stats, fingerprint_inputs, grade, save_traces
from ads.stage import files
from ads.stage.fingerprint import fingerprint_json
from ads.stage.settings import GenConfig
from ads.stage.world import print0
from utils import print_result

CUTS = {"answer_only": answer_only, "truncated": truncated}
BATCHES_AT_ONCE = 4  # of texts that are published in the place of what is sampled
LOADED = []  # (settings, what load_models() gave) of the last stage of this process


def main(arguments):
    cfg, inputs = utils.begin_stage(GenConfig, "gen_config.yaml", fingerprint_inputs, arguments)
    utils.run_stage(cfg, inputs, generate_traces)


def generate_traces(cfg, inputs, world):
    start = time.time()
    tokenizer = chat.load_tokenizer_for(cfg.teacher, cfg.tokenizer)
    prefill = choose_prefill(cfg)
    rows, num_left_out = make_rows(cfg, tokenizer, prefill)
    prompts = fingerprint_json({row.id: row.prompt_ids for row in rows})
    made_with = resolve_numerics(cfg, world.device) | {"prompts": prompts}
    made_with |= {"resolved_prefill": prefill} if cfg.prefill == "auto" else {}
    utils.begin_parts(cfg, cfg.parts_dir, inputs | made_with, world)

    models, notes = models_of(cfg, inputs, tokenizer, world)
    speed = sample_rows(cfg, models, tokenizer, rows, world)
    table = [columns_of(cfg, row) for row in rows]
    if cfg.num_contrasts and cfg.arm.defence:
        firsts = table[:: cfg.num_samples]  # one trace a problem
        save_contrasts(cfg, models, tokenizer, firsts[: cfg.num_contrasts], world)
    models = None
    if cfg.one_step:  # which needs the room
        LOADED.clear()
    diagnostics = {"one_step": one_step_test(cfg, table, world)} if cfg.one_step else {}
    if world.is_main:
        save_traces(cfg, table)
        stats = compute_stats(cfg, table) | num_left_out | diagnostics | speed
        finish(cfg, inputs, stats, notes | made_with, start)


def resolve_numerics(cfg, device):
    """What dtypes "auto" stands for on this machine: parts made in another one are not gone on with."""
    from ads.loading import dtype_name

    dtypes = {"resolved_dtype": cfg.dtype}
    if cfg.has_proxy:
        dtypes["resolved_proxy_dtype"] = cfg.proxy_dtype
    return {key: dtype_name(name, device) for key, name in dtypes.items()}


def models_of(cfg, inputs, tokenizer, world):
    """load_models(), or what the stage before in this process had loaded with the same settings."""
    from ads.delta.arm_models import load_models

    vocabulary = match_proxy(cfg, tokenizer) if "proxy_student" in inputs else None
    of_config = ("dtype", "attn_implementation", "lam", "eps", "defence", "direction_seed", "proxy_dtype")
    settings = [(name, getattr(cfg, name)) for name in (*of_config, "seed")]
    settings += [(name, inputs.get(name)) for name in ("teacher", "tokenizer", "proxy_student", "gradient")]
    if settings not in [kept for kept, _ in LOADED]:
        LOADED.clear()
        LOADED.append((settings, load_models(cfg, tokenizer, vocabulary, world.device)))
    return LOADED[0][1]


def match_proxy(cfg, tokenizer):
    """Which of the teacher's ids mean the same to the proxy; ValueError where they are of other families."""
    theirs = chat.load_tokenizer(cfg.proxy_student, need_chat_template=False)
    return chat.match_vocabularies(tokenizer, theirs)


def sample_rows(cfg, models, tokenizer, rows, world):
    """Sample and grade the response to each row's prompt; how fast. Rows that are in parts are kept."""
    from ads.decode.engine import choose_batch_size
    from ads.decode.rows import Request

    requests = [Request(row.id, row.prompt_ids, cfg.max_length - len(row.prompt_ids)) for row in rows]
    print0("first prompt:", tokenizer.decode(rows[0].prompt_ids), sep="\n")
    by_id = {row.id: row for row in rows}
    forcing = make_forcing(tokenizer, models.eos, by_id) if cfg.answer_force else None
    batch_size = cfg.batch_size
    if batch_size == "auto":
        batch_size = choose_batch_size(models, requests, forcing, world.size)
        print0(f"batch_size: {batch_size} rows at once, by free memory")
    to_columns = functools.partial(grade, cfg, tokenizer, models.eos, by_id)
    start = time.time()
    decode = functools.partial(decode_rows, cfg, models, tokenizer, by_id, forcing, batch_size)
    num_sampled = decode_to_parts(cfg, decode, requests, to_columns, world, batch_size)
    num_tokens, seconds = world.sum(num_sampled), time.time() - start  # of all, as the sum waits for them
    sampled = world.ask_main(files.read_all_parts, cfg.parts_dir / "traces", by_id.keys(), world.size)
    for row in rows:
        row.sampled = sampled[row.id]
    print0("first trace:", rows[0].sampled["trace"], sep="\n")
    speed = round(num_tokens / seconds, 1) if num_tokens else None
    return {"tokens_per_second": speed, "rows_at_once": batch_size, "num_models": models.num_models}


def make_forcing(tokenizer, eos, by_id):
    """How the model is made to state its answer after a response."""
    from ads.decode.rows import Forcing

    texts = (chat.FORCE_TEXT, chat.THINK_END + chat.FORCE_TEXT)
    most = max(len(chat.encode_next(tokenizer, text)) for text in texts)
    return Forcing(functools.partial(force_ids, tokenizer, eos, by_id), most, chat.NUM_FORCED_TOKENS)


def force_ids(tokenizer, eos, by_id, request, response_ids):
    """What follows a response; its opening, at the end of the prompt that was read, is part of it."""
    row = by_id[request.id]
    prompt_ids = row.prompt_ids[: len(row.prompt_ids) - len(row.opening)]
    return chat.force_ids(tokenizer, prompt_ids, row.opening + response_ids, eos)


def decode_rows(cfg, models, tokenizer, by_id, forcing, batch_size, requests):
    """Yield the Completions of requests: sampled, or of a text that is published in the place of what was.

    Such texts are made of a few batches at a time: a kill costs what is sampled before its text is made.
    """
    from ads.decode.engine import generate
    from ads.decode.replay import complete
    from ads.delta.arm_models import sampling_of

    has_graphs = models.allowed_V.device.type == "cuda" if cfg.cuda_graph == "auto" else cfg.cuda_graph
    given = models, sampling_of(cfg, models.shared_V), cfg.seed
    if cfg.defence not in TEXTS:
        yield from generate(*given, requests, batch_size, forcing, has_graphs)
        return
    for first in range(0, len(requests), size := BATCHES_AT_ONCE * batch_size):
        some, sampled = requests[first : first + size], {}
        if cfg.defence in CUTS:
            sampled = {c.id: c.ids for c in generate(*given, some, batch_size, None, has_graphs)}
        texts = [published_text(cfg, models, tokenizer, by_id[r.id], sampled.get(r.id)) for r in some]
        responses = [[*chat.encode_next(tokenizer, text), tokenizer.eos_token_id] for text in texts]
        cut = [ids[: r.max_new_tokens] for r, ids in zip(some, responses, strict=True)]
        yield from complete(models, cfg.seed, some, cut, forcing, batch_size)


def published_text(cfg, models, tokenizer, row, sampled_ids):
    """A trace made elsewhere, or what is cut out of the one that was sampled."""
    if sampled_ids is None:
        return row.published
    trace = chat.response_text(tokenizer, row.opening + sampled_ids, models.eos)
    return CUTS[cfg.defence](trace, row.problem["solution"])


def decode_to_parts(cfg, decode, requests, to_columns, world, batch_size):
    """Decode this process's requests that are in no part, and write in parts what ends; tokens sampled."""
    from tqdm import tqdm

    folder = cfg.parts_dir / "traces"
    done = utils.rows_in_parts(folder, len(requests), world)
    mine = [r for k, r in enumerate(requests) if k % world.size == world.rank and r.id not in done]
    bar = {"total": len(mine), "desc": "traces", "unit": "row", "mininterval": 2}
    with tqdm(**bar, disable=not world.is_main) as progress:
        ended = told(map(to_columns, decode(mine)), progress)
        rows = files.write_parts(folder, world.rank, ended, batch_size)
    return sum(row["num_tokens"] for row in rows)


def told(rows, progress):
    """The rows, each told to the progress bar once it has been taken."""
    start, num_tokens = time.time(), 0
    for row in rows:
        yield row
        num_tokens += row["num_tokens"]
        progress.set_postfix_str(f"{num_tokens / (time.time() - start):.0f} tokens/s", refresh=False)
        progress.update()


def save_contrasts(cfg, models, tokenizer, rows, world):
    """Store the rows' traces beside clean ones of the same random numbers, for the report's reader.

    Each process makes its share and writes it as a part.
    """
    from ads.delta import effects
    from ads.delta.arm_models import sampling_of

    folder = cfg.parts_dir / "contrasts"
    done = files.read_parts(folder)
    mine = [
        {**row, "max_new_tokens": cfg.max_length - len(row["prompt_ids"])}
        for row in rows[world.rank :: world.size]
        if row["id"] not in done
    ]
    if mine:
        num_slots = len(mine) if cfg.batch_size == "auto" else min(cfg.batch_size, len(mine))
        found = effects.contrasts(
            models, sampling_of(cfg, models.shared_V), cfg.seed, tokenizer, mine, is_correct, num_slots
        )
        files.write_part(folder, world.rank, found)
    world.barrier()
    if world.is_main:
        done = files.read_all_parts(folder, {row["id"] for row in rows}, world.size)
        problems = [done[row["id"]] for row in rows]
        files.write_text(cfg.contrast_path, json.dumps({"trace_name": cfg.trace_name, "problems": problems}))


def is_correct(row, text):
    return grading.grade(text, row["solution"]).correct


def one_step_test(cfg, table, world):
    """What a step of gradient descent on the traces does to the proxy's loss on the holdout traces."""
    from ads.delta import effects
    from ads.delta.loss import load_sequences, make_sequences
    from ads.loading import load_model
    from ads.trials import try_batches

    taught = make_sequences(take_subset(table, cfg.one_step_samples, cfg.seed), cfg.max_length)
    holdout, _ = load_sequences(cfg.holdout_traces, cfg.max_length)
    print0(f"loading {cfg.proxy_student} for the one-step test")
    proxy = load_model(cfg.proxy_student, "float32", world.device, cfg.attn_implementation)
    try_batches(proxy, max(len(s.ids) for s in taught + holdout))
    return effects.one_step(proxy, taught, holdout, cfg.one_step, world)


def finish(cfg, inputs, stats, notes, start):
    outputs = [path for path in (cfg.parquet_path, cfg.contrast_path) if path.is_file()]
    utils.finish_stage(cfg, "trace", cfg.traces_path, inputs, stats, start, *outputs, **notes)
    print_result(trace_name=cfg.trace_name, sidecar=str(cfg.sidecar_path), **stats)


if __name__ == "__main__":
    utils.run_script(main)
