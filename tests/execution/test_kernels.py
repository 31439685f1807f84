"""Real kernels, compiled and executed: clean as they are, and each fault that is put into their PTX is seen."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import fastdsm
from benchmarks.execution import Module
from benchmarks.execution.compilation import cache_dir

from ..uninterpreted import rows_of

FORWARD = "_sinkhorn_fwd_kernel"
HISTORY = "_sinkhorn_history_bwd_kernel"
SWEEP = "_attention_whole_fwd_kernel"
ATTEND = "_attention_attend_fwd_kernel"
BARRIER = r"bar\.(warp\.)?sync[^;]*;"
IN, OUT = (rf"setp\.ge\.s32 p, (%r\d+), 528; {next_one}" for next_one in ("@p cp", "ld"))  # pieces of 5x5


def forward(n: int) -> None:
    """Sweeps."""
    fastdsm.sinkhorn(torch.randn(40, n, n), n_iters=4, backend="triton")


def backward(n: int) -> None:
    """Sweeps and their exact gradient."""
    logits = torch.randn(130, n, n, requires_grad=True)
    fastdsm.sinkhorn(logits, n_iters=4, backend="triton").square().sum().backward()


def attend(gradient: bool = False) -> None:
    """Sinkhorn attention, with its gradient if asked for."""
    query, key, value = (torch.randn(1, 1, 150, 16, dtype=torch.float16, requires_grad=gradient) for _ in range(3))
    out = fastdsm.sinkhorn_attention(query, key, value, n_iters=2, backend="triton")
    if gradient:
        out.square().sum().backward()


@dataclass(frozen=True)
class Fault:
    """In the PTX of ``kernel`` the place number ``which`` that ``pattern`` matches becomes ``by``; ``call`` runs it."""

    name: str
    kernel: str
    pattern: str
    by: str
    which: int
    call: Callable[[], None]
    seen: str

    def put_into(self, ptx: str) -> str:
        """The text with the fault, where it is the kernel's."""
        if f"entry {self.kernel}(" not in ptx:
            return ptx
        match = list(re.finditer(self.pattern, ptx))[self.which]
        return ptx[: match.start()] + match.expand(self.by) + ptx[match.end() :]


FAULTS = (
    Fault("no wait for cp.async", FORWARD, r"cp\.async\.wait_all;", "", 0, lambda: forward(5), "pending"),
    Fault("no barrier before threads take their own", FORWARD, BARRIER, "", 1, lambda: forward(5), "race in shared memory"),
    Fault("no barrier before the plan crosses over", FORWARD, BARRIER, "", -2, lambda: forward(5), "race in shared memory"),
    Fault("no barrier before the plan is stored", FORWARD, BARRIER, "", -1, lambda: forward(5), "race in shared memory"),
    Fault("a piece too many in", FORWARD, IN, r"setp.ge.s32 p, \1, 512; @p cp", 0, lambda: forward(5), "out of bounds"),
    Fault("a piece too many out", FORWARD, OUT, r"setp.ge.s32 p, \1, 512; ld", 0, lambda: forward(5), "out of bounds"),
    Fault(
        "a vector off by a value",
        FORWARD,
        r"ld\.global\.v4\.b32 (\{[^}]*\}), \[(%rd\d+)\]",
        r"ld.global.v4.b32 \1, [\2+4]",
        1,
        lambda: forward(4),
        "misaligned",
    ),
    Fault(
        "an offset beyond the workspace",
        FORWARD,
        r"ld\.shared\.b32 (%r\d+), \[(%r\d+) \+ 0\]",
        r"ld.shared.b32 \1, [\2 + 65536]",
        0,
        lambda: forward(5),
        "out of bounds",
    ),
    Fault("never filled", FORWARD, r"@p cp\.async", "@!p cp.async", 0, lambda: forward(5), "uninitialised"),
    Fault("backward, no barrier between its blocks", HISTORY, BARRIER, "", 0, lambda: backward(5), "race in shared memory"),
    Fault(
        "warps that part at a barrier",
        FORWARD,
        rf"({BARRIER})",
        r"mov.u32 %r1, %laneid; setp.lt.s32 %p1, %r1, 16; @%p1 bra LX; \1 LX: mov.u32 %r1, %laneid;",
        1,
        lambda: forward(5),
        "divergence",
    ),
    Fault("attention, no wait for cp.async", ATTEND, r"cp\.async\.wait_group\s+\d+;", "", 0, lambda: attend(True), "pending"),
    Fault("attention, no wait for wgmma", SWEEP, r"wgmma\.wait_group\.sync\.aligned \d+;", "", 0, attend, "pending"),
)


def _executed() -> list[dict[str, list[str]]]:
    """Kinds of the issues, by the name of each fault; "": of kernels as they are. In a process of its own: see ``kinds``."""
    from benchmarks.execution.hook import Execution  # not where kernels are interpreted

    class Faulty(Execution):
        fault: Fault | None = None

        def parsed(self, ptx: str) -> Module:
            return super().parsed(self.fault.put_into(ptx) if self.fault else ptx)

    def kinds_of(call: Callable[[], object], fault: Fault | None) -> list[str]:
        execution = Faulty("sm_90")
        execution.fault = fault
        execution.install()
        torch.manual_seed(0)
        call()
        return sorted({issue.kind for issue in execution.report.harmful()})

    found = {"": kinds_of(lambda: (forward(5), backward(5), forward(16), attend()), None)}
    return [found | {fault.name: kinds_of(fault.call, fault) for fault in FAULTS}]


@pytest.fixture(scope="module")
def triton_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Triton's own cache while ``kinds`` are found."""
    return tmp_path_factory.mktemp("home") / "cache"


@pytest.fixture(scope="module")
def kinds(triton_cache: Path) -> dict[str, list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(triton_cache))
        found: dict[str, list[str]] = rows_of(__name__, "_executed")[0]
    return found


def test_kernels_are_clean(kinds: dict[str, list[str]]) -> None:
    assert kinds[""] == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_seen(kinds: dict[str, list[str]], fault: Fault) -> None:
    assert fault.seen in kinds[fault.name]


@pytest.mark.usefixtures("kinds")
def test_cache_is_their_own(triton_cache: Path) -> None:
    """What is executed has no machine code: in Triton's own cache it would break every real launch."""
    assert any(Path(cache_dir()).iterdir())
    assert not triton_cache.exists()
