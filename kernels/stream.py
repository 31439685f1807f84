"""Launching the stream family: matrices beyond 256 whose rows are read once per sweep; symbols in ``stream_lines``.

A projection is a sequence of launches that the host never waits for: the first column step (three), two for each sweep, and
the plan. Which matrices have stopped is known to the device alone. Rows must be contiguous; where they are not, as in a
problem that has been transposed, the logits are copied once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdsm.problem import Gradients, Outputs, Problem

from .stream_table import (
    ADJOINT,
    BLOCK_0,
    BLOCK_1,
    CHUNK,
    COLUMNS,
    COTANGENT,
    ELEMENTS,
    GRADIENT,
    MASSES,
    MAX_PARTS,
    PLAN,
    REDUCE,
    REDUCE_ADJOINT,
    ROWS,
    START,
    SWEEP,
    configurations,
)

__all__ = ["configurations", "sinkhorn_backward", "sinkhorn_forward", "supports"]

MAX_SIZE = CHUNK * MAX_PARTS
# Rows of a program at the least: below, writing partial sums and reading them again adds over an eighth to the traffic.
FEWEST_LINES = 16


def supports(problem: Problem) -> bool:
    """Whether the logits have 16 or 32 bits and at most 32,768 columns (rows are not limited)."""
    return problem.logits.dtype in ELEMENTS and problem.logits.shape[2] <= MAX_SIZE


def by_rows(x: Tensor) -> Tensor:
    """``x`` (B, n, m) with the entries of a row adjacent: itself, or a copy."""
    return x if x.stride(2) == 1 else x.contiguous()


def used_logits(problem: Problem) -> Tensor:
    """The logits by rows; under a mask a copy with -inf where an entry takes no part, so that no sweep reads the mask."""
    if problem.mask is None:
        return by_rows(problem.logits)
    logits = problem.logits
    excluded = torch.full((), -torch.inf, dtype=logits.dtype, device=logits.device)
    return torch.where(problem.mask, logits, excluded, out=torch.empty(logits.shape, dtype=logits.dtype, device=logits.device))


def aligned(matrix: Tensor, dim: int = 2) -> bool:
    """Whether lines along ``dim`` are contiguous and made of whole 16-byte vectors."""
    vector = 16 // matrix.element_size()
    others = (*(matrix.stride(d) for d in range(3) if d != dim), matrix.shape[dim])
    return matrix.stride(dim) == 1 and not any(s % vector for s in others) and matrix.data_ptr() % 16 == 0


@dataclass
class Work:
    """What launches of one problem share: the logits by rows, buffers, and arguments common to most kernels.

    row_fine, row_factor, col_fine: (slots, B, lines), one slot for each sweep that is kept.
    """

    problem: Problem
    logits: Tensor
    block_m: int
    lines: int
    blocks: int
    slots: int
    row_base: Tensor
    row_fine: Tensor
    row_factor: Tensor
    col_base: Tensor
    col_fine: Tensor
    start: Tensor
    masses: Tensor
    partial: Tensor
    residuals: Tensor
    done: Tensor
    arguments: dict[str, Any]

    def given(self, kernel: Any, **more: Any) -> dict[str, Any]:
        """Those of the shared arguments that ``kernel`` takes, and ``more``."""
        names = set(kernel.arg_names)
        return {name: value for name, value in self.arguments.items() if name in names} | more


def prepare(problem: Problem, keep: bool) -> Work:
    """Buffers for ``problem``; ``keep`` every sweep's potentials, else the last."""
    logits, device = used_logits(problem), problem.logits.device
    batch, n, m = logits.shape
    block_m = next((block for block in ROWS if m <= block), 0)
    rows = ROWS[block_m][0] if block_m else 4
    lines = -(-max(FEWEST_LINES, -(-n // MAX_PARTS)) // rows) * rows
    blocks, chunks = -(-n // lines), -(-m // CHUNK)
    width, slots = chunks * CHUNK, problem.n_iters + 2 if keep else 2

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    absent = new(1, 1)
    row, col, f0 = (absent if x is None else x for x in (problem.row_marginal, problem.col_marginal, problem.f0))
    per_matrix = problem.temperature if isinstance(problem.temperature, Tensor) else None
    temperature = absent[0] if per_matrix is None else per_matrix
    row_base, row_fine, row_factor = new(batch, n), new(slots, batch, n), new(slots, batch, n)
    col_base, col_fine = new(batch, width), new(slots, batch, width)
    start, masses, partial = new(batch, n), new(batch, 2), new(batch, blocks, width)
    residuals, done = new(2, batch, chunks), new(batch, dtype=torch.int32)
    arguments = {
        "logits_ptr": logits,
        "row_ptr": row,
        "col_ptr": col,
        "f0_ptr": f0,
        "temperature_ptr": temperature,
        "masses_ptr": masses,
        "col_base_ptr": col_base,
        "col_fine_ptr": col_fine,
        "row_base_ptr": row_base,
        "row_fine_ptr": row_fine,
        "row_factor_ptr": row_factor,
        "start_ptr": start,
        "partial_ptr": partial,
        "residuals_ptr": residuals,
        "done_ptr": done,
        "stride_b": logits.stride(0),
        "stride_n": logits.stride(1),
        "row_stride_b": row.stride(0),
        "row_stride_n": row.stride(1),
        "col_stride_b": col.stride(0),
        "col_stride_m": col.stride(1),
        "f0_stride_b": f0.stride(0),
        "f0_stride_n": f0.stride(1),
        "temperature_stride": temperature.stride(0),
        "batch": batch,
        "n": n,
        "m": m,
        "width": width,
        "lines": lines,
        "blocks": blocks,
        "chunks": chunks,
        "slots": slots,
        "n_iters": problem.n_iters,
        "has_row": int(problem.row_marginal is not None),
        "has_col": int(problem.col_marginal is not None),
        "has_f0": int(problem.f0 is not None),
        "has_temperature": int(per_matrix is not None),
        "unit_rows": int(problem.unit_rows),
        "scale": 1.0 if per_matrix is not None else math.log2(math.e) / float(problem.temperature),
    }
    return Work(
        problem, logits, block_m, lines, blocks, slots, row_base, row_fine, row_factor, col_base, col_fine, start, masses,
        partial, residuals, done, arguments,
    )  # fmt: skip


def sweep(work: Work, tol: float, sweeps: Tensor | None) -> None:
    """Run the sweeps: each matrix to ``tol``, ``sweeps`` (B,) or ``n_iters``, at least one row step."""
    problem, logits = work.problem, work.logits
    batch = logits.shape[0]
    top, counts = torch.empty_like(work.partial), work.partial.new_empty((batch, work.blocks, 2))
    col_counts = work.partial.new_empty((batch, work.arguments["chunks"], 2))
    # What starts the sweeps is slot 1's.
    first = {"col_fine_ptr": work.col_fine[1]}
    kind = logits.dtype, aligned(logits)
    programs, chunk_programs = batch * work.blocks, batch * work.arguments["chunks"]
    configuration = START[kind]
    configuration.launch(
        programs, **work.given(configuration.kernel, top_ptr=top, total_ptr=work.partial, row_counts_ptr=counts)
    )
    configuration = COLUMNS
    configuration.launch(
        chunk_programs,
        **work.given(configuration.kernel, top_ptr=top, total_ptr=work.partial, col_counts_ptr=col_counts, **first),
    )
    MASSES.launch(chunk_programs, **work.given(MASSES.kernel, row_counts_ptr=counts, col_counts_ptr=col_counts, **first))
    stops = {
        "sweeps_ptr": work.done if sweeps is None else sweeps,
        "has_sweeps": int(sweeps is not None),
        "has_tol": int(tol >= 0),
        "tol": tol,
    }
    configuration = SWEEP[logits.dtype, work.block_m, kind[1]]
    for t in range(1, max(problem.n_iters, 1) + 1):
        configuration.launch(programs, **work.given(configuration.kernel, t=t, **stops))
        REDUCE.launch(chunk_programs, **work.given(REDUCE.kernel, t=t, **stops))


def sinkhorn_forward(problem: Problem, outputs: Outputs) -> None:
    """Write what ``outputs`` asks for, sigma2 excepted."""
    plan = outputs.plan
    work = prepare(problem, keep=False)
    sweep(work, problem.tol, None)
    transposed, source = by_contiguous_axis(work, plan)
    configuration = PLAN[plan.dtype, all(aligned(x, 1 if transposed else 2) for x in (source, plan)), transposed]
    has_info = outputs.residual is not None
    configuration.launch(
        tiles(plan, transposed),
        **work.given(configuration.kernel, **placed("logits", source), **placed("plan", plan)),
        residual_ptr=outputs.residual if has_info else work.residuals,
        f_ptr=outputs.f if has_info else work.residuals,
        g_ptr=outputs.g if has_info else work.residuals,
        steps=max(problem.n_iters, 1),
        has_info=int(has_info),
    )
    if outputs.sweeps is not None:
        outputs.sweeps.copy_(work.done)


def sinkhorn_backward(problem: Problem, grad_plan: Tensor, gradients: Gradients, sweeps: Tensor | None) -> None:
    """Write what ``gradients`` asks for; ``sweeps`` (B,) int32 are those done, None where every matrix did ``n_iters``.

    The sweeps are run again with their potentials kept, then come their adjoints, and one pass for the gradient.
    """
    work = prepare(problem, keep=True)
    sweep(work, -1.0, sweeps)
    batch, n, m = work.logits.shape
    cotangent = by_rows(grad_plan)
    vectors = {"beta_ptr": torch.empty_like(work.col_fine), "e_ptr": torch.empty_like(work.row_fine)}
    kind = problem.logits.dtype, work.block_m, aligned(work.logits)
    configuration = COTANGENT[(*kind[:2], kind[2] and aligned(cotangent))]
    for t in (0, *range(problem.n_iters, 0, -1)):
        configuration.launch(
            batch * work.blocks,
            **work.given(configuration.kernel, grad_plan_ptr=cotangent, t=t, **vectors),
            grad_plan_stride_b=cotangent.stride(0),
            grad_plan_stride_n=cotangent.stride(1),
        )
        if t != 1:
            reduction = work.given(REDUCE_ADJOINT.kernel, t=t, beta_ptr=vectors["beta_ptr"])
            REDUCE_ADJOINT.launch(batch * work.arguments["chunks"], **reduction)
        configuration = ADJOINT[kind]
    target = gradients.logits
    transposed, source = by_contiguous_axis(work, target)
    cotangent = grad_plan if transposed else cotangent
    dim = 1 if transposed else 2
    configuration = GRADIENT[target.dtype, all(aligned(x, dim) for x in (source, cotangent, target)), transposed]
    has_vectors = gradients.f0 is not None
    uniform = problem.row_marginal is None and problem.col_marginal is None
    configuration.launch(
        tiles(target, transposed),
        **work.given(
            configuration.kernel,
            **vectors,
            **placed("logits", source),
            **placed("grad_plan", cotangent),
            **placed("grad_logits", target),
        ),
        grad_f0_ptr=gradients.f0 if has_vectors else work.residuals,
        grad_row_ptr=gradients.log_row if has_vectors else work.residuals,
        grad_col_ptr=gradients.log_col if has_vectors else work.residuals,
        steps=max(problem.n_iters, 1),
        reach=math.floor(45 / math.log2(max(n, m, 2))) if uniform else 1,
        has_vectors=int(has_vectors),
    )


def tiles(target: Tensor, transposed: bool) -> int:
    """Programs for what is done entry by entry."""
    batch, n, m = target.shape
    along, beside = (n, m) if transposed else (m, n)
    return batch * -(-along // BLOCK_1) * -(-beside // BLOCK_0)


def by_contiguous_axis(work: Work, target: Tensor) -> tuple[bool, Tensor]:
    """Whether columns are what is contiguous in ``target``, and the logits that go best with it."""
    transposed = target.stride(2) != 1 and target.stride(1) == 1
    source = work.problem.logits if transposed and work.problem.mask is None else work.logits
    return transposed, source


def placed(name: str, matrix: Tensor) -> dict[str, Any]:
    """Arguments ``name``_ptr and its strides for a (B, n, m) matrix; strides of the logits have no prefix."""
    prefix = "" if name == "logits" else f"{name}_"
    return {f"{name}_ptr": matrix} | {
        f"{prefix}stride_{axis}": stride for axis, stride in zip("bnm", matrix.stride(), strict=True)
    }
