"""The gradient of attention's temperature on the kernels: potentials of its own logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastdsm
from fastdsm._ops import backends
from fastdsm.kernels.attention import launch_short


@pytest.mark.parametrize("grad", [None, "implicit"])
def test_gradient_of_the_temperature_has_potentials_of_its_own_logits(
    grad: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensor cores round the logits of a narrow forward in their own way, which no interpreter does."""
    query, key, value, cotangent = (
        torch.randn(2, heads, lines, size).bfloat16() for heads, lines, size in ((4, 9, 5), (2, 7, 5), (2, 7, 3), (4, 9, 3))
    )
    temperature = torch.rand(2, 4) + 0.5

    def called() -> tuple[Tensor, Tensor]:
        leaf = temperature.clone().requires_grad_()
        out, info = fastdsm.sinkhorn_attention(
            query, key, value, temperature=leaf, backend="triton", grad=grad, tol=1e-4 if grad else None, enable_gqa=True,
            return_info=True,
        )  # fmt: skip
        (slope,) = torch.autograd.grad(out, leaf, cotangent)
        return info.f.detach(), slope

    monkeypatch.setattr(launch_short, "serves", lambda *_: False)  # whose sweeps are made again by every gradient
    known, forward = called(), backends.attention_forward

    def rounded(problem: Any, value: Tensor, sweeps: Any, dropout: Any, out: Tensor, state: Any, *rest: Any) -> None:
        forward(problem, value, sweeps, dropout, out, state, *rest)
        if problem.query.dtype == torch.bfloat16:
            state.f.add_(1e-3 * torch.randn_like(state.f))

    monkeypatch.setattr(backends, "attention_forward", rounded)
    found = called()
    assert not torch.equal(found[0], known[0])
    assert torch.equal(found[1], known[1])
