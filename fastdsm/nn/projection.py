"""``SinkhornProjection``: :func:`fastdsm.sinkhorn` as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..mhc.coefficients import project_with_eps
from ..projection import sinkhorn
from .spectral_floor import SpectralFloor


class SinkhornProjection(nn.Module):
    """Project logits onto the doubly-stochastic matrices, as :func:`fastdsm.sinkhorn` does, with options fixed at construction.

    Args:
        n_iters, temperature, first, tol, solver, grad, backend: as for :func:`fastdsm.sinkhorn`; temperature is a float, or a
            tensor: an ``nn.Parameter`` becomes a parameter of this module, any other tensor a buffer. It must stay > 0.
        sigma2_floor: None, or a floor in (0, 1) under which :class:`SpectralFloor` lets no plan fall, by its temperature.
        eps: 0, or what DeepSeek's mHC code adds to the softmax and to every sum, 1e-6 there with first="row": another
            projection (:func:`fastdsm.mhc.sinkhorn_normalize`), without mask, tol, floor and Newton's method. floored: False to
            leave it out of the softmax, as Megatron does.
        device, dtype: where a temperature that is a tensor is moved to.

    forward(logits (..., n, m), mask=None) gives the plan, like logits; differentiable in logits and temperature. A forward hook
    sees the plan, as :class:`fastdsm.diagnostics.SpectralMonitor` does. ``reset_parameters`` brings back the first temperature.

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
        *,
        eps: float = 0.0,
        floored: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not eps >= 0.0:
            raise ValueError(f"eps must be >= 0, got {eps}")
        if eps > 0.0 and (
            n_iters < 1 or tol is not None or solver != "sinkhorn" or grad == "implicit" or sigma2_floor is not None
        ):
            raise ValueError(
                "with eps there are n_iters >= 1 sweeps and their gradient, without tol, sigma2_floor or another solver, got "
                f"n_iters={n_iters}, tol={tol}, solver={solver!r}, grad={grad!r}, sigma2_floor={sigma2_floor}"
            )
        self.eps, self.floored = eps, floored
        self.options: dict[str, Any] = {
            "n_iters": n_iters, "first": first, "tol": tol, "solver": solver, "grad": grad, "backend": backend
        }  # fmt: skip
        # A copy, since a module that comes from the meta device has nothing else to start from.
        self._start: Tensor | None = None
        if isinstance(temperature, Tensor):
            learnt = isinstance(temperature, nn.Parameter)
            if device is not None or dtype is not None:
                temperature = temperature.detach().to(device=device, dtype=dtype)
                temperature = nn.Parameter(temperature) if learnt else temperature
            self._start = None if temperature.is_meta else temperature.detach().clone()
            if not learnt:
                self.register_buffer("temperature", temperature)
        if not hasattr(self, "temperature"):
            self.temperature = temperature
        self.floor = None if sigma2_floor is None else SpectralFloor(sigma2_floor, n_iters)

    def reset_parameters(self) -> None:
        """Bring back the temperature that the module was made with."""
        if not isinstance(self.temperature, Tensor):
            return
        if self._start is None:
            raise RuntimeError("the temperature was made on the meta device, so that there is no first value to bring back")
        with torch.no_grad():
            self.temperature.copy_(self._start)

    def forward(
        self,
        logits: Tensor | None,
        mask: Tensor | None = None,
        *,
        projected: Tensor | None = None,
        streams: Tensor | None = None,
    ) -> Tensor:
        """The plan of ``logits``.

        For hooks: ``projected``, their plan as another call has found it, and ``streams`` (T, n, C), which it will mix.
        """
        if projected is not None:
            return projected
        assert logits is not None
        temperature = self.temperature
        if self.eps > 0.0:
            if mask is not None:
                raise ValueError("with eps there is no mask")
            tau = temperature[..., None, None] if isinstance(temperature, Tensor) else temperature
            n_iters, first, backend = (self.options[name] for name in ("n_iters", "first", "backend"))
            plan = project_with_eps(logits / tau, n_iters, first, self.eps, floored=self.floored, backend=backend)
            return plan.to(logits.dtype)
        if self.floor is not None:
            temperature = self.floor(logits, temperature, mask)
        return sinkhorn(logits, temperature=temperature, mask=mask, **self.options)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        shown = self.options | ({"eps": self.eps} if self.eps > 0.0 else {})
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
