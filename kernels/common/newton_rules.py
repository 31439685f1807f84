"""How far a step of Newton's method goes, and its grounds, in every family; ``fastdsm/pytorch/newton.py`` says why."""

import triton
import triton.language as tl

from .arithmetic import LN_2, log2, reciprocal

PURE_BELOW = tl.constexpr(1e-2)
ROUNDING = tl.constexpr(2.0**-21)  # share of c by which column sums are known: four units
LONGEST_STEP = tl.constexpr(8.0)
_GROUND = tl.constexpr(1e-3)
_SMALLEST_SPREAD = tl.constexpr(1e-30)
_SHORT = tl.constexpr(1e-3)  # log(1 + s) is s to half of this, and log2(1 + s) all rounding far below


@triton.jit
def roughness(residual):
    """The ground of a column, as a share of its c."""
    return tl.where(residual >= PURE_BELOW, tl.minimum(residual, 1.0) * _GROUND, ROUNDING)


@triton.jit
def step_share(spread, damped):
    """Share of a direction to go: all of it or log(1 + s) / s of it, and no further than a spread of LONGEST_STEP."""
    spread = tl.maximum(spread, _SMALLEST_SPREAD)
    wanted = tl.where(damped & (spread > _SHORT), LN_2 * log2(1.0 + spread), spread)
    return tl.minimum(tl.minimum(wanted, LONGEST_STEP) * reciprocal(spread), 1.0)
