"""Launching the stream family: matrices beyond 256 whose rows are read once per sweep; symbols in ``lines.py``.

A projection is a sequence of launches that the host never waits for: the first column step (three), two for each sweep, and
the plan. Which matrices have stopped is known to the device alone. Rows must be contiguous; where they are not, as in a
problem that has been transposed, the logits are copied once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastdsm._ops.problem import Gradients, Outputs, Problem

from ..common.configuration import Configuration, multiprocessors
from ..common.operands import inverse_of
from .table import (
    ADJOINT,
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
    WIDE_ROWS,
    configurations,
)

__all__ = ["configurations", "sinkhorn_backward", "sinkhorn_forward", "supports"]

MAX_SIZE = CHUNK * MAX_PARTS
# Rows of a program at the least: writing its partial sums and reading them again adds an eighth to the traffic of float32
# logits, a quarter to that of 16 bits. More would leave a single matrix of 2048 rows to fewer programs than an H100 has SMs.
FEWEST_LINES = 16
# Programs for each SM: as many as it holds at once, so that all begin and end together. One of 8192 columns fills it.
PROGRAMS = {8192: 1}


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
    """What launches of one problem share: the logits by rows and in how many programs, and arguments common to most kernels.

    Of the buffers among them, row_fine, row_factor and col_fine are (slots, B, lines), one slot for each sweep that is kept.
    """

    problem: Problem
    logits: Tensor
    block_m: int
    blocks: int
    chunks: int
    arguments: dict[str, Any]

    def given(self, configuration: Configuration, **more: Any) -> dict[str, Any]:
        """Those of the shared arguments that the kernel takes, and ``more``."""
        names = set(configuration.kernel.arg_names)
        return {name: value for name, value in self.arguments.items() if name in names} | more

    def by_blocks(self, configuration: Configuration, **more: Any) -> None:
        """Launch a program for each block of rows."""
        configuration.launch(self.logits.shape[0] * self.blocks, **self.given(configuration, **more))

    def by_chunks(self, configuration: Configuration, **more: Any) -> None:
        """Launch a program for each chunk of columns."""
        configuration.launch(self.logits.shape[0] * self.chunks, **self.given(configuration, **more))


def programs_of(matrices: Tensor) -> tuple[int, int, int]:
    """For (B, n, m): the columns that rows are padded to (0: any number), the rows of a program, the programs of a matrix."""
    (batch, n, m), device = matrices.shape, matrices.device
    block_m = next((block for block in ROWS if m <= block), 0)
    rows = ROWS[block_m][0] if block_m else WIDE_ROWS
    # Interpreted, as many programs as may be: adding up what they leave is to be tested, too.
    programs = PROGRAMS.get(block_m, 2) * (multiprocessors(device) if device.type == "cuda" else MAX_PARTS)
    lines = -(-max(FEWEST_LINES, -(-n // MAX_PARTS), min(n, -(-batch * n // programs))) // rows) * rows
    return block_m, lines, -(-n // lines)


def prepare(problem: Problem, keep: bool) -> Work:
    """Buffers for ``problem``; ``keep`` every sweep's potentials, else the last."""
    logits, device = used_logits(problem), problem.logits.device
    batch, n, m = logits.shape
    block_m, lines, blocks = programs_of(logits)
    chunks = -(-m // CHUNK)
    width, slots = chunks * CHUNK, problem.n_iters + 2 if keep else 2

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    absent = new(1, 1)
    row, col, f0 = (absent if x is None else x for x in (problem.row_marginal, problem.col_marginal, problem.f0))
    per_matrix = problem.temperature if isinstance(problem.temperature, Tensor) else None
    temperature = absent[0] if per_matrix is None else per_matrix
    arguments = {
        "logits_ptr": logits,
        "row_ptr": row,
        "col_ptr": col,
        "f0_ptr": f0,
        "temperature_ptr": temperature,
        "masses_ptr": new(batch, 3),
        "col_base_ptr": new(batch, width),
        "col_fine_ptr": new(slots, batch, width),
        "row_base_ptr": new(batch, n),
        "row_fine_ptr": new(slots, batch, n),
        "row_factor_ptr": new(slots, batch, n),
        "start_ptr": new(batch, n),
        "partial_ptr": new(batch, blocks, width),
        "residuals_ptr": new(2, batch, chunks),
        "done_ptr": new(batch, dtype=torch.int32),
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
        "steps": max(problem.n_iters, 1),
        "n_iters": problem.n_iters,
        "has_row": int(problem.row_marginal is not None),
        "has_col": int(problem.col_marginal is not None),
        "has_f0": int(problem.f0 is not None),
        "has_temperature": int(per_matrix is not None),
        "unit_rows": int(problem.unit_rows),
        "inverse_temperature": inverse_of(problem.temperature),
    }
    return Work(problem, logits, block_m, blocks, chunks, arguments)


def sweep(work: Work, tol: float, sweeps: Tensor | None) -> None:
    """Run the sweeps: each matrix to ``tol``, ``sweeps`` (B,) or ``n_iters``, at least one row step."""
    logits, partial, shared = work.logits, work.arguments["partial_ptr"], work.arguments
    first = {
        "top_ptr": torch.empty_like(partial),
        "rest_ptr": torch.empty_like(partial),
        "total_ptr": partial,
        "row_counts_ptr": partial.new_empty((len(logits), work.blocks, 3)),
        "col_counts_ptr": partial.new_empty((len(logits), work.chunks, 2)),
        "col_fine_ptr": shared["col_fine_ptr"][1],
    }
    start = replace(work, arguments=shared | first)
    start.by_blocks(START[logits.dtype, aligned(logits)])
    start.by_chunks(COLUMNS)
    start.by_chunks(MASSES)
    stops = {
        "sweeps_ptr": shared["done_ptr"] if sweeps is None else sweeps,
        "has_sweeps": int(sweeps is not None),
        "has_tol": int(tol >= 0),
        "tol": tol,
    }
    configuration = SWEEP[logits.dtype, work.block_m, aligned(logits)]
    for t in range(1, shared["steps"] + 1):
        work.by_blocks(configuration, t=t, **stops)
        work.by_chunks(REDUCE, t=t, **stops)


def sinkhorn_forward(problem: Problem, outputs: Outputs) -> None:
    """Write what ``outputs`` asks for, sigma2 excepted."""
    plan = outputs.plan
    work = prepare(problem, keep=False)
    sweep(work, problem.tol, None)
    transposed, source = by_contiguous_axis(work, plan)
    configuration = PLAN[plan.dtype, all(aligned(x, 1 if transposed else 2) for x in (source, plan)), transposed]
    has_info, absent = outputs.residual is not None, work.arguments["residuals_ptr"]
    configuration.launch(
        tiles(configuration, plan),
        **work.given(configuration, **placed("logits", source), **placed("plan", plan)),
        residual_ptr=outputs.residual if has_info else absent,
        f_ptr=outputs.f if has_info else absent,
        g_ptr=outputs.g if has_info else absent,
        has_info=int(has_info),
    )
    if outputs.sweeps is not None:
        outputs.sweeps.copy_(work.arguments["done_ptr"])


def sinkhorn_backward(problem: Problem, grad_plan: Tensor, gradients: Gradients, sweeps: Tensor | None) -> None:
    """Write what ``gradients`` asks for; ``sweeps`` (B,) int32 are those done, None where every matrix did ``n_iters``.

    The sweeps are run again with their potentials kept, then come their adjoints, and one pass for the gradient.
    """
    work = prepare(problem, keep=True)
    sweep(work, -1.0, sweeps)
    logits, cotangent, target = work.logits, by_rows(grad_plan), gradients.logits
    for name, like in (("beta_ptr", "col_fine_ptr"), ("e_ptr", "row_fine_ptr")):
        work.arguments[name] = torch.empty_like(work.arguments[like])
    configuration = COTANGENT[logits.dtype, work.block_m, aligned(logits) and aligned(cotangent)]
    given = {
        "grad_plan_ptr": cotangent,
        "grad_plan_stride_b": cotangent.stride(0),
        "grad_plan_stride_n": cotangent.stride(1),
    }
    for t in (0, *range(problem.n_iters, 0, -1)):
        work.by_blocks(configuration, t=t, **given)
        if t != 1:
            work.by_chunks(REDUCE_ADJOINT, t=t)
        configuration = ADJOINT[logits.dtype, work.block_m, aligned(logits)]
    transposed, source = by_contiguous_axis(work, target)
    cotangent = grad_plan if transposed else cotangent
    dim = 1 if transposed else 2
    configuration = GRADIENT[target.dtype, all(aligned(x, dim) for x in (source, cotangent, target)), transposed]
    has_vectors, absent = gradients.f0 is not None, work.arguments["residuals_ptr"]
    uniform = problem.row_marginal is None and problem.col_marginal is None
    configuration.launch(
        tiles(configuration, target),
        **work.given(
            configuration,
            **placed("logits", source),
            **placed("grad_plan", cotangent),
            **placed("grad_logits", target),
        ),
        grad_f0_ptr=gradients.f0 if has_vectors else absent,
        grad_row_ptr=gradients.log_row if has_vectors else absent,
        grad_col_ptr=gradients.log_col if has_vectors else absent,
        reach=math.floor(45 / math.log2(max(*logits.shape[1:], 2))) if uniform else 1,
        has_vectors=int(has_vectors),
    )


def tiles(configuration: Configuration, target: Tensor) -> int:
    """Programs for what is done entry by entry."""
    batch, n, m = target.shape
    constants = configuration.constants
    along, beside = (n, m) if constants["TRANSPOSED"] else (m, n)
    return batch * -(-along // constants["BLOCK_1"]) * -(-beside // constants["BLOCK_0"])


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
