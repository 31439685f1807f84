"""Calls of the operators, differentiable inside functorch's transforms as well as outside.

Outside, an operator's own autograd registration serves. Inside ``torch.func`` (grad, vmap, jacrev, ...) that registration
does not compose, so that there the operator and the same gradient are wrapped in an ``autograd.Function`` that generates
its rule for vmap. Forward-mode derivatives are an error there, not a silent zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import attention_gradients, gradients
from .attention_operators import LIBRARY

_AUTOGRAD = {**gradients.AUTOGRAD, **attention_gradients.AUTOGRAD}
CALLS: Any = SimpleNamespace()  # what gradients are made of: the differentiable calls below


def _composable(name: str) -> Callable[..., Any]:
    """A call of ``torch.ops.fastdsm.<name>``, its gradient registered both ways."""
    operator = getattr(torch.ops.fastdsm, name).default
    context, gradient = _AUTOGRAD[name]
    gradient = partial(gradient, CALLS)
    torch.library.register_autograd(f"fastdsm::{name}", gradient, setup_context=context, lib=LIBRARY)
    members = {
        "generate_vmap_rule": True,
        "forward": staticmethod(operator),
        "setup_context": staticmethod(context),
        "backward": staticmethod(gradient),
    }
    function: Any = type(f"Fastdsm_{name}", (torch.autograd.Function,), members)

    def call(*inputs: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return function.apply(*inputs)
        return operator(*inputs)

    setattr(CALLS, name, call)
    return call


def backward_may_follow(inputs: Iterable[Any]) -> bool:
    """Whether a call of these inputs has to keep what only its gradient needs."""
    if torch._C._are_functorch_transforms_active():
        return True
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


sinkhorn = _composable("sinkhorn")
sinkhorn_info = _composable("sinkhorn_info")
sinkhorn_backward = _composable("sinkhorn_backward")
fixed_point = _composable("fixed_point")
fixed_point_backward = _composable("fixed_point_backward")
sigma2 = _composable("sigma2")
sinkhorn_attention = _composable("sinkhorn_attention")
sinkhorn_attention_backward = _composable("sinkhorn_attention_backward")
sigma2_bounds: Callable[..., Any] = torch.ops.fastdsm.sigma2_bounds.default
