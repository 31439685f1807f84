"""Calls of the operators, differentiable inside functorch's transforms as well as outside.

In a plain thread, on plain tensors (``plain.py``), a call goes past the dispatcher: to the operator's implementation, where a
gradient may be wanted inside an ``autograd.Function``. Elsewhere it goes to the operator, whose own autograd registration
serves, except inside ``torch.func`` (grad, vmap, jacrev, ...), where that does not compose: there the operator stands in an
``autograd.Function`` that generates its rule for vmap. The gradient is one and the same on all three ways. Where an input
carries a tangent of forward mode, the call is a composition of torch's own operations (``composed.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from . import attention_gradients, gradients
from .attention_operators import LIBRARY
from .operators import IMPLEMENTATIONS
from .plain import forms_of, has_tangents, thread_is_plain
from .runs import Run

_AUTOGRAD = {**gradients.AUTOGRAD, **attention_gradients.AUTOGRAD}
CALLS: Any = SimpleNamespace()  # what gradients are made of: the differentiable calls below


class Call:
    """A call of ``torch.ops.fastdsm.<name>``, by whichever way is open.

    by_form: its implementation takes the run, or the forms of its tensors, where these are known. rules: context, gradient and
    composition, of an operator that is not in the tables.
    """

    def __init__(self, name: str, by_form: bool = True, rules: Sequence[Callable[..., Any]] | None = None) -> None:
        context, gradient, self._composed = rules or _AUTOGRAD[name]
        self._operator = getattr(torch.ops.fastdsm, name).default
        bare = IMPLEMENTATIONS[name]
        implementation = bare if by_form else lambda *inputs, run=None, forms=None: bare(*inputs)
        self._implementation = implementation
        self._tensors = sum("Tensor" in str(x.type) for x in self._operator._schema.arguments)  # they lead
        gradient = partial(gradient, CALLS)
        torch.library.register_autograd(f"fastdsm::{name}", gradient, setup_context=context, lib=LIBRARY)
        backward = staticmethod(gradient)
        forward, setup_context = staticmethod(self._operator), staticmethod(context)
        members = {"generate_vmap_rule": True, "forward": forward, "setup_context": setup_context, "backward": backward}
        self._transformed: Any = type(f"Fastdsm_{name}", (torch.autograd.Function,), members)

        def run(ctx: Any, *inputs: Any) -> Any:
            *inputs, known = inputs  # type: ignore[assignment]
            results = implementation(*inputs, run=known)
            context(ctx, inputs, results)
            return results

        def back(ctx: Any, *cotangents: Any) -> Any:
            return *gradient(ctx, *cotangents), None

        members = {"forward": staticmethod(run), "backward": staticmethod(back)}
        function = type(f"Fastdsm_{name}", (torch.autograd.Function,), members)
        # Function.apply first takes off functorch's wrappers, which no plain tensor has.
        base: Any = super(torch.autograd.Function, cast(Any, function))
        self._apply: Callable[..., Any] = base.apply
        setattr(CALLS, name, self)

    def __call__(self, *inputs: Any) -> Any:
        """The operator's results."""
        if torch._C._are_functorch_transforms_active() and not has_tangents(inputs[: self._tensors]):
            return self._transformed.apply(*inputs)
        forms = forms_of(inputs[: self._tensors]) if thread_is_plain() else None
        if forms is None:
            by_torch = has_tangents(inputs[: self._tensors])
            return (self._composed if by_torch else self._operator)(*inputs)
        if backward_may_follow(inputs[: self._tensors]):
            return self.trained(None, *inputs)
        return self._implementation(*inputs, forms=forms)

    def trained(self, run: Run | None, *inputs: Any) -> Any:
        """The same with a gradient to come, for plain tensors in a plain thread, by ``run`` where that is known."""
        return self._apply(*inputs, run)


def backward_may_follow(inputs: Iterable[Any]) -> bool:
    """Whether a call of these inputs has to keep what only its gradient needs."""
    if torch._C._are_functorch_transforms_active():
        return True
    if torch.is_grad_enabled():
        for x in inputs:
            if isinstance(x, Tensor) and x.requires_grad:
                return True
    return False


sinkhorn = Call("sinkhorn")
sinkhorn_info = Call("sinkhorn_info")
sinkhorn_backward = Call("sinkhorn_backward")
sinkhorn_potentials_backward = Call("sinkhorn_potentials_backward", by_form=False)
fixed_point = Call("fixed_point")
fixed_point_backward = Call("fixed_point_backward")
fixed_point_potentials_backward = Call("fixed_point_potentials_backward", by_form=False)
sigma2 = Call("sigma2")
sigma2_backward = Call("sigma2_backward", by_form=False)
sinkhorn_attention = Call("sinkhorn_attention")
sinkhorn_attention_backward = Call("sinkhorn_attention_backward")
sinkhorn_attention_sigma2 = Call("sinkhorn_attention_sigma2", by_form=False)
