"""One decoding step of a model built like Llama, in as few operations as it takes; plain or in dual numbers.

A small model's step spends as long around its matrix products as in them: the library has forty operations a
layer, each a few microseconds of a CPU and of the Python that calls it, or a kernel of a GPU whose launch
takes longer than the kernel. Here a layer is, in the order of `Layer.add_to_`:

    norm                                     of the stream, the sum that layers add to
    query, key, value                        one product of a fused matrix (products.py)
    rotary embedding                         one product, with a matrix per row that all layers share
    scores                                   one product that scales, and starts from the mask
    values, output, added to the stream      two products: the last one adds
    norm, gate and up, gate, down            a fused product, and one that adds

In dual numbers all of these take values and derivatives together, so weights and cache are read once. On a
CPU native.c does the same in one call (`Step.compiled`). Prompts stay with the library, and so do models of
any other kind: `make_step` looks at the modules, cached_model.py at the numbers.

Shapes: N slots, R rows: N, or 2N in dual numbers (values above derivatives, as in dual/model.py); L
positions, H heads of queries, K of keys, G = H / K, D head width; I and O a product's inputs and outputs; J
columns of the room for a product's input, which is in the first I (see products.py).
"""

import inspect

import torch
from torch.nn import functional

from ads import cpu
from ads.decode.products import Norm, Stream, make_product
from ads.dual.rules import Dual, look_up, softmax
from ads.kv_cache import whole

LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def make_step(model, windows):
    """A Step, plain or dual as the model's weights are; None for models whose modules are not Llama's.

    The weights move into fused matrices, of which the model's own become views. Some families have Llama's
    modules but add factors or leave angles out: the caller must compare the step's logits with the library's.
    """
    if children(model) != {"model", "lm_head"} or type(model.lm_head) is not torch.nn.Linear:
        return None
    inner = model.model
    if children(inner) != {"embed_tokens", "layers", "norm", "rotary_emb"} or not is_norm(inner.norm):
        return None
    if type(inner.embed_tokens) is not torch.nn.Embedding or not all(map(is_layer, inner.layers)):
        return None
    norms = [n for layer in inner.layers for n in (layer.input_layernorm, layer.post_attention_layernorm)]
    if any(norm.variance_epsilon != inner.norm.variance_epsilon for norm in norms):
        return None
    return Step(model, windows)


def is_layer(layer):
    if children(layer) != LAYER or children(layer.mlp) != MLP:
        return False
    attention, mlp = dict(layer.self_attn.named_children()), dict(layer.mlp.named_children())
    norms = [attention[name] for name in attention.keys() - ATTENTION]
    fused = [[attention.get(n) for n in ("q_proj", "k_proj", "v_proj")], [mlp["gate_proj"], mlp["up_proj"]]]
    products = [*fused[0], *fused[1], attention.get("o_proj"), mlp["down_proj"]]
    return (
        attention.keys() - ATTENTION in (set(), {"q_norm", "k_norm"})
        and all(type(product) is torch.nn.Linear for product in products)
        and all(len({product.bias is None for product in group}) == 1 for group in fused)
        and all(map(is_norm, [*norms, layer.input_layernorm, layer.post_attention_layernorm]))
        and all(hasattr(layer.self_attn, name) for name in ("layer_idx", "scaling", "head_dim"))
        # Ministral3's queries grow with their position, and only beyond where a try could see it
        and "position_ids" not in inspect.signature(layer.self_attn.forward).parameters
    )


def is_norm(module):
    return hasattr(module, "weight") and hasattr(module, "variance_epsilon")


def children(module):
    return {name for name, _ in module.named_children()}


class Layer:
    """What a step needs of one of the library's layers; window_kind: which of the step's masks it has."""

    def __init__(self, layer, window_kind):
        attention, mlp = layer.self_attn, layer.mlp
        self.kind, self.index = window_kind, attention.layer_idx
        self.scaling, self.width = attention.scaling, attention.head_dim
        self.num_heads = len(attention.q_proj.weight) // self.width
        self.num_keys = len(attention.k_proj.weight) // self.width
        self.norms = [Norm(layer.input_layernorm), Norm(layer.post_attention_layernorm)]
        self.head_norms = [Norm(getattr(attention, n)) for n in ("q_norm", "k_norm") if hasattr(attention, n)]
        self.is_dual = self.norms[0].is_dual
        self.qkv = make_product(attention.q_proj, attention.k_proj, attention.v_proj)
        self.output = make_product(attention.o_proj)
        self.gate_up, self.down = make_product(mlp.gate_proj, mlp.up_proj), make_product(mlp.down_proj)

    def add_to_(self, x, work):
        """Add to x, (N, I) or a Stream, what the layer makes of it."""
        stream = x.x_RI if self.is_dual else x
        self.output.add_to_(stream, self.attend(self.norms[0](x, work.input_of(self.qkv)), work))
        gate_up = self.gate_up(self.norms[1](x, work.input_of(self.gate_up)))
        self.down.add_to_(stream, self.gate(*gate_up.chunk(2, dim=1), work))

    def gate(self, gate_RO, up_RO, work):
        if self.is_dual:
            return dual_gate(gate_RO, up_RO, work.input_of(self.down))
        return functional.silu(gate_RO) * up_RO

    def attend(self, x_RI, work):
        num_turned = self.num_heads + self.num_keys
        qkv_RHD = self.qkv(x_RI).unflatten(1, (-1, self.width))
        turned_RHD, values_RKD = qkv_RHD.split((num_turned, self.num_keys), dim=1)
        if self.head_norms:
            parts = turned_RHD.split((self.num_heads, self.num_keys), dim=1)
            normed = [norm.of_rows(part) for norm, part in zip(self.head_norms, parts, strict=True)]
            turned_RHD = torch.cat(normed, dim=1)
        turned_RHD = torch.bmm(turned_RHD, work.rotations_RDD, out=work.turned_RHD)
        work.write(self.index, turned_RHD[:, self.num_heads :], values_RKD)
        given = work, self.index, self.num_heads, work.masks[self.kind], self.scaling
        return attend_dual(*given, work.input_of(self.output)) if self.is_dual else attend_plain(*given)


def rotations(cos_RD, sin_RD):
    """(R, D, D) that rows are multiplied by: rotary position embedding (Su et al., 2021).

    x cos + (-x_2, x_1) sin of the two halves of D. A product of all heads takes less time than three passes
    over them, as the matrices are the same for all layers.
    """
    half = cos_RD.shape[1] // 2
    result_RDD = cos_RD.diag_embed()
    torch.neg(sin_RD[:, :half], out=result_RDD.diagonal(-half, 1, 2))
    result_RDD.diagonal(half, 1, 2).copy_(sin_RD[:, half:])
    return result_RDD


def dual_gate(gate_RO, up_RO, room_RJ):
    """silu(gate) up, of values over derivatives, into the first columns of the room."""
    (gate, d_gate), up_2NO = (x.unflatten(0, (2, -1)) for x in (gate_RO, up_RO))
    result_2NO = room_RJ[:, : up_RO.shape[1]].unflatten(0, (2, -1))
    torch.mul(functional.silu(gate), up_2NO, out=result_2NO)
    result_2NO[1].addcmul_(torch.ops.aten.silu_backward(d_gate, gate), up_2NO[0])
    return room_RJ


def attend_plain(work, layer, num_heads, mask_NKGL, scaling):
    queries_NHD = work.turned_RHD[:, :num_heads]
    keys, values = work.seen(layer)
    queries_NKGD = queries_NHD.unflatten(1, (keys.shape[1], -1))
    if values.dtype != torch.float32:
        # a fused kernel keeps scores in float32; told of shared keys (enable_gqa) none on GPUs takes a mask
        result = functional.scaled_dot_product_attention(
            queries_NKGD, keys, values, attn_mask=mask_NKGL, scale=scaling
        )
    else:
        queries, keys, values, mask = (x.flatten(0, 1) for x in (queries_NKGD, keys, values, mask_NKGL))
        probs = torch.softmax(torch.baddbmm(mask, queries, keys.mT, alpha=scaling), -1)
        result = torch.bmm(probs, values)
    return result.reshape(len(queries_NHD), -1)


def attend_dual(work, layer, num_heads, mask_NKGL, scaling, room_RJ):
    """Attention of one token per slot, in two products: keys and values are read once, with derivatives.

    The cache has the derivatives beside the values. For the heads that share keys, in blocks,

        [0  q ] [dk k]^T  =  [q k^T          ]  =  [S ]        P = softmax(S), dP its derivative
        [q  dq]              [q dk^T + dq k^T]     [dS]

        [P ] [dv v]       =  [P dv    P v ]                    of which P v, and P dv + dP v
        [dP]                 [dP dv   dP v]
    """
    keys, values = (x.flatten(0, 1).flatten(2) for x in work.seen(layer))
    size = num_heads * work.num_rows // len(keys)
    pairs = work.zero_and_turned_3NHD[:, :, :num_heads].unfold(0, 2, 1)  # (2, N, H, D, 2)
    grouped = pairs.unflatten(2, (-1, size)).permute(1, 2, 0, 3, 5, 4)
    queries = torch.mul(grouped, scaling, out=grouped.new_empty(grouped.shape)).view(len(keys), 2 * size, -1)
    scores = torch.baddbmm(mask_NKGL.flatten(0, 1), queries, keys.mT)
    parts = torch.bmm(softmax(scores), values).unflatten(1, (2, size)).unflatten(3, (2, -1))
    parts = parts.unflatten(0, (work.num_rows, -1)).permute(2, 4, 0, 1, 3, 5)  # (2, 2, N, K, G, D)
    result = room_RJ[:, : parts[0, 0, 0].numel()].view(parts.shape[1:])
    torch.addcmul(parts[:, 1], parts[:1, 0], work.is_derivative_2, out=result)
    return room_RJ


class Workspace:
    """What the layers of a step share: where it writes to the cache, what it reads, room for activations.

    turned_RHD: rotated queries and keys of the layer at work. In dual numbers zeros lie above them, so that
    attend_dual has the rows [0 q; q dq] as a view.
    """

    def __init__(self, cache, lengths_N, longest, masks, rotations_RDD, num_turned):
        self.storage, self.masks, self.rotations_RDD = cache.storage, masks, rotations_RDD
        self.num_rows, self.length = len(lengths_N), longest + 1
        slots_N = torch.arange(self.num_rows, device=lengths_N.device)
        self.slots_R, self.positions_R, self.parts_R = slots_N, lengths_N, 0
        shape = self.num_rows, num_turned, rotations_RDD.shape[1]
        if self.storage.num_parts == 1:
            self.turned_RHD = rotations_RDD.new_empty(shape)
            return
        self.slots_R, self.positions_R = slots_N.repeat(2), lengths_N.repeat(2)
        parts_2 = torch.arange(2, device=slots_N.device)
        self.parts_R = parts_2.flip(0).repeat_interleave(self.num_rows)  # derivatives lie before values
        self.is_derivative_2 = parts_2.to(rotations_RDD.dtype).view(2, 1, 1, 1, 1)
        self.zero_and_turned_3NHD = rotations_RDD.new_zeros(3, *shape)
        self.turned_RHD = self.zero_and_turned_3NHD[1:].flatten(0, 1)
        self.inputs = {}

    def input_of(self, product):
        """In dual numbers the room for a product's input, shared by those of one shape; else None."""
        if self.storage.num_parts == 1:
            return None
        key = type(product), product.shape
        if key not in self.inputs:
            self.inputs[key] = product.make_input(2 * self.num_rows)
        return self.inputs[key]

    def write(self, layer, keys_RKD, values_RKD):
        index = self.slots_R, slice(None), self.positions_R, self.parts_R
        self.storage.keys[layer][index] = keys_RKD
        self.storage.values[layer][index] = values_RKD

    def seen(self, layer):
        """Keys and values of the active slots, (N, K, L, D), or (N, K, L, 2, D) of derivatives and values."""
        stored = self.storage.keys[layer], self.storage.values[layer]
        seen = (x[: self.num_rows, :, : self.length] for x in stored)
        return [x if self.storage.num_parts == 2 else x.squeeze(3) for x in seen]


class Step:
    """Append a token to each slot: what the library's forward of (N, 1) tokens computes."""

    def __init__(self, model, windows):
        inner, config = model.model, model.config
        self.table, self.rotary, self.windows = inner.embed_tokens, inner.rotary_emb, windows
        for p in model.parameters():
            # what is not fused below: on a CPU the least view of the weights' file keeps all of it in memory
            if (p.dim() == 1 or p is self.table.weight) and p.device.type == "cpu":
                p.data = p.data.clone()
        kinds = getattr(config, "layer_types", None) or [next(iter(windows))] * len(inner.layers)
        self.layers = [Layer(layer, kind) for layer, kind in zip(inner.layers, kinds, strict=True)]
        self.norm, self.is_dual = Norm(inner.norm), self.layers[0].is_dual
        is_tied = model.lm_head.weight is inner.embed_tokens.weight
        self.head = make_product(model.lm_head, is_table=is_tied)
        self.compiled = cpu.CompiledStep(self) if cpu.decodes(self.table.weight) else None

    def __call__(self, tokens_N, lengths_N, longest, cache):
        """Logits (N, V) that follow, or a Dual of them; see models.CachedModel.step."""
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            x_RI = self.compiled.embed(tokens_N) if self.compiled else self.embed(tokens_N)
            cos, sin = (angle.squeeze(0) for angle in self.rotary(x_RI, lengths_N[None]))
            if self.compiled:
                windows = [self.windows[layer.kind] for layer in self.layers]
                return self.result(self.compiled(x_RI, cos, sin, lengths_N, cache, windows))
            masks = {
                kind: self.mask(lengths_N, longest, window, x_RI) for kind, window in self.windows.items()
            }
            num_turned = self.layers[0].num_heads + self.layers[0].num_keys
            if self.is_dual:
                cos, sin = torch.cat([cos, cos]), torch.cat([sin, sin])
            work = Workspace(cache, lengths_N, longest, masks, rotations(cos, sin), num_turned)
            x = Stream(x_RI, self.norm.eps) if self.is_dual else x_RI
            for layer in self.layers:
                layer.add_to_(x, work)
            return self.result(self.head(self.norm(x, work.input_of(self.head))))

    def result(self, logits_RV):
        return logits_RV.as_subclass(Dual) if self.is_dual else logits_RV

    def embed(self, tokens_N):
        if self.is_dual:
            values, tangents = look_up(tokens_N, self.table.weight)
            return torch.cat([values, tangents])
        return functional.embedding(tokens_N, self.table.weight)

    def mask(self, lengths_N, longest, window, like):
        """(N, K, G, L) to add to the scores; in dual numbers with G rows of 0 for the derivatives."""
        layer, length = self.layers[0], longest + 1
        num_groups = layer.num_heads // layer.num_keys
        # rows start at multiples of 16 bytes, or a GPU's fused kernel would copy the mask in every layer
        shape = (layer.num_keys, 2 * num_groups, length) if self.is_dual else (1, 1, whole(length, 16))
        mask_NKGL = like.new_zeros(len(lengths_N), *shape)[..., :length]
        distance_NL = lengths_N[:, None] - torch.arange(length, device=like.device)
        hidden_NL = distance_NL < 0 if window is None else (distance_NL < 0) | (distance_NL >= window)
        mask_NKGL[:, :, :num_groups].masked_fill_(hidden_NL[:, None, None], torch.finfo(like.dtype).min)
        return mask_NKGL if self.is_dual else mask_NKGL.expand(-1, layer.num_keys, num_groups, -1)
