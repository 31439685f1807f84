"""The variants of the mHC layer that people run, by name."""

from __future__ import annotations

from typing import Any

from .._ops.mixing import Mixing

VARIANTS = {
    # rows first, eps in the softmax and in every sum; [old, new]
    "deepseek": Mixing(),
    # the same projection, mixed as H[new, old], without an eps of pre
    "liger": Mixing(pre_eps=0.0, transposed=False),
    # rows first, eps in the sums alone
    "megatron": Mixing(floored=False, pre_eps=0.0),
    # rows first, in the log domain, without eps
    "transformer_engine": Mixing(sinkhorn_eps=0.0, pre_eps=0.0),
    # columns first, without eps, H[new, old]
    "paper": Mixing(columns_first=True, sinkhorn_eps=0.0, pre_eps=0.0, transposed=False),
    "lucidrains": Mixing(columns_first=True, sinkhorn_eps=0.0, pre_eps=0.0, transposed=False),
}
"""What each computes; mixes come in the order pre, post, mix of streams, and post_mult is 2, unless a call says else."""


def mixing_of(variant: str, transposed: bool | None, **options: Any) -> Mixing:
    """The variant's, with the options that are not None; ValueError where it does not exist or has no such eps."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(map(repr, VARIANTS))}, got {variant!r}")
    mixing = VARIANTS[variant]
    eps = options.get("sinkhorn_eps")
    if eps is not None and (eps == 0.0) != (mixing.sinkhorn_eps == 0.0):
        expected = "without eps" if mixing.sinkhorn_eps == 0.0 else "with an eps > 0"
        raise ValueError(f"variant {variant!r} projects {expected}, got sinkhorn_eps={eps}")
    given = {name: value for name, value in options.items() if value is not None}
    if transposed is not None:
        given["transposed"] = transposed
    return mixing._replace(**given)
