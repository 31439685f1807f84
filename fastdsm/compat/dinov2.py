"""DINOv2: the teacher's scores made assignments, in which every prototype has the same mass.

Source: facebookresearch/dinov2, ``dinov2/loss/dino_clstoken_loss.py`` and ``ibot_patch_loss.py``; arXiv 2304.07193, after SwAV.
In a loss: ``DINOLoss.sinkhorn_knopp_teacher = staticmethod(fastdsm.compat.dinov2.sinkhorn_knopp_teacher)``.
"""

from __future__ import annotations

from torch import Tensor

from .._ops import arguments
from ._shared import Convention, assignments, check_scale


def sinkhorn_knopp_teacher(teacher_output: Tensor, teacher_temp: float, n_iterations: int = 3) -> Tensor:
    """Assignments of samples to prototypes: prototypes, then samples normalised, ``n_iterations`` times.

    In a process group of several, scores are this process's samples, and prototypes are normalised over those of all.

    iBOT's method of this name has the number of masked patches before n_iterations, which cancels in what it computes: leave it
    out.

    Args:
        teacher_output: (B, K) of B samples and K prototypes, any floating dtype. The origin is NaN from teacher_output /
            teacher_temp > 88 on; here it is right.
        teacher_temp: > 0.
        n_iterations: sweeps, >= 1.

    Returns:
        (B, K), float32 of every input, rows of sum 1; without a gradient, as in the origin.

    Raises:
        TypeError, ValueError: as :func:`fastdsm.sinkhorn`.
    """
    arguments.check_matrices(teacher_output, "teacher_output", 0)
    check_scale(teacher_temp, "teacher_temp")
    n_iterations = arguments.count_of(n_iterations, "n_iterations", 1)
    return assignments(teacher_output.float(), n_iterations, teacher_temp)


CONVENTIONS = (
    Convention(
        "sinkhorn_knopp_teacher", "columns", "rows", "n_iterations: a sweep", "1 | B / K", "teacher_temp", "scores",
        "samples x prototypes",
    ),
)  # fmt: skip
