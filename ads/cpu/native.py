"""The compiled decoding step: what native.c is called with.

A CompiledStep is made from a step in torch (ads/decode/llama_step.py), whose fused matrices it reads where
they lie. The structures below are those of native.c, which says what each field means.

Shapes: N slots; R rows: N, or 2N in dual numbers (values above their derivatives along g); I inputs, O
outputs, K rank of the factors of g, D head width, V vocabulary.
"""

import ctypes
from ctypes import POINTER, byref, c_float, c_int64, c_void_p

import torch
from torch.nn import functional

from ads.cpu import build
from ads.cpu.pages import LANES, PAGE, Pages
from ads.kv_cache import whole

# Work that pays for another thread, about 10 ms of one core: threads meet after every product, and beside
# other processes each meeting may take the time slice of one.
OPERATIONS_PER_THREAD = 1e9
PANEL = 8  # native.c has the same
PRODUCTS = ("qkv", "output", "gate_up", "down")


def fields(kind, names):
    return [(name, kind) for name in names.split()]


class ProductStruct(ctypes.Structure):
    _fields_ = [*fields(c_int64, "outs ins rank"), *fields(c_void_p, "weight g left bias d_bias")]


class NormStruct(ctypes.Structure):
    _fields_ = [*fields(c_void_p, "scale d_scale"), ("eps", c_float)]


class LayerStruct(ctypes.Structure):
    _fields_ = [
        *fields(NormStruct, "before_attention before_mlp of_queries of_keys"),
        *fields(ProductStruct, " ".join(PRODUCTS)),
        *fields(c_void_p, "keys values"),
        ("window", c_int64),
        ("scaling", c_float),
    ]


class ModelStruct(ctypes.Structure):
    _fields_ = [
        *fields(c_int64, "num_layers hidden heads kv_heads width inner"),
        ("layers", POINTER(LayerStruct)),
        ("last", NormStruct),
        ("head", ProductStruct),
    ]


class StepStruct(ctypes.Structure):
    _fields_ = [
        *fields(c_int64, "is_dual rows slot_pages page_stride part_stride v_stride"),
        *fields(c_void_p, "pages cos sin lengths x logits"),
        *fields(c_void_p, "normed wide mixed thin scores head_rows panels packed"),
    ]


def decodes(weight: torch.Tensor) -> bool:
    """Whether a model with this weight is decoded by compiled code if its modules allow it."""
    is_known = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
    return is_known and build.library() is not None


class CompiledStep:
    """The layers and the head of a step; `embed` gives what they begin with, `make_storage` their cache."""

    def __init__(self, step):
        self.kept = []  # tensors whose addresses the structures hold
        self.table, self.is_dual = step.table.weight, step.is_dual
        layers, first = step.layers, step.layers[0]
        self.indices = [layer.index for layer in layers]
        self.layers = (LayerStruct * len(layers))(*map(self.layer, layers))
        self.model = ModelStruct(
            num_layers=len(layers),
            hidden=self.table.shape[1],
            heads=first.num_heads,
            kv_heads=first.num_keys,
            width=first.width,
            inner=first.gate_up.num_outputs // 2,
            layers=self.layers,
            last=self.norm(step.norm),
            head=self.product(step.head),
        )
        self.products = [getattr(layer, name) for layer in self.layers for name in PRODUCTS]
        self.products.append(self.model.head)
        self.num_weights = sum(p.outs * p.ins for p in self.products)
        self.widest_input, self.greatest_rank = (
            max(getattr(p, n) for p in self.products) for n in ("ins", "rank")
        )
        self.is_bfloat16 = self.table.dtype == torch.bfloat16
        self.has_tiles = self.is_bfloat16 and bool(build.library().ads_has_tiles())
        is_grouped = first.num_heads % first.num_keys == 0
        self.fits = is_grouped and all(map(self.has_sizes, layers, self.layers))

    def has_sizes(self, layer, struct):
        """Whether a layer has the sizes of the first, which native.c takes all to have."""
        m, found = self.model, [(p.outs, p.ins) for p in (getattr(struct, name) for name in PRODUCTS)]
        in_heads = m.heads * m.width
        wanted = [
            (in_heads + 2 * m.kv_heads * m.width, m.hidden),
            (m.hidden, in_heads),
            (2 * m.inner, m.hidden),
            (m.hidden, m.inner),
        ]
        heads = layer.num_heads, layer.num_keys, layer.width
        return found == wanted and heads == (m.heads, m.kv_heads, m.width)

    def layer(self, layer):
        head_norms = [self.norm(norm) for norm in layer.head_norms] or [NormStruct(), NormStruct()]
        products = [self.product(getattr(layer, name)) for name in PRODUCTS]
        return LayerStruct(*map(self.norm, layer.norms), *head_norms, *products, scaling=layer.scaling)

    def norm(self, norm):
        return NormStruct(*self.addresses(norm.scale, norm.is_dual), norm.eps)

    def product(self, product):
        rank = 0 if product.left_RO is None else len(product.left_RO)
        return ProductStruct(
            product.num_outputs,
            product.base_PI.shape[1],
            rank,
            self.address(product.base_PI, product.base_PI.dtype),
            None if product.g_OI is None else self.address(product.g_OI, product.g_OI.dtype),
            None if product.left_RO is None else self.address(product.left_RO),
            *self.addresses(product.bias, product.is_dual),
        )

    def addresses(self, vector, is_dual):
        """Of a vector's values and, in dual numbers, of the derivatives below them; None: not there."""
        if vector is None:
            return None, None
        parts = vector.reshape(1 + is_dual, -1)
        return self.address(parts[0]), self.address(parts[1]) if is_dual else None

    def address(self, tensor, dtype=torch.float32):
        """Of a tensor's numbers, which stay where they are if they are of that dtype."""
        self.kept.append(tensor.to(dtype).contiguous())
        return self.kept[-1].data_ptr()

    def make_storage(self, num_slots: int, num_positions: int, num_parts: int = 1) -> Pages:
        return Pages(num_slots, num_positions, num_parts, num_layers=len(self.layers))

    def embed(self, tokens_N):
        """Float32 embeddings (R, I) of tokens; derivatives from factors of g row by row."""
        values_NI = functional.embedding(tokens_N, self.table.detach().as_subclass(torch.Tensor)).float()
        if not self.is_dual:
            return values_NI
        g = self.table.tangent
        if isinstance(g, torch.Tensor):  # else its factors
            return torch.cat([values_NI, functional.embedding(tokens_N, g).float()])
        left_NK, right_KI = g.left[tokens_N].float().contiguous(), g.right.float().contiguous()
        changes_NI = torch.empty_like(values_NI)
        sizes = map(c_int64, (len(tokens_N), *right_KI.shape))
        build.library().ads_mix(*map(address_of, (left_NK, right_KI, changes_NI)), *sizes)
        return torch.cat([values_NI, changes_NI])

    def __call__(self, x_RI, cos_ND, sin_ND, lengths_N, cache, windows):
        """Logits (R, V) of float32 embeddings, which are overwritten; windows: a layer each, None: all."""
        storage, num_rows = cache.storage, len(lengths_N)
        if not self.fits or cos_ND.shape[1] != self.model.width or not isinstance(storage, Pages):
            raise TypeError("native.c has no such model or cache")
        least, most = lengths_N.aminmax()
        if least < 0 or most >= storage.num_positions or num_rows > storage.num_slots:
            raise IndexError("native.c would write beyond the cache")
        storage.reserve(torch.arange(num_rows), lengths_N)
        for layer, index, window in zip(self.layers, self.indices, windows, strict=True):
            layer.keys, layer.values = (x[0, 0, index].data_ptr() for x in (storage.keys, storage.values))
            layer.window = window or 0
        operations = 2 * self.num_weights * len(x_RI)
        num_threads = min(torch.get_num_threads(), 1 + int(operations / OPERATIONS_PER_THREAD))
        logits_RV = x_RI.new_empty(len(x_RI), self.model.head.outs)
        given = {"cos": cos_ND, "sin": sin_ND, "lengths": lengths_N.long(), "x": x_RI}
        given = {name: tensor.contiguous() for name, tensor in given.items()}
        given |= {"pages": storage.table_BP, "logits": logits_RV}
        step = self.struct(len(x_RI), num_threads, given, **storage.strides())
        build.library().ads_step(byref(self.model), byref(step), num_threads)
        return logits_RV

    def multiply(self, product, x_RI):
        """One of `products` alone, (R, O) of inputs in float32, as a step computes it; for benchmarks."""
        y_RO, num_threads = x_RI.new_empty(len(x_RI), product.outs), torch.get_num_threads()
        step = self.struct(len(x_RI), num_threads, {})
        code, given = build.library(), (byref(product), byref(step))
        code.ads_product(*given, address_of(x_RI), address_of(y_RO), num_threads)
        return y_RO

    def struct(self, num_rows, num_threads, given, slot_pages=0, v_stride=0, **strides):
        """A StepStruct of given tensors and of memory to work in, both kept as long as it is."""
        m, (qkv, output, gate_up, down) = self.model, self.products[:4]
        thread_rows = num_threads * 2 * m.heads // m.kv_heads
        sizes = {
            "normed": num_rows * m.hidden,
            "wide": num_rows * max(qkv.outs, gate_up.outs),
            "mixed": num_rows * max(output.ins, down.ins),
            "thin": num_rows * self.greatest_rank,
            "scores": thread_rows * slot_pages * PAGE,
            "head_rows": thread_rows * v_stride,
            "panels": num_threads * PANEL * self.widest_input * self.is_bfloat16,
            "packed": whole(num_rows, LANES) * self.widest_input * self.has_tiles,
        }
        # each begins a line of the CPU's cache
        sizes = {name: whole(size, LANES) for name, size in sizes.items()}
        rooms = torch.empty(sum(sizes.values())).split(list(sizes.values()))
        given = given | dict(zip(sizes, rooms, strict=True))
        addresses = {name: tensor.data_ptr() or None for name, tensor in given.items()}
        step = StepStruct(
            is_dual=self.is_dual,
            rows=num_rows // (1 + self.is_dual),
            slot_pages=slot_pages,
            v_stride=v_stride,
            **strides,
            **addresses,
        )
        step.kept = given
        return step


def address_of(tensor):
    return c_void_p(tensor.data_ptr())
