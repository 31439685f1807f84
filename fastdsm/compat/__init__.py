"""Other packages' Sinkhorn calls, under their names and signatures and with their results, served by fastdsm.

A module per origin; a switch is one line, the import:

    from fastdsm.compat import pot as ot                          # was: import ot
    from fastdsm.compat.superglue import log_optimal_transport    # was: from models.superglue import ...

They differ in what is normalised first, in what counts as an iteration, in the masses and in the sign: :func:`table` says how
each counts, from what the modules say of themselves (``CONVENTIONS``). Options that cannot be served are errors.

An origin's module is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from ._shared import Convention

if TYPE_CHECKING:
    from . import (
        dinov2,
        geomloss,
        gumbel,
        hyper_connections,
        megatron,
        pot,
        pygmtools,
        sinkformers,
        sinkhorn_transformer,
        superglue,
        swav,
    )

ORIGINS = (
    "hyper_connections",
    "sinkformers",
    "pot",
    "geomloss",
    "superglue",
    "pygmtools",
    "gumbel",
    "sinkhorn_transformer",
    "swav",
    "dinov2",
    "megatron",
)

__all__ = [
    "Convention",
    "conventions",
    "dinov2",
    "geomloss",
    "gumbel",
    "hyper_connections",
    "megatron",
    "pot",
    "pygmtools",
    "sinkformers",
    "sinkhorn_transformer",
    "superglue",
    "swav",
    "table",
]


def __getattr__(name: str) -> ModuleType:
    """An origin's module, imported."""
    if name not in ORIGINS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; origins are {', '.join(ORIGINS)}")
    return importlib.import_module(f".{name}", __name__)


def __dir__() -> list[str]:
    return sorted({*globals(), *ORIGINS})


def conventions() -> list[Convention]:
    """How every call counts, in the order of ``ORIGINS``; ``call`` is its name below ``fastdsm.compat``."""
    modules = [(name, importlib.import_module(f".{name}", __name__)) for name in ORIGINS]
    return [row._replace(call=f"{name}.{row.call}") for name, module in modules for row in module.CONVENTIONS]


def table() -> None:
    """Print who counts how, a line per call: :func:`conventions` in columns."""
    rows = [Convention(*(name.replace("_", " ") for name in Convention._fields)), *conventions()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
