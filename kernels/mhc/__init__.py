"""The residual streams of mHC layers: what reads a branch's input from them, mixes them, and writes its output to them."""

from . import launch

__all__ = ["launch"]
