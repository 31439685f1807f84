"""The residual streams of mHC layers: mixes of up to 16 streams, the branch's input and output, forward and backward."""

from . import launch_post

__all__ = ["launch_post"]
