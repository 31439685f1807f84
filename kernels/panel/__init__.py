"""Matrices of up to 256 lines, every dtype and option: a matrix a program, its logits re-read from L2 inside one launch."""

from . import launch

__all__ = ["launch"]
