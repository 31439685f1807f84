"""The calls of the family, and its table."""

from ..common.configuration import Configuration
from . import launch_post, launch_pre
from .launch_post import post, post_backward, post_pre
from .launch_pre import pre, pre_backward

__all__ = ["configurations", "post", "post_backward", "post_pre", "pre", "pre_backward"]


def configurations() -> list[Configuration]:
    """Every kernel of the family."""
    return launch_pre.configurations() + launch_post.configurations()
