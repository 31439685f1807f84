"""fastdsm over the processes of torch.distributed; ``import fastdsm.distributed``, which ``import fastdsm`` does not do."""

from .attention import sinkhorn_attention
from .projection import sinkhorn
from .spectrum import sigma2
from .styles import HyperConnectionParallel, SinkhornContextParallel

__all__ = ["HyperConnectionParallel", "SinkhornContextParallel", "sigma2", "sinkhorn", "sinkhorn_attention"]
