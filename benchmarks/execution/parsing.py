"""PTX text to instructions: scopes, registers, shared variables, and several statements a line, as inline assembly has them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from .elements import u1


@dataclass
class Instruction:
    """One instruction. ``parts`` of its name; ``source``: Triton's chain of source lines; ``predicate``: register, negated."""

    text: str
    line: int
    source: str
    parts: list[str]
    operands: list[str]
    predicate: tuple[str, bool] | None


class UnsupportedError(Exception):
    """Something, mostly an instruction or a form of one, that this emulator does not know."""

    @classmethod
    def of(cls, i: Instruction) -> UnsupportedError:
        """With the instruction's line and text."""
        return cls(f"line {i.line}: {i.text}")


def split_operands(text: str) -> list[str]:
    """At commas outside brackets and braces."""
    found, depth, start = [], 0, 0
    for at, c in enumerate(text):
        if c in "[{(":
            depth += 1
        elif c in "]})":
            depth -= 1
        elif c == "," and depth == 0:
            found.append(text[start:at].strip())
            start = at + 1
    rest = text[start:].strip()
    return [*found, rest] if rest else found


class Parsed:
    """The first kernel of a text.

    parameters: name and PTX type of each. threads: of a CTA. registers: index and PTX type by name. shared: where in shared
    memory each static variable lies, ``static_shared`` bytes in all. dynamic: symbols of dynamic shared memory, and their
    alignment. constants: bytes of global constants. statements: instructions, and labels as strings.
    """

    def __init__(self, text: str) -> None:
        entry = re.search(r"\.visible \.entry ([\w$]+)\((.*?)\)\s*((?:\.\w+[^\n{]*\n)*)\{", text, re.S)
        if entry is None:
            raise UnsupportedError("no entry")
        self.name = entry.group(1)
        self.parameters: list[tuple[str, str]] = [
            (name, kind)
            for kind, name in re.findall(r"\.param \.(\w+)(?: \.ptr[^,\n]*?)? ([\w$]+)(?:,|\s*$)", entry.group(2), re.M)
        ]
        threads = re.search(r"\.(?:reqntid|maxntid) (\d+)", entry.group(3))
        if threads is None:
            raise UnsupportedError("a kernel that does not say how many threads it has")
        self.threads = int(threads.group(1))
        self.registers: dict[str, tuple[int, str]] = {}
        self.shared: dict[str, int] = {}
        self.static_shared = 0
        self.dynamic = {
            name: int(align) for align, name in re.findall(r"\.extern \.shared \.align (\d+) \.b8 ([\w$]+)\[\]", text)
        }
        for name, size in re.findall(r"^\s*\.shared \.align \d+ \.b8 ([\w$]+)\[(\d+)\];", text[: entry.start()], re.M):
            self._declare_shared(name, int(size), 16)
        self.constants = {
            name: np.array([int(x) for x in values.split(",")], u1)
            for name, values in re.findall(r"\.global \.align \d+ \.b8 ([\w$]+)\[\d+\] = \{([^}]*)\};", text)
        }
        self.statements: list[str | Instruction] = []
        self._scopes: list[dict[str, str]] = [{}]  # new names of what is declared within
        self._read(text, entry.end())
        self.symbols = {*self.shared, *self.dynamic, *self.constants, *(name for name, _ in self.parameters)}

    def _declare_shared(self, name: str, size: int, align: int) -> None:
        at = -(-self.static_shared // align) * align
        self.shared[name] = at
        self.static_shared = at + size

    def _read(self, text: str, start: int) -> None:
        """The body, character by character."""
        lines_before = text.count("\n", 0, start)
        scopes = 0
        source = ""
        buffer, first_line = "", 0
        for offset, raw in enumerate(text[start:].split("\n")):
            number = lines_before + offset + 1
            where = re.match(r"\s*\.loc\s+\d+ \d+ \d+(?:, function_name [^/]*)?\s*(?://\s*(.*))?$", raw)
            if where and not buffer.strip():
                source = (where.group(1) or "").strip()
                continue
            line = re.sub(r"/\*.*?\*/", "", raw.split("//")[0])
            for c in line + " ":
                if not buffer.strip():
                    first_line = number
                if c == "{" and not buffer.strip():
                    scopes += 1
                    self._scopes.append({"": str(scopes)})
                    buffer = ""
                elif c == "}" and not buffer.strip():
                    if len(self._scopes) == 1:
                        return
                    self._scopes.pop()
                    buffer = ""
                elif c == ";":
                    self._statement(" ".join(buffer.split()), first_line, source)
                    buffer = ""
                elif c == ":" and re.fullmatch(r"\s*[\w$%]+", buffer):
                    self.statements.append(buffer.strip())
                    buffer = ""
                else:
                    buffer += c
            if buffer.strip().startswith((".loc", ".file", ".section")):
                buffer = ""
        raise UnsupportedError("no end of the kernel")

    def _statement(self, text: str, line: int, source: str) -> None:
        if not text or text.startswith(".pragma"):
            return
        declared = re.fullmatch(r"\.shared \.align (\d+) \.b8 ([\w$]+)\[(\d+)\]", text)
        if text.startswith(".reg"):
            self._declare_registers(text)
        elif declared:
            align, name, size = declared.groups()
            self._declare_shared(self._unique(name), int(size), int(align))
        elif text.startswith("."):
            raise UnsupportedError(f"line {line}: {text}")
        else:
            self.statements.append(self._instruction(text, line, source))

    def _declare_registers(self, text: str) -> None:
        _, kind, names = text.split(None, 2)
        for name in map(str.strip, names.split(",")):
            many = re.fullmatch(r"([%\w$]+)<(\d+)>", name)
            for each in [f"{many.group(1)}{k}" for k in range(int(many.group(2)))] if many else [self._unique(name)]:
                self.registers[each] = len(self.registers), kind[1:]

    def _unique(self, name: str) -> str:
        """The name by which something declared here is known outside."""
        scope = self._scopes[-1]
        scope[name] = f"{name}@{scope['']}" if len(self._scopes) > 1 else name
        return scope[name]

    def _instruction(self, text: str, line: int, source: str) -> Instruction:
        renamed = text
        for names in reversed(self._scopes[1:]):
            for name, unique in names.items():
                if name:
                    renamed = re.sub(rf"(?<![\w%$.]){re.escape(name)}(?![\w$@])", unique, renamed)
        match = re.fullmatch(r"(?:@(!?)([%\w$@]+)\s+)?([a-z][\w.:]*)(?:\s+(.*))?", renamed)
        if match is None:
            raise UnsupportedError(f"line {line}: {text}")
        negated, register, name, rest = match.groups()
        predicate = (register, bool(negated)) if register else None
        return Instruction(text, line, source, name.split("."), split_operands(rest or ""), predicate)
