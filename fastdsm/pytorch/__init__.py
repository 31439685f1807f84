"""The PyTorch path: the same operations as the kernels, for CPU tensors and for matrices no kernel serves yet."""

from .attention import attention_backward, attention_forward, attention_sigma2
from .implicit import implicit_backward
from .newton import newton_forward
from .projection import sinkhorn_backward, sinkhorn_forward
from .spectrum import sigma2, sigma2_bounds
from .spectrum_gradient import sigma2_backward
from .tape import Tape

__all__ = [
    "Tape",
    "attention_backward",
    "attention_forward",
    "attention_sigma2",
    "implicit_backward",
    "newton_forward",
    "sigma2",
    "sigma2_backward",
    "sigma2_bounds",
    "sinkhorn_backward",
    "sinkhorn_forward",
]
