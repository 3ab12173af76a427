"""Useful tokens per second of trace generation: ours, and the way of transformers' generate().

    python bench/decode.py models/smollm2 --data_dir data --num 128 --batch 16 --max_length 384 --threads 2
    python bench/decode.py demo/models/teacher --proxy demo/models/proxy --data_split arithmetic_test \\
        --num 600 --batch 300 --max_length 200 --lam 8 --threads 1

The peer decodes batches of padded prompts with generate() and, for ADS, a logits processor that runs two
perturbed proxies with caches of their own (the reference's design). `ads` is our default, the exact
derivative in one proxy; `ads_central` has the peer's two proxies, so its traces must be the peer's. The
gradient comes from a few answers of the holdout split. A token is useful when it belongs to a trace. Each way
runs in a process of its own; loading is not timed. The ways take turns in each of --rounds rounds.

The floor of a run: each weight and cache byte read once per step at the measured bandwidth, or the products
at the measured rate where those take longer; and the products of the prompts.
"""

import argparse
import functools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import machine

from ads import chat, sampling
from ads.data.problems import load_problems
from ads.decode import engine
from ads.decode.cached_model import CachedModel
from ads.decode.rows import Request
from ads.delta import gradient, gradient_file
from ads.delta.central import CentralDifference, perturb_
from ads.delta.exact import ExactDerivative
from ads.delta.loss import Sequence
from ads.loading import load_model

WAYS = ("plain", "ads", "ads_central", "peer_plain", "peer_ads")


@dataclass(frozen=True)
class Step:
    """What one decoding step took: seconds, rows decoded, tokens those rows had in their caches."""

    seconds: float
    num_rows: int
    num_cached: int


def main():
    args = parse()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        args.grad_path = str(Path(folder) / "g.safetensors")
        with context.Pool(1) as pool:
            machine_figures = pool.apply(prepare, (args,))
        rounds = []
        for _ in range(args.rounds):
            found = {}
            for way in args.ways:
                with context.Pool(1) as pool:
                    found[way] = pool.apply(run, (args, way, machine_figures))
                print(
                    way, {k: v for k, v in found[way].items() if k != "traces"}, file=sys.stderr, flush=True
                )
            rounds.append(found)
    summary = {way: summarise([found[way] for found in rounds]) for way in args.ways}
    print(*table(summary), sep="\n")
    equal = {
        f"{ours}={peer}": share_equal(rounds[0][ours]["traces"], rounds[0][peer]["traces"])
        for ours, peer in (("plain", "peer_plain"), ("ads_central", "peer_ads"), ("ads", "peer_ads"))
        if ours in args.ways and peer in args.ways
    }
    settings = {key: value for key, value in vars(args).items() if key not in ("grad_path", "ways")}
    versions = {"torch": torch.__version__, "transformers": __import__("transformers").__version__}
    print(json.dumps({**settings, **versions, **machine_figures, "ways": summary, "share_equal": equal}))


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher")
    parser.add_argument("--proxy", help="the teacher unless given")
    parser.add_argument("--data_split", default="gsm8k_test")
    parser.add_argument("--data_dir")
    parser.add_argument("--num", type=int, default=128, help="problems")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max_length", type=int, default=384)
    parser.add_argument("--lam", type=float, default=0.002)
    parser.add_argument("--eps", type=float, default=1e-3, help="of the central difference")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    args = parser.parse_args()
    args.proxy = args.proxy or args.teacher
    return args


def prepare(args):
    """Write the gradient of a few answers of the holdout split; bandwidth and rate of the machine."""
    torch.set_num_threads(args.threads)
    tokenizer = chat.load_tokenizer(args.teacher)
    holdout = args.data_split.rpartition("_")[0] + "_holdout"
    problems = load_problems(holdout, args.data_dir, 8)
    sequences = []
    for problem in problems:
        prompt = chat.prompt_ids(tokenizer, problem["problem"])
        response = [*chat.encode_next(tokenizer, problem["solution"]), tokenizer.eos_token_id]
        sequences.append(Sequence(prompt + response, len(prompt)))
    model = load_model(args.proxy, "float32", args.device)
    gradient.add_gradient_(model, sequences, len(sequences), 1)
    gradient_file.save(args.grad_path, gradient.compress(model, 16, 0), {"proxy_fingerprint": "-"})
    figures = machine.bandwidth(args.device), machine.rate(getattr(torch, args.dtype), args.device)
    return dict(zip(("bytes_per_second", "operations_per_second"), figures, strict=True))


def run(args, way, figures):
    """What one way took: seconds, traces and steps, peak memory (MB) above what the imports take."""
    torch.set_num_threads(args.threads)
    tokenizer = chat.load_tokenizer(args.teacher)
    problems = load_problems(args.data_split, args.data_dir, args.num)[: args.num]
    prompts = {p["id"]: chat.prompt_ids(tokenizer, p["problem"]) for p in problems}
    base = 0 if args.device == "cuda" else machine.peak_megabytes(args.device)
    decode = load_peer(args, way) if way.startswith("peer") else load_ours(args, way)
    start = time.perf_counter()
    traces, steps = decode(prompts, chat.eos_ids(tokenizer, decode.args[0]))
    machine.synchronize(args.device)
    seconds = time.perf_counter() - start
    num_tokens = sum(map(len, traces.values()))
    floor = floor_seconds(args, way, decode.args[0], prompts, steps, figures)
    return {
        "tokens_per_second": num_tokens / seconds,
        "ms_per_step": 1e3 * statistics.median(step.seconds for step in steps),
        "useful_share": num_tokens / (sum(step.num_rows for step in steps) + len(traces)),
        "share_of_floor": floor / seconds,
        "peak_megabytes": machine.peak_megabytes(args.device) - base,
        "seconds": seconds,
        "num_tokens": num_tokens,
        "traces": traces,
    }


def load_ours(args, way):
    """decode(prompts, eos) -> ({id: ids}, steps) through ads.engine, its first argument the teacher bound."""
    file = gradient_file.open_checked(Path(args.grad_path), "-")
    read_gradient = functools.partial(gradient_file.read, file)
    delta, num_rows = None, None
    if way != "plain":
        models = [load_model(args.proxy, args.dtype, args.device) for _ in range(1 + (way == "ads_central"))]
        num_rows = models[0].get_input_embeddings().weight.shape[0]
    teacher = load_model(args.teacher, args.dtype, args.device)
    allowed_V = torch.ones(num_rows or teacher.config.vocab_size, dtype=torch.bool, device=args.device)
    if way == "ads":
        delta = ExactDerivative(models[0], read_gradient, allowed_V)
    elif way == "ads_central":
        perturb_(*models, read_gradient, args.eps)
        delta = CentralDifference(*models, args.eps, allowed_V)
    settings = teacher, CachedModel(teacher), delta, allowed_V, args
    return functools.partial(decode_ours, *settings, cuda_graph=args.device == "cuda")


def decode_ours(model, teacher, delta, allowed_V, args, prompts, eos, limits=None, cuda_graph=False):
    """limits: {id: most new tokens}; None: what max_length leaves."""
    models = engine.Models(teacher, delta, allowed_V, frozenset(eos))
    limits = limits or dict(zip(prompts, max_new_tokens(list(prompts.values()), args), strict=True))
    requests = [Request(i, ids, limits[i]) for i, ids in prompts.items()]
    rule = sampling.Sampling(0.0, args.lam if delta else 0.0)
    timed = TimedDecoder.steps = []
    engine.Decoder = TimedDecoder
    traces = {
        c.id: c.ids for c in engine.generate(models, rule, 0, requests, args.batch, cuda_graph=cuda_graph)
    }
    return traces, timed


def max_new_tokens(prompts, args):
    """Tokens each row may get: the peer's max_length counts the padding of the row's batch, so ours does."""
    batches = [prompts[first : first + args.batch] for first in range(0, len(prompts), args.batch)]
    return [args.max_length - max(map(len, batch)) for batch in batches for _ in batch]


class TimedDecoder(engine.Decoder):
    steps = []

    def step(self):
        num_rows, cached = len(self.active), sum(row.num_cached for row in self.active)
        start = time.perf_counter()
        ended = list(super().step())
        self.steps.append(Step(time.perf_counter() - start, num_rows, cached))
        return ended


def load_peer(args, way):
    """As load_ours, through generate()."""
    teacher, processor = load_model(args.teacher, args.dtype, args.device), Peer()
    if way == "peer_ads":
        file = gradient_file.open_checked(Path(args.grad_path), "-")
        pair = [load_model(args.proxy, args.dtype, args.device) for _ in range(2)]
        perturb_(*pair, functools.partial(gradient_file.read, file), args.eps)
        processor = PeerDelta(pair, args.eps, args.lam)
    return functools.partial(decode_peer, teacher, processor, args)


@torch.inference_mode()
def decode_peer(teacher, processor, args, prompts, eos, limits=None):
    """limits: {id: most new tokens}, at which a row stops as at an eos."""
    ids, traces, steps = list(prompts), {}, []
    for first in range(0, len(ids), args.batch):
        batch = [prompts[i] for i in ids[first : first + args.batch]]
        width = max(map(len, batch))
        ids_BT = torch.tensor([[0] * (width - len(p)) + p for p in batch], device=args.device)
        mask_BT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=args.device)
        processor.begin(mask_BT)
        of_batch = [limits[i] for i in ids[first : first + args.batch]] if limits else []
        stop = [Limits(width + torch.tensor(of_batch, device=args.device))] if limits else []
        found_BT = teacher.generate(
            ids_BT, attention_mask=mask_BT, do_sample=False, max_length=args.max_length,
            eos_token_id=sorted(eos), pad_token_id=0, logits_processor=[processor], stopping_criteria=stop,
        )  # fmt: skip
        for k, row in enumerate(found_BT[:, width:].tolist()):
            end = next((n for n, token in enumerate(row, 1) if token in eos), len(row))
            traces[ids[first + k]] = row[: min(end, limits[ids[first + k]])] if limits else row[:end]
        stamps = processor.stamps
        for n in range(1, len(stamps)):
            cached = sum(map(len, batch)) + n * len(batch)
            steps.append(Step(stamps[n] - stamps[n - 1], len(batch), cached))
    return traces, steps


class Limits:
    """A stopping criterion: rows end at lengths of their own, prompts and padding included."""

    def __init__(self, lengths_B):
        self.lengths_B = lengths_B

    def __call__(self, ids_BT, scores, **others):
        return ids_BT.shape[1] >= self.lengths_B


class Peer:
    """A logits processor that leaves the logits alone and notes when it is called."""

    def begin(self, mask_BT):
        self.stamps = []

    def __call__(self, ids_BT, logits_BV):
        self.stamps.append(time.perf_counter())
        return logits_BV


class PeerDelta(Peer):
    """log p_T + lam * Delta by two perturbed proxies, each with a cache of its own."""

    def __init__(self, pair, eps, lam):
        self.pair, self.eps, self.lam = pair, eps, lam

    def begin(self, mask_BT):
        from transformers import DynamicCache

        super().begin(mask_BT)
        self.mask_BT, self.caches = mask_BT, [DynamicCache() for _ in self.pair]

    def __call__(self, ids_BT, logits_BV):
        is_first = not self.stamps
        if not is_first:
            self.mask_BT = torch.cat([self.mask_BT, torch.ones_like(self.mask_BT[:, :1])], dim=1)
            ids_BT = ids_BT[:, -1:]
        positions_BT = (self.mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
        log_probs = []
        for model, cache in zip(self.pair, self.caches, strict=True):
            output = model(
                input_ids=ids_BT, attention_mask=self.mask_BT, position_ids=positions_BT,
                past_key_values=cache, use_cache=True, logits_to_keep=1,
            )  # fmt: skip
            log_probs.append(torch.log_softmax(output.logits[:, -1].float(), -1))
        delta_BV = (log_probs[0] - log_probs[1]) / (2 * self.eps)
        super().__call__(ids_BT, logits_BV)
        # the proxy may have fewer rows of its table than the teacher: what it has not cannot be sampled
        scores_BV = torch.log_softmax(logits_BV.float(), -1)
        scores_BV[:, delta_BV.shape[1] :] = -torch.inf
        scores_BV[:, : delta_BV.shape[1]] += self.lam * delta_BV[:, : scores_BV.shape[1]]
        return scores_BV


def floor_seconds(args, way, teacher, prompts, steps, figures):
    """Seconds that the run's weights, caches and products take at the machine's bandwidth and rate."""
    matrices = [p for p in teacher.parameters() if p.dim() == 2]
    if not teacher.config.tie_word_embeddings:
        matrices = matrices[1:]  # the table is read by rows
    num_weights, size = sum(p.numel() for p in matrices), matrices[0].element_size()
    config = teacher.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached_bytes = 2 * size * config.num_hidden_layers * config.num_key_value_heads * width
    # (models' weights read, rows and caches of each): the exact derivative has twice the rows of one model
    models = {"plain": [1], "peer_plain": [1], "ads": [1, 2]}.get(way, [1, 1, 1])
    seconds = 0.0
    for copies in models:
        operations = 2 * copies * num_weights
        seconds += sum(map(len, prompts.values())) * operations / figures["operations_per_second"]
        for step in steps:
            read, computed = num_weights * size, step.num_rows * operations
            cache = copies * step.num_cached * cached_bytes / figures["bytes_per_second"]
            products = read / figures["bytes_per_second"], computed / figures["operations_per_second"]
            seconds += max(products) + cache
    return seconds


def summarise(runs):
    """{figure: median}, and the range of tokens per second."""
    figures = [key for key in runs[0] if key != "traces"]
    medians = {key: round(statistics.median(run[key] for run in runs), 3) for key in figures}
    speeds = sorted(run["tokens_per_second"] for run in runs)
    return {**medians, "tokens_per_second_range": [round(speeds[0], 2), round(speeds[-1], 2)]}


def table(summary):
    yield f"{'':12} useful tokens/s      (range)   ms/step  useful  of floor   peak MB"
    for way, found in summary.items():
        low, high = found["tokens_per_second_range"]
        yield (
            f"{way:12} {found['tokens_per_second']:15.1f} {f'({low:.1f}-{high:.1f})':>12} "
            f"{found['ms_per_step']:9.1f} {found['useful_share']:7.3f} {found['share_of_floor']:9.2f} "
            f"{found['peak_megabytes']:9.0f}"
        )


def share_equal(ours, theirs):
    return round(sum(ours[i] == theirs[i] for i in ours) / len(ours), 4)


if __name__ == "__main__":
    main()
