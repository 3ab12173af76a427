"""The proxy gradient: g, the gradient of the proxy's loss on clean holdout traces.

    l(theta) = mean over sequences of (mean over response tokens of -log p(token)), in nats, float32

Shapes: B rows, T tokens, V vocabulary.
"""

import json
import math
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ads import chat, matmul, sampling
from ads.loss import collate, token_losses
from ads.stage import files
from ads.stage.sidecar import at_a_commit, is_unrecorded

OVERSAMPLING = 8  # more columns than the rank in the sketch of a matrix
NUM_POWER_ITERATIONS = 2  # they sharpen the sketch where singular values fall off slowly

METADATA = "gradient"  # key in the file
MAX_PADDING = 0.05  # of a batch's tokens


@dataclass(frozen=True)
class Factors:
    """A matrix (M, N) of rank R as left (M, R) @ right (R, N)."""

    left: torch.Tensor
    right: torch.Tensor

    @property
    def T(self):  # noqa: N802 (as of a tensor)
        return Factors(self.right.T, self.left.T)

    def to(self, target):
        return Factors(self.left.to(target), self.right.to(target))


def dense(g):
    """A parameter's gradient, which may be Factors, as one tensor."""
    return g.left @ g.right if isinstance(g, Factors) else g


def square_norm(g):
    """The squared Euclidean norm (float64) of a tensor or of Factors."""
    if isinstance(g, Factors):
        left, right = g.left.double(), g.right.double()
        return ((left.T @ left) * (right @ right.T)).sum().item()
    return g.square().sum(dtype=torch.float64).item()


def compress(model, rank, seed, is_share=False):
    """{parameter name: its gradient}: Factors of at most `rank` where that takes less room, else the tensor.

    float32, on the model's device. rank 0 keeps everything whole, which is no copy. is_share: what the
    processes hold is summed, one parameter at a time, into a copy.
    """
    compressed = {}
    for name, p in model.named_parameters():
        g = (torch.zeros_like(p) if p.grad is None else p.grad).float()
        if is_share:
            g = g.clone()
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(g)
        compressed[name] = factorise(g, rank, seed, name) if saves_room(g.shape, rank) else g
    return compressed


def saves_room(shape, rank):
    return len(shape) == 2 and 0 < rank * sum(shape) < shape[0] * shape[1]


def factorise(matrix, rank, seed, name):
    """The best approximation of a matrix of at most that rank: a truncated SVD, in Factors.

    Large matrices are sketched by power iterations from a random start, by (seed, name) (Halko et al., SIAM
    Review 2011); small ones are decomposed as they are.
    """
    basis = None
    if min(matrix.shape) > 4 * rank:
        generator = torch.Generator().manual_seed(sampling.row_key(seed, name) & (2**63 - 1))
        start = torch.randn(matrix.shape[1], rank + OVERSAMPLING, generator=generator)
        basis = torch.linalg.qr(matrix @ start.to(matrix)).Q
        for _ in range(NUM_POWER_ITERATIONS):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(matrix if basis is None else basis.T @ matrix, full_matrices=False)
    scale = values[:rank].sqrt()  # shared out, so that 16 bits hold either factor
    left = left[:, :rank] * scale
    return Factors(left if basis is None else basis @ left, scale[:, None] * right[:rank])


@dataclass(frozen=True)
class Sequence:
    """A holdout trace as token ids; the first num_prompt_tokens are not trained on."""

    ids: list[int]
    num_prompt_tokens: int


def make_sequences(rows, max_length):
    """The Sequence of each trace row, cut to max_length; none where that leaves no response token."""
    sequences = [
        Sequence((row["prompt_ids"] + row["response_ids"])[:max_length], len(row["prompt_ids"]))
        for row in rows
    ]
    return [s for s in sequences if len(s.ids) > s.num_prompt_tokens > 0]


def make_batches(sequences, batch_size, batch_tokens=math.inf):
    """Lists of at most batch_size sequences of like lengths, longest first.

    A batch ends before more than MAX_PADDING of it would be padding, or where it would have more than
    batch_tokens tokens, padding included; a longer sequence stands alone.
    """
    batches = []
    for s in sorted(sequences, key=lambda s: -len(s.ids)):
        batch = batches[-1] if batches else []
        tokens = sum(len(other.ids) for other in batch) + len(s.ids)
        padded = (len(batch) + 1) * len((batch or [s])[0].ids)
        is_full = len(batch) == batch_size or padded > batch_tokens
        if not batch or is_full or tokens < (1 - MAX_PADDING) * padded:
            batches.append([s])
        else:
            batch.append(s)
    return batches


def sequence_losses(model, sequences):
    """Mean negative log-likelihood (nats/token, float32, (B,)) of each sequence's response tokens."""
    examples = [
        {
            "input_ids": s.ids,
            "labels": [chat.IGNORED_LABEL] * s.num_prompt_tokens + s.ids[s.num_prompt_tokens :],
        }
        for s in sequences
    ]
    device = model.get_input_embeddings().weight.device
    batch = {key: tensor.to(device) for key, tensor in collate(examples).items()}
    labels_BT = batch.pop("labels")
    losses_BC = token_losses(model(**batch, use_cache=False).logits, labels_BT)
    return losses_BC.sum(1) / (labels_BT != chat.IGNORED_LABEL).sum(1)


def add_gradient_(
    model, sequences, num_total, batch_size, progress=iter, batch_tokens=math.inf, dtype="float32"
):
    """Add this process's share of the mean gradient to the parameters' .grad; returns its share of the mean
    loss.

    num_total is the number of sequences over all processes. dtype is that of the passes' matrix products;
    weights and .grad stay float32.
    """
    device = model.get_input_embeddings().weight.device.type
    loss = 0.0
    for batch in progress(make_batches(sequences, batch_size, batch_tokens)):
        with matmul.in_tiles():
            with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
                share = sequence_losses(model, batch).sum() / num_total
            share.backward()
        loss += share.item()
    return loss


@torch.no_grad()
def mean_loss(model, sequences, num_total, batch_size, batch_tokens=math.inf):
    """This process's share of the mean loss (nats/token) over num_total sequences."""
    batches = make_batches(sequences, batch_size, batch_tokens)
    return sum(sequence_losses(model, batch).sum().item() for batch in batches) / num_total


def all_reduce_(model):
    """Sum the gradients over all processes, once."""
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        torch.distributed.all_reduce(parameter.grad)


@torch.no_grad()
def descend_(model, step_length):
    """One step of gradient descent, `step_length` long, along the parameters' .grad."""
    factor = step_length / total_norm(norms(model))
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter -= factor * parameter.grad


def random_tensor(read_gradient, seed, name):
    """A random direction for one parameter, by (seed, name), as long as its gradient and of its form.

    Factors give random Factors: a direction of the same rank, neither cheaper nor dearer than g.
    """
    g = read_gradient(name)
    generator = torch.Generator().manual_seed(sampling.row_key(seed, name) & (2**63 - 1))
    if isinstance(g, Factors):
        left, right = (torch.randn(f.shape, generator=generator) for f in (g.left, g.right))
        length = math.sqrt(square_norm(g) / square_norm(Factors(left, right)))
        return Factors(left * length, right)
    direction = torch.randn(g.shape, generator=generator)
    return direction * (g.norm() / direction.norm())


def norms(model):
    """{parameter name: Euclidean norm of its gradient}; ValueError if any is not finite or all are zero."""
    found = finite_norms(model)
    if not any(found.values()):
        raise ValueError("the gradient is zero: no response token of the holdout traces reached the loss")
    return found


def finite_norms(model):
    """As `norms`, where the gradient may be zero, such as that of a process that had no sequences."""
    found = {
        name: 0.0 if p.grad is None else p.grad.norm(dtype=torch.float64).item()
        for name, p in model.named_parameters()
    }
    bad = [name for name, norm in found.items() if not math.isfinite(norm)]
    if bad:
        raise ValueError(
            f"the gradient of {bad[0]} (and {len(bad) - 1} more) is not finite: check the proxy's weights"
        )
    return found


def total_norm(norms_by_name):
    return math.sqrt(sum(norm**2 for norm in norms_by_name.values()))


def save(path, compressed, metadata):
    """Write gradients (see `compress`) and `metadata` (a mapping) to a safetensors file.

    Factors of NAME are stored as NAME.left and NAME.right. The metadata are one entry: several would come in
    another order each time, and a gradient made again would seem another.
    """
    tensors = {}
    for name, g in compressed.items():
        parts = {".left": g.left, ".right": g.right} if isinstance(g, Factors) else {"": g}
        tensors |= {name + part: tensor.cpu().contiguous() for part, tensor in parts.items()}
    with files.atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={METADATA: json.dumps(metadata)})


def metadata_of(file):
    """What `save` was given with the gradients of an open file; empty where it did not write the file."""
    return json.loads((file.metadata() or {}).get(METADATA, "{}"))


def read(file, name):
    """The gradient of one parameter from an open gradient file: a float32 tensor or Factors."""
    if name in file.keys():  # noqa: SIM118 (no mapping)
        return file.get_tensor(name)
    return Factors(file.get_tensor(f"{name}.left"), file.get_tensor(f"{name}.right"))


def open_checked(path, proxy_fingerprint):
    """Open a gradient file (safe_open; see `read`).

    Raises FileNotFoundError when it is missing, ValueError when it is cut short, was not written by
    save_grad.py, or is the gradient of a model with other contents.
    """
    remedy = "make it with save_grad.py"
    if not path.is_file():
        raise FileNotFoundError(f"gradient {path} does not exist: {remedy}")
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"gradient {path} is damaged ({error}): delete it and {remedy}") from error
    metadata = metadata_of(file)
    if "proxy_fingerprint" not in metadata:
        raise ValueError(f"{path} holds no proxy gradient: {remedy}")
    made_for = metadata["proxy_fingerprint"]
    if is_unrecorded(made_for, proxy_fingerprint):
        print(f"WARNING: gradient {path}: at which commit of {made_for} was not recorded", flush=True)
    elif made_for != proxy_fingerprint:
        differences = f"contents {made_for!r}, now {proxy_fingerprint!r}"
        raise ValueError(
            f"gradient {path} belongs to another proxy ({metadata['proxy_student']}, {differences}): "
            f"set proxy_student to it, or {remedy}" + at_a_commit([differences])
        )
    return file


def check_matches(file, path, model):
    """ValueError unless the gradient file has exactly the model's parameters, in their shapes."""
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    stored = stored_shapes(file)
    wrong = sorted(name for name in shapes.keys() | stored.keys() if shapes.get(name) != stored.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"gradient {path} does not fit the proxy: {name} is {stored.get(name)} in the file, "
            f"{shapes.get(name)} in the model ({len(wrong)} parameters differ)"
        )


def stored_shapes(file):
    """{parameter name: shape} of a gradient file."""
    shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
    for left in [name for name in shapes if name.endswith(".left")]:
        name = left.removesuffix(".left")
        right = shapes.pop(f"{name}.right", [0, 0])
        shapes[name] = [shapes.pop(left)[0], right[1]]
    return shapes
