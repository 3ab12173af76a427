"""The linear layers and norms of a decoding step, plain or in dual numbers, on fused matrices.

Shapes: R rows: N, or 2N in dual numbers (values above derivatives, as in dual/model.py); I and O a product's
inputs and outputs; J columns of room for an input, of which x has the first.
"""

import torch
from torch.nn import functional

from ads import cpu
from ads.dual.factors import Factors, dense
from ads.dual.model import stack_columns, stack_rows
from ads.dual.norms import normalise, scale, unit_rows
from ads.dual.rules import Weight, halves, make_weight, pair_of

MARGIN = 8  # columns beside a Stream, of which one is used: rows stay multiples of 16 bytes


class Product:
    """x to [W_1 x; W_2 x; ...] for linear layers of the same input, (R, I) to (R, O)."""

    def __init__(self, *layers, is_table=False):
        weights, biases = [m.weight for m in layers], [m.bias for m in layers]
        tangents = [getattr(weight, "tangent", None) for weight in weights]
        self.num_outputs, self.left_RO, self.g_OI = sum(map(len, weights)), None, None
        self.is_dual = isinstance(weights[0], Weight)
        rows = [w.detach().as_subclass(torch.Tensor) for w in weights]
        if all(isinstance(tangent, Factors) for tangent in tangents):
            rows += [tangent.right for tangent in tangents]
            self.left_RO = torch.block_diag(*(tangent.left for tangent in tangents)).T.contiguous()
        elif self.is_dual:
            self.g_OI = torch.cat([dense(tangent) for tangent in tangents])
        if is_table:  # tied: one matrix of its own already, whose rows are read
            base = weights[0].extended if self.left_RO is not None else rows[0]
        else:
            base = stack_rows(rows)
            repoint(layers, base, self.g_OI)
        if self.left_RO is not None:
            repoint_left([m.weight for m in layers], self.left_RO)
        self.base_PI = base
        self.shape = base.shape[1]  # of its input
        self.bias = None if biases[0] is None else self.join(biases)

    def join(self, biases):
        """(O,), or (2, 1, O) in dual numbers."""
        if not self.is_dual:
            return torch.cat([b.detach() for b in biases])
        values_and_tangents = zip(*map(pair_of, biases), strict=True)
        return torch.stack([torch.cat(part) for part in values_and_tangents])[:, None]

    def __call__(self, x_RI):
        if not self.is_dual:
            return functional.linear(x_RI, self.base_PI, self.bias)
        num_rows, y = x_RI.shape[0] // 2, functional.linear(x_RI, self.base_PI)
        if self.left_RO is not None:  # one product has given W x, W dx and right x
            y, thin = y.split((self.num_outputs, self.left_RO.shape[0]), dim=1)
            y.narrow(0, num_rows, num_rows).addmm_(thin.narrow(0, 0, num_rows), self.left_RO)
        else:
            y[num_rows:].addmm_(x_RI[:num_rows], self.g_OI.T)
        if self.bias is not None:
            y.unflatten(0, (2, -1)).add_(self.bias)
        return y

    def add_to_(self, x_RO, y_RI):
        """Add the product with y to x, in place."""
        if self.bias is not None:
            x_RO.add_(self(y_RI))
        else:
            x_RO.addmm_(y_RI, self.base_PI.T)

    def make_input(self, num_rows):
        return self.base_PI.new_empty(num_rows, self.base_PI.shape[1])


class DualProduct:
    """x to [W_1 x; W_2 x; ...] for linear layers of the same input, in dual numbers, where torch multiplies.

    Left factors of g and biases are columns beside W, so that one product adds all up, also to what is there:

        values        [ x     0         1   0 ]   [W  left  b  db]^T
        derivatives   [dx   right x     0   1 ]
    """

    def __init__(self, *layers):
        weights, biases = [m.weight for m in layers], [m.bias for m in layers]
        tangents = [weight.tangent for weight in weights]
        is_factored, has_bias = all(isinstance(t, Factors) for t in tangents), biases[0] is not None
        self.right_RI = torch.cat([t.right for t in tangents]) if is_factored else None
        self.g_OI = None if is_factored else torch.cat([dense(t) for t in tangents])
        self.num_inputs, self.rank = weights[0].shape[1], len(self.right_RI) if is_factored else 0
        columns = [torch.cat([w.detach().as_subclass(torch.Tensor) for w in weights])]
        if is_factored:
            columns.append(torch.block_diag(*(t.left for t in tangents)))
        if has_bias:
            columns += [torch.cat(part)[:, None] for part in zip(*map(pair_of, biases), strict=True)]
        self.ones = (self.num_inputs + self.rank) if has_bias else None  # the first column of ones
        missing = -sum(part.shape[1] for part in columns) % MARGIN
        columns.append(columns[0].new_zeros(len(columns[0]), missing))
        self.base_OJ = stack_columns(columns)
        self.shape = self.num_inputs, self.rank, has_bias  # of its input
        self.repoint(layers)

    def repoint(self, layers):
        """Make weights and factors of the layers views of the matrices."""
        row, column = 0, 0
        for layer in layers:
            weight = layer.weight
            last_row, rank = row + len(weight), len(weight.tangent.right) if self.rank else 0
            left = slice(self.num_inputs + column, self.num_inputs + column + rank)
            if self.rank:
                tangent = Factors(self.base_OJ[row:last_row, left], self.right_RI[column : column + rank])
            else:
                tangent = self.g_OI[row:last_row]
            layer.weight = make_weight(self.base_OJ[row:last_row, : self.num_inputs], tangent)
            row, column = last_row, column + rank

    def make_input(self, num_rows):
        """(R, J) for x in its first columns; the others are what they must be, or become it."""
        room_RJ = self.base_OJ.new_zeros(num_rows, self.base_OJ.shape[1])
        if self.ones is not None:
            for part, half in enumerate(halves(room_RJ)):
                half[:, self.ones + part] = 1
        return room_RJ

    def fill(self, room_RJ):
        """(x, derivatives' rows) of an input, of which right x is now a part."""
        num_rows = len(room_RJ) // 2
        x_NI = room_RJ[:num_rows, : self.num_inputs]
        if self.rank:
            right_x = room_RJ[num_rows:, self.num_inputs : self.num_inputs + self.rank]
            torch.mm(x_NI, self.right_RI.T, out=right_x)
        return x_NI

    def __call__(self, room_RJ):
        x_NI = self.fill(room_RJ)
        y_RO = functional.linear(room_RJ, self.base_OJ)
        if not self.rank:
            y_RO[len(x_NI) :].addmm_(x_NI, self.g_OI.T)
        return y_RO

    def add_to_(self, x_RO, room_RJ):
        """Add the product to x, in place."""
        x_NI = self.fill(room_RJ)
        x_RO.addmm_(room_RJ, self.base_OJ.T)
        if not self.rank:
            x_RO[len(x_NI) :].addmm_(x_NI, self.g_OI.T)


def make_product(*layers, is_table=False):
    weight = layers[0].weight
    if isinstance(weight, Weight) and not is_table and not cpu.decodes(weight):
        return DualProduct(*layers)
    return Product(*layers, is_table=is_table)


def repoint_left(weights, left_RO):
    """Make the left factors views of one matrix: the gradient's file has no users left and can be closed."""
    row, column = 0, 0
    for weight in weights:
        factors = weight.tangent
        last_row, last_column = row + len(factors.right), column + len(weight)
        weight.tangent = Factors(left_RO[row:last_row, column:last_column].T, factors.right)
        row, column = last_row, last_column


def repoint(layers, base_PI, g_OI):
    """Make the weights of layers views of one matrix, and their tangents, too."""
    first, first_right = 0, sum(len(m.weight) for m in layers)
    for layer in layers:
        last, weight = first + len(layer.weight), layer.weight
        if not isinstance(weight, Weight):
            weight.data = base_PI[first:last]
        elif g_OI is not None:
            layer.weight = make_weight(base_PI[first:last], g_OI[first:last])
        else:
            last_right = first_right + len(weight.tangent.right)
            tangent = Factors(weight.tangent.left, base_PI[first_right:last_right])
            layer.weight, first_right = make_weight(base_PI[first:last], tangent), last_right
        first = last


class Norm:
    """An RMS norm: (R, ..., I) to the same; in dual numbers of a Stream, or of any rows (`of_rows`)."""

    def __init__(self, module):
        weight = module.weight
        self.eps, self.width = module.variance_epsilon, (len(weight),)
        self.is_dual = isinstance(weight, Weight)
        self.scale = scale(weight, 0) if self.is_dual else weight.detach()
        self.unit_scale = self.scale * len(weight) ** 0.5

    def __call__(self, x, room_RJ=None):
        if self.is_dual:
            return x.normalise(self.unit_scale, room_RJ)
        return functional.rms_norm(x, self.width, self.scale, self.eps)

    def of_rows(self, x):
        return normalise(self.scale, self.eps, x).to(x.dtype) if self.is_dual else self(x)


class Stream:
    """What the layers of a dual step add to: zeros (N, I + MARGIN), values x and derivatives dx.

    In this order dual.unit_rows needs no copies. The first column of the margin makes eps of the norms part
    of the length of a row: the root of sum x^2 + I eps.
    """

    def __init__(self, x_RI, eps):
        num_rows, self.width = len(x_RI) // 2, x_RI.shape[1]
        self.rows_3NJ = x_RI.new_zeros(3, num_rows, self.width + MARGIN)
        self.x_RI = self.rows_3NJ[1:].flatten(0, 1)[:, : self.width]
        self.x_RI.copy_(x_RI)
        self.rows_3NJ[1, :, self.width] = (self.width * eps) ** 0.5
        self.ones_R1 = x_RI.new_ones(2 * num_rows, 1)

    def normalise(self, scale_2I, room_RJ):
        """w x / |x| and its derivative for a scale w, into the first columns of the room."""
        unit_RI = unit_rows(self.rows_3NJ, self.ones_R1)[:, : self.width]
        values, derivatives = halves(torch.mul(unit_RI, scale_2I[0], out=room_RJ[:, : self.width]))
        derivatives.addcmul_(unit_RI[: len(values)], scale_2I[1])
        return room_RJ
