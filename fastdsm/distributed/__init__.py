"""fastdsm over the processes of torch.distributed; ``import fastdsm.distributed``, which ``import fastdsm`` does not do."""

from .attention import sinkhorn_attention
from .projection import sinkhorn
from .styles import HyperConnectionParallel, SinkhornContextParallel

__all__ = ["HyperConnectionParallel", "SinkhornContextParallel", "sinkhorn", "sinkhorn_attention"]
