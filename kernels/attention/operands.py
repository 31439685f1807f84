"""Problems of attention as the arguments of its kernels."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdsm._ops.problem import Attention, Dropout, Potentials

from ..common.configuration import stand_in
from .arguments import EntryStrides, Logits, Operands, Scales, Sizes, Strides, VectorStrides
from .table import ELEMENTS

MAX_STRIDE = 1 << 24


def block_of(size: int, blocks: tuple[int, ...]) -> int:
    """The one of ``blocks`` that ``size`` is padded to."""
    return next(block for block in blocks if size <= block)


def whole_lines(tensor: Tensor) -> Tensor:
    """``tensor`` if its lines are made of whole 16-byte vectors; else a copy that is, with zeros behind each line."""
    vector = 16 // tensor.element_size()
    strides = [stride for stride, size in zip(tensor.stride()[:3], tensor.shape, strict=False) if size > 1]
    numbers = (*strides, tensor.shape[3], tensor.data_ptr() // tensor.element_size())
    if tensor.stride(3) == 1 and not any(number % vector for number in numbers):
        return tensor
    copy = tensor.new_zeros((*tensor.shape[:3], -(-tensor.shape[3] // vector) * vector))
    copy[..., : tensor.shape[3]] = tensor
    return copy


def near_entries(entries: Tensor, dtype: torch.dtype) -> Tensor:
    """Bias or mask in ``dtype``, with entries of a tile less than 2^31 apart; what is expanded stays so."""
    if entries.dtype == dtype and max(entries.stride()[2:]) < MAX_STRIDE:
        return entries
    once = [slice(0, 1) if stride == 0 else slice(None) for stride in entries.stride()]
    return entries[tuple(once)].to(dtype, memory_format=torch.contiguous_format, copy=True).expand(entries.shape)


def has_entries(problem: Attention) -> bool:
    """Whether single entries are biased or masked."""
    return problem.bias is not None or problem.mask is not None


def oriented(tensor: Tensor, over: str) -> EntryStrides:
    """Strides of entries (B, H, N, M) by lines and stream."""
    return EntryStrides(*(tensor if over == "cols" else tensor.mT).stride())


def by_line(tensor: Tensor) -> VectorStrides:
    """Strides of vectors (B, heads, lines, features)."""
    return VectorStrides(*tensor.stride()[:3])


def logits_of(problem: Attention, over: str, at: Potentials) -> Logits:
    """The arguments that all passes share. What is absent is never read: a tensor of the right dtype stands in for it."""
    query, key, bias = whole_lines(problem.query), whole_lines(problem.key), problem.bias
    heads, group = query.shape[1], query.shape[1] // key.shape[1]
    device, none = query.device, EntryStrides(0, 0, 0, 0)
    absent, byte = stand_in(device, "fp32"), stand_in(device, "u8")
    kind = 0
    if bias is not None:
        kind = 1 if bias.dtype == query.dtype else 2
        bias = near_entries(bias, bias.dtype if kind == 1 else torch.float32)
    mask = None if problem.mask is None else near_entries(problem.mask, torch.bool).view(torch.uint8)
    sides = (
        (query, problem.query_padding, at.f_base, at.f_fine),
        (key, problem.key_padding, at.g_base, at.g_fine),
    )
    (line, line_padding, f, f_fine), (stream, stream_padding, g, g_fine) = sides if over == "cols" else sides[::-1]
    temperature = problem.temperature
    per_head = isinstance(temperature, Tensor)
    one = math.log2(math.e) / (1.0 if per_head else float(temperature))
    return Logits(
        Operands(
            line_ptr=line,
            stream_ptr=stream,
            bias_ptr=bias if kind == 1 else stand_in(device, ELEMENTS[query.dtype]),
            bias32_ptr=bias if kind == 2 else absent,
            mask_ptr=byte if mask is None else mask,
            line_padding_ptr=byte if line_padding is None else line_padding.contiguous().view(torch.uint8),
            stream_padding_ptr=byte if stream_padding is None else stream_padding.contiguous().view(torch.uint8),
            temperature_ptr=temperature.contiguous() if isinstance(temperature, Tensor) else absent,
            line_base_ptr=f.contiguous(),
            line_fine_ptr=f_fine.contiguous(),
            stream_base_ptr=g.contiguous(),
            stream_fine_ptr=g_fine.contiguous(),
        ),
        Strides(
            line=by_line(line),
            stream=by_line(stream),
            bias=none if bias is None else oriented(bias, over),
            mask=none if mask is None else oriented(mask, over),
        ),
        Sizes(
            heads=heads,
            stream_group=group if over == "cols" else 1,
            n_lines=line.shape[2],
            n_stream=stream.shape[2],
            d=query.shape[3],
            bias_kind=kind,
            has_mask=int(problem.mask is not None),
            has_line_padding=int(line_padding is not None),
            has_stream_padding=int(stream_padding is not None),
            has_temperature=int(per_head),
        ),
        Scales(problem.scale * one, one),
    )


def stream_first(at: Potentials, over: str) -> bool:
    """Whether the potential of the streamed side is the first that logits are added to."""
    return at.columns_first == (over == "cols")


def drops(dropout: Dropout | None) -> bool:
    """Whether entries are dropped at all."""
    return dropout is not None and dropout.p > 0


def dropout_arguments(dropout: Dropout | None, device: torch.device) -> dict[str, Any]:
    """Arguments of a kernel that may drop entries; those of one that does not are not read."""
    if dropout is None:
        return {"seed_ptr": stand_in(device, "i64"), "dropout_p": 0.0, "dropout_scale": 1.0}
    return {"seed_ptr": dropout.seed, "dropout_p": dropout.p, "dropout_scale": 1 / (1 - dropout.p) if dropout.p < 1 else 0.0}


def widened(problem: Attention) -> Attention:
    """The problem with float32 vectors."""
    return replace(problem, query=problem.query.float(), key=problem.key.float())


def stacked(sets: list[Potentials]) -> Potentials:
    """Potentials (sets, B, H, lines)."""
    f_base, g_base, f_fine, g_fine = (
        torch.stack([getattr(at, name) for at in sets]) for name in ("f_base", "g_base", "f_fine", "g_fine")
    )
    return Potentials(f_base, g_base, f_fine, g_fine, sets[0].columns_first)
