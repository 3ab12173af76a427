"""How well each way to compute Delta agrees with the exact one (float32, full gradient), on a real model.

    python bench/delta_agreement.py MODEL_FOLDER gsm8k_train.jsonl.gz --traces 48 --diagnosed 6

Reads question and answer of the first rows as holdout traces. Prints a table per dtype, and one JSON line
that has besides: rank 0 in float32 against torch.func.jvp, the score identity, the cost of compression.
"""

import argparse
import functools
import gzip
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ads.delta import agreement, agreement_table, gradient
from ads.delta.loss import Sequence
from ads.loading import load_model
from ads.stage.settings import GradConfig

DTYPES = ("float32", "bfloat16")


def main():
    args = parse()
    model = load_model(args.model, "float32", "cpu")
    sequences = read_sequences(args)
    start = time.time()
    gradient.add_gradient_(model, sequences[::2], len(sequences), 1)
    half = gradient.compress(model, 16, 0, is_share=True)
    gradient.add_gradient_(model, sequences[1::2], len(sequences), 1)
    result = {
        "model": Path(args.model).name,
        "traces": len(sequences),
        "gradient_seconds": time.time() - start,
    }
    for rank in args.ranks:
        start = time.time()
        compressed = gradient.compress(model, rank, 0)
        result[f"compression_seconds_{rank}"] = time.time() - start
        for dtype in DTYPES:
            cfg = GradConfig(proxy_student=args.model, proxy_dtype=dtype, grad_rank=rank)
            found = agreement.diagnose(cfg, model, compressed, half, sequences[: args.diagnosed])
            result[f"{dtype}_rank_{rank}"] = found
            print(*agreement_table.table(found, 0), "", sep="\n", flush=True)
    result |= check_identities(model, sequences[0])
    print(json.dumps(result))


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--traces", type=int, default=48)
    parser.add_argument("--diagnosed", type=int, default=6)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16])
    return parser.parse_args()


def read_sequences(args):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with gzip.open(args.data, "rt") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(args.traces), strict=False)]
    sequences = []
    for row in rows:
        prompt = tokenizer(row["question"] + "\n").input_ids
        response = tokenizer(row["answer"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        sequences.append(Sequence(prompt + response, len(prompt)))
    return sequences


def check_identities(model, sequence):
    """Relative error against torch.func.jvp, and the largest |sum over x of p(x) Delta(x)|, on one trace."""
    g = {name: p.grad for name, p in model.named_parameters()}
    delta_PV, log_probs_PV = agreement.exact(agreement.twin(model), g.__getitem__, [sequence])
    weights = {name: p.detach() for name, p in model.named_parameters()}
    model.set_attn_implementation("eager")
    wanted_PV = torch.func.jvp(functools.partial(log_probs, model, sequence), (weights,), (g,))[1]
    return {
        "jvp_relative_error": ((delta_PV - wanted_PV).norm() / wanted_PV.norm()).item(),
        "score_identity": (log_probs_PV.exp() * delta_PV).sum(-1).abs().max().item(),
    }


def log_probs(model, sequence, weights):
    """Log-probabilities (P, V) at the sequence's positions as a function of the weights."""
    inputs = {"input_ids": torch.tensor([sequence.ids]), "use_cache": False}
    logits_TV = torch.func.functional_call(model, weights, (), inputs).logits[0]
    return torch.log_softmax(logits_TV[agreement.places(sequence, "cpu")], -1)


if __name__ == "__main__":
    main()
