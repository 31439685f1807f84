"""The memory layouts of a batch of matrices on a CPU, and the contractions each does fast.

``BatchFirst`` (B, n, m) contracts by batched row-vector products: measured 20 entries/ns on two cores where the batched
column-vector product of the same matrices reaches 2. Matrices that fit one vector register or two are too small for that
(1 entry/ns at n = 16): ``Bags`` sums their lines, weighted, as an embedding bag does its rows, the one multiply-and-sum
that torch has in one pass (7 entries/ns; a product and a sum over the batch as the lane make three passes, 3 entries/ns,
and half of that where two processors share one core's ports). ``BatchLast`` (n, m, B) makes the batch the vector lane,
which wins for the smallest, and for doubles, which embedding bags do one by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

_BATCH_LAST_MAX_SIDE = 16  # beyond, row-vector products read a matrix faster than lanes of matrices do
_BATCH_LAST_MIN_BATCH = 32  # times max(n, m): fewer lanes do not pay for the larger number of calls
_BAGS_SIDES = range(9, 17)  # below, lanes of matrices win; beyond, row-vector products do without a transpose
WAITING = 10  # rank-one terms for one product: 40 are 1.1 times faster and take a third more memory
_ADDCMUL_MAX_SIDE = 8  # beyond, one product and one sum need fewer calls than a chain of addcmul


class BatchFirst:
    """Matrices (B, n, m), vectors (B, n)."""

    rows, cols, line, batch = -2, -1, -1, 0
    batch_multiple = 1

    @staticmethod
    def buffer(flat: Tensor, shape: torch.Size) -> Tensor:
        """A matrix of this layout for (B, n, m) ``shape`` in a flat buffer."""
        return flat[: shape.numel()].view(shape)

    @staticmethod
    def matrix(x: Tensor) -> Tensor:
        """View a (B, n, m) tensor in this layout."""
        return x

    @staticmethod
    def batch_first(x: Tensor) -> Tensor:
        """View a matrix of this layout as (B, n, m)."""
        return x

    @staticmethod
    def vector(x: Tensor) -> Tensor:
        """View a (B, n) tensor in this layout, and back."""
        return x

    @staticmethod
    def scalar(x: Tensor) -> Tensor:
        """View a (B,) tensor so that it broadcasts over vectors."""
        return x.unsqueeze(-1)

    @staticmethod
    def whole(x: Tensor) -> Tensor:
        """View a (B,) tensor so that it broadcasts over matrices."""
        return x.view(-1, 1, 1)

    @staticmethod
    def sums(x: Tensor, dim: int) -> Tensor:
        """Sum over lines, each matrix's in an order of its own."""
        return x.sum(dim)

    @staticmethod
    def down(x: Tensor) -> Tensor:
        """A row-indexed vector, to broadcast over columns."""
        return x.unsqueeze(-1)

    @staticmethod
    def across(x: Tensor) -> Tensor:
        """A column-indexed vector, to broadcast over rows."""
        return x.unsqueeze(-2)

    @staticmethod
    def operands(kernel: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
        """What ``contract`` takes to form K^T u, and K v."""
        return kernel, kernel.mT

    @staticmethod
    def contract(operand: Tensor, weights: Tensor, scratch: Tensor, out: Tensor) -> Tensor:
        """Sum of the lines of an operand, weighted."""
        return torch.bmm(weights.unsqueeze(1), operand, out=out.unsqueeze(1)).squeeze(1)

    @staticmethod
    def product_sums(x: Tensor, y: Tensor, scratch: Tensor, rows: Tensor, cols: Tensor) -> None:
        """Row and column sums of x * y."""
        product = x * y
        torch.sum(product, -1, out=rows)
        torch.sum(product, -2, out=cols)

    @staticmethod
    def needs_scratch(side: int) -> bool:
        """Whether contractions use their scratch matrix."""
        return False

    @staticmethod
    def refresh(kernel: Tensor, scratch: Tensor) -> None:
        """Bring ``scratch`` up to date with a new kernel."""

    stores_terms = True  # whether LowRank uses its store

    class LowRank:
        """Takes rank-one matrices a b^T from ``rest``, several as one product; ``store``: flat, where they wait for it."""

        def __init__(self, rest: Tensor, store: tuple[Tensor, Tensor]) -> None:
            batch, n, m = rest.shape
            self._rest, self._waiting = rest, 0
            self._left, self._right = (
                flat[: WAITING * batch * side].view(WAITING, batch, side) for flat, side in zip(store, (n, m), strict=True)
            )

        def take(self, a: Tensor, b: Tensor, times: float = 1.0) -> None:
            """Take a b^T ``times`` over; neither vector is kept."""
            if self._waiting == WAITING:
                self.rest()
            self._left[self._waiting].copy_(a)
            torch.mul(b, times, out=self._right[self._waiting])
            self._waiting += 1

        def rest(self) -> Tensor:
            """What is left, in place."""
            left, right = self._left[: self._waiting], self._right[: self._waiting]
            self._waiting = 0
            return self._rest.baddbmm_(left.permute(1, 2, 0), right.transpose(0, 1), alpha=-1)


class Bags(BatchFirst):
    """``BatchFirst`` whose contractions are embedding bags over the rows of K, or of its transpose in ``scratch``."""

    @staticmethod
    def operands(kernel: Tensor, scratch: Tensor) -> tuple[Any, Any]:
        """What ``contract`` takes to form K^T u, and K v: a table of lines, its indices, and where each bag begins."""
        batch, n, m = kernel.shape
        index = torch.arange(batch * max(n, m), dtype=torch.int32)

        def bags(table: Tensor, lines: int) -> tuple[Tensor, Tensor, Tensor]:
            return table, index[: len(table)], index[: len(table) : lines].contiguous()

        return bags(kernel.view(-1, m), n), bags(Bags._mirror(kernel, scratch).view(-1, n), m)

    @staticmethod
    def contract(operand: Any, weights: Tensor, scratch: Tensor, out: Tensor) -> Tensor:
        """Sum of the lines of an operand, weighted."""
        table, index, starts = operand
        return out.copy_(embedding_bag(index, table, starts, mode="sum", per_sample_weights=weights.reshape(-1)))

    @staticmethod
    def needs_scratch(side: int) -> bool:
        """Whether contractions use their scratch matrix."""
        return True

    @staticmethod
    def refresh(kernel: Tensor, scratch: Tensor) -> None:
        """Bring ``scratch`` up to date with a new kernel."""
        Bags._mirror(kernel, scratch).copy_(kernel.mT)

    @staticmethod
    def _mirror(kernel: Tensor, scratch: Tensor) -> Tensor:
        """The scratch matrix as (B, m, n)."""
        return scratch.view(kernel.mT.shape)


class BatchLast:
    """Matrices (n, m, B), vectors (n, B)."""

    rows, cols, line, batch = 0, 1, 0, -1
    batch_multiple = 64  # so that every line of every matrix starts on a cache line: measured 1.2 times faster

    @staticmethod
    def buffer(flat: Tensor, shape: torch.Size) -> Tensor:
        """A matrix of this layout for (B, n, m) ``shape`` in a flat buffer."""
        return flat[: shape.numel()].view(shape[1], shape[2], shape[0])

    @staticmethod
    def matrix(x: Tensor) -> Tensor:
        """View a (B, n, m) tensor in this layout."""
        return x.permute(1, 2, 0)

    @staticmethod
    def batch_first(x: Tensor) -> Tensor:
        """View a matrix of this layout as (B, n, m)."""
        return x.permute(2, 0, 1)

    @staticmethod
    def vector(x: Tensor) -> Tensor:
        """View a (B, n) tensor in this layout, and back."""
        return x.T

    @staticmethod
    def scalar(x: Tensor) -> Tensor:
        """View a (B,) tensor so that it broadcasts over vectors."""
        return x.unsqueeze(0)

    @staticmethod
    def whole(x: Tensor) -> Tensor:
        """View a (B,) tensor so that it broadcasts over matrices."""
        return x

    @staticmethod
    def sums(x: Tensor, dim: int) -> Tensor:
        """Sum over lines by halves: torch.sum's order, and with it the last bit, depends on how many lanes there are."""
        if x.shape[dim] == 1:
            return x.sum(dim)
        while x.shape[dim] > 1:
            half, odd = divmod(x.shape[dim], 2)
            halves = x.narrow(dim, 0, half) + x.narrow(dim, half, half)
            if odd:
                halves.narrow(dim, 0, 1).add_(x.narrow(dim, 2 * half, 1))
            x = halves
        return x.squeeze(dim)

    @staticmethod
    def down(x: Tensor) -> Tensor:
        """A row-indexed vector, to broadcast over columns."""
        return x.unsqueeze(1)

    @staticmethod
    def across(x: Tensor) -> Tensor:
        """A column-indexed vector, to broadcast over rows."""
        return x.unsqueeze(0)

    @staticmethod
    def operands(kernel: Tensor, scratch: Tensor) -> tuple[Any, Any]:
        """What ``contract`` takes to form K^T u, and K v: views made once, as making them would cost as much as a sum."""
        if scratch.numel():
            return (kernel, scratch), (kernel.transpose(0, 1), scratch.transpose(0, 1))
        return kernel.unbind(0), kernel.unbind(1)

    @staticmethod
    def contract(operand: Any, weights: Tensor, scratch: Tensor, out: Tensor) -> Tensor:
        """Sum of the lines of an operand, weighted."""
        if scratch.numel():
            kernel, product = operand
            return torch.sum(torch.mul(kernel, weights.unsqueeze(1), out=product), 0, out=out)
        first, *others = weights.unbind(0)
        torch.mul(operand[0], first, out=out)
        for line, weight in zip(operand[1:], others, strict=True):
            out.addcmul_(line, weight)
        return out

    @staticmethod
    def product_sums(x: Tensor, y: Tensor, scratch: Tensor, rows: Tensor, cols: Tensor) -> None:
        """Row and column sums of x * y."""
        if scratch.numel():
            product = torch.mul(x, y, out=scratch)
            torch.sum(product, 1, out=rows)
            torch.sum(product, 0, out=cols)
            return
        for sums, dim in ((rows, 1), (cols, 0)):
            (first, other), *rest = zip(x.unbind(dim), y.unbind(dim), strict=True)
            torch.mul(first, other, out=sums)
            for line, other in rest:
                sums.addcmul_(line, other)

    @staticmethod
    def needs_scratch(side: int) -> bool:
        """Whether contractions use their scratch matrix."""
        return side > _ADDCMUL_MAX_SIDE

    @staticmethod
    def refresh(kernel: Tensor, scratch: Tensor) -> None:
        """Bring ``scratch`` up to date with a new kernel."""

    stores_terms = False

    class LowRank:
        """Takes rank-one matrices a b^T from ``rest``, one by one; needs no store."""

        def __init__(self, rest: Tensor, store: tuple[Tensor, Tensor]) -> None:
            self._rest = rest

        def take(self, a: Tensor, b: Tensor, times: float = 1.0) -> None:
            """Take a b^T ``times`` over; neither vector is kept."""
            self._rest.addcmul_(a.unsqueeze(1), b.unsqueeze(0), value=-times)

        def rest(self) -> Tensor:
            """What is left, in place."""
            return self._rest


class Ring:
    """Vectors of one shape, handed out in turn and reused: a fresh one would cost a page fault per 4 kB at every use."""

    def __init__(self, flat: Tensor, count: int, shape: torch.Size) -> None:
        self.count = count
        self._vectors = flat[: count * shape.numel()].view(count, *shape).unbind(0)
        self._next = 0

    def take(self) -> Tensor:
        """The next vector, uninitialised."""
        vector = self._vectors[self._next]
        self._next = (self._next + 1) % len(self._vectors)
        return vector


Layout = type[BatchFirst] | type[BatchLast]  # Bags is a BatchFirst


def copy(target: Tensor, source: Tensor) -> None:
    """``target.copy_(source)`` for (B, n, m): between layouts as one 2-D transpose, which torch does in blocks."""
    if target.dim() == 3 and target.stride() != source.stride() and target.dtype == source.dtype:
        flat = [_as_2d(x) for x in (target, source)]
        if flat[0] is not None and flat[1] is not None:
            flat[0].copy_(flat[1])
            return
    target.copy_(source)


def _as_2d(x: Tensor) -> Tensor | None:
    """(B, n m) as a view, if the strides allow."""
    batch, n, m = x.shape
    return x.as_strided((batch, n * m), (x.stride(0), x.stride(2))) if n == 1 or x.stride(1) == m * x.stride(2) else None


def choose_layout(logits: Tensor, dtype: torch.dtype) -> Layout:
    """The fastest layout for a (B, n, m) batch computed in ``dtype``; on an accelerator always ``BatchFirst``."""
    batch, side = logits.shape[0], max(logits.shape[1:])
    if logits.device.type != "cpu":
        return BatchFirst
    if side in _BAGS_SIDES and dtype == torch.float32:
        return Bags
    return BatchLast if side <= _BATCH_LAST_MAX_SIDE and batch >= _BATCH_LAST_MIN_BATCH * side else BatchFirst
