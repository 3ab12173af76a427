"""A matrix as the product of two thin ones: how a gradient of many gigabytes is kept."""

import math
from dataclasses import dataclass

import torch

from ads import sampling

OVERSAMPLING = 8  # more columns than the rank in the sketch of a matrix
NUM_POWER_ITERATIONS = 2  # they sharpen the sketch where singular values fall off slowly


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


def square_norm(g) -> float:
    """The squared Euclidean norm (float64) of a tensor or of Factors."""
    if isinstance(g, Factors):
        left, right = g.left.double(), g.right.double()
        return ((left.T @ left) * (right @ right.T)).sum().item()
    return g.square().sum(dtype=torch.float64).item()


def saves_room(shape, rank: int) -> bool:
    return len(shape) == 2 and 0 < rank * sum(shape) < shape[0] * shape[1]


def factorise(matrix, rank: int, seed: int, name: str) -> Factors:
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


def random_tensor(read_gradient, seed: int, name: str):
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
