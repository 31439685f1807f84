"""From a basic block to a Python function: operands, registers and the types in which they are read; see ``instructions``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .arithmetic import flush, fma8, mul_hi8, narrow_bf16, to_int, widen_bf16
from .elements import SIZE, TYPES, f4, f8, u2, u4, u8
from .flow import Block
from .parsing import Instruction, UnsupportedError, split_operands

if TYPE_CHECKING:
    from .module import Module

_SPECIAL = {
    "%tid.x": "S.lanes.tid", "%ctaid.x": "S.lanes.ctaid", "%nctaid.x": "S.lanes.grid", "%ntid.x": "S.lanes.ntid",
    "%laneid": "S.lanes.laneid", "%warpid": "S.lanes.warpid", "%tid.y": "i4(0)", "%tid.z": "i4(0)", "%ctaid.y": "i4(0)",
    "%ctaid.z": "i4(0)", "%nctaid.y": "i4(1)", "%nctaid.z": "i4(1)", "%ntid.y": "i4(1)", "%ntid.z": "i4(1)",
    "%cluster_ctarank": "i4(0)", "%clusterid.x": "S.lanes.ctaid",
}  # fmt: skip


class Translator:
    """One basic block to a Python function ``(S, R, m) -> next block, or (predicate, taken, fall)``.

    S: the ``Run``. R: registers. m: which lanes are there, None for all. Types of operands are those of ``elements`` and, to be
    read as them, "w8" (float32 widened to float64) and "bf" (bits of bfloat16, in float32).
    """

    def __init__(self, module: Module, handlers: Mapping[str, Handler], votes: dict[str, dict[str, int]] | None = None) -> None:
        """votes: how often each register is used as which type, counted in the place of translating."""
        self.module, self.handlers, self.votes = module, handlers, votes
        self._space: dict[str, Any] = {
            "np": np, "W": np.where, "fma8": fma8, "flush": flush, "narrow_bf16": narrow_bf16, "widen_bf16": widen_bf16,
            "to_int": to_int, "mul_hi8": mul_hi8, **TYPES,
        }  # fmt: skip
        self._serial = 0

    def translate(self, block: Block, masked: bool) -> Any:
        """The function; None when only votes are asked for."""
        self._lines: list[str] = []
        self._cache: dict[tuple[str, str], str] = {}  # variables that hold a register, as a type
        self.factors: dict[str, str] = {}  # exact products that an addition may take in the place of a register
        self.masked = masked
        self.next = block.index + 1
        self.end = f"return {self.next}"
        for i in [] if block.barrier else block.instructions:
            self._one(i)
        if self.votes is not None:
            return None
        source = "def block(S, R, m):\n" + "".join(f"    {line}\n" for line in [*self._lines, self.end])
        exec(compile(source, f"<{self.module.name} block {block.index}>", "exec"), self._space)
        return self._space["block"]

    def _one(self, i: Instruction) -> None:
        """One instruction. site: its name in the function; mask: of the lanes that execute it, "m" where all there do."""
        self.site = self.constant(i)
        self.predicate: str | None = None
        self.mask = "m"
        if i.predicate is not None and i.parts[0] != "bra":
            name, negated = i.predicate
            p = self.register(name, "b1")
            self.predicate = f"(~{p})" if negated else p
            self.mask = self.keep(f"{self.predicate} & m" if self.masked else self.predicate)
        handler = self.handlers.get(i.parts[0])
        if handler is None:
            raise UnsupportedError.of(i)
        handler(self, i)

    # -- the function's text

    def emit(self, line: str) -> None:
        """One more line."""
        self._lines.append(line)

    def keep(self, expression: str) -> str:
        """A new variable of that value."""
        self._serial += 1
        name = f"v{self._serial}"
        self.emit(f"{name} = {expression}")
        return name

    def constant(self, value: Any) -> str:
        """A name for an object."""
        name = f"C{len(self._space)}"
        self._space[name] = value
        return name

    # -- operands

    def knows(self, operand: str) -> bool:
        """Whether an operand is a register."""
        return operand in self.module.registers

    def canon(self, register: str) -> str:
        """The type in which a register is kept."""
        return self.module.canon[register]

    def get(self, operand: str, kind: str) -> str:
        """An expression for an operand as ``kind``."""
        operand = operand.strip()
        if operand.startswith("!"):
            return f"(~{self.get(operand[1:], kind)})"
        if self.knows(operand):
            return self.register(operand, kind)
        if operand in _SPECIAL:
            special = _SPECIAL[operand]
            if kind == "i4":
                return special
            return f"{special}.view({kind})" if SIZE[kind] == 4 else f"{special}.astype({kind})"
        if operand in self.module.symbols:
            return f"{kind}(S.symbols[{operand!r}])"
        return self.constant(literal(operand, kind))

    def register(self, name: str, kind: str) -> str:
        """A variable that holds a register as ``kind``."""
        key = name, kind
        if key not in self._cache:
            self._vote(name, kind)
            self._cache[key] = self._read(name, kind)
        return self._cache[key]

    def _read(self, name: str, kind: str) -> str:
        canon = self.canon(name)
        if kind == canon:
            return self.keep(f"R[{self.module.registers[name][0]}]")
        if kind == "w8":
            return self.keep(f"{self.register(name, 'f4')}.astype(f8)")
        if kind == "bf":
            return self.keep(f"widen_bf16({self.register(name, 'i2')})")
        if "b1" in (canon, kind):
            raise UnsupportedError(f"{name} as {kind}")
        known = next((k for (n, k) in self._cache if n == name and SIZE.get(k) == SIZE[canon]), None)
        base = self._cache[name, known] if known else self.register(name, canon)
        if SIZE[kind] == SIZE[canon]:
            return self.keep(f"{base}.view({kind})")
        # a wider register, of which the low part is meant, or a narrower one
        return self.keep(f"{base}.view(u{canon[1]}).astype(u{kind[1]}).view({kind})")

    def set(self, operand: str, kind: str, expression: str) -> None:
        """Give a register the value of an expression of type ``kind``."""
        operand = operand.strip()
        if operand == "_":
            return
        if not self.knows(operand):
            raise UnsupportedError(f"destination {operand!r}")
        self._vote(operand, kind)
        index, canon = self.module.registers[operand][0], self.canon(operand)
        value = as_canon = self.keep(expression)
        if kind != canon:
            if SIZE[kind] != SIZE[canon]:  # wider register: zero- or sign-extended by the caller's type
                wide = ("i" if kind[0] == "i" else "u") + canon[1]
                as_canon = self.keep(f"{value}.astype({wide}).view({canon})")
            else:
                as_canon = self.keep(f"{value}.view({canon})")
        if self.predicate is not None:
            value = as_canon = self.keep(f"W({self.predicate}, {as_canon}, {self.register(operand, canon)})")
            kind = canon
        for key in [key for key in self._cache if key[0] == operand]:
            del self._cache[key]
        self.factors.pop(operand, None)
        if SIZE[kind] == SIZE[canon]:
            self._cache[operand, kind] = value
        self._cache[operand, canon] = as_canon
        self.emit(f"R[{index}] = W(m, {as_canon}, R[{index}])" if self.masked else f"R[{index}] = {as_canon}")

    def set_all(self, operands: list[str], kind: str, values: str) -> None:
        """Give each register its own of a list."""
        for k, name in enumerate(operands):
            self.set(name, kind, f"{values}[{k}]")

    def _vote(self, name: str, kind: str) -> None:
        if self.votes is not None:
            of = self.votes[name]
            kind = {"w8": "f4", "bf": "i2"}.get(kind, kind)
            of[kind] = of.get(kind, 0) + 1

    def address(self, operand: str, shared: bool) -> str:
        """An expression for ``[register or symbol + offset]``."""
        match = re.fullmatch(r"\[\s*([%\w$@.]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand.strip())
        if match is None:
            raise UnsupportedError(f"address {operand!r}")
        base, offset = match.group(1), int(match.group(2) or "0", 0)
        narrow = SIZE[self.canon(base)] == 4 if self.knows(base) else shared
        kind = "i4" if narrow else "i8"
        expression = self.get(base, kind)
        return f"({expression} + {kind}({offset}))" if offset else expression


Handler = Callable[[Translator, Instruction], None]
"""Translates the instructions of one name."""


def vector(operand: str) -> list[str]:
    """The registers of ``{a, b}``; of a single operand, itself."""
    operand = operand.strip()
    return split_operands(operand[1:-1]) if operand.startswith("{") else [operand]


def literal(text: str, kind: str) -> Any:
    """A number in the text as ``kind``."""
    if kind == "b1":
        return np.bool_(int(text) != 0)
    if kind == "w8":
        return f8(literal(text, "f4"))
    if kind == "bf":
        return widen_bf16(np.array(int(text, 0) & 0xFFFF, u2))[()]
    raw: Any
    if text.startswith(("0f", "0F")):
        raw = np.array(int(text[2:], 16), u4)
        if kind == "f8":
            return f8(raw.view(f4)[()])
    elif text.startswith(("0d", "0D")):
        raw = np.array(int(text[2:], 16), u8)
    elif re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        value = int(text.rstrip("U"), 0)
        raw = np.array(value & ((1 << (8 * SIZE[kind])) - 1), f"u{SIZE[kind]}")
    else:
        raise UnsupportedError(f"operand {text!r}")
    return raw.view(TYPES[kind])[()]
