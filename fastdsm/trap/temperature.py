"""Temperature: entropy rises, sigma2 falls, as the law of random logits says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..diagnostics import entropy, random_sigma2, sigma2_prior_bound
from ..projection import sinkhorn_sigma2
from .result import ACCENT, DARK, GREY, SECOND, Result, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE, _COUNT = 128, 8
_TEMPERATURES = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0)


def run() -> Result:
    """Sweep the temperature of normal logits."""
    logits = torch.randn(_COUNT, _SIZE, _SIZE, generator=torch.Generator().manual_seed(1))
    rows = []
    for tau in _TEMPERATURES:
        found = sinkhorn_sigma2(logits, temperature=tau, tol=1e-5, n_iters=500)
        law, bound = number(random_sigma2(1 / tau, _SIZE)), number(sigma2_prior_bound(logits, tau).mean())
        rows.append((tau, number(entropy(found.plan).mean()), number(found.sigma2.mean()), law, bound))
    warm = next(row for row in rows if row[0] == 2.0)
    text = (
        f"{_COUNT} matrices of {_SIZE} × {_SIZE} independent standard normal logits, plans swept to a residual of 1e-5. As the "
        "temperature rises, entropy tends to that of the uniform plan and sigma2 to 0, from temperature 1 on by the law "
        f"2 sqrt(exp(1 / temperature²) − 1) / sqrt(n): at temperature 2 measured {warm[2]:.4f}, predicted {warm[3]:.4f}. The "
        "bound tanh(D / (4 temperature)) holds for any logits, and says little about large random ones."
    )

    def draw(axes: Sequence[Axes]) -> None:
        tau, shannon, measured, law, bound = (list(x) for x in zip(*rows, strict=True))
        axes[0].plot(tau, shannon, "o-", color=DARK)
        axes[0].set(xlabel="temperature", ylabel="entropy of the rows, 1 = uniform")
        axes[1].plot(tau, bound, "--", color=GREY, label="tanh bound")
        axes[1].plot(tau, law, "-", color=SECOND, label="law of random logits")
        axes[1].plot(tau, measured, "o", color=ACCENT, label="measured")
        axes[1].set(yscale="log", xlabel="temperature", ylabel="σ₂")
        axes[1].legend(frameon=False)
        for axis in axes:
            axis.set_xscale("log", base=2)

    columns = ("temperature", "entropy", "sigma2 measured", "sigma2 by the law", "tanh bound")
    return Result("temperature", "Temperature: entropy up, sigma2 down", text, columns, rows, 2, draw)
