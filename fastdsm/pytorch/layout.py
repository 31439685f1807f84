"""The memory layouts of a batch of matrices on a CPU, and the contractions each does fast.

``BatchFirst`` (B, n, m) contracts by batched row-vector products: measured 20 entries/ns on two cores where the batched
column-vector product of the same matrices reaches 2. Matrices that fit one vector register or two are too small for that
(1 entry/ns at n = 16): ``Bags`` sums their lines, weighted, as an embedding bag does its rows, the one multiply-and-sum
that torch has in one pass (7 entries/ns; a product and a sum over the batch as the lane make three passes, 3 entries/ns,
and half of that where two processors share one core's ports). ``BatchLast`` (n, m, B) makes the batch the vector lane,
which wins for the smallest, and for doubles, which embedding bags do one by one.

torch shares an operation between threads by its outermost dimension. Were that a line, each thread would read at the next
contraction what the others have just written; between cores without a common cache this doubled the time of 4x4. So with
several threads lanes come in blocks, outermost, and a thread has the same matrices in every operation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ring import Ring

_BATCH_LAST_MAX_SIDE = 16  # beyond, row-vector products read a matrix faster than lanes of matrices do
_BATCH_LAST_MIN_BATCH = 32  # times max(n, m): fewer lanes do not pay for the larger number of calls
_BAGS_SIDES = range(9, 17)  # below, lanes of matrices win; beyond, row-vector products do without a transpose
_CACHE_LINE = 64  # bytes
_LANES = _CACHE_LINE // 4
_SHARED_ABOVE = 32768  # elements from which torch shares an operation between threads
_ADDCMUL_MAX_SIDE = 8


class BatchFirst:
    """Matrices (B, n, m), vectors (B, n)."""

    rows, cols, line, batch = -2, -1, -1, 0
    needs_scratch = False  # whether contractions use their scratch matrix
    keeps_v = True  # whether a history holds v too, which LowRank then takes from there
    waiting = 8  # pairs of terms that LowRank lets wait: in 16x16, as many as take the place of a matrix

    @staticmethod
    def multiple() -> int:
        """What the number of matrices of a piece is best a multiple of."""
        return 1

    @staticmethod
    def blocks(batch: int, side: int) -> int | None:
        """In how many blocks so many matrices are best laid out, None where there are none."""
        return None

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
    def sums(x: Tensor, dim: int, out: Tensor | None = None) -> Tensor:
        """Sum over lines, each matrix's in an order of its own."""
        return torch.sum(x, dim, out=out)

    @staticmethod
    def movable(size: int) -> bool:
        """Whether results of a matrix of so many bytes are the same to the last bit wherever in whatever batch it is."""
        return size % _CACHE_LINE == 0  # products look at where a matrix begins

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
    def weights(x: Tensor) -> Tensor:
        """What ``contract`` takes for a vector."""
        return x.unsqueeze(1)

    @staticmethod
    def contract(operand: Tensor, weights: Tensor, scratch: Tensor, out: Tensor) -> Tensor:
        """Sum of the lines of an operand, weighted: ``out``, or a vector that nothing else uses."""
        return torch.bmm(weights, operand, out=out.unsqueeze(1)).squeeze(1)

    @staticmethod
    def product_sums(x: Tensor, y: Tensor, room: Tensor, rows: Tensor, cols: Tensor) -> None:
        """Row and column sums of x * y, which may be formed in ``room`` unless that is empty."""
        product = torch.mul(x, y, out=room) if room.numel() else x * y
        torch.sum(product, -1, out=rows)
        torch.sum(product, -2, out=cols)

    @staticmethod
    def refresh(kernel: Tensor, scratch: Tensor) -> None:
        """Bring ``scratch`` up to date with a new kernel."""

    class LowRank:
        """rest - sum of a v^T - u b^T, several sweeps as one product; v and u wait for it in ``history``.

        ``store``: rings of ``waiting`` vectors for a and b.
        """

        def __init__(self, rest: Tensor, store: tuple[Ring, Ring], history: tuple[Ring, Ring]) -> None:
            self._rest, self._store, self._history = rest, store, history
            self._u: list[Tensor] = []
            self._v: list[Tensor] = []

        def next(self) -> tuple[Tensor, Tensor]:
            """Where to put the next a and b; history is gone through backwards, hence so is the store."""
            if len(self._u) == self._store[0].count:
                self.rest()
            a, b = (ring.from_end(len(self._u)) for ring in self._store)
            return a, b

        def take(self, a: Tensor, v: Tensor, u: Tensor, b: Tensor) -> None:
            """Take a v^T and give u b^T, a and b being in the places that ``next`` told."""
            self._u.insert(0, u)
            self._v.insert(0, v)

        def rest(self) -> Tensor:
            """What is left, in place."""
            waiting = len(self._u)
            if waiting:
                a, b = (ring.last(waiting) for ring in self._store)
                u, v = (ring.together(x) for ring, x in zip(self._history, (self._u, self._v), strict=True))
                self._rest.baddbmm_(a.permute(1, 2, 0), v.transpose(0, 1), alpha=-1)
                self._rest.baddbmm_(u.permute(1, 2, 0), b.transpose(0, 1))
                self._u, self._v = [], []
            return self._rest


class Bags(BatchFirst):
    """``BatchFirst`` whose contractions are embedding bags over the rows of K, or of its transpose in ``scratch``."""

    needs_scratch = True

    @staticmethod
    def operands(kernel: Tensor, scratch: Tensor) -> tuple[Any, Any]:
        """What ``contract`` takes to form K^T u, and K v: a table of lines, its indices, and where bags begin and end."""
        batch, n, m = kernel.shape
        index = torch.arange(batch * max(n, m) + 1, dtype=torch.int32)

        def bags(table: Tensor, lines: int) -> tuple[Tensor, Tensor, Tensor]:
            return table, index[: len(table)], index[: len(table) + 1 : lines].contiguous()

        return bags(kernel.view(-1, m), n), bags(Bags._mirror(kernel, scratch).view(-1, n), m)

    @staticmethod
    def weights(x: Tensor) -> Tensor:
        """What ``contract`` takes for a vector."""
        return x.reshape(-1)

    @staticmethod
    def contract(operand: Any, weights: Tensor, scratch: Tensor, out: Tensor) -> Tensor:
        """Sum of the lines of an operand, weighted: ``out``, or a vector that nothing else uses."""
        table, index, bounds = operand
        return torch.embedding_bag(table, index, bounds, mode=0, per_sample_weights=weights, include_last_offset=True)[0]

    @staticmethod
    def refresh(kernel: Tensor, scratch: Tensor) -> None:
        """Bring ``scratch`` up to date with a new kernel."""
        Bags._mirror(kernel, scratch).copy_(kernel.mT)

    @staticmethod
    def _mirror(kernel: Tensor, scratch: Tensor) -> Tensor:
        """The scratch matrix as (B, m, n)."""
        return scratch.view(kernel.mT.shape)


class BatchLast:
    """Matrices (n, m, B), vectors (n, B), scalars (B,); in blocks (blocks, n, m, B / blocks) and so forth."""

    rows, cols, line, batch = -3, -2, -2, -1
    needs_scratch = False
    keeps_v = False  # vectors weigh so much that v is rather computed again
    waiting = 1

    @staticmethod
    def multiple() -> int:
        """What the number of matrices of a piece is best a multiple of: lines on cache lines were 1.2 times faster."""
        return _LANES * torch.get_num_threads()

    @staticmethod
    def blocks(batch: int, side: int) -> int | None:
        """In how many blocks so many matrices are best laid out, None where there are none."""
        threads = torch.get_num_threads()
        return threads if threads > 1 and batch % (_LANES * threads) == 0 and batch * side > _SHARED_ABOVE else None

    @staticmethod
    def buffer(flat: Tensor, shape: torch.Size) -> Tensor:
        """A matrix of this layout for (B, n, m) ``shape`` in a flat buffer."""
        *blocks, batch, n, m = shape
        return flat[: shape.numel()].view(*blocks, n, m, batch)

    @staticmethod
    def matrix(x: Tensor) -> Tensor:
        """View a (B, n, m) tensor in this layout."""
        return x.movedim(-3, -1)

    @staticmethod
    def batch_first(x: Tensor) -> Tensor:
        """View a matrix of this layout as (B, n, m)."""
        return x.movedim(-1, -3)

    @staticmethod
    def vector(x: Tensor) -> Tensor:
        """View a (B, n) tensor in this layout, and back."""
        return x.mT

    @staticmethod
    def scalar(x: Tensor) -> Tensor:
        """View a (B,) tensor so that it broadcasts over vectors."""
        return x.unsqueeze(-2)

    @staticmethod
    def whole(x: Tensor) -> Tensor:
        """View a (B,) tensor so that it broadcasts over matrices."""
        return x.unsqueeze(-2).unsqueeze(-2)

    @staticmethod
    def sums(x: Tensor, dim: int, out: Tensor | None = None) -> Tensor:
        """Sum over lines, one after another: torch.sum's order, and so the last bit, depends on how many lanes there are."""
        first, *rest = x.unbind(dim)
        if not rest:
            return torch.sum(x, dim, out=out)
        total = torch.add(first, rest[0], out=out)
        for line in rest[1:]:
            total.add_(line)
        return total

    @staticmethod
    def movable(size: int) -> bool:
        """Whether results of a matrix of so many bytes are the same to the last bit wherever in whatever batch it is."""
        return True

    @staticmethod
    def down(x: Tensor) -> Tensor:
        """A row-indexed vector, to broadcast over columns."""
        return x.unsqueeze(-2)

    @staticmethod
    def across(x: Tensor) -> Tensor:
        """A column-indexed vector, to broadcast over rows."""
        return x.unsqueeze(-3)

    @staticmethod
    def operands(kernel: Tensor, scratch: Tensor) -> tuple[Any, Any]:
        """What ``contract`` takes to form K^T u, and K v: views made once, as making them would cost as much as a sum."""
        return kernel.unbind(-3), kernel.unbind(-2)

    @staticmethod
    def weights(x: Tensor) -> Any:
        """What ``contract`` takes for a vector, or for several along a dimension in front."""
        return x.unsqueeze(-2).unbind(-3)

    @staticmethod
    def contract(operand: Any, weights: Any, scratch: Tensor, out: Tensor) -> Tensor:
        """``out``, sum of the lines of an operand, weighted."""
        torch.mul(operand[0], weights[0], out=out)
        for k in range(1, len(weights)):
            out.addcmul_(operand[k], weights[k])
        return out

    @staticmethod
    def product_sums(x: Tensor, y: Tensor, room: Tensor, rows: Tensor, cols: Tensor) -> None:
        """Row and column sums of x * y, which may be formed in ``room`` unless that is empty."""
        for sums, dim in ((rows, -2), (cols, -3)):
            (first, other), *rest = zip(x.unbind(dim), y.unbind(dim), strict=True)
            torch.mul(first, other, out=sums)
            for line, other in rest:
                sums.addcmul_(line, other)

    @staticmethod
    def refresh(kernel: Tensor, scratch: Tensor) -> None:
        """Bring ``scratch`` up to date with a new kernel."""

    class LowRank:
        """rest - sum of a v^T - u b^T, at once; ``store``: rings of a vector for a and for b."""

        def __init__(self, rest: Tensor, store: tuple[Ring, Ring], history: tuple[Ring, Ring]) -> None:
            self._rest, self._store = rest, store

        def next(self) -> tuple[Tensor, Tensor]:
            """Where to put the next a and b."""
            a, b = (ring.take() for ring in self._store)
            return a, b

        def take(self, a: Tensor, v: Tensor, u: Tensor, b: Tensor) -> None:
            """Take a v^T and give u b^T."""
            self._rest.addcmul_(a.unsqueeze(-2), v.unsqueeze(-3), value=-1)
            self._rest.addcmul_(u.unsqueeze(-2), b.unsqueeze(-3))

        def rest(self) -> Tensor:
            """What is left, in place."""
            return self._rest


class Products(BatchLast):
    """``BatchLast`` whose contractions are one product, in ``scratch``, and one sum: fewer calls than a chain of addcmul."""

    needs_scratch = True
    keeps_v = True

    @staticmethod
    def operands(kernel: Tensor, scratch: Tensor) -> tuple[Any, Any]:
        """What ``contract`` takes to form K^T u, and K v."""
        return kernel, kernel.transpose(-3, -2)

    @staticmethod
    def weights(x: Tensor) -> Any:
        """What ``contract`` takes for a vector."""
        return x.unsqueeze(-2)

    @staticmethod
    def movable(size: int) -> bool:
        """Never: one sum over many lanes is taken in an order of torch's choice."""
        return False

    @staticmethod
    def contract(operand: Any, weights: Any, scratch: Tensor, out: Tensor) -> Tensor:
        """``out``, sum of the lines of an operand, weighted."""
        return torch.sum(torch.mul(operand, weights, out=scratch.view_as(operand)), -3, out=out)

    @staticmethod
    def product_sums(x: Tensor, y: Tensor, room: Tensor, rows: Tensor, cols: Tensor) -> None:
        """Row and column sums of x * y, which may be formed in ``room`` unless that is empty."""
        product = torch.mul(x, y, out=room) if room.numel() else x * y
        torch.sum(product, -2, out=rows)
        torch.sum(product, -3, out=cols)


Layout = type[BatchFirst] | type[BatchLast]  # Bags and Products are such


def copy(target: Tensor, source: Tensor) -> None:
    """``target.copy_(source)`` for (B, n, m): between layouts as a transpose of (B, n m), with as few dimensions as may be."""
    if target.dim() >= 3 and target.stride() != source.stride() and target.dtype == source.dtype:
        flat = [_lines_joined(x) for x in (target, source)]
        if flat[0] is not None and flat[1] is not None:
            flat[0].copy_(flat[1])
            return
    target.copy_(source)


def _lines_joined(x: Tensor) -> Tensor | None:
    """(B, n m) as a view, if the strides allow."""
    *batch, n, m = x.shape
    *steps, down, across = x.stride()
    return x.as_strided((*batch, n * m), (*steps, across)) if n == 1 or down == m * across else None


def choose_layout(logits: Tensor, dtype: torch.dtype) -> Layout:
    """The fastest layout for a (B, n, m) batch computed in ``dtype``; on an accelerator always ``BatchFirst``."""
    batch, side = logits.shape[0], max(logits.shape[1:])
    if logits.device.type != "cpu":
        return BatchFirst
    if side in _BAGS_SIDES and dtype == torch.float32:
        return Bags
    if side <= _BATCH_LAST_MAX_SIDE and batch >= _BATCH_LAST_MIN_BATCH * side:
        return BatchLast if side <= _ADDCMUL_MAX_SIDE else Products
    return BatchFirst
