"""Everything that is verified: the cases of a target, and the judge of each."""

from __future__ import annotations

from .attention import AttentionCase, attention_cases, verify_attention_case
from .newton import NewtonCase, newton_cases, verify_newton_case
from .sinkhorn import Case, Record, Target, cases, verify_case


def grid(target: Target, quick: bool = False) -> list[Case]:
    """Every case of ``target``; neighbours share their kernels."""
    return [*cases(target, quick), *newton_cases(target, quick), *attention_cases(target, quick)]


def verify(case: Case, target: Target) -> list[Record]:
    """Hold what the case is about against the oracle."""
    if isinstance(case, AttentionCase):
        return verify_attention_case(case, target)
    if isinstance(case, NewtonCase):
        return verify_newton_case(case, target)
    return verify_case(case, target)
