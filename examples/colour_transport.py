"""Optimal transport of colours: one photograph in the colours of another.

The colours of two of scikit-learn's pictures are two palettes, each with how often its colours occur. The plan that carries
one palette onto the other at the least squared distance in RGB, ``fastdsm.sinkhorn`` with these frequencies as marginals,
says which colours each colour becomes, and in what parts.

One sees: the first picture in the second's colours (give a path for the file), each as often as in the second; and that the
plan costs hardly more than any plan must.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.datasets import load_sample_images
from torch import Tensor

import fastdsm


class Palette(NamedTuple):
    """Colours (K, 3) from 0 to 1, dark to bright, their frequencies (K,), and the colour of each pixel (N,)."""

    colours: Tensor
    frequencies: Tensor
    of_pixel: Tensor


def palette_of(picture: Tensor, size: int) -> Palette:
    """Colours of some pixels; every pixel of (H, W, 3) counts for the nearest."""
    pixels = picture.reshape(-1, 3)
    colours = pixels[torch.randperm(len(pixels))[:size]].unique(dim=0)
    colours = colours[colours.sum(-1).argsort()]
    index = torch.cdist(pixels, colours).argmin(-1)
    return Palette(colours, index.bincount(minlength=len(colours)) / len(index), index)


def recoloured(picture: Tensor, source: Palette, plan: Tensor) -> Tensor:
    """(N,), the target's colour of each pixel: a source colour's pixels share out its row of the plan, darker ones first."""
    order = (source.of_pixel + picture.reshape(-1, 3).mean(-1) / 2).argsort()  # by source colour, then by brightness
    colour, counts = source.of_pixel[order], source.of_pixel.bincount(minlength=len(plan))
    share = (torch.arange(len(order)) - (counts.cumsum(0) - counts)[colour] + 0.5) / counts[colour]
    ends = plan.cumsum(-1) / plan.sum(-1, keepdim=True)
    index = torch.empty_like(source.of_pixel)
    index[order] = torch.searchsorted(ends[colour], share.unsqueeze(-1).to(plan)).squeeze(-1).clamp(max=plan.shape[-1] - 1)
    return index


def unlikeness(index: Tensor, target: Palette) -> float:
    """Total variation between the frequencies of these colours and the target's: 0 where they are the same, 1 at most."""
    frequencies = index.bincount(minlength=len(target.colours)) / len(index)
    return (frequencies - target.frequencies).abs().sum().item() / 2


def draw(pictures: dict[str, Tensor], path: Path | None) -> None:
    """Side by side, into a file; a notebook shows them by itself."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(pictures), figsize=(11, 2.7), dpi=72, layout="constrained")
    for axis, (title, picture) in zip(axes, pictures.items(), strict=True):
        axis.imshow(picture.numpy())
        axis.set_title(title)
        axis.set_axis_off()
    if path is not None:
        figure.savefig(path)
        pyplot.close(figure)


def main(path: Path | None = None, size: int = 256, temperature: float = 1e-3) -> dict[str, float]:
    """Carry the second picture's colours over to the first; ``path``: where to draw all three."""
    torch.manual_seed(0)

    # Two photographs, every second pixel of each side, and 256 colours of each. Before the transport the first picture takes
    # the nearest of the second's colours, some of them far too often.
    first, second = (torch.tensor(x[::2, ::2], dtype=torch.float32) / 255 for x in load_sample_images().images)
    source, target = palette_of(first, size), palette_of(second, size)
    nearest = torch.cdist(source.colours, target.colours).argmin(-1)[source.of_pixel]
    before = unlikeness(nearest, target)

    # The plan between the palettes has their frequencies as marginals. Low temperatures make it sharp, and sweeps slow:
    # Newton's method converges all the same. Its potentials, made feasible, are a lower bound of what any plan costs.
    distances = torch.cdist(source.colours.double(), target.colours.double()).square()
    rows, columns = source.frequencies.double(), target.frequencies.double()
    plan, info = fastdsm.sinkhorn(
        -distances, temperature=temperature, row_marginal=rows, col_marginal=columns, solver="newton", n_iters=100,
        return_info=True,
    )  # fmt: skip
    potential = temperature * info.f
    bound = (rows @ potential + columns @ (distances - potential.unsqueeze(-1)).amin(0)).item()
    cost = (plan * distances).sum().item()
    print(f"plan of {len(plan)} x {plan.shape[-1]} colours: residual {info.residual:.0e} after {info.sweeps} steps")
    print(f"it costs {cost:.4f}, and no plan less than {bound:.4f}")

    # Pixels take their new colours.
    index = recoloured(first, source, plan)
    after = unlikeness(index, target)
    print(f"unlike the second picture's colours: {before:.3f} by the nearest colour, {after:.3f} by the plan")

    draw({"first": first, "second": second, "first, in the second's colours": target.colours[index].reshape(first.shape)}, path)

    return {"cost": cost, "bound": bound, "before": before, "after": after, "residual": info.residual.item()}


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "colours.png"))
