"""Sinkhorn attention: logits made of query and key, never stored.

Tile by tile, one pass over them per half sweep; or, of few lines, all of a head's on chip.
"""

from . import launch, launch_short

__all__ = ["launch", "launch_short"]
