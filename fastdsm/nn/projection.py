"""``SinkhornProjection``: :func:`fastdsm.sinkhorn` as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..projection import sinkhorn
from .spectral_floor import SpectralFloor


class SinkhornProjection(nn.Module):
    """Project logits onto the doubly-stochastic matrices, as :func:`fastdsm.sinkhorn` does, with options fixed at construction.

    Args:
        n_iters, temperature, first, tol, solver, grad, backend: as for :func:`fastdsm.sinkhorn`; temperature is a float, or a
            tensor: an ``nn.Parameter`` becomes a parameter of this module, any other tensor a buffer. It must stay > 0.
        sigma2_floor: None, or a floor in (0, 1) under which :class:`SpectralFloor` lets no plan fall, by its temperature.

    forward(logits (..., n, m), mask=None) gives the plan, like logits; differentiable in logits and temperature. A forward hook
    sees the plan, as :class:`fastdsm.diagnostics.SpectralMonitor` does.

    Source: Sinkhorn and Knopp (1967); see :func:`fastdsm.sinkhorn`.
    """

    temperature: Tensor | float

    def __init__(
        self,
        n_iters: int = 20,
        temperature: float | Tensor = 1.0,
        first: str = "col",
        tol: float | None = None,
        solver: str = "sinkhorn",
        grad: str | None = None,
        sigma2_floor: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "n_iters": n_iters, "first": first, "tol": tol, "solver": solver, "grad": grad, "backend": backend
        }  # fmt: skip
        if isinstance(temperature, Tensor) and not isinstance(temperature, nn.Parameter):
            self.register_buffer("temperature", temperature)
        else:
            self.temperature = temperature
        self.floor = None if sigma2_floor is None else SpectralFloor(sigma2_floor, n_iters)

    def forward(self, logits: Tensor, mask: Tensor | None = None) -> Tensor:
        """The plan of ``logits``."""
        temperature = self.temperature
        if self.floor is not None:
            temperature = self.floor(logits, temperature, mask)
        plan = sinkhorn(logits, temperature=temperature, mask=mask, **self.options)
        assert isinstance(plan, Tensor)
        return plan

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
