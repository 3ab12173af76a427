"""Whether a model computes what it should: tried on a few tokens, before hours are spent on it."""

import functools
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ads.dual.rules import Dual
from ads.stage import errors
from ads.stage.errors import UserError

TRIED = 24  # tokens of a row that caches and derivatives are tried with
NUM_SHORT = 9  # tokens of the shorter of two rows
MOST_ATTEMPTS = 3  # with other ids, in 16 bits; two of them decide


def tried_ids(model, number: int, attempt: int = 0) -> list[int]:
    """Token ids to try a model with, others in each attempt. None is the padding's, which backpropagation
    leaves out."""
    table = model.get_input_embeddings()
    ids = ((torch.arange(2 * number + 1) + 101 * attempt) * 7919 % len(table.weight)).tolist()
    return [i for i in ids if i != getattr(table, "padding_idx", None)][:number]


def holds(is_right_at: Callable[[int], bool], dtype: torch.dtype) -> bool:
    """Whether is_right_at(attempt) is true: of the first; in 16 bits also of two of three, each with other
    ids.

    There rounding alone may look like a flaw. By how much logits differ hangs on the ids: SmolLM2-135M in
    bfloat16 by .015 to .08 of their size over 16 rows on a CPU; of some hundred trained ones on an H100 one
    was refused, at any length.
    """
    found = [is_right_at(0)]
    while dtype != torch.float32 and 0 < found.count(False) < 2 and len(found) < MOST_ATTEMPTS:
        found.append(is_right_at(len(found)))
    return found.count(True) > found.count(False)


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in errors.NO_MEMORY)


def agrees(found, wanted, slack=1) -> bool:
    """Whether logits (R, V), or a Dual of them, are what they should be.

    In 16 bits rounding leaves a difference: a model of 30 layers differs from itself by .05 through the order
    of its sums, and the nearest wrong step (Llama's for SmolLM3, which leaves some angles out) by .146.
    slack: how many times more than in one step of decoding they may differ in 16 bits.
    """
    is_dual = isinstance(wanted, Dual)
    tolerances = (1e-3, 1e-3) if wanted.dtype == torch.float32 else (0.09 * slack, 0.25 * slack)
    pairs = [x.as_subclass(torch.Tensor).float().chunk(1 + is_dual) for x in (found, wanted)]
    differences = [((a - b).norm(), (b - b.mean()).norm()) for a, b in zip(*pairs, strict=True)]
    return all(d <= tolerance * size for (d, size), tolerance in zip(differences, tolerances, strict=False))


def logits_of(model, ids):
    """Logits (T, V) of one row."""
    ids_1T = torch.tensor([ids], device=model.get_input_embeddings().weight.device)
    return model(input_ids=ids_1T, use_cache=False).logits[0]


def longest_without(flaw_at, fitting: int, failing: int) -> int:
    """The largest length below `failing` that has no flaw, by bisection; `fitting` has none."""
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        fitting, failing = (fitting, middle) if flaw_at(middle) else (middle, failing)
    return fitting


def try_batches(model, longest: int, dtype=torch.float32):
    """ValueError where a model cannot be trained, or differentiated, on sequences of up to `longest` tokens.

    It may have fewer positions, look at later tokens and so at padding (attention that is not causal, angles
    that follow the longest row, keys chosen among those of all tokens), have logits that are not finite, or
    not run at all. The cost is 3.4 forward passes of `longest` tokens and a backward pass of a few.
    Gradients are left empty. dtype: that of the passes' matrix products.
    """
    is_training, kind = model.training, model.config.model_type
    model.eval()  # dropout would change logits
    flaw_at = functools.partial(flaw_of_batch, model, dtype)
    reason = flaw_at(longest)
    fitting = longest_without(flaw_at, 0, longest) if reason else longest
    model.train(is_training)
    if not reason:
        return
    if fitting <= NUM_SHORT:
        problem = f"cannot be trained in padded batches ({reason})"
        raise UserError(f"model type {kind!r} {problem}: take another model")
    raise UserError(
        f"sequences come to {longest} tokens, but padded batches of model type {kind!r} are right only up to "
        f"{fitting} ({reason}): set max_length={fitting}"
    )


def flaw_of_batch(model, dtype, longest):
    """What is wrong with the logits of a row of so many tokens, beside those of its parts; else None."""
    weights_dtype = model.get_input_embeddings().weight.dtype
    used = dtype if weights_dtype == torch.float32 else weights_dtype
    try:
        is_same = holds(functools.partial(is_batch_right, model, dtype, longest), used)
    except UserError:
        raise
    except Exception as error:  # whatever a family raises
        if is_out_of_memory(error):
            raise
        return errors.reason(error)
    return None if is_same else "logits change with the tokens that follow"


def is_batch_right(model, dtype, longest, attempt):
    ids = tried_ids(model, longest, attempt)
    tried = min(NUM_SHORT, longest), longest // 2, 9 * longest // 10, longest - 1
    lengths = sorted({max(1, n) for n in tried})
    device = model.get_input_embeddings().weight.device
    ids_1T, last_C = torch.tensor([ids], device=device), torch.tensor(lengths, device=device) - 1
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        with CheckedLookups(), torch.no_grad():
            found = model(input_ids=ids_1T, use_cache=False, logits_to_keep=last_C).logits[0]
            parts = [model(input_ids=ids_1T[:, :n], use_cache=False, logits_to_keep=1) for n in lengths]
        logits_V = model(input_ids=ids_1T[:, :NUM_SHORT], use_cache=False).logits[0, -1]
    logits_V.float().logsumexp(-1).backward()
    model.zero_grad()
    wanted_CV = torch.stack([part.logits[0, -1] for part in parts])
    if not wanted_CV.isfinite().all():
        raise UserError(f"logits of the {model.config.model_type!r} model are not finite: check its weights")
    if len(found) > len(lengths):  # of all tokens: some families do not know logits_to_keep
        found = found[last_C]
    return all(is_right(a[None], b[None]) for a, b in zip(found, wanted_CV, strict=True))


class CheckedLookups(TorchDispatchMode):
    """A context in which an index beyond a table is an IndexError: a GPU would give up its process."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        for dim, ids in lookups(function.overloadpacket, arguments):
            if ids is not None and ids.dtype in (torch.int32, torch.int64) and ids.numel():
                last, size = int(ids.max()), arguments[0].shape[dim]
                if last >= size:
                    raise IndexError(f"position {last} of a table of {size}")
        return function(*arguments, **(keywords or {}))


def lookups(operation, arguments):
    """[(dimension, ids)] by which an operation reads from its first argument."""
    if operation is torch.ops.aten.embedding:
        return [(0, arguments[1])]
    if operation is torch.ops.aten.index:
        return list(enumerate(arguments[1]))
    return [arguments[1:3]] if operation in (torch.ops.aten.gather, torch.ops.aten.index_select) else []


def is_right(found, wanted) -> bool:
    """Whether logits are those wanted; where these are not finite, that is for the sampled row to say."""
    return not wanted.as_subclass(torch.Tensor).isfinite().all() or agrees(found, wanted, slack=2)
