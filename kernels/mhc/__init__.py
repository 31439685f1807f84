"""Mixes, collapse and expansion of an mHC layer's streams."""

from . import launch

__all__ = ["launch"]
