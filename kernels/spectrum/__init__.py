"""sigma2 of plans of up to 256 lines, and the ways to a largest singular value that the other families share."""

from . import launch

__all__ = ["launch"]
