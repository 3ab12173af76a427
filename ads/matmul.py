"""Products of float32 matrices in a CPU's matrix registers (AMX): native.c's instead of torch's.

    with matmul.in_tiles():
        loss = model(**batch).loss
        loss.backward()

As close to the exact product as torch's (tests/test_matmul.py), and a row's result depends on no other row.
Where there are no such registers or no compiler, or with ADS_NATIVE=0, the context changes nothing.

Shapes: R rows, I inputs, O outputs.
"""

import contextlib
import ctypes
import functools
from ctypes import POINTER, c_int, c_int64, c_void_p

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ads.cpu import native
from ads.kv_cache import whole

LEAST_SIZE = 256  # of inputs and outputs: what is smaller is packed for longer than multiplied
OPERATIONS_PER_THREAD = 5e7  # about 0.2 ms of one core
ALIGNMENT = 64  # bytes
TORCH_FORWARD = torch.nn.Linear.forward


class Operand(ctypes.Structure):
    _fields_ = [
        ("at", c_void_p),
        *native.fields(c_int64, "rows depth stride"),
        ("is_transposed", c_int),
    ]


@functools.cache
def library():
    """The compiled code, or None where it cannot multiply in tiles."""
    code = native.library()
    if code is None or not code.ads_has_tiles():
        return None
    code.ads_matmul_room.argtypes = [c_int64, c_int64, c_int]
    code.ads_matmul_room.restype = c_int64
    code.ads_matmul.argtypes = [POINTER(Operand), POINTER(Operand), c_void_p, c_void_p, c_int]
    code.ads_matmul.restype = None
    return code


@contextlib.contextmanager
def in_tiles():
    """A context in which native.c computes nn.Linear of float32 on the CPU, forward and backward.

    The class's own forward is replaced meanwhile, which holds whoever calls a layer (gradient checkpointing).
    """
    if library() is not None:
        torch.nn.Linear.forward = forward
    try:
        yield
    finally:
        torch.nn.Linear.forward = TORCH_FORWARD


def forward(layer, input):
    return (linear if suits(input, layer.weight) else functional.linear)(input, layer.weight, layer.bias)


def multiplier(input, weight):
    """`multiply` where it suits, within in_tiles() or not; else torch's."""
    return multiply if library() is not None and suits(input, weight) else torch.mm


def suits(input, weight):
    """Whether native.c multiplies by this weight; how many rows there are does not matter."""
    are_plain = type(input) is torch.Tensor and type(weight) in (torch.Tensor, torch.nn.Parameter)
    are_float = input.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    on_cpu = input.device.type == weight.device.type == "cpu"
    return are_plain and are_float and on_cpu and min(weight.shape) >= LEAST_SIZE


def linear(input, weight, bias):
    """functional.linear: (..., O) of (..., I), (O, I) and (O)."""
    y_RO = Linear.apply(input.reshape(-1, input.shape[-1]), weight)
    y = y_RO.view(*input.shape[:-1], len(weight))
    return y if bias is None else y + bias


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RI, weight_OI):
        ctx.save_for_backward(x_RI, weight_OI)
        return multiply(x_RI, weight_OI.T)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_RO):
        x_RI, weight_OI = ctx.saved_tensors
        for_x, for_weight = ctx.needs_input_grad
        dx_RI = multiply(dy_RO, weight_OI) if for_x else None
        return dx_RI, multiply(dy_RO.T, x_RI) if for_weight else None


def multiply(a_MK, b_KN):
    """Their product (M, N); all float32."""
    assert a_MK.dtype == b_KN.dtype == torch.float32 and a_MK.shape[1] == len(b_KN)
    c_MN = a_MK.new_empty(len(a_MK), b_KN.shape[1])
    if not a_MK.shape[1]:
        return c_MN.zero_()
    left, right = operand(a_MK), operand(b_KN.T)
    operations = 2 * a_MK.numel() * b_KN.shape[1]
    num_threads = min(torch.get_num_threads(), 1 + int(operations / OPERATIONS_PER_THREAD))
    code = library()
    size = code.ads_matmul_room(left[0].rows, left[0].depth, num_threads) + ALIGNMENT // 4
    room = torch.empty(size, dtype=torch.int32, device="cpu")
    start = whole(room.data_ptr(), ALIGNMENT)
    code.ads_matmul(left[0], right[0], c_MN.data_ptr(), start, num_threads)
    return c_MN


def operand(a_RK):
    """(Operand, the tensor it is in)."""
    if a_RK.stride(1) != 1 and a_RK.stride(0) != 1:
        a_RK = a_RK.contiguous()
    is_transposed = a_RK.stride(1) != 1
    return Operand(a_RK.data_ptr(), *a_RK.shape, a_RK.stride(int(is_transposed)), is_transposed), a_RK
