"""Sinkhorn attention in other packages' models.

``convert(model)`` replaces what it understands. ``fastdsm.integrations.transformers`` and ``fastdsm.integrations.timm`` import
these packages, at their first use.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from .convert import convert
from .report import Entry, Report

if TYPE_CHECKING:
    from . import timm as timm
    from . import transformers as transformers

__all__ = ["Entry", "Report", "convert"]


def __getattr__(name: str) -> ModuleType:
    """What is imported late."""
    if name in ("timm", "transformers"):
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
