"""A thread's registers, predicates and constants, of which only what follows from a kernel's arguments is known."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

MASK = 0xFFFFFFFF
_CONSTANT = re.compile(r"c\[0x0\]\[(0x[0-9a-f]+)\]")

Value = int | None
Logical = bool | None


class Machine:
    """Registers, predicates and the constant bank of one thread of warp 0 in program 0.

    guessing: of a choice or an extremum with one side known, that side is taken, as bounds of loops are; lanes hold the same.
    """

    def __init__(
        self, parameters: Mapping[int, int], reductions: Iterable[int] = (), guessing: bool = False, lane: int = 0
    ) -> None:
        self.parameters, self.guessing, self.lane = parameters, guessing, lane
        self.reductions, self.registers = iter(reductions), dict[str, Value]()
        self.predicates: dict[str, Logical] = {}

    def read(self, operand: str, high: int = 0) -> Value:
        """32-bit value of a source operand; ``high`` = 1: of the register or word that follows it."""
        sign, operand = ("", operand) if operand[0] not in "-~" else (operand[0], operand[1:])
        operand = operand.removesuffix(".64")
        value: Value
        if operand in ("RZ", "URZ", "SRZ"):
            value = 0
        elif match := re.fullmatch(r"(U?R)(\d+)", operand):
            value = self.registers.get(f"{match.group(1)}{int(match.group(2)) + high}")
        elif match := _CONSTANT.fullmatch(operand):
            value = self.parameters.get(int(match.group(1), 16) + 4 * high)
        elif re.fullmatch(r"0x[0-9a-f]+", operand):
            value = 0 if high else int(operand, 16)
        else:
            return None
        if value is None:
            return None
        return (-value if sign == "-" else ~value if sign == "~" else value) & MASK

    def predicate(self, operand: str) -> Logical:
        """Truth of a predicate operand such as "P0", "!UP1", "PT"."""
        name = operand.removeprefix("!")
        value = True if name in ("PT", "UPT") else self.predicates.get(name)
        return value if value is None or name == operand else not value

    def write(self, name: str, value: Value) -> None:
        """Set a register."""
        self.registers[name] = value if value is None else value & MASK

    def set(self, name: str, value: Logical) -> None:
        """Set a predicate."""
        self.predicates[name] = value

    def values(self, names: Iterable[str]) -> dict[str, int | None]:
        """Current values of registers and predicates."""
        return {name: (self.predicates if "P" in name else self.registers).get(name) for name in names}

    def forget(self, names: Iterable[str]) -> None:
        """Mark registers and predicates unknown."""
        for name in names:
            (self.predicates if "P" in name else self.registers).pop(name, None)


def signed(value: int) -> int:
    """Of 32 bits in two's complement."""
    return value - (1 << 32) if value >> 31 else value
