"""What a trace dataset tells about antidistillation besides its accuracy.

The one-step test: does a step of gradient descent on the traces lower the proxy's holdout loss (as clean
traces do) or raise it (as Delta promises, to first order)? The contrasts: for a few problems the clean trace
beside the ADS one, both drawn with the same random numbers, and what Delta did to each token.
"""

import dataclasses

from ads import chat
from ads.decode.engine import Models, Request, generate
from ads.decode.replay import replay
from ads.delta import gradient
from ads.delta.loss import mean_loss

BATCH = {"batch_size": 64, "batch_tokens": 2048}  # at most, of the proxy's forward and backward pass


def one_step(model, taught, holdout, step_length, world):
    """{n, step_length, loss_before, loss_after, change} of the holdout loss (nats/token) of a float32 model.

    taught, holdout: gradient.Sequence lists. The model is changed: one step of descent along the gradient of
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


def contrasts(models, rule, seed, tokenizer, rows, grade, num_slots):
    """Per row {id, problem, solution, clean, ads}: two traces with what the rule thought of each token.

    rows: dicts with id, problem, solution, prompt_ids, response_ids, finished, max_new_tokens; grade(row,
    text) says whether a response is correct. Each side: {finished, is_correct, tokens}, a token being [text,
    clean probability, probability with Delta, Delta (nats per unit of g)].
    """
    plain = Models(models.teacher, None, models.allowed_V, models.eos)
    clean_rule = dataclasses.replace(rule, lam=0.0)
    requests = [Request(row["id"], row["prompt_ids"], row["max_new_tokens"]) for row in rows]
    completions = {c.id: c for c in generate(plain, clean_rule, seed, requests, num_slots)}
    clean = [(completions[row["id"]].ids, completions[row["id"]].finished) for row in rows]
    ads = [(row["response_ids"], row["finished"]) for row in rows]
    sides = {}
    for name, responses in (("clean", clean), ("ads", ads)):
        judged = [replay(models, rule, seed, r, ids) for r, (ids, _) in zip(requests, responses, strict=True)]
        texts = [chat.response_text(tokenizer, ids, models.eos) for ids, _ in responses]
        sides[name] = [
            {
                "finished": finished,
                "is_correct": grade(row, text),
                "tokens": describe_tokens(tokenizer, ids, values),
            }
            for row, text, (ids, finished), values in zip(rows, texts, responses, judged, strict=True)
        ]
    return [
        {key: row[key] for key in ("id", "problem", "solution")} | dict(zip(sides, pair, strict=True))
        for row, *pair in zip(rows, *sides.values(), strict=True)
    ]


def describe_tokens(tokenizer, ids, values):
    """[text, *values to 4 digits] of each token; the texts put together are the response."""
    texts = chat.token_texts(tokenizer, ids)
    return [[text, *(float(f"{v:.4g}") for v in row)] for text, row in zip(texts, values, strict=True)]
