"""Everything that is verified: the cases of a target, and the judge of each."""

from __future__ import annotations

from . import attention, mhc, newton, sinkhorn
from .attention import AttentionCase
from .mhc import MhcCase
from .newton import NewtonCase
from .sinkhorn import Case, Record, Target


def grid(target: Target, quick: bool = False) -> list[Case]:
    """Every case of ``target``; neighbours share their kernels."""
    return [
        *sinkhorn.cases(target, quick),
        *newton.newton_cases(target, quick),
        *attention.attention_cases(target, quick),
        *mhc.mhc_cases(target, quick),
    ]


def verify(case: Case, target: Target) -> list[Record]:
    """Hold what the case is about against the oracle."""
    if isinstance(case, AttentionCase):
        return attention.verify_attention_case(case, target)
    if isinstance(case, NewtonCase):
        return newton.verify_newton_case(case, target)
    if isinstance(case, MhcCase):
        return mhc.verify_mhc_case(case, target)
    return sinkhorn.verify_case(case, target)
