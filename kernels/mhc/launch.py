"""The calls of the family, and its table."""

from .launch_pre import configurations, mix, pre, pre_backward, product

__all__ = ["configurations", "mix", "pre", "pre_backward", "product"]
