"""The linear layers and norms of a decoding step, plain or in dual numbers.

Linear layers that read the same input (query, key and value; gate and up) are one product of a fused matrix,
of which the model's own weights become views. In dual numbers a product has to give

    y = W x + b        dy = W dx + dW x + db        where dW is whole, or left right (factors of g)

for x and dx as rows of one matrix, so that W is read once. The fused matrix has one of two layouts:

    rows, [W; right]           of Product: one multiplication gives W x, W dx and right x; what left makes of
                               right x is added after it. native.c reads this layout; so does a last layer
                               that is tied to the embeddings, which are looked up as rows of the same matrix
    columns, [W left b db]     of DualProduct: right x is made first and put beside dx, so that the other
                               multiplication adds up all, to the residual stream where it is to go there.
                               With a bias that takes a GPU two kernels, where the rows take four

Shapes: R rows: N, or 2N in dual numbers (values above derivatives, as in dual/model.py); I and O a product's
inputs and outputs, P rows of W and of right; J columns of the room for an input: x in the first I, what
DualProduct puts beside it, and padding to whole 16 bytes.
"""

import torch
from torch.nn import functional

from ads import cpu
from ads.dual.factors import Factors, dense
from ads.dual.model import stack_columns, stack_rows
from ads.dual.norms import normalise, scale, unit_rows
from ads.dual.rules import Dual, Weight, halves, linear, make_weight, pair_of

MARGIN = 8  # columns of a Stream beside x, of which one is used: rows stay multiples of 16 bytes


def make_product(*layers, is_table=False):
    """The product of linear layers of one input; is_table: of a last layer tied to the embeddings."""
    weight = layers[0].weight
    if isinstance(weight, Weight) and not is_table and not cpu.decodes(weight):
        return DualProduct(*layers)
    return Product(*layers, is_table=is_table)


class Product:
    """x to [W_1 x; W_2 x; ...], (R, I) to (R, O): plain, or in dual numbers with right factors below W.

    bias: (O,), or (2, 1, O) in dual numbers; left_RO and g_OI: g in left factors or whole, else None.
    """

    def __init__(self, *layers, is_table=False):
        weights, biases = [m.weight for m in layers], [m.bias for m in layers]
        self.layers, self.num_outputs = layers, sum(map(len, weights))
        self.is_dual = isinstance(weights[0], Weight)
        tangents = [weight.tangent for weight in weights] if self.is_dual else []
        is_factored = self.is_dual and all(isinstance(tangent, Factors) for tangent in tangents)
        self.left_RO = left_of(tangents).T.contiguous() if is_factored else None
        self.g_OI = torch.cat(list(map(dense, tangents))) if self.is_dual and not is_factored else None
        rows = [w.detach().as_subclass(torch.Tensor) for w in weights]
        if is_table:
            self.base_PI = weights[0].extended if is_factored else rows[0]
        else:
            self.base_PI = stack_rows(rows + [tangent.right for tangent in tangents if is_factored])
        left_OR = self.left_RO.T if is_factored else None
        matrices = self.base_PI[: self.num_outputs], self.g_OI, left_OR, self.base_PI[self.num_outputs :]
        repoint(layers, *matrices, is_table)
        self.shape = self.base_PI.shape[1]  # of its input
        self.bias = None
        if biases[0] is not None and self.is_dual:
            self.bias = torch.stack(join_pairs(biases))[:, None]
        elif biases[0] is not None:
            self.bias = torch.cat([b.detach() for b in biases])

    def __call__(self, x_RI):
        if self.is_dual:  # the tied last layer: native.c multiplies by all others of this layout
            dual_x = x_RI.as_subclass(Dual)
            return linear(None, dual_x, self.layers[0].weight, self.layers[0].bias).as_subclass(torch.Tensor)
        return functional.linear(x_RI, self.base_PI, self.bias)

    def add_to_(self, x_RO, y_RI):
        """Add the product with y to x, in place; of plain numbers alone."""
        if self.bias is not None:
            x_RO.add_(self(y_RI))
        else:
            x_RO.addmm_(y_RI, self.base_PI.T)

    def make_input(self, num_rows):
        return self.base_PI.new_empty(num_rows, self.base_PI.shape[1])


class DualProduct:
    """x to [W_1 x; W_2 x; ...] in dual numbers, with factors of g and biases in columns beside W:

    values        [ x     0         1   0 ]   [W  left  b  db]^T
    derivatives   [dx   right x     0   1 ]
    """

    def __init__(self, *layers):
        weights, biases = [m.weight for m in layers], [m.bias for m in layers]
        tangents = [weight.tangent for weight in weights]
        is_factored, has_bias = all(isinstance(t, Factors) for t in tangents), biases[0] is not None
        self.right_RI = torch.cat([t.right for t in tangents]) if is_factored else None
        self.g_OI = None if is_factored else torch.cat(list(map(dense, tangents)))
        self.num_inputs, self.rank = weights[0].shape[1], len(self.right_RI) if is_factored else 0
        self.left = slice(self.num_inputs, self.num_inputs + self.rank)  # its columns, and those of right x
        columns = [torch.cat([w.detach().as_subclass(torch.Tensor) for w in weights])]
        if is_factored:
            columns.append(left_of(tangents))
        if has_bias:
            columns += [part[:, None] for part in join_pairs(biases)]
        self.ones = self.left.stop if has_bias else None  # the first column of ones
        missing = -sum(part.shape[1] for part in columns) % MARGIN
        columns.append(columns[0].new_zeros(len(columns[0]), missing))
        self.base_OJ = stack_columns(columns)
        self.shape = self.num_inputs, self.rank, has_bias  # of its input
        matrices = self.base_OJ[:, : self.num_inputs], self.g_OI, self.base_OJ[:, self.left], self.right_RI
        repoint(layers, *matrices)

    def make_input(self, num_rows):
        """(R, J) for x in its first columns; the others are what they must be, or become it."""
        room_RJ = self.base_OJ.new_zeros(num_rows, self.base_OJ.shape[1])
        if self.ones is not None:
            for part, half in enumerate(halves(room_RJ)):
                half[:, self.ones + part] = 1
        return room_RJ

    def fill(self, room_RJ):
        """Put right x beside dx, in an input that has x and dx; returns x."""
        num_rows = len(room_RJ) // 2
        x_NI = room_RJ[:num_rows, : self.num_inputs]
        if self.rank:
            torch.mm(x_NI, self.right_RI.T, out=room_RJ[num_rows:, self.left])
        return x_NI

    def __call__(self, room_RJ):
        x_NI = self.fill(room_RJ)
        return self.add_g_(functional.linear(room_RJ, self.base_OJ), x_NI)

    def add_to_(self, x_RO, room_RJ):
        """Add the product to x, in place."""
        x_NI = self.fill(room_RJ)
        self.add_g_(x_RO.addmm_(room_RJ, self.base_OJ.T), x_NI)

    def add_g_(self, y_RO, x_NI):
        """Add dW x where g is whole."""
        if not self.rank:
            y_RO[len(x_NI) :].addmm_(x_NI, self.g_OI.T)
        return y_RO


def join_pairs(biases):
    """[values, derivatives] of several biases as one, (O,) each."""
    return [torch.cat(part) for part in zip(*map(pair_of, biases), strict=True)]


def left_of(tangents):
    """The left factors of several layers as one (O, R): each has columns of its own."""
    return torch.block_diag(*(tangent.left for tangent in tangents))


def repoint(layers, weight_OI, g_OI, left_OR, right_RI, is_table=False):
    """Make the layers' weights views of a fused matrix, and their derivatives views of g or of its factors.

    Nothing uses the tensors that they were before, nor the files that these were read from.
    """
    row = column = 0
    for layer in layers:
        weight, first = layer.weight, row
        row += len(weight)
        if not isinstance(weight, Weight):
            weight.data = weight_OI[first:row]
            continue
        if g_OI is not None:
            tangent = g_OI[first:row]
        else:
            columns = slice(column, column + len(weight.tangent.right))
            tangent, column = Factors(left_OR[first:row, columns], right_RI[columns]), columns.stop
        if is_table:  # its weight is in place, and is the embedding's, too
            weight.tangent = tangent
        else:
            layer.weight = make_weight(weight_OI[first:row], tangent)


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

    In this order unit_rows (dual/norms.py) needs no copies. The first column of the margin makes eps of the
    norms part of the length of a row: the root of sum x^2 + I eps.
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
