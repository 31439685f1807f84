"""Sinkhorn layers as torch.nn modules, and the floor that keeps their sigma2 from collapsing."""

from .attention import SinkhornAttention
from .hyper_connection import HyperConnection
from .projection import SinkhornProjection
from .spectral_floor import SpectralFloor, spectral_penalty

__all__ = ["HyperConnection", "SinkhornAttention", "SinkhornProjection", "SpectralFloor", "spectral_penalty"]
