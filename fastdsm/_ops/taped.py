"""A projection on the PyTorch path whose gradient starts from what its forward left, where the batch is small enough for that.

It is the gradient of ``gradients.py`` in all else: a derivative of it, and tensors or a thread that are no longer plain when
the backward comes (a cotangent inside vmap), go by ``sinkhorn_backward``, which makes the sweeps again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from ..pytorch import Tape
from . import gradients
from .plain import forms_of, thread_is_plain
from .runs import Backward, Forward, run_of
from .transforms import CALLS


class _Taped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        *inputs, run = inputs  # type: ignore[assignment]
        tape = Tape()
        plan = run.taped(inputs[:6], inputs[6], tape)[0]
        tensors, ctx.tape_of = tape.taken()
        gradients.save(ctx, inputs, *tensors)
        return plan

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> gradients.Gradients:
        inputs, recorded = gradients.saved(ctx)

        def back(grad_plan: Tensor, lines: bool, *inputs: Any) -> Any:
            tensors, (scale, *options) = (grad_plan, None, *inputs[:6]), inputs[6:]
            forms = forms_of(tensors) if recorded and thread_is_plain() and not torch.is_grad_enabled() else None
            if forms is None:
                return CALLS.sinkhorn_backward(grad_plan, None, *inputs, lines)
            run = run_of(Backward, inputs[0], tensors, forms, False, lines, *options)
            return cast(Backward, run).from_tape(tensors, scale, ctx.tape_of(recorded))

        return *gradients.of_projection(ctx.needs_input_grad, grad, back, inputs), None


# As in transforms.py: what Function.apply does before this is for functorch's wrappers.
_apply: Callable[..., Tensor] = super(torch.autograd.Function, cast(Any, _Taped)).apply


def sinkhorn(run: Forward, *inputs: Any) -> Tensor:
    """What ``transforms.sinkhorn.trained`` returns for plain tensors in a plain thread, on the PyTorch path."""
    return _apply(*inputs, run)
