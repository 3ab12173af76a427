"""Teacher-forced log-probabilities and scores of ids that are given."""

import torch

from ads import sampling
from ads.decode.engine import Models, generate
from ads.decode.rows import Completion, Request

REPLAYED_TOKENS = 256  # at once: their logits over the vocabulary are held some ten times


@torch.inference_mode()
def replay(models, distribution, seed, request, response):
    """What was thought of a given response: a list of (clean, adjusted, score) per token; of models without
    a proxy (clean,).

    clean and adjusted are the token's probabilities under softmax(log p_T / tau) and under eq. 11, both
    before truncation; the score, such as Delta, is in nats. The response is read like a prompt, in chunks.
    """
    num_prompt_tokens, given = len(request.prompt_ids), response[:-1]
    models.allocate(1, num_prompt_tokens + len(given))
    read = [m.prefill([request.prompt_ids], 0) for m in models.both]
    judged = [judge(models, distribution, seed, request, response[:1], 0, *read)]
    for first in range(0, len(given), REPLAYED_TOKENS):
        ids, length = given[first : first + REPLAYED_TOKENS], num_prompt_tokens + first
        read = [m.extend(ids, length) for m in models.both]
        judged_ids = response[first + 1 : first + 1 + len(ids)]
        judged.append(judge(models, distribution, seed, request, judged_ids, first + 1, *read))
    return torch.cat(judged).tolist()


def judge(models, distribution, seed, request, ids, first, logits_TR, proxy_TV=None):
    """(clean probability, adjusted probability, score) of each of a row's tokens `first`, ..., (T, 3); the
    first alone, (T, 1), where no proxy gives anything."""
    log_probs_TV = sampling.log_probs(logits_TR, models.allowed_V)
    tokens_T = torch.tensor(ids, device=log_probs_TV.device)
    keys_T = torch.full_like(tokens_T, sampling.row_key(seed, request.id))
    steps_T = first + torch.arange(len(ids), device=keys_T.device)
    found = [sampling.adjust(log_probs_TV, None, distribution, keys_T, steps_T).log_q_BV.softmax(-1)]
    if proxy_TV is not None:
        adjusted = sampling.adjust(log_probs_TV, proxy_TV, distribution, keys_T, steps_T)
        found += [adjusted.log_q_BV.softmax(-1), adjusted.score_BV]
    index_T1 = tokens_T[:, None]
    return torch.cat([values.gather(1, index_T1) for values in found], dim=1)


@torch.inference_mode()
def complete(models, seed, requests, responses, forcing, batch_size):
    """Yield a Completion per request whose response (ids) is given: its log-probability, and with Forcing the
    ids that follow it and the teacher's greedy ones after those."""
    given = {}
    if forcing:
        given = {r.id: forcing.ids_of(r, ids) for r, ids in zip(requests, responses, strict=True)}
    forced = force_after(models, seed, requests, responses, given, forcing, batch_size) if forcing else {}
    for request, ids in zip(requests, responses, strict=True):
        log_prob = log_prob_of(models, request, ids)
        is_finished = ids[-1] in models.eos
        yield Completion(
            request.id, ids, is_finished, log_prob, None, given.get(request.id), forced.get(request.id)
        )


def force_after(models, seed, requests, responses, given, forcing, batch_size):
    """{id: greedy ids} after each response, less its eos, and the ids given after it."""
    plain = Models(models.teacher, None, models.allowed_V, models.eos)
    longer = []
    for request, ids in zip(requests, responses, strict=True):
        kept = ids[:-1] if ids[-1] in models.eos else ids
        longer.append(
            Request(request.id, request.prompt_ids + kept + given[request.id], forcing.max_new_tokens)
        )
    return {c.id: c.ids for c in generate(plain, sampling.GREEDY, seed, longer, batch_size)}


def log_prob_of(models, request, ids):
    """The sum of log p_T (nats) of a response."""
    models.teacher.allocate(1, len(request.prompt_ids) + len(ids))
    logits = [models.teacher.prefill([request.prompt_ids], 0)]
    for first in range(0, len(ids) - 1, REPLAYED_TOKENS):
        chunk = ids[first : min(first + REPLAYED_TOKENS, len(ids) - 1)]
        logits.append(models.teacher.extend(chunk, len(request.prompt_ids) + first))
    total, first = 0.0, 0
    for logits_TR in logits:
        tokens_T1 = torch.tensor(ids[first : first + len(logits_TR)], device=logits_TR.device)[:, None]
        total += sampling.log_probs(logits_TR, models.allowed_V).gather(1, tokens_T1).sum().item()
        first += len(logits_TR)
    return total
