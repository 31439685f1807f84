"""How often ``fastdsm.temperature_for_sigma2`` hits its target: python -m benchmarks.temperature_targets

Four families of logits at n = 4, 16, 64, targets uniform in (0.03, 0.98). The oracle is a dense scan in float64: 300
temperatures per matrix (120 at n = 64) from the a-priori bound down a factor 10^4, each plan by Newton's method to 1e-11. A
target is reachable where two neighbours of that scan enclose it; its largest root lies between the first such pair. Counted
are: the share of reachable targets whose temperature the oracle confirms within 1e-3; of those reported as reached, the share
that the oracle confirms; and the share whose temperature is the scan's largest root. Seeds are fixed.

On a CPU the searched logits are float64, with ``--device cuda`` float32, which one launch searches.
"""

from __future__ import annotations

import time
from typing import Annotated

import torch
import typer
from torch import Tensor

import fastdsm

from .converged import converged_sigma2, sigma2_curve

_POINTS = {4: 300, 16: 300, 64: 120}
_COUNTS = {4: 1500, 16: 1000, 64: 1000}


def families(n: int, count: int, seed: int) -> dict[str, Tensor]:
    """Logits (count, n, n) by name: normal, heavy-tailed, of low rank as in attention, small integers full of ties."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=draw, dtype=torch.float64)

    return {
        "normal": normal(n, n),
        "heavy tails": normal(n, n) / normal(n, n).abs().clamp(min=0.05),
        "query key": normal(n, 3) @ normal(3, n),
        "integers": torch.randint(0, 3, (count, n, n), generator=draw).double(),
    }


def _timed(logits: Tensor, target: Tensor, device: str) -> tuple[Tensor, Tensor, float]:
    """Temperature and whether it was reached, in float64 on the CPU, and seconds; a GPU is warm by then."""
    if device != "cpu":
        logits, target = logits.to(device, torch.float32), target.to(device, torch.float32)
        fastdsm.temperature_for_sigma2(logits, target)
        torch.cuda.synchronize()
    start = time.perf_counter()
    temperature, reached = fastdsm.temperature_for_sigma2(logits, target)
    if device != "cpu":
        torch.cuda.synchronize()
    return temperature.cpu().double(), reached.cpu(), time.perf_counter() - start


def measure(logits: Tensor, seed: int, device: str) -> dict[str, float]:
    """The shares of one family, and seconds per call."""
    draw = torch.Generator().manual_seed(seed)
    target = torch.rand(len(logits), generator=draw, dtype=torch.float64) * 0.95 + 0.03
    temperature, reached, seconds = _timed(logits, target, device)

    centred = logits - logits.mean(-1, keepdim=True)
    centred = centred - centred.mean(-2, keepdim=True)
    top = centred.abs().amax((-2, -1)) / target.atanh()
    grid = top * torch.logspace(0, -4, _POINTS[logits.shape[-1]], dtype=torch.float64)[:, None]
    above = sigma2_curve(logits, grid) >= target
    crossing = above[1:] & ~above[:-1]
    reachable, first = crossing.any(0), crossing.to(torch.int8).argmax(0)
    high, low = (grid.take_along_dim(x[None], 0)[0] for x in (first, first + 1))
    found = converged_sigma2(logits, torch.where(reached, temperature, top))
    hit = reached & ((found - target).abs() <= 1e-3)
    largest = (temperature <= high * (1 + 1e-6)) & (temperature >= low * (1 - 1e-6))
    both = hit & reachable
    return {
        "reachable": int(reachable.sum()),
        "of": len(logits),
        "hit": (both.sum() / reachable.sum()).item(),
        "confirmed": (hit.sum() / reached.sum()).item(),
        "largest": ((both & largest).sum() / both.sum()).item(),
        "seconds": seconds,
    }


def main(
    sizes: Annotated[list[int] | None, typer.Argument(help="4, 16, 64: lines of the matrices; all of them")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print("n    family       reachable   hit      confirmed  largest root  ms per matrix")
    for n in sizes or _COUNTS:
        for k, (name, logits) in enumerate(families(n, _COUNTS[n], seed=n).items()):
            row = measure(logits, k, device)
            share = f"{row['reachable']}/{row['of']}"
            each = 1e3 * row["seconds"] / row["of"]
            shares = f"{row['hit']:.4f}   {row['confirmed']:.4f}     {row['largest']:.4f}"
            print(f"{n:<4} {name:<12} {share:<11} {shares}        {each:.1f}", flush=True)


if __name__ == "__main__":
    typer.run(main)
