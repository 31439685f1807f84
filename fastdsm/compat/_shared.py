"""What origins have in common: arrays of NumPy or PyTorch, masses of unequal totals, stopping rules, one line of the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._ops import arguments
from ..projection import sinkhorn
from ..results import SinkhornInfo


class Convention(NamedTuple):
    """How a call of an origin counts.

    call: its name. order: the side normalised first. exact: the side whose sums are right at the end. iteration: what one is,
    under its parameter's name. marginals: the masses of a line. eps: what the logits are divided by. sign: what the logits are.
    orientation: what rows and columns are.
    """

    call: str
    order: str
    exact: str
    iteration: str
    marginals: str
    eps: str
    sign: str
    orientation: str


def differentiable(*inputs: Any) -> bool:
    """Whether autograd will follow one of the inputs."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


def detached(x: Any) -> Any:
    """A tensor without its gradient; what else comes as it is."""
    return x.detach() if isinstance(x, Tensor) else x


def tensors_of(*arrays: Any) -> tuple[list[Any], Callable[[Any], Any]]:
    """Arrays of one library as tensors of one floating dtype, and the function that brings a result back to that library.

    Args:
        arrays: torch tensors, NumPy arrays, lists of numbers, or None, which stays. Lists follow the others; lists alone are
            NumPy's float64. Dtypes are promoted to one; integers of NumPy are float64.

    Raises:
        TypeError: of arrays of both libraries, or of neither.
    """
    given = [x for x in arrays if not (x is None or isinstance(x, (list, tuple)))]
    tensors = [x for x in given if isinstance(x, Tensor)]
    if tensors:
        if len(tensors) < len(given):
            raise TypeError(
                f"arrays must all be torch tensors or all of NumPy, got both: {_kinds(given)}; convert some of them"
            )
        dtype, like = tensors[0].dtype, tensors[0]
        for x in tensors[1:]:
            dtype = torch.promote_types(dtype, x.dtype) if x.numel() else dtype
        if not dtype.is_floating_point:
            raise TypeError(f"tensors must be floating-point, got {dtype}; convert with .float()")
        as_list = (list, tuple)
        return [
            torch.tensor(x, dtype=dtype, device=like.device) if isinstance(x, as_list) else x if x is None else x.to(dtype)
            for x in arrays
        ], lambda x: x
    import numpy as np

    if any(not isinstance(x, np.ndarray) for x in given):
        raise TypeError(f"arrays must be torch tensors, NumPy arrays or lists of numbers, got {_kinds(given)}; convert them")
    found = np.result_type(*(x for x in given if x.size)) if any(x.size for x in given) else np.dtype(np.float64)
    kind = found if np.issubdtype(found, np.floating) else np.dtype(np.float64)
    return [x if x is None else torch.tensor(np.asarray(x, dtype=kind)) for x in arrays], _to_numpy


def _to_numpy(x: Any) -> Any:
    """A tensor as an array, or as a NumPy scalar if it is one; what else comes as it is."""
    return x.numpy()[()] if isinstance(x, Tensor) else x


def _kinds(given: list[Any]) -> str:
    return ", ".join(sorted({type(x).__name__ for x in given}))


def balanced(masses: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """(..., n) scaled to the total of ``others``, and the logarithm (..., 1) of what its total was relative to theirs.

    A plan is free of the total of the side which is not normalised last, but potentials are not: every sweep moves them by that
    logarithm, the side of ``masses`` up and the other down.
    """
    ratio = masses.double().sum(-1, keepdim=True) / others.double().sum(-1, keepdim=True)  # logarithms add up over sweeps
    return masses / ratio.to(masses.dtype), ratio.log().to(masses.dtype)


def check_scale(x: Any, name: str) -> None:
    """What logits are divided by, under the origin's name for it: > 0, a number or a tensor."""
    if isinstance(x, Tensor):
        arguments.check_temperatures(x, name)
    else:
        arguments.check_temperature(x, name)


class Swept(NamedTuple):
    """Sweeps until a rule said stop: plan and info of the last one, how many there were, and whether it was said."""

    plan: Tensor
    info: SinkhornInfo
    sweeps: int
    stopped: bool


def sweeps_until(
    stop: Callable[[Tensor, SinkhornInfo], bool] | None,
    most: int,
    every: int,
    logits: Tensor,
    *,
    first: str,
    f0: Tensor | None = None,
    **options: Any,
) -> Swept:
    """Sweeps, at most ``most``, until ``stop`` of plan and info, asked after the first and after ``every`` more, is true.

    Calls of :func:`fastdsm.sinkhorn`, each warm started with the last one's potential, without a gradient; where there is to be
    one, the sweeps that were found to do are made again at once. ``stop`` of None makes ``most`` sweeps. ``options`` are
    fastdsm.sinkhorn's.
    """
    sweeps, stopped = most, False
    inputs = (logits, f0, *options.values())
    if stop is not None:
        sweeps, start = 0, detached(f0)
        fixed = {name: detached(x) for name, x in options.items()}
        while sweeps < most and not stopped:
            step = min(every, most - sweeps) if sweeps else 1
            plan, info = sinkhorn(logits.detach(), n_iters=step, first=first, f0=start, return_info=True, **fixed)
            sweeps, start = sweeps + step, info.f if first == "col" else info.g
            stopped = (sweeps - 1) % every == 0 and stop(plan, info)
    if stop is None or differentiable(*inputs):
        plan, info = sinkhorn(logits, n_iters=sweeps, first=first, f0=f0, return_info=True, **options)
    return Swept(plan, info, sweeps, stopped)


def assignments(scores: Tensor, n_iters: int, temperature: float) -> Tensor:
    """The plan of samples and prototypes; in a process group of several that of the samples of all, each with its own rows."""
    processes = torch.distributed
    with torch.no_grad():
        if processes.is_available() and processes.is_initialized() and processes.get_world_size() > 1:
            from ..distributed import sinkhorn as over_processes

            plan = over_processes(scores, n_iters=n_iters, temperature=temperature)
            assert isinstance(plan, Tensor)
            return plan
        return sinkhorn(scores, n_iters=n_iters, temperature=temperature)


def positive_logits(kernel: Tensor) -> Tensor:
    """log of a matrix of numbers >= 0, -inf with gradient 0 where it is 0."""
    none = kernel == 0
    return kernel.masked_fill(none, 1.0).log().masked_fill(none, -torch.inf)


def gumbel_of(uniform: Tensor, eps: float) -> Tensor:
    """Gumbel noise, -log(-log(U + eps) + eps), of U uniform in [0, 1)."""
    return -(-(uniform + eps).log() + eps).log()
