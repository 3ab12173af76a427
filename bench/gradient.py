"""Tokens per second of the proxy gradient in batches of like lengths, beside a plain loop over the traces.

    python bench/gradient.py MODEL_FOLDER gsm8k_train.jsonl.gz --traces 300 --runs 3 --ways 8 8:bfloat16

Reads question and answer of the first rows as traces. The plain loop is model(input_ids, labels).loss
.backward() on one trace at a time, float32. A way is BATCH_SIZE[:DTYPE], through ads.gradient as in
save_grad.py, or `float64`, the plain loop in which nothing is float32 (slow; to compare with). The ways have
a process each and take turns on every CHUNK traces of like lengths, so that what else runs on the machine
hits all alike. Medians and ranges of the runs, how far each gradient is from the plain loop's, and how far
from that of the first way. Tokens are those of the traces, without padding.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from delta_agreement import read_sequences
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ads import cpu
from ads.delta import gradient
from ads.delta.loss import make_batches
from ads.loading import load_model

CHUNK = 32
LOOPS = "plain", "float64"
context = multiprocessing.get_context("spawn")


def main():
    args = parse()
    ways = ["plain", *args.ways]
    sequences = sorted(read_sequences(args), key=lambda s: len(s.ids))
    num_tokens = sum(len(s.ids) for s in sequences)
    rates = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        paths = {way: Path(folder) / way.replace(":", "-") for way in ways}
        workers = {way: start(args, way) for way in ways}
        for _ in range(args.runs):
            seconds = measure(workers, sequences)
            for way in ways:
                rates[way].append(num_tokens / seconds[way])
            print({way: round(found[-1], 1) for way, found in rates.items()}, flush=True)
        for way, worker in workers.items():
            worker.send(paths[way])
            worker.recv()
            worker.send("end")
        table = [describe(way, rates, paths, sequences, args) for way in ways]
    for row in table:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    settings = {key: vars(args)[key] for key in ("model", "traces", "threads", "batch_tokens")}
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


def start(args, way):
    """The connection to a process of its own (see `work`)."""
    ours, theirs = context.Pipe()
    context.Process(target=work, args=(theirs, args, way), daemon=True).start()
    return ours


def work(connection, args, way):
    """Answer (sequences, number of all) by seconds for their share of the gradient, None by a new gradient,
    and a path by the gradient in a file."""
    torch.set_num_threads(args.threads)
    model = load_model(args.model, "float32", "cpu")
    if way == "float64":
        model = in_float64(model)
    elif way != "plain":
        cpu.keep_freed_memory("cpu")
    while (found := connection.recv()) != "end":
        start = time.perf_counter()
        if found is None:
            model.zero_grad()
        elif isinstance(found, Path):
            save_file({name: p.grad for name, p in model.named_parameters()}, found)
        else:
            add_(model, *found, way, args.batch_tokens)
        connection.send(time.perf_counter() - start)


def in_float64(model):
    """The model in float64, and what models compute in float32 whatever their weights, such as norms."""
    torch.Tensor.float = torch.Tensor.double
    torch.float = torch.float32 = torch.float64
    return model.double()


def measure(workers, sequences):
    """{way: seconds for the gradient, which is left in its process}."""
    seconds = dict.fromkeys(workers, 0.0)
    for worker in workers.values():
        worker.send(None)
        worker.recv()
    for first in range(0, len(sequences), CHUNK):
        for way, worker in workers.items():
            worker.send((sequences[first : first + CHUNK], len(sequences)))
            seconds[way] += worker.recv()
    return seconds


def add_(model, sequences, num_total, way, batch_tokens):
    if way in LOOPS:
        add_plainly_(model, sequences, num_total)
    else:
        size, kind = batch_size(way), dtype(way)
        gradient.add_gradient_(model, sequences, num_total, size, batch_tokens=batch_tokens, dtype=kind)


def batch_size(way):
    return int(way.split(":")[0])


def dtype(way):
    return way.split(":")[1] if ":" in way else "float32"


def add_plainly_(model, sequences, num_total):
    for s in sequences:
        ids_1T = torch.tensor([s.ids])
        labels_1T = ids_1T.clone()
        labels_1T[0, : s.num_prompt_tokens] = -100
        loss = model(input_ids=ids_1T, labels=labels_1T, use_cache=False).loss
        (loss / num_total).backward()


def describe(way, rates, paths, sequences, args):
    ratios = [rate / plain for rate, plain in zip(rates[way], rates["plain"], strict=True)]
    found = {"way": way, "tokens_per_second": spread(rates[way], 0), "over_plain": spread(ratios, 2)}
    found |= compare(paths[way], paths["plain"])
    found["relative_error_to_first"] = compare(paths[way], paths[args.ways[0]])["relative_error"]
    if way in LOOPS:
        return found
    chunks = [sequences[first : first + CHUNK] for first in range(0, len(sequences), CHUNK)]
    batches = [b for chunk in chunks for b in make_batches(chunk, batch_size(way), args.batch_tokens)]
    padded = sum(len(batch) * max(len(s.ids) for s in batch) for batch in batches)
    padding = 1 - sum(len(s.ids) for s in sequences) / padded
    return found | {"batches": len(batches), "padding": round(padding, 4)}


def compare(path, plain_path):
    """{relative error, cosine} of the gradient in a file."""
    dot = square = plain_square = difference = 0.0
    gradients, plain = load_file(path), load_file(plain_path)
    for name in plain:
        found, wanted = gradients[name].double(), plain[name].double()
        dot += (found * wanted).sum().item()
        square += found.square().sum().item()
        plain_square += wanted.square().sum().item()
        difference += (found - wanted).square().sum().item()
    return {
        "relative_error": f"{(difference / plain_square) ** 0.5:.2g}",
        "cosine": round(dot / (square * plain_square) ** 0.5, 7),
    }


def spread(values, digits):
    """Median, and range in brackets."""
    median, low, high = (round(f(values), digits) for f in (statistics.median, min, max))
    return f"{median:g} ({low:g}-{high:g})"


if __name__ == "__main__":
    main()
