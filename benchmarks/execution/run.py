"""A group of CTAs run to its end: which block comes next, for all lanes or, once they have parted, for some of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from .approximations import Approximations, Noise
from .copies import AsyncCopies
from .elements import SIZE, TYPES, WARP, bits_of, f4, f8, i4, u1
from .flow import Block
from .global_memory import GlobalMemory
from .lanes import Lanes
from .matrices import Matrices
from .module import Module
from .parsing import Instruction
from .regions import Region
from .report import Report
from .shared_memory import SharedMemory
from .warpgroups import Warpgroups
from .warps import Warps


class Run:
    """The state of a group of CTAs, and what its instructions call. values: of the parameters; symbols: addresses by name."""

    def __init__(
        self,
        module: Module,
        ctas: np.ndarray,
        grid: int,
        values: dict[str, Any],
        dynamic: int,
        regions: list[Region],
        report: Report,
        noise: Noise | None,
    ) -> None:
        self.module, self.report, self.values = module, report, values
        self.lanes = Lanes(module, ctas, grid, report)
        self.memory = GlobalMemory(self.lanes, regions)
        self.shared = SharedMemory(self.lanes, module, dynamic)
        self.copies = AsyncCopies(self.memory, self.shared)
        self.warps = Warps(self.lanes)
        self.matrices = Matrices(self.shared, self.warps)
        self.warpgroups = Warpgroups(self.shared, self.warps)
        self.approximate = Approximations(noise)
        self.symbols = dict(self.shared.symbols)
        self._parameters = np.zeros(8 * len(values), u1)  # for when the address of one is taken
        for k, (name, value) in enumerate(values.items()):
            self.symbols[name] = 8 * k
            raw = np.frombuffer(value.tobytes(), u1)
            self._parameters[8 * k : 8 * k + len(raw)] = raw
        for name, data in module.constants.items():
            self.symbols[name] = data.ctypes.data

    def load_param(self, addr: Any, kind: str) -> Any:
        """A parameter whose address was taken; addresses count from the first, 8 bytes each."""
        return self._parameters.view(TYPES[kind])[np.asarray(addr) // SIZE[kind]]

    def execute(self) -> None:
        """Run the group to its end."""
        R = list(self.module.poison)
        blocks, at = self.module.blocks, 0
        with np.errstate(all="ignore"):
            while at < len(blocks):
                at = self._together(blocks[at], R)

    def _together(self, block: Block, R: list[Any]) -> int:
        """Run a block that all lanes have come to; returns the next such block."""
        self._count(block, self.lanes.count)
        if block.barrier:
            self.lanes.epoch += 1
            return block.index + 1
        to = self.module.function(block, False)(self, R, None)
        if isinstance(to, int):
            return to
        p, taken, fall = to
        if np.ndim(p) == 0 or p.all() or not p.any():
            return int(taken if np.all(p) else fall)
        self._check_branch(p, None, block)
        return self._apart(np.where(p, taken, fall).astype(i4), R)

    def _apart(self, pc: np.ndarray, R: list[Any]) -> int:
        """Run with a mask until all lanes are at one block again; returns that block. pc: the block of each lane."""
        lanes, blocks, rank = self.lanes, self.module.blocks, self.module.rank
        waiting = np.zeros(lanes.count, bool)
        while True:
            alive = pc < len(blocks)
            ready = alive & ~waiting
            if not ready.any():
                if not alive.any():
                    return len(blocks)
                pc = self._release(pc, waiting, np.unique(lanes.cta_of[waiting]), alive)  # all others have left
                continue
            candidates = pc[ready]
            at = int(candidates[rank[candidates].argmin()])
            m = ready & (pc == at)
            if m.all():
                return at
            block = blocks[at]
            self._count(block, int(m.sum()))
            if block.barrier:
                self._check_barrier(block, m, alive)
                waiting |= m
                pc = self._release(pc, waiting, np.unique(lanes.cta_of[m]), alive)
                continue
            to = self.module.function(block, True)(self, R, m)
            if isinstance(to, int):
                pc[m] = to
            else:
                p, taken, fall = to
                self._check_branch(p, m, block)
                pc = np.where(m, np.where(p, taken, fall), pc)

    def _count(self, block: Block, lanes: int) -> None:
        self.report.instructions += len(block.instructions)
        self.report.lane_instructions += len(block.instructions) * lanes

    def _release(self, pc: np.ndarray, waiting: np.ndarray, ctas: np.ndarray, alive: np.ndarray) -> np.ndarray:
        """Where lanes go on, once those of ``ctas`` whose lanes all wait (but for those that have left) pass their barrier."""
        for cta in ctas:
            mine = self.lanes.cta_of == cta
            here = mine & alive
            if waiting[here].all():
                lines = np.unique(pc[here])
                if len(lines) > 1:
                    i = self.module.blocks[lines[0]].instructions[0]
                    self.lanes.issue("divergence", i, f"cta {self.lanes.ctas[cta]}: lanes wait at barriers of different lines")
                waiting &= ~mine
                pc = np.where(here, pc + 1, pc)
                self.lanes.epoch[mine] += 1
        return pc

    def _check_barrier(self, block: Block, m: np.ndarray, alive: np.ndarray) -> None:
        """Whether the warps of lanes that reach a barrier reach it whole."""
        warps = m.reshape(-1, WARP)
        if (warps.any(1) & ~(warps | ~alive.reshape(-1, WARP)).all(1)).any():
            who = self.lanes.who(np.flatnonzero(m))
            self.lanes.issue("divergence", block.instructions[0], f"{who} reach a barrier without their warps")

    def check_condition(self, a: Any, b: Any, mask: Any, i: Instruction) -> None:
        """Report operands of a comparison that decides a branch where lanes of one CTA have different ones."""
        m = self._by_cta(self.lanes.there(mask))
        for x in (a, b):
            if not np.ndim(x):
                continue
            x = self._by_cta(bits_of(self.lanes.spread(x)))
            first = np.take_along_axis(x, m.argmax(1)[:, None], 1)
            mixed = ((x != first) & m).any(1)
            if mixed.any():
                k = int(mixed.argmax())
                shown = np.unique(x[k][m[k]])
                shown = shown.view(f4 if shown.dtype == i4 else f8)
                values = f"{len(shown)} values, {shown[0]!r} to {shown[-1]!r}"
                self.lanes.issue("condition not uniform", i, f"cta {self.lanes.ctas[k]}: {values}")

    def _check_branch(self, p: Any, mask: Any, block: Block) -> None:
        """Report a branch that lanes of one CTA take differently: Triton's conditions are of the whole CTA, so that this is a
        slow path of a division or the like, or copies of one value that were rounded differently."""
        p, m = self._by_cta(self.lanes.spread(p)), self._by_cta(self.lanes.there(mask))
        mixed = (p & m).any(1) & (~p & m).any(1)
        if mixed.any():
            self.lanes.issue("branch not uniform", block.instructions[-1], f"cta {self.lanes.ctas[mixed.argmax()]}")

    def _by_cta(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(len(self.lanes.ctas), -1)
