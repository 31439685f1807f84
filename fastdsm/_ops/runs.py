"""How the operators run, decided once for each form of their tensors and each set of options.

A run takes what its call writes, and then makes launches that were prepared the first time, where the kernels' part of the call
is launches alone; else it goes by the backends, as the first time does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import pytorch
from . import backends
from .plain import Kept, forms_of
from .problem import Gradients, Outputs, Problem, compute_dtype

Tensors = tuple[Tensor | None, ...]
Forms = tuple[Any, ...] | None


class Run:
    """A call of one form. ``results``: shape and dtype of what it writes, in order, None where nothing is."""

    def __init__(self, like: Tensor, results: Sequence[tuple[tuple[int, ...], torch.dtype] | None], backend: str) -> None:
        # Of one element each, which is never looked at: the quickest way to torch.empty.
        self._like = [None if x is None else torch.empty(1, dtype=x[1], device=like.device).expand(x[0]) for x in results]
        self._backend = backend
        self._prepared: Any = None if backend == "triton" else False  # None: not tried yet

    def __call__(self, inputs: Tensors, scale: float = 1.0) -> Tensors:
        """What the call returns for ``inputs`` and a temperature that all matrices share."""
        results = self._new()
        if self._prepared:
            self._prepared(inputs, results, scale)
            return results
        if self._prepared is None:
            self._prepared = self._prepare(inputs, scale, results) or False
        self._run(inputs, scale, results)
        return results

    def _new(self) -> Tensors:
        """What is to be filled."""
        return tuple([None if x is None else torch.empty_like(x) for x in self._like])

    def _prepare(self, inputs: Tensors, scale: float, results: Tensors) -> Any:
        """The launches by which kernels alone fill ``results``, or None."""
        matrices = inputs[0]
        assert matrices is not None
        if 0 in (matrices.numel(), *(x.numel() for x in results if x is not None)):
            return None

        def serve(kernels: Any) -> bool:
            return self._served(kernels, inputs, scale, results)

        return backends.prepared(serve, matrices, self.named(inputs), results)

    def _run(self, inputs: Tensors, scale: float, results: Tensors) -> None:
        """Fill ``results``."""
        raise NotImplementedError

    def _served(self, kernels: Any, inputs: Tensors, scale: float, results: Tensors) -> bool:
        """Whether kernels alone filled them."""
        raise NotImplementedError

    def named(self, inputs: Tensors) -> Mapping[str, Tensor | None]:
        """``inputs``, in their order, by the names that kernels have for them."""
        raise NotImplementedError


_NAMES = {
    True: ("logits", "temperature", "f0", "row", "col", "mask"),
    False: ("logits", "temperature", "f0", "col", "row", "mask"),
}


class _OfProblem(Run):
    """A run of a projection: ``inputs`` end with logits, temperature, f0, row and column marginal, and mask."""

    def __init__(
        self, like: Tensor, results: Sequence[Any], n_iters: int, columns_first: bool, tol: float, backend: str
    ) -> None:
        super().__init__(like, results, backend)
        self.n_iters, self.columns_first, self.tol = n_iters, columns_first, tol

    def problem(self, inputs: Tensors, scale: float) -> Problem:
        """Canonical form: a projection that ends with columns is the transposed one that ends with rows."""
        logits, temperature, f0, row, col, mask = inputs
        assert logits is not None
        if not self.columns_first:
            logits, mask, row, col = logits.mT, None if mask is None else mask.mT, col, row
        return Problem(
            logits=logits,
            n_iters=self.n_iters,
            temperature=scale if temperature is None else temperature,
            f0=f0 if self.n_iters > 0 else None,
            row_marginal=row,
            col_marginal=col,
            unit_rows=self.columns_first,
            mask=mask,
            tol=self.tol,
        )

    def turned(self, matrices: Tensor) -> Tensor:
        """Matrices as the canonical problem has them."""
        return matrices if self.columns_first else matrices.mT


class Forward(_OfProblem):
    """Plan, residual, sweeps, f, g and sigma2; None for what is not asked for."""

    def __init__(
        self,
        logits: Tensor,
        n_iters: int,
        columns_first: bool,
        tol: float,
        backend: str,
        solver: str = "sinkhorn",
        with_info: bool = False,
        with_sigma2: bool = False,
    ) -> None:
        batch, n, m = logits.shape
        dtype = compute_dtype(logits.dtype)
        info = [((batch,), dtype), ((batch,), torch.int32), ((batch, n), dtype), ((batch, m), dtype)]
        results = [
            ((batch, n, m), logits.dtype),
            *(info if with_info else [None] * 4),
            ((batch,), dtype) if with_sigma2 else None,
        ]
        super().__init__(logits, results, n_iters, columns_first, tol, backend)
        self._name = f"{solver}_forward"

    def _outputs(self, results: Tensors) -> Outputs:
        plan, residual, sweeps, f, g, sigma2 = results
        assert plan is not None
        f, g = (f, g) if self.columns_first else (g, f)
        return Outputs(self.turned(plan), residual, sweeps, f, g, sigma2)

    def _run(self, inputs: Tensors, scale: float, results: Tensors) -> None:
        getattr(backends, self._name)(self.problem(inputs, scale), self._outputs(results), self._backend)

    def taped(self, inputs: Tensors, scale: float, tape: pytorch.Tape) -> Tensors:
        """The same on the PyTorch path, which leaves on ``tape`` what the gradient of few matrices starts from."""
        results = self._new()
        pytorch.sinkhorn_forward(self.problem(inputs, scale), self._outputs(results), tape)
        return results

    def _served(self, kernels: Any, inputs: Tensors, scale: float, results: Tensors) -> bool:
        return bool(getattr(kernels, self._name)(self.problem(inputs, scale), self._outputs(results)))

    def named(self, inputs: Tensors) -> Mapping[str, Tensor | None]:
        return dict(zip(_NAMES[self.columns_first], inputs, strict=True))


class Backward(_OfProblem):
    """d logits, d f0, d log row and d log col from (grad_plan, given, *a projection's); the last three None without ``lines``.

    given: the sweeps done, or None; of the implicit gradient the potential that the other follows from.
    """

    def __init__(
        self, logits: Tensor, implicit: bool, lines: bool, n_iters: int, columns_first: bool, tol: float, backend: str
    ) -> None:
        batch, n, m = logits.shape
        dtype = compute_dtype(logits.dtype)
        vectors = [((batch, n if columns_first else m), dtype), ((batch, n), dtype), ((batch, m), dtype)]
        results = [((batch, n, m), logits.dtype), *(vectors if lines else [None] * 3)]
        super().__init__(logits, results, n_iters, columns_first, tol, backend)
        self._implicit = implicit

    def from_tape(self, inputs: Tensors, scale: float, tape: pytorch.Tape) -> Tensors:
        """The same on the PyTorch path, from what :meth:`Forward.taped` left."""
        results = self._new()
        self._of(pytorch, inputs, scale, results, tape)
        return results

    def with_potentials(self, inputs: Tensors, scale: float, grad_f: Tensor, grad_g: Tensor) -> Tensors:
        """The same for cotangents of f and g too, on the PyTorch path."""
        results = self._new()
        pair = (grad_f, grad_g) if self.columns_first else (grad_g, grad_f)
        self._of(pytorch, inputs, scale, results, grad_potentials=pair)
        return results

    def _of(self, backend: Any, inputs: Tensors, scale: float, results: Tensors, *last: Any, **more: Any) -> Any:
        grad_plan, given, *rest = inputs
        d_logits, d_f0, d_row, d_col = results
        assert grad_plan is not None
        assert d_logits is not None
        rows, cols = (d_row, d_col) if self.columns_first else (d_col, d_row)
        gradients = Gradients(self.turned(d_logits), d_f0, rows, cols)
        problem, grad_plan = self.problem(tuple(rest), scale), self.turned(grad_plan)
        if self._implicit:
            return backend.implicit_backward(problem, grad_plan, given, gradients, *last, **more)
        return backend.sinkhorn_backward(problem, grad_plan, gradients, given, *last, **more)

    def _run(self, inputs: Tensors, scale: float, results: Tensors) -> None:
        self._of(backends, inputs, scale, results, self._backend)

    def _served(self, kernels: Any, inputs: Tensors, scale: float, results: Tensors) -> bool:
        return bool(self._of(kernels, inputs, scale, results))

    def named(self, inputs: Tensors) -> Mapping[str, Tensor | None]:
        return dict(zip(("grad_plan", "g" if self._implicit else "sweeps", *_NAMES[self.columns_first]), inputs, strict=True))


class Sigma2(Run):
    """sigma2, u and v of (plan, row and column marginal, mask, v0)."""

    def __init__(self, plan: Tensor, method: str, tol: float, max_iters: int, backend: str) -> None:
        batch, n, m = plan.shape
        dtype = compute_dtype(plan.dtype)
        super().__init__(plan, [(shape, dtype) for shape in ((batch,), (batch, n), (batch, m))], backend)
        self._options = method, tol, max_iters, backend

    def _run(self, inputs: Tensors, scale: float, results: Tensors) -> None:
        arguments: Any = (results, *inputs, *self._options)
        backends.sigma2(*arguments)

    def _served(self, kernels: Any, inputs: Tensors, scale: float, results: Tensors) -> bool:
        method, tol, *_ = self._options
        return method == "auto" and bool(kernels.sigma2(*inputs[:4], tol, *results))

    def named(self, inputs: Tensors) -> Mapping[str, Tensor | None]:
        return dict(zip(("plan", "row", "col", "mask", "v0"), inputs, strict=True))


class Bounds(Run):
    """Certified bounds of sigma2 of (plan, row and column marginal, mask)."""

    def __init__(self, plan: Tensor, backend: str) -> None:
        super().__init__(plan, [((plan.shape[0],), compute_dtype(plan.dtype))] * 2, backend)

    def _run(self, inputs: Tensors, scale: float, results: Tensors) -> None:
        arguments: Any = (results, *inputs, self._backend)
        backends.sigma2_bounds(*arguments)

    def _served(self, kernels: Any, inputs: Tensors, scale: float, results: Tensors) -> bool:
        return bool(kernels.sigma2_bounds(*inputs, *results))

    def named(self, inputs: Tensors) -> Mapping[str, Tensor | None]:
        return dict(zip(("plan", "row", "col", "mask"), inputs, strict=True))


class TemperatureSearch(Run):
    """Temperature and whether it was reached, of (logits, row and column marginal, target, start), float32 as kernels take it.

    ``serves``: whether kernels do so for logits like these, as far as is known; what they were called with before is served.
    """

    def __init__(self, logits: Tensor, n_iters: int, backend: str) -> None:
        batch = logits.shape[:1]
        super().__init__(logits, [(batch, torch.float32), (batch, torch.uint8)], backend)
        self._n_iters = n_iters
        self.serves = backend == "triton" and logits.dtype != torch.float64

    def _run(self, inputs: Tensors, scale: float, results: Tensors) -> None:
        self.serves = backends.temperature_search(self._backend, *inputs, self._n_iters, *results)

    def _served(self, kernels: Any, inputs: Tensors, scale: float, results: Tensors) -> bool:
        return bool(kernels.temperature_search(*inputs, self._n_iters, *results))

    def named(self, inputs: Tensors) -> Mapping[str, Tensor | None]:
        return dict(zip(("logits", "row", "col", "target", "start"), inputs, strict=True))


_runs = Kept()


def run_of(kind: Callable[..., Run], like: Tensor, inputs: Tensors, forms: Forms, *options: Any) -> Run:
    """The run of ``kind`` for matrices and inputs like these, kept; ``forms``: theirs, where they are known."""
    key = (kind, forms or forms_of(inputs), options)
    found: Run = _runs.get(key) or _runs.keep(key, kind(like, *options))
    return found
