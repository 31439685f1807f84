"""Problems of attention as the arguments of its kernels."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdsm._ops.problem import Attention, Dropout, Potentials

MAX_STRIDE = 1 << 24


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


def oriented(tensor: Tensor, over: str) -> tuple[int, int, int, int]:
    """Strides of an entry: batch, head, line, stream."""
    b, h, n, m = tensor.stride()
    return (b, h, n, m) if over == "cols" else (b, h, m, n)


def named_strides(prefix: str, names: str, values: tuple[int, ...]) -> dict[str, int]:
    """Strides as the arguments of a kernel."""
    return {f"{prefix}_stride_{name}": value for name, value in zip(names.split(), values, strict=True)}


def shared_arguments(problem: Attention, over: str, at: Potentials) -> dict[str, Any]:
    """Arguments that all passes share. What is absent is never read: any tensor of the right dtype stands in for it."""
    query, key, bias = whole_lines(problem.query), whole_lines(problem.key), problem.bias
    heads, group = query.shape[1], query.shape[1] // key.shape[1]
    absent = torch.empty((1, 1, 1, 1), dtype=torch.float32, device=query.device)
    byte = absent.view(torch.uint8)
    kind = 0
    if bias is not None:
        kind = 1 if bias.dtype == query.dtype else 2
        bias = near_entries(bias, bias.dtype if kind == 1 else torch.float32)
    mask = byte if problem.mask is None else near_entries(problem.mask, torch.bool).view(torch.uint8)
    paddings = [
        byte if padding is None else padding.contiguous().view(torch.uint8)
        for padding in (problem.query_padding, problem.key_padding)
    ]
    has_padding = [int(padding is not None) for padding in (problem.query_padding, problem.key_padding)]
    sides, potentials = [query, key], [(at.f_base, at.f_fine), (at.g_base, at.g_fine)]
    if over == "rows":
        sides, paddings, has_padding, potentials = sides[::-1], paddings[::-1], has_padding[::-1], potentials[::-1]
    temperature = problem.temperature
    per_head = isinstance(temperature, Tensor)
    one = math.log2(math.e) / (1.0 if per_head else float(temperature))
    return {
        "line_ptr": sides[0],
        "stream_ptr": sides[1],
        "bias_ptr": bias if kind == 1 else query,
        "bias32_ptr": bias if kind == 2 else absent,
        "mask_ptr": mask,
        "line_padding_ptr": paddings[0],
        "stream_padding_ptr": paddings[1],
        "temperature_ptr": temperature.contiguous() if isinstance(temperature, Tensor) else absent,
        "line_base_ptr": potentials[0][0].contiguous(),
        "line_fine_ptr": potentials[0][1].contiguous(),
        "stream_base_ptr": potentials[1][0].contiguous(),
        "stream_fine_ptr": potentials[1][1].contiguous(),
        **named_strides("line", "b h n", sides[0].stride()[:3]),
        **named_strides("stream", "b h n", sides[1].stride()[:3]),
        **named_strides("bias", "b h line stream", (0, 0, 0, 0) if bias is None else oriented(bias, over)),
        **named_strides("mask", "b h line stream", oriented(mask, over)),
        "heads": heads,
        "stream_group": group if over == "cols" else 1,
        "n_lines": sides[0].shape[2],
        "n_stream": sides[1].shape[2],
        "d": query.shape[3],
        "bias_kind": kind,
        "has_mask": int(problem.mask is not None),
        "has_line_padding": has_padding[0],
        "has_stream_padding": has_padding[1],
        "has_temperature": int(per_head),
        "scale": problem.scale * one,
        "bias_scale": one,
    }


def stream_first(at: Potentials, over: str) -> bool:
    """Whether the potential of the streamed side is the first that logits are added to."""
    return at.columns_first == (over == "cols")


def drops(dropout: Dropout | None) -> bool:
    """Whether entries are dropped at all."""
    return dropout is not None and dropout.p > 0


def dropout_arguments(dropout: Dropout | None, device: torch.device) -> dict[str, Any]:
    """Arguments of a kernel that may drop entries; those of one that does not are not read."""
    if dropout is None:
        return {"seed_ptr": torch.empty(1, dtype=torch.int64, device=device), "dropout_p": 0.0, "dropout_scale": 1.0}
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
