"""The error policy, and the calls held against the float64 oracle under it: what ``fastdsm verify`` runs.

Policy. e is the largest error of :mod:`fastdsm.reference` in float32 against the same oracle in float64 on the same
inputs; s is the size of the quantity: 1 for plans, sigma2 and residuals, :func:`gradient_size` for gradients. Allowed:

    float32   2 e + 1e-6 s
        as much again as plain log-domain PyTorch errs, plus eight units in the last place of s.
    float64   3 e 2^-29 + 1e-13 s
        To first order a rounding error is proportional to the unit roundoff, so the float32 run foretells the float64
        one: 2^-29 = 2^-53 / 2^-24. Three, not two, because the oracle itself carries the error of plain PyTorch in
        float64. The floor is 450 units: a hundred sweeps round 200 times in the call and 200 times in the oracle.
    float16, bfloat16   half a unit in the last place of the output, plus the float32 budget
        the inside is float32; only the rounding of the result comes on top.

sigma2 is found by an iteration, and may miss by its relative tolerance, 1e-4, where both sides have more than four lines; by
the kernels where either has.
The certified bounds have no budget of their own: the true value lies between them up to the oracle's 1e-13.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._ops.problem import compute_dtype
from ..projection import sinkhorn, sinkhorn_sigma2
from ..results import SinkhornInfo
from ..spectrum import sigma2, sigma2_bounds

FLOOR = {torch.float32: 1e-6, torch.float64: 1e-13}
ROUNDOFF_RATIO = 2.0**-29
SIGMA2_TOL = 1e-4
BOUNDS_GAP = 1e-3
BOUNDS_GAP_SIZE = 64

LOGIT_STDS = (0.1, 1.0, 5.0, 30.0, 200.0)
OPTIONS = ("row first", "temperature", "marginals", "one marginal", "mask", "f0", "tol")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def half_ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest rounding error of a number of the size of ``value`` stored in ``dtype``; float64, elementwise."""
    info = torch.finfo(dtype)
    size = value.abs().to(torch.float64).clamp(min=info.tiny)
    return torch.ldexp(torch.full_like(size, info.eps / 2), torch.frexp(size).exponent - 1)


def budget(truth: Tensor, plain: Tensor, dtype: torch.dtype, *, size: float = 1.0) -> Tensor:
    """Largest allowed error of each entry of a result in ``dtype``, by the policy in the module's docstring.

    Args:
        truth: the float64 oracle's values.
        plain: the values of the reference run in float32 on the same inputs, for float64 results too (draw the inputs
            in float32, so that both see the same numbers).
        dtype: of the result that is judged.
        size: s of the policy: 1, or :func:`gradient_size`.

    Returns:
        float64, the shape of ``truth``.
    """
    error = (plain.to(torch.float64) - truth).abs().max().item() if truth.numel() else 0.0
    if dtype == torch.float64:
        allowed = 3 * error * ROUNDOFF_RATIO + FLOOR[torch.float64] * size
    else:
        allowed = 2 * error + FLOOR[torch.float32] * size
    inside = torch.full_like(truth, allowed, dtype=torch.float64)
    if dtype == compute_dtype(dtype):
        return inside
    return inside + half_ulp(truth.abs() + inside, dtype)


def gradient_size(truth: Tensor, cotangent: Tensor) -> float:
    """s of the policy for a gradient: its largest true entry, or the root mean square of the cotangent if that is more.

    The gradient P * D - K * W is linear in the cotangent D and a difference of terms of D's size: where these cancel,
    rounding is relative to the terms, not to what is left.
    """
    spread = cotangent.to(torch.float64).square().mean().sqrt()
    return max(truth.abs().max().item(), spread.item()) if truth.numel() else 0.0


@dataclass(frozen=True)
class Target:
    """What is verified: a backend on a device."""

    backend: str
    device: str

    @property
    def interpreted(self) -> bool:
        """Whether the kernels run in Triton's interpreter, which bears tiny matrices only."""
        return self.backend == "triton" and self.device == "cpu"

    def __str__(self) -> str:
        return "triton (interpreter)" if self.interpreted else f"{self.backend} ({self.device})"


@dataclass(frozen=True)
class Case:
    """One set of inputs: ``shape`` (B, n, m), normal logits of standard deviation ``std``, one of ``OPTIONS`` or ""."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    std: float
    n_iters: int = 20
    option: str = ""

    @property
    def summary(self) -> str:
        """Everything but the dtype."""
        option = f", {self.option}" if self.option else ""
        return f"{'x'.join(map(str, self.shape))}, std {self.std:g}, {self.n_iters} sweeps{option}"

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.summary}"


@dataclass(frozen=True)
class Record:
    """One comparison. ``error`` and ``budget`` are those of the entry that comes closest to, or exceeds, its budget."""

    target: str
    group: str
    quantity: str
    case: Case
    error: float
    budget: float

    @property
    def ok(self) -> bool:
        """Within budget; NaN is a miss."""
        return self.error <= self.budget

    @property
    def share(self) -> float:
        """Error as a share of the budget; inf for NaN."""
        if self.error == 0:
            return 0.0
        return self.error / self.budget if self.budget > 0 and not math.isnan(self.error) else math.inf

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        case = self.case
        return {
            "target": self.target,
            "group": self.group,
            "quantity": self.quantity,
            "shape": list(case.shape),
            "dtype": str(case.dtype).removeprefix("torch."),
            "logit_std": case.std,
            "n_iters": case.n_iters,
            "option": case.option,
            "error": self.error,
            "budget": self.budget,
            "ok": self.ok,
        }


def targets() -> list[Target]:
    """Every backend this machine can run, the kernels first."""
    found = []
    if torch.cuda.is_available():
        found += [Target("triton", "cuda"), Target("torch", "cuda")]
    if _interpreting():
        found.append(Target("triton", "cpu"))
    return [*found, Target("torch", "cpu")]


def _interpreting() -> bool:
    """Whether Triton was imported as an interpreter."""
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)


def cases(target: Target, quick: bool = False) -> list[Case]:
    """The grid for ``target``: every size at every logit scale, numbers of sweeps, options, in every dtype."""
    stds: tuple[float, ...]
    counts: tuple[int, ...]
    if target.interpreted:
        shapes = [(2, 1, 1), (3, 2, 2), (5, 4, 4), (3, 8, 8)] + (
            [] if quick else [(2, 3, 3), (2, 7, 5), (1, 16, 16), (1, 6, 264)]
        )
        stds, counts, sweeps, option_shapes = (1.0, 30.0), (0, 1, 5), 3, [(3, 4, 4), (2, 5, 3)]
        dtypes = DTYPES[:1] if quick else DTYPES
    elif quick:
        shapes = [(3, 1, 1), (64, 4, 4), (16, 7, 7), (8, 16, 16), (2, 64, 64), (8, 5, 9)]
        stds, counts, sweeps, option_shapes = (1.0, 30.0), (0, 1, 100), 20, [(16, 4, 4), (4, 7, 12)]
        dtypes = DTYPES
    else:
        square = [(3, 1), (64, 2), (64, 3), (64, 4), (32, 5), (32, 7), (32, 8), (8, 16), (4, 31), (2, 64), (2, 100)]
        shapes = [(b, n, n) for b, n in square] + [(1, 256, 256), (1, 264, 300), (16, 3, 5), (16, 6, 1), (4, 40, 17)]
        stds, counts, sweeps, option_shapes = (
            LOGIT_STDS,
            (0, 1, 3, 100),
            20,
            [(16, 4, 4), (8, 8, 8), (4, 7, 12), (2, 33, 33), (1, 40, 301)],
        )
        dtypes = DTYPES
    scales = [Case(shape, dtype, std, sweeps) for shape in shapes for dtype in dtypes for std in stds]
    lengths = [Case(shape, dtype, 3.0, count) for shape in shapes for dtype in dtypes[:2] for count in counts]
    options = [Case(shape, dtype, 2.0, sweeps, option) for option in OPTIONS for shape in option_shapes for dtype in dtypes]
    return scales + lengths + options


def verify_case(case: Case, target: Target) -> list[Record]:
    """Hold sinkhorn, sinkhorn_sigma2, sigma2, sigma2_bounds and the gradients against the oracle on one case.

    A call that raises is a miss like any other: its record carries the error's text and NaN.
    """
    try:
        return _compare(case, target)
    except Exception as error:
        return [failed(case, target, error)]


def failed(case: Case, target: Target, error: Exception) -> Record:
    """The record of a case that raised."""
    return Record(str(target), "forward", f"raised {type(error).__name__}: {error}", case, math.nan, 0.0)


def _compare(case: Case, target: Target) -> list[Record]:
    logits, options, cotangent = inputs(case)
    if target.device != "cpu":
        logits, cotangent = logits.to(target.device), cotangent.to(target.device)
        options = {k: x.to(target.device) if isinstance(x, Tensor) else x for k, x in options.items()}
    record = partial(compare, target=target, case=case)
    call = _evaluate(partial(sinkhorn, backend=target.backend), logits, options, cotangent)
    oracle = _oracle_at(call.info.sweeps, options)
    truth = _evaluate(oracle, *cast(torch.float64, logits, options, cotangent))
    plain = _evaluate(oracle, *cast(torch.float32, logits, options, cotangent))

    records = [
        record("forward", "plan", call.plan, truth.plan, plain.plan),
        record("forward", "residual", call.info.residual, truth.info.residual, plain.info.residual),
    ]
    if "tol" in options:
        records.append(_stopping(case, target, call, truth, plain, options["tol"], cast(torch.float64, logits)[0]))
    for name, gradient in truth.gradients.items():
        size = gradient_size(gradient, cotangent)
        quantity = f"gradient of {name}"
        records.append(record("gradient", quantity, call.gradients[name], gradient, plain.gradients[name], size=size))

    plain_options = {k: x for k, x in options.items() if k in ("row_marginal", "col_marginal", "mask")}
    fused = sinkhorn_sigma2(logits, backend=target.backend, **options)
    records.append(record("forward", "plan beside sigma2", fused.plan, truth.plan, plain.plan))
    lines = (max if target.backend == "triton" else min)(case.shape[1:])
    slack = SIGMA2_TOL if lines > 4 else 0.0
    expected, usual = (_sigma2_of(run.plan, plain_options) for run in (truth, plain))
    records.append(record("sigma2", "sigma2 of the call", fused.sigma2, expected, usual, relative=slack))

    expected, usual = (_sigma2_of(call.plan.to(dtype), plain_options) for dtype in (torch.float64, torch.float32))
    found = sigma2(call.plan, backend=target.backend, **plain_options)
    assert isinstance(found, Tensor)  # no vectors were asked for
    records.append(record("sigma2", "sigma2 of a plan", found, expected, usual, relative=slack))
    lower, upper = sigma2_bounds(call.plan, backend=target.backend, **plain_options)
    return [*records, *_bounds(case, target, lower.double(), upper.double(), expected)]


@dataclass(frozen=True)
class _Run:
    """Plan, what came with it, and the gradient of sum(plan * cotangent) with respect to every tensor operand."""

    plan: Tensor
    info: SinkhornInfo
    gradients: Mapping[str, Tensor]


def inputs(case: Case) -> tuple[Tensor, dict[str, Any], Tensor]:
    """Logits, options and cotangent on the CPU, drawn in float32 and then held in the dtypes of the call."""
    generator = torch.Generator().manual_seed(0)
    batch, n, m = case.shape
    inside = compute_dtype(case.dtype)

    def uniform(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator) + 0.5).to(inside)

    logits = (torch.randn(case.shape, generator=generator) * case.std).to(case.dtype)
    cotangent = torch.randn(case.shape, generator=generator).to(case.dtype)
    options: dict[str, Any] = {"n_iters": case.n_iters}
    if case.option == "row first":
        options["first"] = "row"
    elif case.option == "temperature":
        options["temperature"] = uniform(batch)
    elif case.option == "marginals":
        row, col = uniform(batch, n), uniform(batch, m)
        options |= {"row_marginal": row, "col_marginal": col * (row.sum(-1) / col.sum(-1)).unsqueeze(-1)}
    elif case.option == "one marginal":
        options["col_marginal"] = uniform(batch, m)
    elif case.option == "mask":
        mask = torch.rand(case.shape, generator=generator) < 0.8
        mask[0, 0], mask[0, :, -1] = False, False
        options["mask"] = mask
    elif case.option == "f0":
        options["f0"] = torch.randn(batch, n, generator=generator).to(inside)
    elif case.option == "tol":
        options["tol"] = 1e-3
    return logits, options, cotangent


def cast(
    dtype: torch.dtype, logits: Tensor, options: Mapping[str, Any] | None = None, cotangent: Tensor | None = None
) -> tuple[Any, ...]:
    """The same numbers in another dtype."""
    operands = {
        name: x.to(dtype) if isinstance(x, Tensor) and x.dtype.is_floating_point else x for name, x in (options or {}).items()
    }
    return logits.to(dtype), operands, None if cotangent is None else cotangent.to(dtype)


def _evaluate(call: Callable[..., Any], logits: Tensor, options: Mapping[str, Any], cotangent: Tensor) -> _Run:
    """Run ``call`` forward and backward."""
    leaves = {"logits": logits} | {
        name: x for name, x in options.items() if isinstance(x, Tensor) and x.dtype.is_floating_point
    }
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    operands = {**options, **leaves}
    plan, info = call(operands.pop("logits"), return_info=True, **operands)
    gradients = torch.autograd.grad(plan, list(leaves.values()), cotangent, allow_unused=True)
    # What no sweep used (f0 at zero sweeps) has no path to the plan: its gradient is zero.
    filled = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves.values(), gradients, strict=True)]
    return _Run(plan.detach(), info, dict(zip(leaves, filled, strict=True)))


def _oracle_at(sweeps: Tensor, options: Mapping[str, Any]) -> Callable[..., Any]:
    """The oracle, with each matrix stopped after the number of sweeps the call gave it.

    Under ``tol`` two precisions may stop a sweep apart, which is no error; :func:`_stopping` judges the stopping.
    """
    if "tol" not in options:
        return reference.sinkhorn

    def stopped(logits: Tensor, *, n_iters: int, tol: float, **others: Any) -> tuple[Tensor, SinkhornInfo]:
        runs = {k: reference.sinkhorn(logits, n_iters=k, **others) for k in sweeps.unique().tolist()}
        parts = [(runs[k][0][i], [x[i] for x in runs[k][1]]) for i, k in enumerate(sweeps.tolist())]
        info = SinkhornInfo(*(torch.stack(column) for column in zip(*(p[1] for p in parts), strict=True)))
        return torch.stack([p[0] for p in parts]), info

    return stopped


def _stopping(case: Case, target: Target, call: _Run, truth: _Run, plain: _Run, tol: float, logits: Tensor) -> Record:
    """A matrix that stopped early has a residual <= tol, and had one > tol a sweep before; the float64 values judge."""
    excess = []
    for i, k in enumerate(call.info.sweeps.tolist()):
        if k < case.n_iters:
            excess.append(truth.info.residual[i].item() - tol)
        if k > 1:
            before = reference.sinkhorn_sigma2(logits[i], n_iters=k - 1)
            excess.append(tol - before.residual.item())
    allowed = budget(truth.info.residual, plain.info.residual, compute_dtype(case.dtype)).max().item()
    return Record(str(target), "forward", "stopping at tol", case, max(0.0, *excess), allowed)


def _sigma2_of(plan: Tensor, options: Mapping[str, Any]) -> Tensor:
    """The oracle's sigma2 in the dtype of ``plan``, with the marginals in that dtype too."""
    return reference.sigma2(plan, **cast(plan.dtype, plan, options)[1])


def compare(
    group: str,
    quantity: str,
    found: Tensor,
    truth: Tensor,
    plain: Tensor,
    *,
    target: Target,
    case: Case,
    size: float = 1.0,
    relative: float = 0.0,
) -> Record:
    """Compare ``found`` with ``truth`` entry by entry; ``relative`` widens the budget by that share of the truth."""
    allowed = budget(truth, plain, found.dtype, size=size) + relative * truth.abs()
    return worst(target, group, quantity, case, (found.detach().to(torch.float64) - truth).abs(), allowed)


def _bounds(case: Case, target: Target, lower: Tensor, upper: Tensor, truth: Tensor) -> Iterator[Record]:
    """The truth lies between the bounds, and up to ``BOUNDS_GAP_SIZE`` they are within a thousandth of each other.

    Of kernels the longer side counts: beyond, they have the bounds of Lanczos' method, which depend on the spectrum.
    """
    outside = torch.maximum(lower - truth, truth - upper).clamp(min=0.0)
    exact = FLOOR[torch.float64] * truth.clamp(min=1.0)
    yield worst(target, "bounds", "sigma2 outside its bounds", case, outside, exact)
    if (max if target.backend == "triton" else min)(case.shape[1:]) <= BOUNDS_GAP_SIZE:
        allowed = BOUNDS_GAP * lower + FLOOR[compute_dtype(case.dtype)]
        yield worst(target, "bounds", "gap of the bounds", case, upper - lower, allowed)


def worst(target: Target, group: str, quantity: str, case: Case, error: Tensor, allowed: Tensor) -> Record:
    """The record of the entry with the largest error relative to its budget."""
    if error.numel() == 0:
        return Record(str(target), group, quantity, case, 0.0, 0.0)
    share = torch.where(error == 0, 0.0, error / allowed).nan_to_num(nan=torch.inf, posinf=torch.inf).flatten()
    at = share.argmax()
    return Record(str(target), group, quantity, case, error.flatten()[at].item(), allowed.flatten()[at].item())
