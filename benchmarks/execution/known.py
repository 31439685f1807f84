"""What was looked into, and is harmless in the machine code there is: each at a line of the kernels' source."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fastdsm import kernels


@dataclass(frozen=True)
class Known:
    """An issue of a kind, in kernels whose name has ``kernel`` in it, at the only line of a file that contains ``text``."""

    kind: str
    kernel: str
    file: str
    text: str

    def pattern(self) -> tuple[str, str]:
        """As a ``Report`` wants it."""
        lines = Path(str(kernels.__file__)).parent.joinpath(self.file).read_text().splitlines()
        found = [number for number, line in enumerate(lines, 1) if self.text in line]
        if len(found) != 1:
            raise ValueError(
                f"expected one line with {self.text!r} in kernels/{self.file}, got {found}; see whether {self} holds"
            )
        return self.kind, rf"{self.kernel}.*\b{re.escape(Path(self.file).name)}:{found[0]}:"


KNOWN = (
    # drain() reads whole rounds of pieces, beyond the matrices there are, and stores those that are theirs alone
    Known("uninitialised", "", "registers/shared.py", "tl.inline_asm_elementwise(moving,"),
    # a value is loaded by every lane that holds a copy, changed, and stored by one of them, which uses its own copy
    Known("race in global memory", "_lanczos_", "spectrum/lanczos_forward.py", "tl.store(used_row_ptr + i, r * uniform_r"),
    Known("race in global memory", "_lanczos_", "spectrum/lanczos_forward.py", "tl.store(u_ptr + i, tl.load(u_ptr + i,"),
    # one warp: all lanes' loads of what is left to do have gone into a branch that the storing lane has passed
    Known("race in global memory", "_newton_tile_", "tile/newton.py", "tl.store(residual_ptr + b, residual + poison"),
)
