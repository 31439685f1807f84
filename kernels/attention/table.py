"""The finite table of attention kernels: which tiles, for which dtypes, as compiled without a spill.

A kernel exists for each element type of query and key and block of features; with bias, mask or dropout per entry
(ENTRIES) or without; and for the stream's potential being the first or the last that logits are added to.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from ..common.configuration import Configuration, pointers_of
from .apply import _attention_apply_fwd_kernel, _attention_attend_fwd_kernel, _attention_products_bwd_kernel
from .gradient import _attention_bias_bwd_kernel, _attention_gradient_bwd_kernel
from .sweep import _attention_sweep_fwd_kernel
from .whole import _attention_whole_fwd_kernel

# Features are padded to a block: below 64 that costs products of zeros, but a pass is bound by its exponentials there.
BLOCKS_D = (64, 128, 256)
# Features of the vectors that the plan multiplies, per program.
MAX_E = 128
ELEMENTS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# Element of query and key, and what the plan multiplies: "half", of 16 bits as they are, in and out; "wide", with a float32
# result; "mixed", float32 vectors, as three bfloat16 so that all stays on tensor cores; or float32 throughout, multiplied
# exactly or as TF32.
SAME = (("fp16", "half"), ("bf16", "half"), ("fp32", "ieee"), ("fp32", "tf32"))
APPLIED = (("fp16", "wide"), ("bf16", "wide"), ("bf16", "mixed"), ("fp32", "ieee"), ("fp32", "tf32"))

Tile = tuple[int, ...]
Tiles = dict[str, tuple[tuple[Tile, ...], tuple[Tile, ...]]]
# Lines kept on chip, lines per step of the stream, warps, steps in flight, and the registers of a thread where the assembler
# would take fewer and spill: by what is multiplied, for each block of features, without and with ENTRIES. Found by compiling
# for sm_80, sm_90 and sm_100, the widest tried that spill on none of them. Hopper's tensor-core instructions take 64 lines
# for each four warps: of two products in a row, more warps than that would only repeat each other's work. Exact float32 has
# at most 32 lines: Triton 3.7.1 turns a float32 product of 64 into TF32 on sm_100.
SWEEP: Tiles = {
    "half": (((128, 64, 4, 3), (128, 128, 8, 2), (128, 64, 8, 2, 255)), ((64, 64, 4, 2), (64, 64, 8, 1), (64, 32, 8, 2))),
    "ieee": (((32, 32, 4, 2), (32, 16, 4, 1), (32, 16, 4, 1)), ((32, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1))),
    "tf32": (((64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 8, 1)), ((64, 32, 8, 1), (64, 16, 4, 1), (64, 16, 8, 1))),
}
ATTEND: Tiles = {
    "half": (((128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2)), ((64, 32, 4, 2), (128, 32, 8, 1), (64, 16, 8, 2))),
    "ieee": (((32, 32, 4, 2), (32, 16, 4, 1), (16, 16, 4, 1)), ((32, 16, 4, 1), (16, 16, 4, 1), (16, 16, 8, 1, 255))),
    "tf32": (((64, 16, 4, 1), (32, 32, 8, 1), (32, 32, 8, 1)), ((32, 16, 4, 1), (32, 16, 8, 1), (32, 16, 8, 1))),
}
APPLY: Tiles = {
    "wide": (((128, 32, 8, 2), (128, 32, 8, 1), (64, 32, 8, 2)), ((64, 16, 4, 1), (128, 16, 8, 1), (32, 32, 8, 2))),
    "mixed": (((64, 16, 4, 1, 255), (32, 32, 8, 1), (32, 32, 8, 1)), ((64, 16, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1))),
    "ieee": (((32, 32, 4, 2), (32, 16, 4, 1), (16, 16, 8, 1)), ((16, 16, 4, 1), (16, 16, 4, 1, 255), (16, 16, 8, 1))),
    "tf32": (((64, 16, 4, 1), (32, 32, 8, 1), (32, 32, 8, 1)), ((32, 16, 4, 1), (32, 16, 8, 1), (32, 16, 8, 1))),
}
GRADIENT: Tiles = {
    "half": (((128, 32, 8, 1), (64, 16, 4, 1), (32, 32, 8, 1)), ((128, 16, 8, 1), (32, 32, 8, 1), (32, 16, 8, 1))),
    "ieee": (((32, 16, 4, 1), (16, 16, 8, 1), (32, 16, 8, 1)), ((16, 16, 4, 1), (16, 16, 8, 1), (16, 16, 8, 1))),
    "tf32": (((32, 32, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1, 255)), ((32, 16, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1, 255))),
}
PRODUCT: Tiles = {
    "half": (((64, 64, 4, 2, 255), (64, 32, 4, 2, 255), (64, 16, 4, 1)), ((64, 16, 4, 1), (64, 16, 4, 1), (64, 16, 8, 1, 255))),
    "ieee": (((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)), ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1))),
    "tf32": (((64, 16, 4, 1), (32, 16, 8, 1), (16, 16, 8, 1)), ((32, 16, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1))),
}
BIAS: Tiles = {
    "half": (((64, 32, 8, 1), (64, 32, 8, 1), (64, 16, 8, 1)),) * 2,
    "ieee": (((16, 16, 8, 1, 255), (16, 16, 8, 1, 255), (16, 16, 8, 1, 255)),) * 2,
    "tf32": (((32, 16, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1)),) * 2,
}
# What Hopper has instead: tiles wide enough for its tensor-core instructions, which spill on one of the others, or Triton
# 3.7.1 compiles them to nothing there; and what an H100 was faster with, at 64 heads of 4,096 lines: two or three programs of
# four warps on an SM, whose waits for loads and barriers do not coincide, rather than one of eight.
HOPPER: dict[tuple[Any, tuple[str, str], int, bool], Tile] = {
    (_attention_apply_fwd_kernel, ("bf16", "mixed"), 128, False): (64, 16, 8, 1),
    (_attention_apply_fwd_kernel, ("bf16", "mixed"), 128, True): (128, 16, 8, 1, 255),
    (_attention_apply_fwd_kernel, ("bf16", "mixed"), 256, False): (64, 32, 4, 1, 255),
    (_attention_apply_fwd_kernel, ("bf16", "mixed"), 256, True): (64, 16, 4, 1, 255),
    (_attention_attend_fwd_kernel, ("bf16", "half"), 64, False): (64, 64, 4, 2, 168),
    (_attention_attend_fwd_kernel, ("fp16", "half"), 64, False): (64, 64, 4, 2, 255),
    **{
        key: tile
        for element in ("bf16", "fp16")
        for key, tile in {
            (_attention_apply_fwd_kernel, (element, "wide"), 64, False): (64, 32, 4, 2, 168),
            (_attention_products_bwd_kernel, (element, "half"), 64, False): (64, 64, 4, 3, 255),
            (_attention_apply_fwd_kernel, (element, "wide"), 256, True): (64, 16, 4, 1, 255),
            (_attention_gradient_bwd_kernel, (element, "half"), 128, True): (64, 16, 4, 1),
            (_attention_gradient_bwd_kernel, (element, "half"), 256, False): (64, 16, 4, 1, 255),
            (_attention_gradient_bwd_kernel, (element, "half"), 256, True): (64, 16, 4, 1, 255),
        }.items()
    },
}
# Features of the result per program on Hopper, where the registers of 64 lines do not hold them all: other programs form the
# logits once more.
HOPPER_FEATURES: dict[tuple[Any, tuple[str, str], int, bool], dict[str, int]] = {
    (_attention_apply_fwd_kernel, ("bf16", "mixed"), 256, True): {"BLOCK_E": 64},
    **{
        (_attention_gradient_bwd_kernel, (element, "half"), 256, entries): {"BLOCK_O": 64 if entries else 128}
        for element, entries in itertools.product(("bf16", "fp16"), (False, True))
    },
}


def _configuration(
    kernel: Any,
    tiles: Tiles,
    kind: tuple[str, str],
    block_d: int,
    entries: bool,
    out: str,
    **constants: Any,
) -> Configuration:
    """The one way to run ``kernel`` on query and key of ``kind[0]``; out: element of its result."""
    tile = tiles[kind[1]][entries][BLOCKS_D.index(block_d)]
    key, rest = (kernel, kind, block_d, entries), (kind, block_d, out, entries)
    configuration = _tiled(kernel, tile, *rest, constants)
    if key not in HOPPER:
        return configuration
    return configuration.with_own(_tiled(kernel, HOPPER[key], *rest, constants | HOPPER_FEATURES.get(key, {})), "sm_90")


def _tiled(
    kernel: Any, tile: Tile, kind: tuple[str, str], block_d: int, out: str, entries: bool, constants: dict[str, Any]
) -> Configuration:
    element, precision = kind
    types = dict.fromkeys(("operands.line_ptr", "operands.stream_ptr", "operands.bias_ptr"), element)
    types |= dict.fromkeys(("x_ptr", "line_v_ptr", "stream_v_ptr"), "fp32" if precision == "mixed" else element)
    masks = ("operands.mask_ptr", "operands.line_padding_ptr", "operands.stream_padding_ptr", "active_ptr")
    types |= dict.fromkeys(masks, "u8")
    types |= {"seed_ptr": "i64", "factors.counts_ptr": "i32", "lse_ptr": "fp64", "out_ptr": out}
    lines, stream, warps, stages, *registers = tile
    names = [constants["KIND"]] if "KIND" in constants else []
    label = f"{element} {precision} {block_d} {'entries' if entries else 'plain'}"
    return Configuration(
        kernel,
        {name: types.get(name, "fp32") for name in pointers_of(kernel)},
        {
            "BLOCK_L": lines,
            "BLOCK_S": stream,
            "BLOCK_D": block_d,
            "PRECISION": precision if element == "fp32" else "bf16x6",
            **constants,
            **({} if kernel is _attention_bias_bwd_kernel else {"ENTRIES": entries}),
        },
        warps,
        matrices=1,
        num_stages=stages,
        maxnreg=registers[0] if registers else None,
        label=" ".join([label, *names]),
    )


def _whole(element: str, block_d: int, lines: int, online: bool) -> Configuration:
    """The one way to run a whole sweep with ``lines`` on chip."""
    rest = (element, "half"), block_d, "fp32", False, {"ONLINE": online}
    anywhere, on_hopper = (_tiled(_attention_whole_fwd_kernel, tile, *rest) for tile in WHOLE_TILES[lines])
    return anywhere.with_own(on_hopper, "sm_90")


def vector_block(kind: tuple[str, str], block_d: int) -> int:
    """Features of grad_out and value per launch of a gradient: exact float32 of more does not fit into the registers."""
    return 64 if (kind[1], block_d) == ("ieee", 256) else block_d


SWEEPS = {
    (kind, block_d, entries, stream_first, what): _configuration(
        _attention_sweep_fwd_kernel,
        SWEEP,
        kind,
        block_d,
        entries,
        "fp32" if what == "weighted" else "fp64",
        STREAM_FIRST=stream_first,
        KIND=what,
    )
    for kind, block_d, entries, stream_first in itertools.product(SAME, BLOCKS_D, (False, True), (False, True))
    for what in ("online", "bounded", "weighted")
}
ATTENDS = {
    (kind, block_d, entries): _configuration(
        _attention_attend_fwd_kernel,
        ATTEND,
        kind,
        block_d,
        entries,
        kind[0],
        STREAM_FIRST=True,
        BLOCK_E=min(block_d, MAX_E),
        PIECES=2,
    )
    for kind, block_d, entries in itertools.product(SAME, BLOCKS_D, (False, True))
}
APPLIES = {
    (kind, block_d, entries, stream_first, dropout): _configuration(
        _attention_apply_fwd_kernel,
        APPLY,
        kind,
        block_d,
        entries,
        "fp32",
        STREAM_FIRST=stream_first,
        BLOCK_E=min(block_d, MAX_E),
        PIECES=3 if kind[0] == "bf16" else 2,
        HAS_DROPOUT=dropout,
    )
    for kind, block_d, stream_first in itertools.product(APPLIED, BLOCKS_D, (False, True))
    for entries, dropout in ((False, False), (True, False), (True, True))
}
GRADIENTS = {
    (kind, block_d, entries, stream_first, dropout): _configuration(
        _attention_gradient_bwd_kernel,
        GRADIENT,
        kind,
        block_d,
        entries,
        kind[0],
        STREAM_FIRST=stream_first,
        BLOCK_E=vector_block(kind, block_d),
        BLOCK_O=block_d,
        EXACT="ieee" if kind[1] == "ieee" else "bf16x6",
        PIECES=3 if kind[0] == "bf16" else 2,
        HAS_DROPOUT=dropout,
    )
    for kind, block_d, stream_first in itertools.product(SAME, BLOCKS_D, (False, True))
    for entries, dropout in ((False, False), (True, False), (True, True))
}
PRODUCTS = {
    (kind, block_d, entries, stream_first, dropout): _configuration(
        _attention_products_bwd_kernel,
        PRODUCT,
        kind,
        block_d,
        entries,
        "fp32",
        STREAM_FIRST=stream_first,
        BLOCK_E=vector_block(kind, block_d),
        HAS_DROPOUT=dropout,
    )
    for kind, block_d, stream_first in itertools.product(SAME, BLOCKS_D, (False, True))
    for entries, dropout in ((False, False), (True, False), (True, True))
}
BIASES = {
    (kind, block_d, dropout): _configuration(
        _attention_bias_bwd_kernel,
        BIAS,
        kind,
        block_d,
        True,
        "fp32",
        BLOCK_E=vector_block(kind, block_d),
        EXACT="ieee" if kind[1] == "ieee" else "bf16x6",
        HAS_DROPOUT=dropout,
    )
    for kind, block_d, dropout in itertools.product(SAME, BLOCKS_D, (False, True))
}
# Whole sweeps: features, lines that stay on chip with the lines per step and warps of any target and of Hopper, and how the
# streamed side is cut, into chunks of at most so many steps as leave this many programs.
WHOLE_D = (64, 128)
WHOLE_TILES: dict[int, tuple[Tile, Tile]] = {
    128: ((128, 32, 4, 1), (128, 64, 4, 1)),
    256: ((256, 32, 4, 1), (256, 64, 4, 1)),
    512: ((512, 32, 8, 1), (512, 64, 8, 1)),
}
WHOLE_LINES = tuple(WHOLE_TILES)
WHOLE_PROGRAMS, WHOLE_STEPS = 1024, 16
WHOLES = {
    (element, block_d, lines, online): _whole(element, block_d, lines, online)
    for element, block_d, lines, online in itertools.product(("fp16", "bf16"), WHOLE_D, WHOLE_LINES, (False, True))
}


def configurations() -> list[Configuration]:
    """Every kernel of this family that can be launched."""
    tables = (SWEEPS, WHOLES, ATTENDS, APPLIES, PRODUCTS, GRADIENTS, BIASES)
    return [y for table in tables for x in table.values() for y in x.everywhere()]
