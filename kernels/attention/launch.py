"""Launching the passes of attention over logits that are never stored; symbols and derivation in ``tile.py``.

``over`` names the axis a pass sums along: "cols" leaves one result per query, "rows" one per key. The contract is that of
``Passes`` in ``fastdsm/_ops/streamed``, for query and key of at most 32 bits. Nothing here compiles for a shape: the head
dimension is padded to a block, everything else is a run-time number.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from fastdsm._ops.problem import Attention, Dropout, Potentials, Terms
from fastdsm._ops.streamed.potentials import Potential, counted

from ..common.configuration import Configuration
from .arguments import EntryStrides, Logits
from .gradient import Factors
from .operands import (
    block_of,
    by_line,
    dropout_arguments,
    drops,
    has_entries,
    logits_of,
    oriented,
    stacked,
    stream_first,
    whole_lines,
    widened,
)
from .table import (
    APPLIES,
    ATTENDS,
    BIASES,
    BLOCKS_D,
    ELEMENTS,
    GRADIENTS,
    PRODUCTS,
    SWEEPS,
    WHOLE_D,
    WHOLE_LINES,
    WHOLE_PROGRAMS,
    WHOLE_STEPS,
    WHOLES,
    configurations,
    vector_block,
)

__all__ = ["UNIT", "apply", "attend", "configurations", "gradient", "lse", "products", "supports", "sweep", "weigh"]

UNIT = math.log(2.0)
MAX_D = BLOCKS_D[-1]
_DTYPES = {element: dtype for dtype, element in ELEMENTS.items()}


def supports(problem: Attention) -> bool:
    """Whether query and key are of 16 or 32 bits with at most 256 features."""
    return problem.query.dtype in ELEMENTS and problem.query.shape[3] <= MAX_D


def _kind(dtype: torch.dtype) -> tuple[str, str]:
    """Element, and how float32 is multiplied now."""
    if dtype != torch.float32:
        return ELEMENTS[dtype], "half"
    return "fp32", "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _blocks(configuration: Configuration, logits: Logits) -> int:
    """Programs per head."""
    return -(-logits.sizes.n_lines // configuration.constants["BLOCK_L"])


def _sweep(
    problem: Attention, over: str, at: Potentials, what: str, w: Tensor | None, out: Tensor, active: Tensor | None
) -> None:
    """Launch the sweep kernel."""
    query = problem.query
    logits = logits_of(problem, over, at)
    kind = _kind(query.dtype), block_of(query.shape[3], BLOCKS_D), has_entries(problem), stream_first(at, over), what
    configuration = SWEEPS[kind].on(query.device)
    configuration.launch(
        query.shape[0] * query.shape[1] * _blocks(configuration, logits),
        **logits._asdict(),
        weight_ptr=logits.operands.line_base_ptr if w is None else w.contiguous(),
        active_ptr=logits.operands.line_padding_ptr if active is None else active.contiguous().view(torch.uint8),
        out_ptr=out,
        line_group=1 if over == "cols" else query.shape[1] // problem.key.shape[1],
        has_active=int(active is not None),
    )


def lse(problem: Attention, over: str, at: Potentials, online: bool, out: Tensor, active: Tensor | None = None) -> None:
    """``out`` (float64, contiguous) <- log sum exp(S + f + g) along ``over``, -inf on a line without entries.

    online: with a running maximum; without one exp(S + f + g) must be near a plan. active: (B, H) bool, False where a head
    keeps its ``out``.
    """
    _sweep(problem, over, at, "online" if online else "bounded", None, out, active)


def sweep(problem: Attention, over: str, at: Potentials, online: bool, out: Tensor, other: Tensor, active: Tensor) -> bool:
    """``out`` as :func:`lse`; ``other`` <- that of the other way round once the lines of ``out`` have sum 1, in one pass.

    For 16 bits, at most 128 features, nothing per entry, and an other side of at most 512 lines, which then fits on chip.
    """
    query, key = problem.query, problem.key
    lines, d = (key if over == "cols" else query).shape[2], query.shape[3]
    if has_entries(problem) or _kind(query.dtype)[1] != "half" or d > WHOLE_D[-1] or lines > WHOLE_LINES[-1]:
        return False
    across = "rows" if over == "cols" else "cols"
    block = next(block for block in WHOLE_LINES if lines <= block)
    configuration = WHOLES[ELEMENTS[query.dtype], block_of(d, BLOCKS_D), block, online].on(query.device)
    logits, step = logits_of(problem, across, at), configuration.constants["BLOCK_S"]
    heads, blocks = query.shape[0] * query.shape[1], -(-logits.sizes.n_stream // step)
    chunk = step * min(max(heads * blocks // WHOLE_PROGRAMS, 1), WHOLE_STEPS)
    chunks = -(-logits.sizes.n_stream // chunk)
    total, top = torch.empty_like(out, dtype=torch.float32), torch.zeros_like(out, dtype=torch.float32)
    partial = torch.empty((*other.shape[:2], chunks, lines), dtype=torch.float32, device=query.device)
    configuration.launch(
        heads * chunks,
        **logits._asdict(),
        active_ptr=active.contiguous().view(torch.uint8),
        total_ptr=total,
        top_ptr=top,
        partial_ptr=partial,
        line_group=query.shape[1] // key.shape[1] if over == "cols" else 1,
        chunk=chunk,
    )
    torch.add(total.double().log_(), top, alpha=UNIT, out=out)
    torch.log(partial.sum(2, dtype=torch.float64), out=other)
    return True


def weigh(problem: Attention, over: str, at: Potentials, w: Tensor, out: Tensor) -> None:
    """``out`` (float32, contiguous) <- the sum of P w along ``over``; w: float32, one vector per head."""
    _sweep(problem, over, at, "weighted", w, out, None)


def attend(
    problem: Attention,
    at: Potentials,
    online: bool,
    value: Tensor,
    dropout: Dropout | None,
    out: Tensor,
    line: Tensor,
) -> None:
    """``line`` (B, H, N), float64 <- lse over "cols"; ``out`` (B, H, N, e) <- Z exp(S + f + g - line) value, 0 on empty lines.

    value: (B, G, M, e). One pass where the sums are bounded, nothing is dropped, columns come first and all is of one dtype;
    else :func:`lse`, then :func:`apply`.
    """
    query = problem.query
    if online or drops(dropout) or not at.columns_first or not query.dtype == value.dtype == out.dtype:
        lse(problem, "cols", at, online, line)
        f = counted(at.f_base, UNIT) + counted(at.f_fine, UNIT) - torch.where(line == -torch.inf, 0.0, line)
        last = Potential.near(f, UNIT, at.f_base.dtype).moved(f, UNIT)
        apply(problem, "cols", replace(at, f_base=last.base, f_fine=last.fine), value, dropout, out)
        return
    value, e = whole_lines(value), value.shape[3]
    logits = logits_of(problem, "cols", at)
    configuration = ATTENDS[_kind(query.dtype), block_of(query.shape[3], BLOCKS_D), has_entries(problem)].on(query.device)
    configuration.launch(
        query.shape[0] * query.shape[1] * _blocks(configuration, logits) * -(-e // configuration.constants["BLOCK_E"]),
        **logits._asdict(),
        x_ptr=value,
        out_ptr=out,
        lse_ptr=line,
        x_strides=by_line(value),
        out_strides=EntryStrides(*out.stride()),
        e=value.shape[3],
        out_e=e,
    )


def apply(problem: Attention, over: str, at: Potentials, x: Tensor, dropout: Dropout | None, out: Tensor) -> None:
    """``out`` <- the sum of Z P x along ``over``, P = exp(S + f + g).

    over "cols": x (B, G, M, e), out (B, H, N, e); "rows": x (B, H, N, e), out (B, G, M, e), summed over the heads of a group.
    x is multiplied to float32's accuracy, whatever its dtype and the query's.
    """
    element, precision = _kind(problem.query.dtype)
    if precision == "half":
        precision = "wide" if x.dtype == problem.query.dtype else "mixed"
    if (element, precision) == ("fp16", "mixed"):
        problem, (element, precision) = widened(problem), _kind(torch.float32)
    query, key, e = problem.query, problem.key, x.shape[3]
    x = whole_lines(x if precision == "wide" else x.float())
    target = out if out.dtype == torch.float32 else torch.empty(out.shape, dtype=torch.float32, device=out.device)
    dropped = drops(dropout)
    entries = dropped or has_entries(problem)
    configuration = APPLIES[(element, precision), block_of(query.shape[3], BLOCKS_D), entries, stream_first(at, over), dropped]
    configuration, logits = configuration.on(query.device), logits_of(problem, over, at)
    configuration.launch(
        out.shape[0] * out.shape[1] * _blocks(configuration, logits) * -(-e // configuration.constants["BLOCK_E"]),
        **logits._asdict(),
        x_ptr=x,
        out_ptr=target,
        x_strides=by_line(x),
        out_strides=EntryStrides(*target.stride()),
        e=x.shape[3],
        out_e=e,
        heads_per_out=1 if over == "cols" else query.shape[1] // key.shape[1],
        line_is_key=int(over == "rows"),
        **dropout_arguments(dropout, x.device),
    )
    if target is not out:
        out.copy_(target)


def products(
    problem: Attention,
    over: str,
    at: Potentials,
    value: Tensor,
    grad_out: Tensor,
    dropout: Dropout | None,
    out: Tensor,
) -> None:
    """``out`` (float32, contiguous, one result per query head) <- the sum of Z P (grad_out value^T) along ``over``."""
    if not problem.query.dtype == value.dtype == grad_out.dtype:
        problem, value, grad_out = widened(problem), value.float(), grad_out.float()
    query, e, kind, dropped = problem.query, value.shape[3], _kind(problem.query.dtype), drops(dropout)
    block = block_of(max(query.shape[3], min(e, MAX_D)), BLOCKS_D)
    configuration = PRODUCTS[kind, block, dropped or has_entries(problem), stream_first(at, over), dropped]
    configuration, logits = configuration.on(query.device), logits_of(problem, over, at)
    step = configuration.constants["BLOCK_E"]
    for start in range(0, e, step):
        sides = [whole_lines(x[..., start : start + step]) for x in (grad_out, value)][:: 1 if over == "cols" else -1]
        part = out if start == 0 else torch.empty_like(out)
        configuration.launch(
            query.shape[0] * query.shape[1] * _blocks(configuration, logits),
            **logits._asdict(),
            line_v_ptr=sides[0],
            stream_v_ptr=sides[1],
            out_ptr=part,
            line_v_strides=by_line(sides[0]),
            stream_v_strides=by_line(sides[1]),
            e=sides[0].shape[3],
            line_group=1 if over == "cols" else query.shape[1] // problem.key.shape[1],
            line_is_key=int(over == "rows"),
            **dropout_arguments(dropout, out.device),
        )
        if start > 0:
            out += part


def gradient(
    problem: Attention,
    which: str,
    terms: Terms,
    value: Tensor,
    grad_out: Tensor,
    dropout: Dropout | None,
    out: Tensor,
) -> None:
    """``out`` <- the gradient of the "query", the "key" or the "bias", from dS = Z P (grad_out value^T) - terms.

    out of the bias: (1 or B, 1 or H, 1 or N, 1 or M), 1 where the bias is expanded.
    """
    query = problem.query
    if not query.dtype == value.dtype == grad_out.dtype:
        problem = widened(problem)
        value, grad_out = value.float(), grad_out.float()
    e, kind = value.shape[3], _kind(problem.query.dtype)
    block = block_of(max(query.shape[3], min(e, MAX_D)), BLOCKS_D)
    step = vector_block(kind, block)
    if e <= step:
        _gradient(problem, which, kind, block, terms, value, grad_out, dropout, out)
        return
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for start in range(0, e, step):
        features = slice(start, start + step)
        part = torch.empty_like(total)
        _gradient(problem, which, kind, block, terms, value[..., features], grad_out[..., features], dropout, part)
        total += part
        terms = replace(terms, segments=[], counts=[])
    out.copy_(total)


def _gradient(
    problem: Attention,
    which: str,
    kind: tuple[str, str],
    block: int,
    terms: Terms,
    value: Tensor,
    grad_out: Tensor,
    dropout: Dropout | None,
    out: Tensor,
) -> None:
    """The same for vectors of the dtype of the query that fit into one launch."""
    query, key, device = problem.query, problem.key, problem.query.device
    at = terms.plan
    over = "rows" if which == "key" or (which == "bias" and not at.columns_first) else "cols"
    dropped = drops(dropout)
    if which == "bias":
        configuration = BIASES[kind, block, dropped]
    else:
        configuration = GRADIENTS[kind, block, dropped or has_entries(problem), stream_first(at, over), dropped].on(device)
    logits = logits_of(problem, over, stacked([at, *terms.segments]))
    value, grad_out = whole_lines(value), whole_lines(grad_out)
    sides = ((grad_out, terms.x), (value, terms.y)) if over == "cols" else ((value, terms.y), (grad_out, terms.x))
    counts = [torch.full((1,), count, dtype=torch.int32, device=device) for count in (*terms.counts, -1)]
    dtype, target = _DTYPES[configuration.pointers["out_ptr"]], out
    if out.dtype != dtype:
        target = torch.empty(out.shape, dtype=dtype, device=device)
    group = query.shape[1] // key.shape[1]
    shared = {
        **logits._asdict(),
        "factors": Factors(sides[0][1], sides[1][1], torch.cat(counts)),
        "line_v_ptr": sides[0][0],
        "stream_v_ptr": sides[1][0],
        "out_ptr": target,
        "line_v_strides": by_line(sides[0][0]),
        "stream_v_strides": by_line(sides[1][0]),
        "e": value.shape[3],
        "batch": query.shape[0],
        "n_terms": terms.x.shape[2],
        "line_is_key": int(over == "rows"),
        **dropout_arguments(dropout, device),
    }
    if which == "bias":
        b, h, n, m = out.shape
        sums = {"sum_b": b < query.shape[0], "sum_h": h < query.shape[1]}
        of_lines, of_stream = (n, m) if over == "cols" else (m, n)
        sums |= {"sum_lines": of_lines < logits.sizes.n_lines, "sum_stream": of_stream < logits.sizes.n_stream}
        line_blocks = 1 if sums["sum_lines"] else _blocks(configuration, logits)
        stream_blocks = 1 if sums["sum_stream"] else -(-logits.sizes.n_stream // configuration.constants["BLOCK_S"])
        configuration.launch(
            b * h * line_blocks * stream_blocks,
            **shared,
            out_strides=oriented(target, over),
            **{name: int(value) for name, value in sums.items()},
            line_group=1 if over == "cols" else group,
        )
    else:
        chunks = -(-query.shape[3] // configuration.constants["BLOCK_O"])
        configuration.launch(
            out.shape[0] * out.shape[1] * _blocks(configuration, logits) * chunks,
            **shared,
            out_strides=EntryStrides(*target.stride()),
            out_d=query.shape[3],
            heads_per_out=1 if over == "cols" else group,
        )
    if target is not out:
        out.copy_(target)
