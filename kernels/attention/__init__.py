"""Sinkhorn attention: logits made of query and key tile by tile, never stored; one pass over them per half sweep."""

from . import launch

__all__ = ["launch"]
