"""NamedTuples as arguments of a kernel: their members arrive, and nothing is specialised on them."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from fastdsm.kernels.common.configuration import Configuration, finite_jit, global_names

from ..uninterpreted import rows_of

VALUES = (1, 0, 1 << 40)  # Triton's own launch would take them as a constant, as 32 bits and as 64


class Numbers(NamedTuple):
    wide: tl.int64
    narrow: tl.int32
    real: tl.float32


class Target(NamedTuple):
    ptr: tl.pointer_type
    numbers: Numbers


@finite_jit
def _copy_fwd_kernel(target: Target, count: tl.int32, SCALE: tl.constexpr):
    tl.store(target.ptr, target.numbers.wide)
    tl.store(target.ptr + 1, target.numbers.narrow)
    tl.store(target.ptr + 2, target.numbers.real)
    tl.store(target.ptr + 3, count * SCALE)


def configuration() -> Configuration:
    return Configuration(_copy_fwd_kernel, {"target.ptr": "fp64"}, {"SCALE": 2}, num_warps=1, matrices=1)


def check(configuration: Configuration, value: int, device: str) -> None:
    narrow, out = min(value, 1 << 30), torch.zeros(4, dtype=torch.float64, device=device)
    configuration.launch(1, target=Target(out, Numbers(value, narrow, value)), count=narrow // 2)
    assert out.tolist() == [value, narrow, value, narrow // 2 * 2]


@pytest.mark.parametrize("value", VALUES)
def test_members_arrive(value: int) -> None:
    check(configuration(), value, "cpu")


class _Nothing:
    """Stands in for a compiled kernel."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: None


def _compiled() -> list[Any]:
    """The signatures compiled by launches of all VALUES in each member, then the parameters of the machine code."""
    compile_source, copy, out, signatures = triton.compile, configuration(), torch.zeros(4, dtype=torch.float64), []
    triton.compile = lambda source, **_: signatures.append(source.signature) or _Nothing()
    for wide in VALUES:
        for narrow in (1, 0):
            for real in (1, 0, 0.5):
                copy.launch(1, target=Target(out, Numbers(wide, narrow, real)), count=narrow)
    triton.compile = compile_source
    ptx = copy.compile(GPUTarget("cuda", 90, 32)).asm["ptx"]
    return [signatures, re.findall(r"^\s*\.param \.(\w+)", ptx, re.MULTILINE)]


def test_nothing_in_a_tuple_is_specialised_on() -> None:
    signatures, parameters = rows_of(__name__, "_compiled")
    assert signatures == [{"target": ["*fp64", ["i64", "i32", "fp32"]], "count": "i32", "SCALE": "constexpr"}]
    assert parameters[:5] == ["u64", "u64", "u32", "f32", "u32"]


def test_names_inside_comprehensions_are_among_the_global_ones() -> None:
    """By them a kernel's callees are found: for its key in Triton's cache, and for its source in the static record."""

    def function(values: list[list[int]]) -> list[int]:
        return [max(abs(x) for x in value) for value in values if any(value)]

    assert {"max", "abs", "any"} <= set(global_names(function.__code__))


def test_no_constant_is_rounded_where_float64_is_computed() -> None:
    """``tl.fma`` takes a number by itself as float32, whatever it stands beside."""
    bare = re.compile(r"\b(?:fma|fused)\((?:[^()]|\([^()]*\))*?(?<=[(,\s])(?:[A-Z][A-Z0-9_]+|[0-9][0-9.e-]*)\s*[,)]")
    assert bare.search("fused(fused(x, k, row), BITS, g[None, :])")
    assert bare.search("tl.fma(x, 2.0, y)")
    assert not bare.search("tl.fma(tl.broadcast_to(-r[:, None], x.shape), k, x)")
    folder = Path(configuration.__code__.co_filename).parents[2] / "kernels"
    files = [file for family in ("panel", "spectrum", "common", "attention") for file in sorted((folder / family).glob("*.py"))]
    assert len(files) > 20
    assert [file.name for file in files if bare.search(file.read_text())] == []
