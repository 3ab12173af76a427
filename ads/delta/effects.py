"""What a trace dataset tells about antidistillation besides its accuracy.

The one-step test: does a step of gradient descent on the traces lower the proxy's holdout loss (as clean
traces do) or raise it (as Delta promises, to first order)? The contrasts: for a few problems the clean trace
beside the defended one, both drawn with the same random numbers, and what the defence did to each token.
"""

import dataclasses

import torch

from ads import chat, sampling
from ads.decode.engine import Models, generate
from ads.decode.replay import replay
from ads.decode.rows import Request
from ads.delta import gradient
from ads.delta.loss import mean_loss

BATCH = {"batch_size": 64, "batch_tokens": 2048}  # at most, of the proxy's forward and backward pass


def one_step(model, taught, holdout, step_length, world):
    """{n, step_length, loss_before, loss_after, change} of the holdout loss (nats/token) of a float32 model.

    taught, holdout: loss.Sequence lists. The model is changed: one step of descent along the gradient of
    the mean loss on `taught`, step_length long whatever the gradient's norm.
    """
    ours = taught[world.rank :: world.size], holdout[world.rank :: world.size]
    before = world.sum(mean_loss(model, ours[1], len(holdout), **BATCH))
    gradient.add_gradient_(model, ours[0], len(taught), **BATCH)
    if world.size > 1:
        gradient.all_reduce_(model)
    gradient.descend_(model, step_length)
    after = world.sum(mean_loss(model, ours[1], len(holdout), **BATCH))
    losses = {"loss_before": before, "loss_after": after, "change": after - before}
    return {"n": len(taught), "step_length": step_length, **{k: round(v, 6) for k, v in losses.items()}}


def contrasts(models, distribution, seed, tokenizer, rows, grade, num_slots):
    """Per row {id, problem, solution, clean, defended}: two traces with the probabilities of each token.

    rows: dicts with id, problem, solution, prompt_ids, response_ids, finished, max_new_tokens; grade(row,
    text) says whether a response is correct. Each side: {finished, is_correct, tokens, replaced}, a token
    being [text, clean probability, probability with the score, score (nats; Delta's per unit of g)], without
    a proxy [text, clean probability]; replaced: the places of those put there by a corruption.
    """
    plain = Models(models.teacher, None, models.allowed_V, models.eos)
    clean_distribution = dataclasses.replace(distribution, lam=0.0)
    requests = [Request(row["id"], row["prompt_ids"], row["max_new_tokens"]) for row in rows]
    completions = {c.id: c for c in generate(plain, clean_distribution, seed, requests, num_slots)}
    found = []
    for row, request in zip(rows, requests, strict=True):
        clean = completions[row["id"]]
        sides = {"clean": (clean.ids, clean.finished), "defended": (row["response_ids"], row["finished"])}
        problem = {key: row[key] for key in ("id", "problem", "solution")}
        for side, (ids, finished) in sides.items():
            is_correct = grade(row, chat.response_text(tokenizer, ids, models.eos))
            judged = replay(models, distribution, seed, request, ids)
            tokens = describe_tokens(tokenizer, ids, judged)
            problem[side] = {"finished": finished, "is_correct": is_correct, "tokens": tokens, "replaced": []}
        if models.corruption:
            key = torch.tensor(sampling.row_key(seed, row["id"]))
            problem["defended"]["replaced"] = models.corruption.places(row["response_ids"], key)
        found.append(problem)
    return found


def describe_tokens(tokenizer, ids, values):
    """[text, *values to 4 digits] of each token; the texts put together are the response."""
    texts = chat.token_texts(tokenizer, ids)
    return [[text, *(float(f"{v:.4g}") for v in row)] for text, row in zip(texts, values, strict=True)]
