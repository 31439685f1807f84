"""Matrices of any size, of at most 32 bits: every sweep reads each entry once, in one launch over row blocks."""

from . import launch, spectrum

__all__ = ["launch", "spectrum"]
