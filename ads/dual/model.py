"""A causal language model in dual numbers: each activation with its derivative along g, one set of weights.

The library's own forward runs on tensors that hold values and derivatives one above the other:

    Dual, (2B, ...)      rows 0..B-1: values x              rows B..2B-1: derivatives dx
    Weight               a parameter W                       its `tangent` dW, a tensor or Factors

Reshaping, adding, scaling by constants treat all rows alike and run as they are, once. Few operations need
more (rules.py, attention.py, norms.py):

    linear layer   y = W x + b   [W x; W dx] is one product of twice the rows, so W is read once;
                                 dy = W dx + dW x + db, where dW x is two thin products if dW = left right
    embedding      y = E[i]      dy = dE[i], made for the rows asked for alone
    product        z = x y       dz = x dy + y dx
    attention      y = P v       keys and values, each read once for value and derivative
    RMS norm       y = w x / |x| one formula for both

All others (softmax, layer norm, activations, soft caps, ...) are differentiated by torch's forward-mode AD,
one operation at a time; delta/check.py finds out whether that is right. (The whole forward under forward-mode
AD is the rival: less code and, when decoding, twice the time beside the linear layers, most of it on the
host.)

Shapes: B rows, T tokens given, L positions attended to, H heads of queries, K of keys, G = H / K, D head
width, I and O a linear layer's inputs and outputs, N = B T.
"""

import functools

import torch
from torch.utils._pytree import tree_map

from ads import cpu
from ads.dual.attention import ATTENTION
from ads.dual.factors import Factors
from ads.dual.norms import apply_norm, find_norms, scale
from ads.dual.rules import Dual, halves, make_weight
from ads.kv_cache import Placement, SlotCache


class DualModel:
    """Called like the model that it takes over; then its logits are Dual.

    read_gradient(name) is g of a parameter, a tensor or Factors; it is kept in the parameter's dtype. With
    attn_implementation "eager" attention stays the library's: slower, of any kind.
    """

    def __init__(self, model, read_gradient):
        self.library, self.config = model, model.config
        if model.config._attn_implementation != "eager":
            model.set_attn_implementation(ATTENTION)
        norms = find_norms(model)
        # by identity, as tied weights have one name and several owners
        tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
        weights = {
            id(p): own_weight(p, read_gradient(name), id(p) in tables) for name, p in model.named_parameters()
        }
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                setattr(module, name, weights[id(p)])
        for module, offset, eps in norms:
            module.forward = functools.partial(apply_norm, scale(module.weight, offset), eps)

    def get_input_embeddings(self):
        return self.library.get_input_embeddings()

    def make_cache(self, make_storage, num_slots, num_positions):
        gives_pairs = self.config._attn_implementation == ATTENTION
        return DualCache(make_storage, num_slots, num_positions, gives_pairs)

    def __call__(self, input_ids, attention_mask=None, past_key_values=None, **inputs):
        if past_key_values is not None:
            past_key_values.double_placement(len(input_ids))
        inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        if "position_ids" not in inputs:  # the library's own would be one row, of no derivative
            inputs["position_ids"] = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
            inputs["position_ids"] = inputs["position_ids"].expand_as(input_ids)
        inputs = tree_map(twice, inputs)
        # forward-mode AD drops derivatives without a word in inference mode
        with torch.inference_mode(False), torch.no_grad():
            return self.library(past_key_values=past_key_values, **inputs)


def own_weight(parameter, tangent, is_table):
    """The Weight of a parameter, in memory of its own rather than in that of a file; is_table: rows are read
    from it."""
    tangent = tangent.to(parameter)
    if not isinstance(tangent, Factors):
        parameter.data = parameter.data.clone()
        return make_weight(parameter, tangent.clone() if tangent.dim() == 1 else tangent)
    rows = [parameter.detach(), tangent.right]
    extended = torch.cat(rows) if is_table else stack_rows(rows)
    parameter.data = extended[: len(parameter)]  # frees the first copy
    weight = make_weight(parameter, Factors(tangent.left, extended[len(parameter) :]))
    weight.extended = extended
    return weight


def stack_rows(matrices):
    """Matrices one above the other, in the layout by which few rows are multiplied fastest.

    On the CPU in float32 that is by rows where native.c decodes, else by columns, in torch a tenth faster
    (bench/RESULTS.md).
    """
    stacked = new_matrix(matrices[0], sum(map(len, matrices)), matrices[0].shape[1])
    for part, matrix in zip(stacked.split([len(m) for m in matrices]), matrices, strict=True):
        part.copy_(matrix)
    return stacked


def stack_columns(matrices):
    """Matrices side by side, in that layout."""
    widths = [m.shape[1] for m in matrices]
    stacked = new_matrix(matrices[0], len(matrices[0]), sum(widths))
    for part, matrix in zip(stacked.split(widths, dim=1), matrices, strict=True):
        part.copy_(matrix)
    return stacked


def new_matrix(like, num_rows, num_columns):
    is_by_columns = like.device.type == "cpu" and like.dtype == torch.float32 and not cpu.decodes(like)
    return like.new_empty(num_columns, num_rows).T if is_by_columns else like.new_empty(num_rows, num_columns)


def twice(value):
    """An input of the model for the rows of values and again for those of derivatives."""
    is_of_rows = isinstance(value, torch.Tensor) and value.dim() > 1
    return torch.cat([value, value]) if is_of_rows else value


def rows(x, first, last):
    """Rows first..last-1 of a Dual."""
    return torch.cat([half[first:last] for half in halves(x.as_subclass(torch.Tensor))]).as_subclass(Dual)


def stack(duals):
    """One Dual of the rows of several."""
    pairs = [halves(x.as_subclass(torch.Tensor)) for x in duals]
    return torch.cat([half for part in zip(*pairs, strict=True) for half in part]).as_subclass(Dual)


class DualCache(SlotCache):
    """A SlotCache that has the derivatives of a slot's keys and values num_slots slots further on.

    gives_pairs: attention gets (values, derivatives), (B K, L, D), rather than a Dual.
    """

    num_parts = 2

    def __init__(self, make_storage, num_slots, num_positions, gives_pairs=True):
        super().__init__(make_storage, num_slots, num_positions)
        self.gives_pairs = gives_pairs

    def double_placement(self, num_rows):
        """Place what a batch of num_rows rows of values, and of derivatives, will give to `update`."""
        place = self.placement
        self.placement = Placement(
            torch.cat([place.rows, place.rows + num_rows]),
            torch.cat([place.columns, place.columns]),
            torch.cat([place.slots, place.slots + self.storage.num_slots]),
            torch.cat([place.positions, place.positions]),
            place.read,
        )

    def update(self, keys_BKTD, values_BKTD, layer_idx, *args, **kwargs):
        with torch._C.DisableTorchFunctionSubclass():
            self.storage.write(layer_idx, keys_BKTD, values_BKTD, self.placement)
            if self.placement.read is None:
                return keys_BKTD, values_BKTD
            first, num_rows, length = self.placement.read
            starts = first, first + self.storage.num_slots
            parts = [self.storage.read(layer_idx, start, num_rows, length) for start in starts]
            return tuple(map(self.join, *parts))

    def join(self, values_BKLD, derivatives_BKLD):
        if self.gives_pairs:
            return values_BKLD.flatten(0, 1), derivatives_BKLD.flatten(0, 1)
        return torch.cat([values_BKLD, derivatives_BKLD]).as_subclass(Dual)
