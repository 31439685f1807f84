"""Sinkhorn layers as torch.nn modules, and the floor that keeps their sigma2 from collapsing."""

from .attention import SinkhornAttention
from .hyper_connection import HyperConnection
from .hyper_connections import HyperConnections
from .projection import SinkhornProjection
from .spectral_floor import SpectralFloor, spectral_penalty

__all__ = [
    "HyperConnection",
    "HyperConnections",
    "SinkhornAttention",
    "SinkhornProjection",
    "SpectralFloor",
    "spectral_penalty",
]
