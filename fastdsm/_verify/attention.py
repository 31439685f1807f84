"""Sinkhorn attention held against the float64 oracle, under the policy of :mod:`fastdsm._verify.sinkhorn`.

Logits have the standard deviation of the case: query and key are normal, and their products are scaled to it. s is the
largest true entry for outputs, :func:`~fastdsm._verify.sinkhorn.gradient_size` for gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..attention import sinkhorn_attention
from ..attention_spectrum import sinkhorn_attention_sigma2
from .sinkhorn import SIGMA2_TOL, Case, Record, Target, cast, compare, failed, gradient_size

_OPTIONS = ("row first", "bias", "mask", "padding", "temperature")


@dataclass(frozen=True)
class AttentionCase(Case):
    """``shape`` (B, H, G, N, M, d, e): batch, query and key heads, query and key lines, features of both and of values."""

    @property
    def summary(self) -> str:
        """Everything but the dtype."""
        B, H, G, N, M, d, e = self.shape
        option = f", {self.option}" if self.option else ""
        return f"attention {B}x{H}/{G} heads, {N}x{M}, d {d}, e {e}, std {self.std:g}, {self.n_iters} sweeps{option}"


def attention_cases(target: Target, quick: bool = False) -> list[AttentionCase]:
    """The grid for ``target``: sizes at every logit scale, numbers of sweeps, options, in every dtype."""
    dtypes = (torch.float32, torch.bfloat16) if quick else (torch.float32, torch.float16, torch.bfloat16)
    if target.interpreted:
        shapes = [(1, 2, 1, 9, 7, 5, 3)] if quick else [(1, 2, 1, 9, 7, 5, 3), (2, 1, 1, 17, 5, 16, 16), (1, 1, 1, 1, 3, 8, 4)]
    elif quick:
        shapes = [(2, 4, 2, 65, 40, 16, 16)]
    else:
        shapes = [(2, 4, 2, 65, 40, 16, 24), (1, 2, 2, 128, 128, 64, 64), (2, 2, 1, 33, 100, 80, 128), (1, 1, 1, 1, 1, 3, 1)]
    if not target.interpreted:
        dtypes = (*dtypes, torch.float64)
    scales = [AttentionCase(shape, x, std, 3) for shape in shapes for x in dtypes for std in (1.0, 50.0)]
    lengths = [AttentionCase(shapes[0], x, 3.0, count) for x in dtypes for count in (0, 1, 10)]
    return scales + lengths + [AttentionCase(shapes[0], x, 2.0, 3, option) for option in _OPTIONS for x in dtypes]


def verify_attention_case(case: AttentionCase, target: Target) -> list[Record]:
    """Hold the output, every gradient, the residual and sigma2 against the oracle; a call that raises is a miss."""
    try:
        return _compare(case, target)
    except Exception as error:
        return [failed(case, target, error)]


@dataclass(frozen=True)
class _Run:
    out: Tensor
    residual: Tensor
    sigma2: Tensor
    gradients: Mapping[str, Tensor]


def _compare(case: AttentionCase, target: Target) -> list[Record]:
    operands, cotangent = _inputs(case, target.device)
    found = _evaluate(
        partial(sinkhorn_attention, backend=target.backend, enable_gqa=True),
        partial(sinkhorn_attention_sigma2, backend=target.backend, enable_gqa=True),
        operands,
        cotangent,
    )
    oracle = (reference.sinkhorn_attention, reference.sinkhorn_attention_sigma2)
    truth, plain = (_evaluate(*oracle, *_held_in(dtype, operands, cotangent)) for dtype in (torch.float64, torch.float32))
    record = partial(compare, target=target, case=case)
    size = max(1.0, truth.out.abs().max().item())
    records = [
        record("attention", "output", found.out, truth.out, plain.out, size=size),
        record("attention", "residual", found.residual, truth.residual, plain.residual),
        record("attention", "sigma2", found.sigma2, truth.sigma2, plain.sigma2, relative=SIGMA2_TOL),
    ]
    for name, gradient in truth.gradients.items():
        size = gradient_size(gradient, cotangent)
        records.append(
            record("attention", f"gradient of {name}", found.gradients[name], gradient, plain.gradients[name], size=size)
        )
    return records


def _held_in(dtype: torch.dtype, operands: Mapping[str, Any], cotangent: Tensor) -> tuple[dict[str, Any], Tensor]:
    """The same numbers in another dtype."""
    cotangent, held, _ = cast(dtype, cotangent, operands)
    return dict(held), cotangent


def _evaluate(call: Callable[..., Any], spectrum: Callable[..., Any], operands: Mapping[str, Any], cotangent: Tensor) -> _Run:
    floating = {name: x for name, x in operands.items() if isinstance(x, Tensor) and x.is_floating_point()}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in floating.items()}
    out, info = call(**{**operands, **leaves}, return_info=True)
    gradients = torch.autograd.grad(out, list(leaves.values()), cotangent)
    measured = spectrum(**{name: x for name, x in operands.items() if name != "value"})
    return _Run(out.detach(), info.residual, measured, dict(zip(leaves, gradients, strict=True)))


def _inputs(case: AttentionCase, device: str) -> tuple[dict[str, Any], Tensor]:
    """The call's operands and a cotangent, drawn in float32 and then held in the dtype of the call."""
    generator = torch.Generator().manual_seed(0)
    B, H, G, N, M, d, e = case.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(case.dtype).to(device)

    operands: dict[str, Any] = {
        "query": normal(B, H, N, d), "key": normal(B, G, M, d), "value": normal(B, G, M, e),
        "scale": case.std / math.sqrt(d), "n_iters": case.n_iters,
    }  # fmt: skip
    cotangent = normal(B, H, N, e)
    if case.option == "row first":
        operands["first"] = "row"
    elif case.option == "bias":
        operands["attn_mask"] = normal(1, H, N, M)
    elif case.option == "mask":
        mask = torch.rand(N, M, generator=generator) < 0.8
        mask[0], mask[:, -1] = False, False
        operands["attn_mask"] = mask.to(device)
    elif case.option == "padding":
        keys, queries = torch.zeros(B, M, dtype=torch.bool), torch.zeros(B, N, dtype=torch.bool)
        keys[0, M // 2 :], queries[-1, : N // 3] = True, True
        operands |= {"key_padding_mask": keys.to(device), "query_padding_mask": queries.to(device)}
    elif case.option == "temperature":
        inside = torch.float64 if case.dtype == torch.float64 else torch.float32
        operands["temperature"] = (torch.rand(B, H, generator=generator) + 0.5).to(inside).to(device)
    return operands, cotangent
