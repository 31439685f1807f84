"""The emulator sees what it should, and nothing else: a handful of threads, each kernel a line or two of PTX."""

from __future__ import annotations

import pytest
import torch

from benchmarks.execution import Module, Report, launch, regions_of

THREADS = 64
HEAD = """.version 8.0
.target sm_90
.visible .entry tiny(
\t.param .u64 .ptr .global .align 1 tiny_param_0
)
.reqntid 64
{
\t.reg .pred %p<9>;
\t.reg .b32 %r<9>;
\t.reg .b64 %rd<9>;
\tld.param.b64 %rd1, [tiny_param_0];
\tmov.u32 %r1, %tid.x;
\tmov.u32 %r2, %ctaid.x;
\tmad.wide.s32 %rd2, %r1, 4, %rd1;
\tsetp.eq.s32 %p1, %r1, 0;
\tsetp.lt.s32 %p2, %r1, 32;
"""
OWN = "st.global.b32 [%rd2], %r1;"
NEIGHBOUR = "xor.b32 %r3, %r1, 1; mad.wide.s32 %rd3, %r3, 4, %rd1; ld.global.b32 %r4, [%rd3];"
OTHER_WARP = "xor.b32 %r3, %r1, 32; mad.wide.s32 %rd3, %r3, 4, %rd1; ld.global.b32 %r4, [%rd3];"


def found(body: str, ctas: int, group_lanes: int = 1024) -> list[str]:
    """Kinds of the issues, but for benign ones, of a kernel whose threads have a word of memory each."""
    report, memory = Report(), torch.zeros(THREADS, dtype=torch.int32)
    module = Module(f"{HEAD}{body}\n\tret;\n}}\n")
    launch(module, ctas, [memory.data_ptr()], 0, regions_of({"x": memory}), report, group_lanes=group_lanes)
    return sorted({issue.kind for issue in report.harmful()})


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(OWN, id="a store of each thread"),
        pytest.param(f"{OWN} bar.sync 0; {OTHER_WARP}", id="read what another warp stored, behind a barrier"),
        pytest.param(f"{OWN} bar.warp.sync -1; {NEIGHBOUR}", id="read what a neighbour stored, behind bar.warp.sync"),
        pytest.param(f"@%p2 bra END; bar.sync 0; END: {OWN}", id="one warp leaves out a barrier"),
    ],
)
def test_nothing_is_reported_of(body: str) -> None:
    assert found(body, 1) == []


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        pytest.param("st.global.b32 [%rd1], %r1;", "race in a store", id="all threads store different values to one word"),
        pytest.param(f"{OWN} {OTHER_WARP}", "race in global memory", id="read what another warp stored"),
        pytest.param(
            f"{OWN} bar.warp.sync -1; {OTHER_WARP}",
            "race in global memory",
            id="read what another warp stored, behind bar.warp.sync",
        ),
        pytest.param(
            f"@%p2 bra A; bar.sync 0; bra.uni END; A: bar.sync 0; END: {OWN}",
            "divergence",
            id="warps wait at barriers of different lines",
        ),
        pytest.param(f"@%p1 bra END; bar.sync 0; END: bar.sync 0; {OWN}", "divergence", id="a thread alone at a barrier"),
        pytest.param(
            f"@%p1 bra END; shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1; END: {OWN}",
            "divergence",
            id="a shuffle without all lanes of its mask",
        ),
        pytest.param("st.global.b32 [%rd2+4], %r1;", "out of bounds", id="a byte too far"),
    ],
)
def test_it_is_reported(body: str, kind: str) -> None:
    assert kind in found(body, 1)


@pytest.mark.parametrize(
    ("stores", "kind"), [("eq.s32 %p3, %r2, 0", "race between CTAs"), ("eq.s32 %p3, %r2, 1", "race in global memory")]
)
def test_one_cta_stores_what_another_reads(stores: str, kind: str) -> None:
    """Either first; run one after the other."""
    body = f"setp.{stores}; @%p3 st.global.b32 [%rd2], %r1; @!%p3 ld.global.b32 %r4, [%rd2];"
    assert kind in found(body, 2, group_lanes=THREADS)


def test_two_ctas_store_different_values() -> None:
    assert "race in a store" in found("st.global.b32 [%rd2], %r2;", 2)
