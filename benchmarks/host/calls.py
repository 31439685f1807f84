"""The public calls that are timed, each with what it computes and which kernels it launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastdsm
from fastdsm import reference

from ..converged import converged_sigma2

BATCH, HEADS, FEATURES = 64, 4, 32  # so few that torch's own work on them is small beside a call


def same(x: Any) -> Any:
    """``x``."""
    return x


@dataclass(frozen=True)
class Call:
    """A call of one argument.

    text: as one writes it. truth: what ``seen`` of the ``output`` has to be, of the source in float64, up to ``tolerance`` of
    the largest entry, and so its gradient where the truth has one. kernels: what is launched forward, and ``backward`` what
    the gradient launches after it, None where there is none to time, and ``no_gradient`` says why.
    """

    text: str
    source: Tensor
    function: Callable[[Tensor], Any]
    truth: Callable[[Tensor], Any]
    kernels: tuple[str, ...]
    backward: tuple[str, ...] | None
    output: Callable[[Any], Tensor] = same
    seen: Callable[[Tensor], Tensor] = same
    tolerance: float = 1e-4
    no_gradient: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the source; of attention (heads, lines, which operand, features)."""
        shape = tuple(self.source.shape)
        return shape if len(shape) == 3 else (*shape[1:3], 3, shape[3])


_REGISTERS, _TILE = "_sinkhorn_fwd_kernel", "_sinkhorn_tile_fwd_kernel"
_WIDE_BACKWARD, _TILE_BACKWARD = "_sinkhorn_history_bwd_kernel", "_sinkhorn_tile_bwd_kernel"
_SWEEP = "_attention_sweep_fwd_kernel"
_SWEEPS = (_SWEEP,) * 5  # three sweeps, the first from nothing
_ATTEND = "_attention_attend_fwd_kernel"
_ATTENTION_BACKWARD = (
    *_SWEEPS, "_attention_apply_fwd_kernel", *("_attention_products_bwd_kernel",) * 2, *("_attention_gradient_bwd_kernel",) * 2,
)  # fmt: skip


_SHORT_BACKWARD = ("_attention_short_adjoint_bwd_kernel", "_attention_short_gradient_bwd_kernel")


def calls(device: str) -> list[Call]:
    """Every public call, on ``device``."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(device)

    four, eight = normal(BATCH, 4, 4), normal(BATCH, 8, 8)
    plan = reference.sinkhorn(eight)
    assert isinstance(plan, Tensor)
    mask = (torch.rand(BATCH, 8, 8, generator=draw) > 0.1).to(device)
    row, col = torch.ones(BATCH, 8, device=device), torch.ones(BATCH, 8, device=device)

    def sinkhorn(
        text: str, source: Tensor, kernel: str, backward: str, output: Callable[[Any], Tensor] = same, **options: Any
    ) -> Call:
        text = f"sinkhorn({', '.join(['x', text] if text else ['x'])})"
        truth = partial(reference.sinkhorn, **{**options, "return_info": False})
        tolerance = 1e-4 if "solver" not in options else 1e-3
        function = partial(fastdsm.sinkhorn, **options) if options else fastdsm.sinkhorn
        return Call(text, source, function, truth, (kernel,), (backward,), output, tolerance=tolerance)

    return [
        sinkhorn("", four, _REGISTERS, "_sinkhorn_bwd_kernel"),
        sinkhorn('solver="newton"', eight, "_newton_fwd_kernel", "_implicit_bwd_kernel", solver="newton"),
        sinkhorn("tol=1e-3", eight, _TILE, _TILE_BACKWARD, tol=1e-3),
        sinkhorn("mask=mask", eight, _TILE, _TILE_BACKWARD, mask=mask),
        sinkhorn("row_marginal=r, col_marginal=c", eight, _TILE, _TILE_BACKWARD, row_marginal=row, col_marginal=col),
        sinkhorn("return_info=True", eight, _REGISTERS, _WIDE_BACKWARD, lambda found: found[0], return_info=True),
        Call(
            "sinkhorn_sigma2(x).plan", four, lambda x: fastdsm.sinkhorn_sigma2(x).plan,
            lambda x: reference.sinkhorn_sigma2(x).plan, (_REGISTERS,), ("_sinkhorn_bwd_kernel",),
        ),
        Call(
            "sinkhorn_sigma2(x).sigma2", eight, lambda x: fastdsm.sinkhorn_sigma2(x).sigma2,
            lambda x: reference.sinkhorn_sigma2(x).sigma2, (_TILE,), ("_sigma2_fwd_kernel", _WIDE_BACKWARD), tolerance=1e-2,
        ),
        Call(
            "sigma2(p)", plan, fastdsm.sigma2, reference.sigma2, ("_sigma2_fwd_kernel",), (), tolerance=1e-2,
        ),
        Call(
            "sigma2_bounds(p)", plan, fastdsm.sigma2_bounds, reference.sigma2, ("_sigma2_bounds_fwd_kernel",), None,
            lambda found: (found[0] + found[1]) / 2, tolerance=1e-3, no_gradient="is not differentiable",
        ),
        Call(
            "round_to_birkhoff(p)", plan, fastdsm.round_to_birkhoff, lambda p: torch.ones_like(p[..., 0]), (), (),
            seen=lambda rounded: rounded.sum(-2), tolerance=1e-6,
        ),
        Call(
            "temperature_for_sigma2(x, 0.5)", eight, lambda x: fastdsm.temperature_for_sigma2(x, 0.5),
            lambda x: torch.full_like(x[:, 0, 0], 0.5), ("_temperature_tile_fwd_kernel",), None, lambda found: found[0],
            lambda temperature: converged_sigma2(eight.cpu(), temperature.cpu()), tolerance=1e-3,
            no_gradient="goes on with the temperature found",
        ),
        Call(
            "sinkhorn_attention(x, x, x)", normal(1, HEADS, 64, FEATURES), lambda x: fastdsm.sinkhorn_attention(x, x, x),
            lambda x: reference.sinkhorn_attention(x, x, x), (*_SWEEPS, _ATTEND), _ATTENTION_BACKWARD,
        ),
        Call(
            "sinkhorn_attention(x, x, x), bfloat16", normal(1, HEADS, 64, FEATURES).bfloat16(),
            lambda x: fastdsm.sinkhorn_attention(x, x, x), lambda x: reference.sinkhorn_attention(x, x, x),
            ("_attention_short_fwd_kernel",), _SHORT_BACKWARD, tolerance=2e-2,
        ),
        # Two lines and steps: Lanczos' matrix of two has eigenvalues, and the time is the same, whatever a stub leaves in it.
        Call(
            "sinkhorn_attention_sigma2(x, x, max_steps=2)", normal(1, HEADS, 2, FEATURES),
            lambda x: fastdsm.sinkhorn_attention_sigma2(x, x, max_steps=2),
            lambda x: reference.sinkhorn_attention_sigma2(x, x, n_iters=3), (_SWEEP,) * 11,
            (*_SWEEPS, _ATTEND, *_ATTENTION_BACKWARD),
            tolerance=1e-3,
        ),
    ]  # fmt: skip
