"""A kernel ready to run: blocks, the type in which each register is kept, and translations."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from . import flow
from .elements import INTEGER, PTX_TYPE, SIZE, TYPES, i8
from .flow import Block
from .instructions import HANDLERS
from .parsing import Instruction, Parsed
from .translator import Translator


class Module:
    """A parsed kernel. contract: products used once, by an addition of the same block, are not rounded, as by ptxas."""

    def __init__(self, text: str, contract: bool = False) -> None:
        self.contract = contract
        parsed = Parsed(text)
        self.name, self.parameters, self.threads = parsed.name, parsed.parameters, parsed.threads
        self.registers, self.symbols, self.constants = parsed.registers, parsed.symbols, parsed.constants
        self.shared, self.static_shared, self.dynamic = parsed.shared, parsed.static_shared, parsed.dynamic
        self.blocks, self.labels = flow.blocks_of(parsed.statements)
        self.rank = flow.ranks(self.blocks, self.labels)
        self.deciding = flow.deciding(self.blocks, self.registers)
        self.uses = self._count_uses()
        self.canon = self._canonical_types()
        self.poison = [self._poison(name) for name in self.registers]
        widths = [_width(i) for i in self.instructions if "shared" in i.parts]
        self.granule = min([width for width in widths if width] + [4])  # bytes to a shadow cell of shared memory

    @property
    def instructions(self) -> list[Instruction]:
        """Of all blocks."""
        return [i for block in self.blocks for i in block.instructions]

    def function(self, block: Block, masked: bool) -> Any:
        """The translation of a block."""
        found = block.functions.get(masked)
        if found is None:
            found = block.functions[masked] = Translator(self, HANDLERS).translate(block, masked)
        return found

    def _count_uses(self) -> dict[str, int]:
        """How often each register is read."""
        uses = dict.fromkeys(self.registers, 0)
        for i in self.instructions:
            read = i.operands if i.parts[0] in ("st", "red", "stmatrix") else i.operands[1:]
            for word in re.findall(r"[%\w$@]+", " ".join(read)):
                if word in uses:
                    uses[word] += 1
        return uses

    def _canonical_types(self) -> dict[str, str]:
        """Each register is kept in the type in which it is used the most."""
        self.canon = {
            name: "b1" if kind == "pred" else INTEGER[SIZE[PTX_TYPE[kind]]] for name, (_, kind) in self.registers.items()
        }
        votes: dict[str, dict[str, int]] = {name: {} for name in self.registers}
        translator = Translator(self, HANDLERS, votes)
        for block in self.blocks:
            translator.translate(block, False)
        return {name: _elected(of, self.canon[name]) for name, of in votes.items()}

    def _poison(self, name: str) -> Any:
        """What a register holds before it is written."""
        kind = self.canon[name]
        return np.bool_(False) if kind == "b1" else np.full(1, 0x7FC0DEAD7FC0DEAD, i8).view(TYPES[kind])[0]


def _elected(votes: dict[str, int], canon: str) -> str:
    if canon == "b1":
        return canon
    merged: dict[str, int] = {}
    for kind, n in votes.items():
        if kind != "b1" and SIZE.get(kind) == SIZE[canon]:
            signed = "i" + kind[1] if kind[0] == "u" else kind
            merged[signed] = merged.get(signed, 0) + n
    return max(merged, key=lambda kind: merged[kind]) if merged else canon


def _width(i: Instruction) -> int:
    """Bytes of each value that an instruction moves; 0 where it moves none."""
    if i.parts[0] in ("ld", "st", "atom", "red"):
        return SIZE[PTX_TYPE[i.parts[-1]]]
    return 2 if "matrix" in i.parts[0] else 0
