"""timm's attention with a doubly-stochastic plan: its own classes, fused attention in them being fastdsm.sinkhorn_attention.

    model = timm.create_model("vit_small_patch16_224", attn_layer=fastdsm.integrations.timm.SinkhornAttention)

or ``fastdsm.integrations.convert(model)``, which turns the attention of a model that exists, with its weights, into these.
Parameters, buffers and their names are timm's. Written for timm 1.0.31 (1.0.20 or newer).
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..attention import sinkhorn_attention
from .lines import check_queries, masked

try:
    from timm.layers import Attention, AttentionRope
    from timm.models.beit import Attention as BeitAttention
    from timm.models.eva import EvaAttention
    from timm.models.swin_transformer import WindowAttention
    from timm.models.vision_transformer_relpos import RelPosAttention
except ImportError as error:
    raise ImportError(
        f"fastdsm.integrations.timm needs timm 1.0.20 or newer, and the torchvision that it imports: pip install timm ({error})"
    ) from error


class _Fused(TorchFunctionMode):
    """While it is entered, scaled_dot_product_attention is Sinkhorn's."""

    def __init__(self, kind: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.kind, self.options, self.calls = kind, options, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return _attend(*args, kind=self.kind, options=self.options, **(kwargs or {}))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    kind: str,
    options: dict[str, Any],
    **others: Any,
) -> Any:
    """Self-attention; a key that the mask takes from every query takes its query out, too."""
    queries, keys, n_iters = query.shape[-2], key.shape[-2], options["n_iters"]
    check_queries(queries, keys, n_iters, kind, "leave it to softmax")
    mask, padding = masked(attn_mask)
    padding = padding if n_iters > 0 and queries == keys else None
    return sinkhorn_attention(query, key, value, mask, query_padding_mask=padding, **others, **options)


class _Sinkhorn(nn.Module):
    """Before a class of timm's: its forward by the fused path, whose softmax is taken by a plan."""

    sinkhorn_options: ClassVar[dict[str, Any]] = {"n_iters": 3}
    """Of :func:`fastdsm.sinkhorn_attention`; a subclass or an instance may have its own."""

    fused_attn: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fused_attn = True

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the class's own; ``is_causal=True`` is an error."""
        fused = _Fused(type(self).__name__, self.sinkhorn_options)
        with fused:
            out: Tensor = super().forward(*args, **kwargs)
        if fused.calls != 1:
            raise RuntimeError(
                f"{type(self).__name__} called scaled_dot_product_attention {fused.calls} times, expected once: this "
                "release of timm computes attention in another way; please report it"
            )
        return out

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return ", ".join(f"{name}={value}" for name, value in self.sinkhorn_options.items())


class SinkhornAttention(_Sinkhorn, Attention):
    """``timm.layers.Attention``: of ViT, DeiT, DINOv2, SigLIP and their kin."""


class SinkhornAttentionRope(_Sinkhorn, AttentionRope):
    """``timm.layers.AttentionRope``: of ViTs with rotary positions."""


class SinkhornBeitAttention(_Sinkhorn, BeitAttention):
    """BEiT's, with its relative positions."""


class SinkhornEvaAttention(_Sinkhorn, EvaAttention):
    """EVA's, with its rotary positions."""


class SinkhornRelPosAttention(_Sinkhorn, RelPosAttention):
    """Of ViTs with relative positions."""


class SinkhornWindowAttention(_Sinkhorn, WindowAttention):
    """Swin's, a plan per window. Its -100 between parts of a shifted window is a logit, as in softmax."""


SINKHORN: dict[type[nn.Module], type[_Sinkhorn]] = {
    kind.__bases__[1]: kind
    for kind in (
        SinkhornAttention,
        SinkhornAttentionRope,
        SinkhornBeitAttention,
        SinkhornEvaAttention,
        SinkhornRelPosAttention,
        SinkhornWindowAttention,
    )
}
"""Which class takes the place of which; of timm's other attention none is replaced."""


def become_sinkhorn(attention: nn.Module, **options: Any) -> None:
    """Make a module of one of the classes in :data:`SINKHORN` a Sinkhorn one in place: one object, its weights and hooks."""
    kind = SINKHORN.get(type(attention))
    if kind is None:
        served = ", ".join(sorted(f"{x.__module__}.{x.__qualname__}" for x in SINKHORN))
        raise TypeError(f"attention must be one of {served}, got {type(attention).__module__}.{type(attention).__qualname__}")
    attention.__class__ = kind
    attention.fused_attn = True  # type: ignore[assignment]
    attention.sinkhorn_options = options  # type: ignore[assignment]
