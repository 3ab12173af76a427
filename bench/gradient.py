"""Tokens per second of the proxy gradient in batches of like lengths, beside a plain loop over the traces.

    python bench/gradient.py MODEL_FOLDER gsm8k_train.jsonl.gz --traces 300 --runs 3 --ways 8 8:bfloat16

Reads question and answer of the first rows as traces. The plain loop is model(input_ids, labels).loss
.backward() on one trace at a time, float32. A way is BATCH_SIZE[:DTYPE]. All take turns in each run; medians,
ranges, and how far each gradient is from the plain loop's. Tokens are those of the traces, without padding.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from delta_agreement import read_sequences

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ads import gradient
from ads.models import load_model


def main():
    args = parse()
    torch.set_num_threads(args.threads)
    model = load_model(args.model, "float32", "cpu")
    sequences = read_sequences(args)
    ways = ["plain", *args.ways]
    rates, errors = {way: [] for way in ways}, {}
    num_tokens = sum(len(s.ids) for s in sequences)
    for _ in range(args.runs):
        for way in ways:
            model.zero_grad()
            start = time.perf_counter()
            run(model, sequences, args, way)
            rates[way].append(num_tokens / (time.perf_counter() - start))
            if way == "plain":
                wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
            else:
                errors[way] = compare(model, wanted)
    settings = {key: vars(args)[key] for key in ("model", "traces", "threads", "batch_tokens")}
    table = [describe(way, rates, errors, sequences, args) for way in ways]
    for row in table:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    print(json.dumps({**settings, "tokens": num_tokens, "ways": table}))


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--traces", type=int, default=300)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch_tokens", type=int, default=4096)
    parser.add_argument("--ways", nargs="+", default=["8"])
    return parser.parse_args()


def run(model, sequences, args, way):
    if way == "plain":
        add_plainly_(model, sequences)
    else:
        gradient.add_gradient_(
            model, sequences, len(sequences), batch_size(way), iter, args.batch_tokens, dtype(way)
        )


def batch_size(way):
    return int(way.split(":")[0])


def dtype(way):
    return way.split(":")[1] if ":" in way else "float32"


def add_plainly_(model, sequences):
    for s in sequences:
        ids_1T = torch.tensor([s.ids])
        labels_1T = ids_1T.clone()
        labels_1T[0, : s.num_prompt_tokens] = -100
        loss = model(input_ids=ids_1T, labels=labels_1T, use_cache=False).loss
        (loss / len(sequences)).backward()


def compare(model, wanted):
    """{relative error, cosine} of the model's gradient."""
    products = torch.zeros(3, dtype=torch.float64)
    difference = 0.0
    for name, p in model.named_parameters():
        found, other = p.grad.double(), wanted[name].double()
        difference += (found - other).square().sum().item()
        products += torch.stack([(found * other).sum(), found.square().sum(), other.square().sum()])
    dot, square, other_square = products.tolist()
    return {
        "relative_error": f"{(difference / other_square) ** 0.5:.2g}",
        "cosine": round(dot / (square * other_square) ** 0.5, 7),
    }


def describe(way, rates, errors, sequences, args):
    ratios = [rate / plain for rate, plain in zip(rates[way], rates["plain"], strict=True)]
    found = {"way": way, "tokens_per_second": spread(rates[way], 0), "over_plain": spread(ratios, 2)}
    if way == "plain":
        return found
    batches = gradient.make_batches(sequences, batch_size(way), args.batch_tokens)
    padded = sum(len(batch) * max(len(s.ids) for s in batch) for batch in batches)
    padding = 1 - sum(len(s.ids) for s in sequences) / padded
    return found | {"batches": len(batches), "padding": round(padding, 4)} | errors[way]


def spread(values, digits):
    """Median, and range in brackets."""
    median, low, high = (round(f(values), digits) for f in (statistics.median, min, max))
    return f"{median:g} ({low:g}-{high:g})"


if __name__ == "__main__":
    main()
