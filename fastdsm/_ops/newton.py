"""solver="newton" where no kernel takes its steps: sweeps first, then Newton's method for the matrices that these leave.

A step takes as long as ten to thirty sweeps, and most matrices that people project are done after as many: where sigma2 is not
close to 1. So the first step is up to ``SWEEPS`` of them, by whoever sweeps fastest; it counts as one step, and Newton's method
starts from where it leads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from .. import pytorch
from ..pytorch.host import may_look
from .problem import Outputs, Problem

SWEEPS = 24  # on a CPU, 4 to 1,024 lines, logit std 1 to 8: 12 and 16 leave too many at std 2, 32 save no more than they take
_WATCHED_ABOVE = 32  # lines; up to so many a residual after each sweep takes longer than the sweeps it may save


def newton_forward(problem: Problem, outputs: Outputs, sweep: Callable[[Problem, Outputs], None]) -> None:
    """Fill ``outputs``; ``sweep`` does so for a problem of sweeps, by the same backend.

    The host looks once which matrices are left, on an accelerator too, except while a graph of its work is captured.
    """
    if problem.n_iters < 2 or not may_look(problem.logits):
        pytorch.newton_forward(problem, outputs)
        return
    f, left = _sweep(problem, outputs, sweep)
    if len(left) == len(f):
        pytorch.newton_forward(replace(problem, f0=f), outputs)
    elif len(left):
        rest = outputs.room_for(len(left))
        pytorch.newton_forward(replace(problem.part(left), f0=f[left]), rest)
        outputs.put(left, rest)


def _sweep(problem: Problem, outputs: Outputs, sweep: Callable[[Problem, Outputs], None]) -> tuple[Tensor, Tensor]:
    """Make the first step; the row potentials it leads to, and which matrices it does not bring to their tolerance."""
    outputs = outputs.with_info(problem)
    watched = max(problem.logits.shape[1:]) > _WATCHED_ABOVE
    sweep(replace(problem, n_iters=SWEEPS, tol=problem.tol if watched else -1.0), outputs)
    assert outputs.residual is not None
    assert outputs.sweeps is not None
    assert outputs.f is not None
    outputs.sweeps.fill_(1)
    return outputs.f, (outputs.residual > problem.tol).nonzero().squeeze(1)
