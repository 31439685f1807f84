"""Matrices that stay on chip, to 128 lines, of at most 32 bits, with every option: one or several a program."""

from . import launch, launch_converged

__all__ = ["launch", "launch_converged"]
