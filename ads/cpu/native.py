"""decoder.Step in compiled code, for CPUs in float32 and bfloat16: native.c, built at first use.

Nothing depends on it. Without a C compiler (CC, else cc) or AVX-512, or with ADS_NATIVE=0, torch computes the
same. ADS_NATIVE=avx512 does without matrix registers (AMX) only. Shapes as in decoder.py.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch.nn import functional

from ads.cpu.pages import LANES, PAGE, Pages
from ads.kv_cache import whole
from ads.stage.config import native_setting

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = "-std=gnu11 -O3 -march=native -fopenmp -fno-math-errno -fno-trapping-math -shared -fPIC"
WITHOUT_TILES = "-U__AMX_BF16__"
BUILD_SECONDS = 120
# Work that pays for another thread, about 10 ms of one core: threads meet after every product, and beside
# other processes each meeting may take the time slice of one.
OPERATIONS_PER_THREAD = 1e9
PANEL = 8  # native.c has the same


def fields(kind, names):
    return [(name, kind) for name in names.split()]


PRODUCTS = ("qkv", "output", "gate_up", "down")


class Product(ctypes.Structure):
    _fields_ = [*fields(c_int64, "outs ins rank"), *fields(c_void_p, "weight g left bias d_bias")]


class Norm(ctypes.Structure):
    _fields_ = [*fields(c_void_p, "scale d_scale"), ("eps", c_float)]


class Layer(ctypes.Structure):
    _fields_ = [
        *fields(Norm, "before_attention before_mlp of_queries of_keys"),
        *fields(Product, " ".join(PRODUCTS)),
        *fields(c_void_p, "keys values"),
        ("window", c_int64),
        ("scaling", c_float),
    ]


class Model(ctypes.Structure):
    _fields_ = [
        *fields(c_int64, "num_layers hidden heads kv_heads width inner is_dual"),
        ("layers", POINTER(Layer)),
        ("last", Norm),
        ("head", Product),
    ]


class Halves(ctypes.Structure):
    _fields_ = fields(c_void_p, "panels packed")


class Place(ctypes.Structure):
    _fields_ = [
        *fields(c_int64, "rows slot_pages page_stride part_stride v_stride"),
        *fields(c_void_p, "pages cos sin lengths x logits normed wide mixed thin"),
        ("room", Halves),
        *fields(c_void_p, "scores head_rows"),
    ]


@functools.cache
def library():
    """The compiled code, or None where it cannot be had."""
    if native_setting() == "0" or "avx512f" not in cpu_flags():
        return None
    try:
        code = load()
        code.ads_step.argtypes = [POINTER(Model), POINTER(Place), c_int]
        rooms = [c_void_p, c_void_p, c_void_p, POINTER(Halves)]
        code.ads_product.argtypes = [POINTER(Product), c_int, c_int64, *rooms, c_int]
        code.ads_mix.argtypes = [c_void_p, c_int64, c_void_p, c_int64, c_int64, c_void_p]
        code.ads_step.restype = code.ads_product.restype = code.ads_mix.restype = None
    except (OSError, RuntimeError, ValueError, AttributeError, subprocess.SubprocessError) as error:
        print(f"native.c cannot be used, torch decodes instead: {first_error(error)}", file=sys.stderr)
        return None
    return code


def other_ways():
    """The values of ADS_NATIVE by which this machine would compute in another way than by default."""
    if library() is None:
        return []
    return ["0", "avx512"] if library().ads_has_tiles() else ["0"]


def cpu_flags():
    """What the CPU can do, as Linux says it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return sorted({word for line in lines if line.startswith("flags") for word in line.split()})


def load():
    path = build()
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # damaged, or made for another C library
        path.unlink()
        return ctypes.CDLL(str(build()))


def first_error(error):
    """One line; of a compiler its first error."""
    lines = getattr(error, "stderr", None) or b""
    errors = [line for line in lines.decode(errors="replace").splitlines() if "error" in line]
    return errors[0] if errors else " ".join(str(error).split())


def build():
    """The shared library's path; made once per source, command and kind of CPU, in the user's cache."""
    command = [*shlex.split(os.environ.get("CC") or "cc"), *FLAGS.split()]
    if native_setting() == "avx512":
        command.append(WITHOUT_TILES)
    # home directories are shared between unlike machines, and -march=native depends on the machine
    made_of = repr([SOURCE.read_text(), command, platform.machine(), cpu_flags()])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "antidistillation-sampling"
    path = cache / f"native-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            made = Path(folder) / path.name
            subprocess.run(
                [*command, str(SOURCE), "-o", str(made), "-lm"],
                check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=BUILD_SECONDS,
            )  # fmt: skip
            made.chmod(0o700)
            with made.open("rb") as file:
                os.fsync(file.fileno())
            made.replace(path)
    for owned in (cache, path):
        found = owned.stat()
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise PermissionError(f"{owned} can be written by others")
    return path


def suits(weight):
    """Whether a model with this weight is decoded by native.c if its modules allow it."""
    is_known = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
    return is_known and library() is not None


class CompiledStep:
    """The layers and the head of a decoder.Step, whose matrices it reads; the cache has Pages."""

    def __init__(self, step):
        self.kept = []  # what C has the addresses of
        self.table = step.table.weight
        layers, first, hidden = step.layers, step.layers[0], self.table.shape[1]
        self.indices = [layer.index for layer in layers]
        self.layers = (Layer * len(layers))(*map(self.layer, layers))
        self.model = Model(
            num_layers=len(layers),
            hidden=hidden,
            heads=first.num_heads,
            kv_heads=first.num_keys,
            width=first.width,
            inner=first.gate_up.num_outputs // 2,
            is_dual=step.is_dual,
            layers=self.layers,
            last=self.norm(step.norm),
            head=self.product(step.head),
        )
        products = [getattr(layer, name) for layer in self.layers for name in PRODUCTS] + [self.model.head]
        # floats of a Place's rooms: for each row, each slot, and each thread and position
        self.row_sizes = {
            "normed": hidden,
            "wide": max(products[0].outs, products[2].outs),
            "mixed": max(products[1].ins, products[3].ins),
        }
        self.greatest_rank = max(p.rank for p in products)
        self.widest = max(p.ins for p in products)
        self.is_half = self.table.dtype == torch.bfloat16
        self.has_tiles = bool(library().ads_has_tiles())
        self.thread_rows = 2 * first.num_heads // first.num_keys
        self.num_weights = sum(p.outs * p.ins for p in products)
        is_grouped = first.num_heads % first.num_keys == 0
        self.fits = is_grouped and all(map(self.has_sizes, layers, self.layers))

    def has_sizes(self, layer, native):
        """Whether a layer has the sizes of the first, by which C goes."""
        m, found = self.model, [(p.outs, p.ins) for p in (getattr(native, name) for name in PRODUCTS)]
        in_heads = m.heads * m.width
        wanted = (in_heads + 2 * m.kv_heads * m.width, m.hidden), (m.hidden, in_heads)
        wanted += (2 * m.inner, m.hidden), (m.hidden, m.inner)
        heads = layer.num_heads, layer.num_keys, layer.width
        return found == [*wanted] and heads == (m.heads, m.kv_heads, m.width)

    def layer(self, layer):
        head_norms = [self.norm(norm) for norm in layer.head_norms] or [Norm(), Norm()]
        products = [self.product(getattr(layer, name)) for name in PRODUCTS]
        return Layer(*map(self.norm, layer.norms), *head_norms, *products, scaling=layer.scaling)

    def norm(self, norm):
        scales = norm.scale.unbind() if norm.is_dual else [norm.scale, None]
        return Norm(*map(self.address, scales), norm.eps)

    def product(self, product):
        biases = [None, None]
        if product.bias is not None:
            biases[: 1 + product.is_dual] = product.bias.view(-1, product.num_outputs)
        rank = 0 if product.left_RO is None else len(product.left_RO)
        matrices = (self.address(matrix, None) for matrix in (product.base_PI, product.g_OI))
        vectors = map(self.address, (product.left_RO, *biases))
        return Product(product.num_outputs, product.base_PI.shape[1], rank, *matrices, *vectors)

    def address(self, tensor, dtype=torch.float32):
        """Of a tensor's numbers, which stay where they are if they are of that dtype; None for None."""
        if tensor is None:
            return None
        self.kept.append(tensor.to(dtype or tensor.dtype).contiguous())
        return self.kept[-1].data_ptr()

    def embed(self, tokens_N):
        """Float32 embeddings (R, I) of tokens; derivatives from factors of g row by row."""
        values_NI = functional.embedding(tokens_N, self.table.detach().as_subclass(torch.Tensor)).float()
        if not self.model.is_dual:
            return values_NI
        g = self.table.tangent
        if isinstance(g, torch.Tensor):  # else its factors
            return torch.cat([values_NI, functional.embedding(tokens_N, g).float()])
        left_NR, right_RI = g.left[tokens_N].float().contiguous(), g.right.float().contiguous()
        changes_NI = torch.empty_like(values_NI)
        sizes = len(tokens_N), right_RI.data_ptr(), *right_RI.shape
        library().ads_mix(left_NR.data_ptr(), *sizes, changes_NI.data_ptr())
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
        sizes = {
            "slot_pages": storage.table_BP.shape[1],
            "page_stride": storage.memory.stride(0),
            "part_stride": storage.memory.stride(1),
            "v_stride": storage.values.stride(-2),
        }
        given = {"cos": cos_ND, "sin": sin_ND, "lengths": lengths_N.long(), "x": x_RI}
        given = {name: tensor.contiguous() for name, tensor in given.items()} | {"pages": storage.table_BP}
        given["logits"] = x_RI.new_empty(len(x_RI), self.model.head.outs)
        given |= self.rooms(x_RI, num_threads, sizes)
        addresses = {name: tensor.data_ptr() for name, tensor in given.items()}
        addresses["room"], _kept = self.room_for_halves(len(x_RI), num_threads)
        library().ads_step(self.model, Place(rows=num_rows, **sizes, **addresses), num_threads)
        return given["logits"]

    def rooms(self, x_RI, num_threads, sizes):
        """{name: memory that a step uses}."""
        floats = {name: len(x_RI) * size for name, size in self.row_sizes.items()}
        floats["thin"] = len(x_RI) * self.greatest_rank
        floats["scores"] = num_threads * self.thread_rows * sizes["slot_pages"] * PAGE
        floats["head_rows"] = num_threads * self.thread_rows * sizes["v_stride"]
        parts = x_RI.new_empty(sum(floats.values())).split(list(floats.values()))
        return dict(zip(floats, parts, strict=True))

    def room_for_halves(self, num_rows, num_threads):
        """Halves, and the memory they are in."""
        if not self.is_half:
            return Halves(), None
        num_packed = whole(num_rows, LANES) if self.has_tiles else 0
        parts = torch.empty((num_threads * PANEL + num_packed) * self.widest)
        panels, packed = parts.split([num_threads * PANEL * self.widest, num_packed * self.widest])
        return Halves(panels.data_ptr(), packed.data_ptr() if num_packed else None), parts
