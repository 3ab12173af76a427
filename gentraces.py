"""Sample a model on a split, force answers, grade: problems -> EXP_DIR/traces/NAME (stages 1, 3, 5 and 6).

    python gentraces.py data_split=gsm8k_holdout trace_name=holdout exp_dir=runs/x
    python gentraces.py data_split=gsm8k_train tau=0.6 lam=0.03 grad_path=runs/x/student_grads.safetensors \\
        proxy_student=Qwen/Qwen2.5-3B trace_name=train exp_dir=runs/x

Settings: gen_config.yaml, then key=value. --check only says whether the stage is done (exit code 0) or not
(3).
"""

import functools
import json
import shutil
import time
from pathlib import Path

import utils
from ads import chat
from ads.data import grading
from ads.data.problems import fingerprint_data, load_problems, take_subset
from ads.data.tables import check_traces, read_parquet
from ads.data.traces import assemble, compute_stats, save_traces, trace_row
from ads.stage import files, fingerprint, layout
from ads.stage.config import ignored_keys, to_dict
from ads.stage.errors import UserError
from ads.stage.inputs import fingerprint_existing, fingerprint_model, fingerprint_tokenizer
from ads.stage.settings import GenConfig
from ads.stage.sidecar import open_parts, write_sidecar
from ads.stage.world import print0
from utils import print_result

LOADED = []  # (settings, what load_models() gave) of the last stage of this process
PART_ROWS, PART_SECONDS = 32, 60  # finished rows are written by then: what a kill without notice may cost
LATE_SECONDS = 90  # after which a network file system shows what other machines have written


def main(arguments):
    cfg, inputs = utils.begin_stage(GenConfig, "gen_config.yaml", fingerprint_inputs, arguments)
    utils.run_stage(cfg, inputs, generate_traces)


def fingerprint_inputs(cfg):
    """What the traces depend on besides the settings."""
    inputs = {
        "teacher": fingerprint_model(cfg.teacher),
        "tokenizer": fingerprint_tokenizer(cfg.tokenizer or cfg.teacher),
        "data": fingerprint_data(cfg.data_split, cfg.data_dir),
    }
    if cfg.has_delta:
        inputs["proxy_student"] = fingerprint_model(cfg.proxy_student)
        inputs["gradient"] = fingerprint_existing(cfg.grad_path, "make it with save_grad.py")
    if cfg.one_step:
        inputs["proxy_student"] = fingerprint_model(cfg.proxy_student)
        inputs["holdout_traces"] = fingerprint_existing(cfg.holdout_traces, "make it with gentraces.py")
    if cfg.few_shot:
        inputs["few_shot_traces"] = fingerprint_existing(cfg.few_shot_traces, "make it with gentraces.py")
    return inputs


def generate_traces(cfg, inputs, world):
    start = time.time()
    tokenizer = chat.load_tokenizer_for(cfg.teacher, cfg.tokenizer)
    if place := chat.describe_place(tokenizer):
        print0(place)
    found = load_problems(cfg.data_split, cfg.data_dir, cfg.max_samples, cfg.seed)
    problems = leave_out_unanswered(found)
    prompts = render_prompts(cfg, tokenizer, problems)
    made_with = resolve_numerics(cfg, world.device) | {"prompts": fingerprint.fingerprint_json(prompts)}
    world.ask_main(open_parts, cfg.parts_dir, to_dict(cfg), inputs | made_with, ignored_keys(cfg))

    vocabulary = check_vocabulary(cfg, tokenizer) if cfg.has_delta or cfg.one_step else None
    models, notes = models_of(cfg, inputs, tokenizer, vocabulary, world)
    rows, speed = sample_traces(cfg, models, tokenizer, problems, prompts, world)
    rows = assemble(cfg, problems, prompts, rows)
    if cfg.has_delta and cfg.num_contrasts:
        save_contrasts(cfg, models, tokenizer, rows[: cfg.num_contrasts], world)
    models = None
    if cfg.one_step:  # which needs the room
        LOADED.clear()
    diagnostics = {"one_step": one_step_test(cfg, rows, world)} if cfg.one_step else {}
    if world.is_main:
        save_traces(cfg, rows)
        left_out = {
            "num_without_answer": len(found) - len(problems),
            "num_prompts_too_long": len(problems) - len(prompts),
        }
        stats = compute_stats(cfg, rows) | left_out | diagnostics | speed
        finish(cfg, inputs, stats, notes | made_with, time.time() - start)


def resolve_numerics(cfg, device):
    """What dtypes "auto" stands for on this machine: parts made in another one are not gone on with."""
    from ads.loading import resolve_dtype

    dtypes = {"resolved_dtype": cfg.dtype}
    if cfg.has_delta:
        dtypes["resolved_proxy_dtype"] = cfg.proxy_dtype
    return {key: str(resolve_dtype(name, device)).removeprefix("torch.") for key, name in dtypes.items()}


def leave_out_unanswered(problems):
    """The problems that have an answer to grade against: their own solution, graded as a response, is right.

    2 of MATH's 7,500 solutions end in an empty box; a line of prose may not say which number is the answer.
    """
    kept, reasons = [], {}
    for problem in problems:
        try:
            grading.check_solution(problem["solution"])
            kept.append(problem)
        except ValueError as error:
            reasons[problem["id"]] = error
    if reasons:
        problem_id, reason = next(iter(reasons.items()))
        summary = f"{len(reasons)} of {len(problems)} problems have no answer, such as {problem_id}: {reason}"
        if not kept:
            raise UserError(summary)
        print0(f"left out: {summary}")
    return kept


def render_prompts(cfg, tokenizer, problems):
    """{problem id: prompt ids, the response's forced opening among them}; prompts that are too long or leave
    no room to respond are left out."""
    examples = few_shot_examples(cfg)
    opening = opening_ids(cfg, tokenizer)
    prompts = {p["id"]: chat.prompt_ids(tokenizer, p["problem"], examples) + opening for p in problems}
    longest = min(cfg.max_prompt_length, cfg.max_length - 1)
    kept = {i: ids for i, ids in prompts.items() if len(ids) <= longest}
    if not kept:
        shortest = min(map(len, prompts.values()))
        raise UserError(
            f"max_prompt_length={cfg.max_prompt_length}, max_length={cfg.max_length}: every prompt of "
            f"{cfg.data_split} is too long, the shortest has {shortest} tokens"
        )
    if len(kept) < len(prompts):
        print0(
            f"left out {len(prompts) - len(kept)} of {len(prompts)} problems: prompts above {longest} tokens"
        )
    return kept


def opening_ids(cfg, tokenizer):
    """The ids of what each response is made to begin with."""
    ids = chat.encode_next(tokenizer, cfg.prefill or "")
    if tokenizer.eos_token_id in ids:
        raise UserError(f"prefill={cfg.prefill!r}: holds the token that ends a response; leave it out")
    return ids


def few_shot_examples(cfg):
    """(problem, worked solution) of the first correct, finished traces: what follows their think block."""
    if not cfg.few_shot:
        return ()
    rows = read_parquet(Path(cfg.few_shot_traces))
    texts, flags = ("problem", cfg.trace_colname), ("finished", "is_raw_correct")
    check_traces(cfg.few_shot_traces, rows, text=texts, flags=flags)
    rows = [row for row in rows if row["finished"] and row["is_raw_correct"]]
    if len(rows) < cfg.few_shot:
        raise UserError(
            f"few_shot={cfg.few_shot}: {cfg.few_shot_traces} has {len(rows)} correct, finished traces"
        )
    return [(r["problem"], r[cfg.trace_colname].split("</think>")[-1].strip()) for r in rows[: cfg.few_shot]]


def check_vocabulary(cfg, tokenizer):
    """Which of the teacher's ids mean the same to the proxy; ValueError where they are of other families."""
    theirs = chat.load_tokenizer(cfg.proxy_student, need_chat_template=False)
    return chat.match_vocabularies(tokenizer, theirs)


def models_of(cfg, inputs, tokenizer, vocabulary, world):
    """load_models(), or what the stage before in this process had loaded with the same settings."""
    names = (
        "dtype",
        "attn_implementation",
        "lam",
        "eps",
        "direction",
        "direction_seed",
        "proxy_dtype",
        "seed",
    )
    made_of = ("teacher", "tokenizer", "proxy_student", "gradient")
    settings = [(name, getattr(cfg, name)) for name in names] + [(name, inputs.get(name)) for name in made_of]
    if settings not in [kept for kept, _ in LOADED]:
        LOADED.clear()
        LOADED.append((settings, load_models(cfg, tokenizer, vocabulary, world)))
    return LOADED[0][1]


def load_models(cfg, tokenizer, vocabulary, world):
    """(engine.Models, notes for the sidecar): the teacher and, where lam is not 0, what gives Delta."""
    from ads.decode import memory_plan
    from ads.decode.cached_model import CachedModel
    from ads.decode.corruption import Corruption
    from ads.decode.engine import Models
    from ads.loading import load_model

    memory_plan.check_decoding(cfg, memory_plan.room(world.device))
    proxy, notes = load_proxy(cfg, tokenizer, vocabulary, world.device) if cfg.has_delta else (None, {})
    print0(f"loading {cfg.teacher}")
    teacher = load_model(cfg.teacher, cfg.dtype, world.device, cfg.attn_implementation)
    chat.check_rows(tokenizer, teacher.get_output_embeddings().weight.shape[0], cfg.teacher)
    allowed_V = id_mask(tokenizer, tokenizer.get_vocab().values(), world.device)
    eos = frozenset(i for i in chat.eos_ids(tokenizer, teacher) if i < len(allowed_V))
    is_corrupting = cfg.lam and cfg.direction == "corrupt"
    corruption = Corruption(tokenizer, allowed_V, cfg.lam) if is_corrupting else None
    return Models(CachedModel(teacher), proxy, allowed_V, eos, corruption), notes


def load_proxy(cfg, tokenizer, vocabulary, device):
    """(what gives Delta, notes): theta +- eps g or, with eps = 0, one proxy in dual numbers."""
    from ads.delta import gradient_file
    from ads.delta.central import CentralDifference
    from ads.delta.exact import ExactDerivative
    from ads.dual.factors import random_tensor
    from ads.loading import load_model

    grad_path = Path(cfg.grad_path)
    file = gradient_file.open_checked(grad_path, fingerprint_model(cfg.proxy_student))
    way = f"twice, as theta +- {cfg.eps:g} g" if cfg.eps else "once, to differentiate along g"
    print0(f"loading {cfg.proxy_student} {way} (direction: {cfg.direction})")
    models = [
        load_model(cfg.proxy_student, cfg.proxy_dtype, device, cfg.attn_implementation)
        for _ in range(2 if cfg.eps else 1)
    ]
    gradient_file.check_matches(file, grad_path, models[0])
    chat.check_rows(tokenizer, models[0].get_input_embeddings().weight.shape[0], cfg.proxy_student)
    read_gradient = functools.partial(gradient_file.read, file)
    if cfg.direction == "random":
        seed = cfg.seed if cfg.direction_seed is None else cfg.direction_seed
        read_gradient = functools.partial(random_tensor, read_gradient, seed)
    shared_V = id_mask(tokenizer, vocabulary.shared_ids, device)
    notes = {
        "grad_rank": gradient_file.metadata_of(file)["grad_rank"],
        "ids_without_delta": [list(entry) for entry in vocabulary.differing],
    }
    if cfg.eps == 0:
        return ExactDerivative(models[0], read_gradient, shared_V), notes
    notes["perturbation"] = perturb_(cfg, models, read_gradient)
    return CentralDifference(*models, cfg.eps, shared_V), notes


def perturb_(cfg, models, read_gradient):
    """Make the two proxies theta +- eps g; figures of what was stored of eps g."""
    from ads.delta.central import describe, perturb_, warning

    realised = perturb_(*models, read_gradient, cfg.eps)
    print0(f"perturbation as stored: {describe(realised)}")
    if warning := warning(realised, cfg.eps, cfg.proxy_dtype):
        print0(warning)
    return describe(realised)


def id_mask(tokenizer, ids, device):
    """Bool mask (V,) over the tokenizer's ids, true at `ids`."""
    import torch

    mask_V = torch.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=torch.bool)
    mask_V[list(ids)] = True
    return mask_V.to(device)


def sample_traces(cfg, models, tokenizer, problems, prompts, world):
    """({id: row} of every problem's response, speed). Rows already in parts are kept."""
    from ads.decode.engine import Request

    requests = [Request(i, ids, cfg.max_length - len(ids)) for i, ids in prompts.items()]
    solutions = {p["id"]: p["solution"] for p in problems}
    print0("first prompt:", tokenizer.decode(requests[0].prompt_ids), sep="\n")
    opening = opening_ids(cfg, tokenizer)
    forcing = make_forcing(tokenizer, models.eos, opening) if cfg.answer_force else None
    to_row = functools.partial(trace_row, cfg, tokenizer, models.eos, opening, solutions=solutions)
    batch_size = choose_rows(cfg, models, forcing, requests, world)
    start = time.time()
    given = cfg, models, forcing, requests, to_row, world, batch_size
    num_tokens = world.sum(decode_to_parts(*given))  # waits for all
    seconds = time.time() - start
    rows = world.ask_main(read_rows, cfg.parts_dir / "traces", prompts.keys(), world)
    print0("first trace:", rows[requests[0].id]["trace"], sep="\n")
    speed = round(num_tokens / seconds, 1) if num_tokens else None
    return rows, {"tokens_per_second": speed, "rows_at_once": batch_size}


def choose_rows(cfg, models, forcing, requests, world):
    """How many rows are decoded at once: batch_size, or by free memory."""
    from ads.decode.engine import choose_batch_size

    if cfg.batch_size != "auto":
        return cfg.batch_size
    batch_size = choose_batch_size(models, requests, forcing, world.size)
    print0(f"batch_size: {batch_size} rows at once, by free memory")
    return batch_size


def read_rows(folder, ids, world):
    """{id: row} of all rows that the processes have put into parts; ValueError when some do not turn up."""
    rows = files.read_parts(folder)
    last_look = time.monotonic() + (LATE_SECONDS if world.size > 1 else 0)
    while missing := ids - rows.keys():
        if time.monotonic() > last_look:
            raise UserError(
                f"{folder} lacks {len(missing)} of {len(ids)} rows that were sampled, such as "
                f"{min(missing)}: exp_dir must be a folder that all machines of a run share; run again"
            )
        time.sleep(2)
        rows = files.read_parts(folder)
    return rows


def make_forcing(tokenizer, eos, opening):
    """How the model is made to state its answer after a response."""
    from ads.decode.engine import Forcing

    most = len(chat.encode_next(tokenizer, chat.THINK_END + chat.FORCE_TEXT))
    most = max(most, len(chat.encode_next(tokenizer, chat.FORCE_TEXT)))
    ids_of = functools.partial(force_ids, tokenizer=tokenizer, eos=eos, opening=opening)
    return Forcing(ids_of, most, chat.NUM_FORCED_TOKENS)


def force_ids(request, response_ids, tokenizer, eos, opening):
    prompt = request.prompt_ids[: len(request.prompt_ids) - len(opening)]
    return chat.force_ids(tokenizer, prompt, opening + response_ids, eos)


def sampling_rule(cfg):
    """The distribution that traces are drawn from."""
    from ads.sampling import Sampling

    is_permuted = cfg.has_delta and cfg.direction == "permuted"
    return Sampling(cfg.tau, cfg.lam if cfg.has_delta else 0.0, cfg.top_k, cfg.top_p, is_permuted)


def decode_to_parts(cfg, models, forcing, requests, to_row, world, batch_size):
    """Decode this process's requests that are in no part, and write what is finished in parts; tokens
    sampled."""
    from tqdm import tqdm

    from ads.decode.engine import generate

    folder = cfg.parts_dir / "traces"
    done = world.share(set(files.read_parts(folder)) if world.is_main else None)
    mine = [r for k, r in enumerate(requests) if k % world.size == world.rank and r.id not in done]
    if len(mine) < len(requests) // world.size:
        print0(f"{len(done)} of {len(requests)} rows are there from an earlier run")
    part_rows = min(PART_ROWS, batch_size)
    rows, num_tokens, start, written = [], 0, time.time(), time.monotonic()
    try:
        with tqdm(
            total=len(mine), desc="traces", unit="row", disable=not world.is_main, mininterval=2
        ) as progress:
            has_graphs = cfg.cuda_graph is True  # auto: not before a GPU has run them
            rule = sampling_rule(cfg)
            for completion in generate(models, rule, cfg.seed, mine, batch_size, forcing, has_graphs):
                rows.append(to_row(completion))
                num_tokens += len(completion.ids)
                progress.set_postfix_str(f"{num_tokens / (time.time() - start):.0f} tokens/s", refresh=False)
                progress.update()
                if len(rows) >= part_rows or time.monotonic() - written > PART_SECONDS:
                    files.write_part(folder, world.rank, rows)
                    rows, written = [], time.monotonic()
    finally:  # stopped, or another row failed: what is finished is kept
        if rows:
            files.write_part(folder, world.rank, rows)
    return num_tokens


def save_contrasts(cfg, models, tokenizer, rows, world):
    """Store the rows' traces beside clean ones of the same random numbers, for the report's reader.

    Each process makes its share and writes it as a part.
    """
    from ads.delta import effects

    folder = cfg.parts_dir / "contrasts"
    done = files.read_parts(folder)
    mine = [
        {**row, "max_new_tokens": cfg.max_length - len(row["prompt_ids"])}
        for row in rows[world.rank :: world.size]
        if row["id"] not in done
    ]
    if mine:
        num_slots = len(mine) if cfg.batch_size == "auto" else min(cfg.batch_size, len(mine))
        rule = sampling_rule(cfg)
        found = effects.contrasts(models, rule, cfg.seed, tokenizer, mine, is_correct, num_slots)
        files.write_part(folder, world.rank, found)
    world.barrier()
    if world.is_main:
        done = read_rows(folder, {row["id"] for row in rows}, world)
        problems = [done[row["id"]] for row in rows]
        files.write_text(cfg.contrast_path, json.dumps({"trace_name": cfg.trace_name, "problems": problems}))


def is_correct(row, text):
    return grading.grade(text, row["solution"]).correct


def one_step_test(cfg, rows, world):
    """What a step of gradient descent on the traces does to the proxy's loss on the holdout traces."""
    from ads.delta import effects
    from ads.delta.loss import make_sequences
    from ads.loading import load_model
    from ads.trials import try_batches

    taught = take_subset(rows, cfg.one_step_samples, cfg.seed)
    holdout = read_parquet(cfg.holdout_traces)
    check_traces(cfg.holdout_traces, holdout, ids=("prompt_ids", "response_ids"))
    taught, holdout = (make_sequences(part, cfg.max_length) for part in (taught, holdout))
    if not holdout:
        raise UserError(f"{cfg.holdout_traces}: no response token within max_length={cfg.max_length}")
    print0(f"loading {cfg.proxy_student} for the one-step test")
    proxy = load_model(cfg.proxy_student, "float32", world.device, cfg.attn_implementation)
    try_batches(proxy, max(len(s.ids) for s in taught + holdout))
    return effects.one_step(proxy, taught, holdout, cfg.one_step, world)


def finish(cfg, inputs, stats, notes, seconds):
    """Registry, sidecar (last), and only then away with the parts."""
    entry = {"name": cfg.trace_name, "path": str(cfg.traces_path), "config": to_dict(cfg), "stats": stats}
    files.append_jsonl(layout.path_of("registry", cfg.exp_dir, "trace"), entry)
    outputs = [path for path in (cfg.parquet_path, cfg.contrast_path) if path.is_file()]
    write_sidecar(cfg.sidecar_path, to_dict(cfg), inputs, stats, seconds, outputs, **notes)
    shutil.rmtree(cfg.parts_dir)
    print_result(trace_name=cfg.trace_name, sidecar=str(cfg.sidecar_path), **stats)


if __name__ == "__main__":
    utils.run_script(main)
