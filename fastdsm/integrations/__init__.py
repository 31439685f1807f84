"""Sinkhorn attention in other packages' models.

``convert(model)`` replaces what it understands; ``fastdsm.integrations.transformers`` and ``.timm`` import these packages, and
are imported by who needs them: ``from fastdsm.integrations import transformers``.
"""

from .convert import convert
from .report import Entry, Report

__all__ = ["Entry", "Report", "convert"]
