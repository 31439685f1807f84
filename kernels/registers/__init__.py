"""Matrices of up to 4x4, or packed square ones to 8x8, of at most 32 bits: one in the registers of each thread."""

from . import launch, launch_converged, sigma2

__all__ = ["launch", "launch_converged", "sigma2"]
