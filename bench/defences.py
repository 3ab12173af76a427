"""Milliseconds per token of each defence and cap, in one run, with the engine that the stages use.

    python bench/defences.py MODEL_FOLDER --problems gsm8k_test.jsonl.gz --num 128 --batch 16 --threads 2

The model is teacher and proxy; Delta is along a random direction in factors of rank 16, which costs what a
gradient does. Prompts are problems in the model's chat template, or as they are where it has none; every
response has `--tokens` tokens. Each row of the table is the median over `--rounds` rounds, in which all take
turns, so that what else runs on the machine hits all alike. KL and NLL are those of the tokens sampled.
Reading the prompts is part of the time: of 128 problems and 32 tokens each it is most of it.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from decode_delta import random_gradient

from ads import chat
from ads.data.tables import read_lines
from ads.decode.cached_model import CachedModel
from ads.decode.engine import Models, generate
from ads.decode.rows import Request
from ads.defences import scores
from ads.delta.exact import ExactDerivative
from ads.delta.plain import PlainProxy
from ads.loading import load_model
from ads.sampling import Sampling

PLAIN = Sampling(0.6, 0.0, top_k=50, top_p=0.95)
# along a random direction it takes as much for KL to come to what the caps are about
ADS = dataclasses.replace(PLAIN, lam=20.0)
POE = dataclasses.replace(PLAIN, lam=0.3, score=scores.poe)
ARMS = {
    "temperature": PLAIN,
    "ads": ADS,
    "permuted": dataclasses.replace(ADS, score=scores.permuted),
    "poe": POE,
    "gated_poe": dataclasses.replace(POE, lam=0.1, score=scores.gated_poe),
    "contrastive": dataclasses.replace(POE, score=scores.contrastive),
    "ads, max_kl": dataclasses.replace(ADS, max_kl=0.05),
    "ads, keep_top1": dataclasses.replace(ADS, keep_top1=True),
    "ads, both": dataclasses.replace(ADS, max_kl=0.05, keep_top1=True),
    "poe, max_kl": dataclasses.replace(POE, max_kl=0.005),
    "poe, keep_top1": dataclasses.replace(POE, keep_top1=True),
}


def main():
    args = parse()
    torch.set_num_threads(args.threads)
    tokenizer = chat.load_tokenizer(args.model, need_chat_template=False)
    requests = make_requests(args, tokenizer)
    load = functools.partial(load_model, args.model, args.dtype, args.device)
    teacher = CachedModel(load())
    allowed_V = torch.ones(len(tokenizer), dtype=torch.bool, device=args.device)
    proxies = {"": None, "plain": PlainProxy(load(), allowed_V), "exact": exact(load(), allowed_V)}
    arms = {name: ARMS[name] for name in args.arms}
    found = {name: [] for name in arms}
    for number in range(1 + args.rounds):  # the first, of one batch, has what is done once: compiling, trials
        for name, settings in arms.items():
            kind = (
                ""
                if not settings.lam
                else "exact"
                if settings.score in (Sampling.score, scores.permuted)
                else "plain"
            )
            models = Models(teacher, proxies[kind], allowed_V, frozenset())
            if not number:
                measure(models, settings, requests[: args.batch], args.batch)
                continue
            found[name].append(measure(models, settings, requests, args.batch))
            print(f"{name}: {found[name][-1][0]:.2f} ms/token", file=sys.stderr, flush=True)
    table = {
        name: [round(statistics.median(column), 4) for column in zip(*rows, strict=True)]
        for name, rows in found.items()
    }
    base = table["ads" if "ads" in table else args.arms[0]][0]
    print(f"{'':16}{'ms/token':>10}{'of ads':>8}{'KL':>9}{'NLL':>9}")
    for name, (milliseconds, kl, nll) in table.items():
        print(f"{name:16}{milliseconds:10.2f}{milliseconds / base:8.2f}{kl:9.4f}{nll:9.4f}")
    print(json.dumps({**vars(args), "milliseconds": {name: row[0] for name, row in table.items()}}))


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--problems", required=True)
    parser.add_argument("--num", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def make_requests(args, tokenizer):
    rows = read_lines(Path(args.problems), lambda row: None)[: args.num]
    has_template = bool(tokenizer.chat_template)
    requests = []
    for i, row in enumerate(rows):
        text = row.get("question") or row["problem"]
        ids = chat.prompt_ids(tokenizer, text, ()) if has_template else chat.encode(tokenizer, text)
        requests.append(Request(str(i), list(ids), args.tokens))
    return requests


def exact(model, allowed_V):
    torch.manual_seed(0)
    gradients = {name: random_gradient(p.shape, 16) for name, p in model.named_parameters()}
    return ExactDerivative(model, gradients.__getitem__, allowed_V)


def measure(models, settings, requests, batch):
    """(milliseconds, KL, NLL) per token."""
    start = time.perf_counter()
    completions = list(generate(models, settings, 1, requests, batch))
    seconds, num_tokens = time.perf_counter() - start, sum(len(c.ids) for c in completions)
    kl = sum(c.price[0] for c in completions if c.price) / num_tokens
    nll = -sum(c.log_prob for c in completions) / num_tokens
    return 1e3 * seconds / num_tokens, kl, nll


if __name__ == "__main__":
    main()
