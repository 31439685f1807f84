"""What torch.distributed does around a call, seen without importing any of it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast

from torch import Tensor
from torch.nn import Parameter, functional

_CONTEXT_PARALLEL = "torch.distributed.tensor.experimental._context_parallel._attention"
_WHOLE = frozenset((Tensor, Parameter, type(None), bool, int, float, str))
_Function = TypeVar("_Function", bound=Callable[..., Any])


def refuse_context_parallel(name: str) -> None:
    """RuntimeError inside torch's ``context_parallel``, where every process has a part of the sequence.

    There scaled_dot_product_attention is among the functions that it has replaced; replaced by others it says nothing.
    """
    module: Any = sys.modules.get(_CONTEXT_PARALLEL)
    if module is not None and functional.scaled_dot_product_attention in getattr(module, "_replaced_functions", ()):
        raise RuntimeError(
            f"fastdsm.{name} inside torch's context_parallel would see this process's part of the sequence alone; call "
            "fastdsm.distributed.sinkhorn_attention(..., group=mesh.get_group()) there, or give nn.SinkhornAttention the "
            "parallel style fastdsm.distributed.SinkhornContextParallel"
        )


_UNREAD: ContextVar[bool] = ContextVar("fastdsm_unread", default=False)


@contextmanager
def unread() -> Iterator[None]:
    """Within, no check looks at values: of parts of a tensor one process would raise and the others wait for it."""
    token = _UNREAD.set(True)
    try:
        yield
    finally:
        _UNREAD.reset(token)


def are_unread() -> bool:
    """Whether a call is within :func:`unread`."""
    return _UNREAD.get()


def is_sharded(x: Any) -> bool:
    """Whether ``x`` is a DTensor."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local(x: Tensor) -> Tensor:
    """What this process has of a DTensor; any other tensor as it is."""
    whole: Any = x
    return whole.to_local() if is_sharded(x) else x


def own(x: Tensor, apart: bool) -> Tensor:
    """A parameter as this process holds it, whole; apart: its gradient here is of a part of the tokens, to be added up."""
    if not is_sharded(x):
        return x
    module: Any = sys.modules["torch.distributed.tensor"]
    whole: Any = x
    if any(not isinstance(placement, module.Replicate) for placement in whole.placements):
        raise ValueError(
            f"parameters of this module must be whole on every process, got {whole.placements}; fully_shard gathers them "
            "before a forward, fastdsm.distributed.HyperConnectionParallel keeps them replicated"
        )
    summed = [module.Partial() if apart else module.Replicate()] * len(whole.placements)
    held: Tensor = whole.to_local(grad_placements=summed)
    return held


def by_shards(lead: str, dims: int = 2, rows: bool = False, **trailing: int | None) -> Callable[[_Function], _Function]:
    """Decorator: DTensors are taken apart, and what every process has is an ordinary call.

    lead: the argument whose batch, all but its last ``dims`` dimensions, is sharded or replicated; so are the results.
    trailing: the other tensors, and how many dimensions each has behind its batch; None where that is as long as the lead's.
    Tensors that are not named are parameters without a batch. rows: the rows of matrices may lie apart on one dimension of the
    mesh, and the call is then that of :mod:`fastdsm.distributed` of the same name.
    """

    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for x in (*args, *kwargs.values()) if kwargs else args:
                if type(x) not in _WHOLE and is_sharded(x):  # asked by type first: this is most of what a call costs
                    from .shards import called

                    return called(function, lead, dims, rows, trailing, args, kwargs)
            return function(*args, **kwargs)

        return cast(_Function, call)

    return decorate
