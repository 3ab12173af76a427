"""Products in matrix registers against float64 and against torch's."""

import contextlib

import pytest
import test_loss
import torch
from conftest import tiny_model
from test_central import sequences

from ads import loading, matmul
from ads.delta import gradient
from ads.dual.rules import Dual

pytestmark = pytest.mark.compiled

no_tiles = pytest.mark.skipif(matmul.library() is None, reason="no compiler or no matrix registers (AMX)")
SIZES = [  # edges of blocks of 32, of groups of 6 of them, of depths of 640, of 4,096 rows
    (1, 1, 1),
    (33, 70, 15),
    (64, 640, 192),
    (100, 641, 1290),
    (37, 1925, 224),
    (4101, 40, 33),
]
LAYOUTS = "rows rows", "columns rows", "rows columns", "columns columns", "gaps rows"


def random_matrix(rows, columns, layout):
    """Numbers of many magnitudes: by rows, by columns, within a larger matrix, or every second."""
    numbers = torch.randn(rows + 3, 2 * columns + 5) * 10 ** torch.empty(rows + 3, 1).uniform_(-4, 4)
    if layout == "columns":
        return numbers[:rows, :columns].T.contiguous().T
    return numbers[2 : rows + 2, 1 : 2 * columns + 1 : 2] if layout == "gaps" else numbers[:rows, :columns]


def error(found, a, b):
    """Of each row, relative to its exact product."""
    exact = a.double() @ b.double()
    return (found.double() - exact).norm(dim=1) / exact.norm(dim=1)


@no_tiles
@pytest.mark.parametrize("layouts", LAYOUTS)
@pytest.mark.parametrize("sizes", SIZES)
def test_as_close_to_the_exact_product_as_torch(sizes, layouts):
    torch.manual_seed(sum(sizes))
    num_rows, depth, num_columns = sizes
    of_a, of_b = layouts.split()
    a, b = random_matrix(num_rows, depth, of_a), random_matrix(depth, num_columns, of_b)
    b = b / b.norm(dim=1, keepdim=True)
    found = matmul.multiply(a, b)
    assert found.shape == (num_rows, num_columns)
    assert (error(found, a, b) < 1e-6).all()
    assert error(found, a, b).square().mean() < 2 * error(a @ b, a, b).square().mean() + 1e-14


@no_tiles
def test_a_row_depends_on_no_other_and_on_no_number_of_threads():
    torch.manual_seed(0)
    a, b = torch.randn(200, 700), torch.randn(700, 300)
    wanted, threads = matmul.multiply(a, b), torch.get_num_threads()
    chosen = [3, 199, 70]
    assert torch.equal(matmul.multiply(a[chosen], b), wanted[chosen])
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert torch.equal(matmul.multiply(a, b), wanted)
    finally:
        torch.set_num_threads(threads)


@no_tiles
def test_what_is_not_finite_stays_so_and_nothing_else_is_touched():
    a, b = torch.randn(40, 64), torch.randn(64, 50)
    a[3, 5], a[7, 9] = torch.nan, torch.inf
    is_finite = matmul.multiply(a, b).isfinite()
    assert not is_finite[[3, 7]].any()
    assert is_finite.all(1).sum() == 38
    assert torch.equal(matmul.multiply(torch.zeros(3, 0), torch.zeros(0, 4)), torch.zeros(3, 4))
    assert matmul.multiply(torch.zeros(0, 5), torch.zeros(5, 4)).shape == (0, 4)


@no_tiles
@pytest.mark.parametrize("size,bound", [(1e25, 1e-6), (1e-25, 1e-6), (1e-30, 2e-5), (1e-39, 1)])
def test_only_numbers_near_the_least_float_lose_bits(size, bound):
    found = matmul.multiply(torch.full((32, 64), size), torch.full((64, 32), 1e-3))
    assert ((found.double() / (64 * size * 1e-3) - 1).abs() <= bound).all()


@no_tiles
@pytest.mark.parametrize("shape", [(7, 300), (2, 5, 300), (2, 0, 300)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_layers_and_their_gradients(shape, has_bias, tile_products):
    torch.manual_seed(1)
    layer = torch.nn.Linear(shape[-1], 260, bias=has_bias)
    results = []
    for context in (matmul.in_tiles(), contextlib.nullcontext()):
        layer.zero_grad()
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
        with context:
            y = layer(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in layer.parameters())])
        assert len(tile_products) == 3  # forward, for x and for the weight; not without the context
    for found, wanted in zip(*results, strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@no_tiles
def test_frozen_weights_get_no_gradient():
    layer = torch.nn.Linear(256, 256).requires_grad_(False)
    x = torch.randn(4, 256, requires_grad=True)
    with matmul.in_tiles():
        layer(x).sum().backward()
    assert layer.weight.grad is None
    assert (x.grad - layer.weight.sum(0)).abs().max() < 1e-5


@no_tiles
def test_other_layers_are_torch_s(tile_products):
    layer, narrow = torch.nn.Linear(300, 300), torch.nn.Linear(300, 30)
    x = torch.randn(3, 300)
    with matmul.in_tiles():
        narrow(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        layer(x.as_subclass(Dual))
        layer.double()(x.double())
    layer.float()(x)
    assert not tile_products
    with matmul.in_tiles():
        layer(x)
    assert len(tile_products) == 1


def test_without_compiled_code_the_context_changes_nothing(monkeypatch, tile_products):
    monkeypatch.setattr(matmul, "library", lambda: None)
    with matmul.in_tiles():
        torch.nn.Linear(300, 300)(torch.randn(3, 300))
    assert not tile_products


@no_tiles
@pytest.mark.parametrize("kind", ("llama", "qwen2", "gemma3_text"))
@pytest.mark.parametrize("has_checkpoints", [False, True])
def test_the_proxy_gradient_is_that_of_torch_s_products(
    kind, has_checkpoints, all_sizes, tile_products, monkeypatch
):
    ours, plain = (tiny_model(kind, seed=3, spread=0.1) for _ in range(2))
    with loading.recomputed(ours, has_checkpoints):
        gradient.add_gradient_(ours, sequences(9), 9, batch_size=4)
    assert tile_products
    monkeypatch.setattr(matmul, "library", lambda: None)
    gradient.add_gradient_(plain, sequences(9), 9, batch_size=4)
    found, wanted = map(test_loss.flat_gradient, (ours, plain))
    assert 0 < (found - wanted).norm() < 3e-6 * wanted.norm()


@no_tiles
def test_distillation_too(tmp_path, all_sizes, tile_products):
    test_loss.test_sorted_steps_train_as_the_trainer_s_random_ones(tmp_path)
    assert tile_products
