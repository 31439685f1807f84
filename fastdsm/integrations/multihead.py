"""``nn.SinkhornAttention`` in the place of an nn.MultiheadAttention, on its parameters. Written for torch 2.11 to 2.13."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..nn import SinkhornAttention
from .lines import check_queries

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def why_not(attention: nn.MultiheadAttention) -> str | None:
    """What keeps an nn.MultiheadAttention from being replaced, or None."""
    if type(attention) is not nn.MultiheadAttention:
        return "a subclass of nn.MultiheadAttention, whose call may be another"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "add_bias_kv or add_zero_attn: a key without a query has no mass to receive"
    if any(getattr(x, name) for x in (attention, attention.out_proj) for name in _HOOKS):
        return "has hooks, which are not carried over"
    if type(attention.out_proj) not in (nn.Linear, NonDynamicallyQuantizableLinear):
        return "out_proj has been replaced or parametrised"
    return None


def replacement(attention: nn.MultiheadAttention, self_attention: bool | None, **options: Any) -> SinkhornAttention:
    """A module with the same Parameters, in the same mode. ``self_attention``: as for :class:`SinkhornAttention`."""
    made = SinkhornAttention(
        attention.embed_dim, attention.num_heads, attention.dropout, attention.in_proj_bias is not None,
        kdim=attention.kdim, vdim=attention.vdim, batch_first=attention.batch_first, device="meta",
        self_attention=self_attention, **options,
    )  # fmt: skip
    for name, parameter in attention.named_parameters(recurse=False, remove_duplicate=False):
        setattr(made, name, parameter)
    made.out_proj.weight, made.out_proj.bias = attention.out_proj.weight, attention.out_proj.bias
    made.register_forward_pre_hook(_several_queries, with_kwargs=True)
    return made.train(attention.training)


def _several_queries(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A hook against one query, which pools by its softmax and would take the mean instead."""
    assert isinstance(module, SinkhornAttention)
    query, key = (args[at] if at < len(args) else kwargs[name] for at, name in enumerate(("query", "key")))
    lines = 1 if module.batch_first and query.dim() == 3 else 0
    remedy = "leave it to softmax: convert(..., leave=[...])"
    check_queries(query.shape[lines], key.shape[lines], module.options["n_iters"], "nn.MultiheadAttention", remedy)
