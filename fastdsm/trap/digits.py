"""Training: small deep networks on handwritten digits, their tokens mixed by softmax, Sinkhorn, and Sinkhorn with a floor.

The data are scikit-learn's digits, 1,797 images of 8 x 8 pixels, shipped in its package. An image is n = 16 tokens, patches of
2 x 2 pixels; x (n, C) starts as their embedding plus one of their place. A layer mixes the tokens and then thinks about each:

    x <- R x,               R = (1 - a) I + a P
    x <- x + MLP(LN(x))     token by token

and a linear map of all LN(x) at the end gives the ten logits. P is made of learned logits, n x n for each layer, the same for
every image: the floor's search takes some milliseconds a matrix, too long here for one per image. a = 1 is pure mixing, where
detail passes by P alone; a = 1/2 keeps a residual connection, so that sigma2(R) <= (1 + sigma2(P)) / 2. R = I, no mixing at
all, is the yardstick: what the task needs of mixing shows in what is lost without.

Every row sums to 1, of softmax too: P 1 = 1, hence (I - J) P = (I - J) P (I - J), and sigma2 bounds for each of them what a
layer leaves of detail, the tokens' difference from their mean; softmax's alone may exceed 1.

The networks of one way (weights a times seeds) are trained side by side, as a leading dimension S of all parameters. Adam works
on single entries and their loss is a sum, so that each trains as it would alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..diagnostics import product_sigma2
from ..nn import SinkhornProjection
from ..spectrum import sigma2
from .result import ACCENT, DARK, GREY, SECOND, Result, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TEST, _SIDE, _PATCH, _WIDTH, _HIDDEN, _CLASSES, _BATCH, _RATE = 397, 8, 2, 32, 64, 10, 128, 3e-3
_TOKENS = (_SIDE // _PATCH) ** 2
_FLOOR, _SWEEPS = 0.9, 40  # a plan of sigma2 = 0.9 has converged to 0.9^80 = 2e-4
_SETTINGS = {"pure mixing": 1.0, "residual": 0.5}

Mixing = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Outcome:
    """Of S networks of one way: accuracy on test images (S,), and (S, L) sigma2 of P before and after, of the product of R."""

    accuracy: Tensor
    before: Tensor
    after: Tensor
    product: Tensor


class Networks(nn.Module):
    """S networks of L layers side by side; a seed gives the same start to networks of every way and weight.

    forward(images (S, n, B, 4), mixing (S, L, n, n), the R of every layer) gives logits (S, B, 10). Lines come first, so that
    every operation is one product of S matrices.
    """

    def __init__(self, seeds: Sequence[int], layers: int) -> None:
        super().__init__()
        drawn = [_start(torch.Generator().manual_seed(seed), layers) for seed in seeds]
        self.start = nn.ParameterDict({name: torch.stack([one[name] for one in drawn]) for name in drawn[0]})

    def forward(self, images: Tensor, mixing: Tensor) -> Tensor:
        """Class logits."""
        p, lines = self.start, images.shape[1:3]
        x = (images.flatten(1, 2) @ p["embed"]).unflatten(1, lines) + p["place"].unsqueeze(2)
        for layer in range(mixing.shape[1]):
            x = (mixing[:, layer] @ x.flatten(2)).reshape(x.shape)
            hidden = torch.baddbmm(p["bias"][:, layer, None], _normalised(x).flatten(1, 2), p["up"][:, layer])
            x = x + (nn.functional.gelu(hidden) @ p["down"][:, layer]).unflatten(1, lines)
        return _normalised(x).transpose(1, 2).flatten(2) @ p["read"]


def run(seeds: int = 3, epochs: int = 12, layers: int = 12) -> Result:
    """Train every way from the same starts on the same batches; ``seeds`` networks of each weight, ``layers`` >= 1.

    Rows: each setting with each way, then R = I. Most of the time goes to the floor's search for temperatures.
    """
    train, test = split()
    ways: dict[str, Mixing] = {
        "softmax": lambda logits: logits.softmax(-1),
        "Sinkhorn": SinkhornProjection(_SWEEPS),
        f"Sinkhorn, floor {_FLOOR}": SinkhornProjection(_SWEEPS, sigma2_floor=_FLOOR),
    }
    every = [(a, seed) for a in _SETTINGS.values() for seed in range(seeds)]
    found: dict[tuple[str, str], Outcome] = {}
    for way, plans in ways.items():
        whole = train_networks(plans, every, train, test, epochs, layers)
        for k, setting in enumerate(_SETTINGS):
            part = slice(k * seeds, (k + 1) * seeds)
            found[setting, way] = Outcome(whole.accuracy[part], whole.before[part], whole.after[part], whole.product[part])
    alone = [(0.0, seed) for seed in range(seeds)]
    unmixed = train_networks(lambda logits: logits.softmax(-1), alone, train, test, epochs, layers).accuracy

    rows: list[tuple[float | str, ...]] = []
    for (setting, way), x in found.items():
        each = x.after.mean(0)
        depths = [number(each[layer]) for layer in (0, layers // 2, -1)]
        rows.append((setting, way, *_range(x.accuracy), number(x.before.mean()), *depths, number(_geometric(x.product[:, -1]))))
    rows.append(("no mixing", "R = I", *_range(unmixed), *[1.0] * 5))
    rows.sort(key=lambda row: [*_SETTINGS, "no mixing"].index(str(row[0])))
    columns = (
        "setting", "way", "accuracy, mean", "least", "most", "sigma2 before training", "after: layer 1",
        f"layer {layers // 2 + 1}", f"layer {layers}", "sigma2 of the product of R",
    )  # fmt: skip
    text = _text(rows, seeds, epochs, layers, len(test[1]))

    def draw(axes: Sequence[Axes]) -> None:
        for k, way in enumerate(ways):
            colour = (SECOND, DARK, ACCENT)[k]
            for j, (setting, line) in enumerate(zip(_SETTINGS, ("-", "--"), strict=True)):
                x = found[setting, way]
                axes[0].plot([j + 0.2 * (k - 1)] * seeds, x.accuracy, "o", color=colour, label=way if j == 0 else None)
                numbers = range(1, layers + 1)
                label = f"{way}, {setting}"
                axes[1].plot(numbers, x.after.mean(0), line, marker="o", markersize=3, color=colour, label=label)
                axes[2].plot(numbers, _geometric(x.product), line, color=colour)
        axes[0].plot([2] * seeds, unmixed, "o", color=GREY, label="R = I")
        axes[0].set(ylabel="accuracy on the test images, each seed", xticks=range(3))
        axes[0].set_xticklabels([*_SETTINGS, "no mixing"])
        axes[1].set(xlabel="layer", ylabel="σ₂ of P after training", ylim=(0, None))
        axes[2].set(yscale="log", xlabel="layer", ylabel="σ₂ of the product of R so far")
        axes[0].legend(frameon=False)
        axes[1].legend(frameon=False, fontsize=7)

    return Result("digits", "Training: handwritten digits by three ways of mixing", text, columns, rows, 3, draw)


def _text(rows: Sequence[Sequence[float | str]], seeds: int, epochs: int, layers: int, images: int) -> str:
    seen = "; ".join(
        f"{setting}, {way}: {mean:.3f} ({least:.3f} to {most:.3f}), sigma2 {first:.2f}, {middle:.2f}, {last:.2f}"
        for setting, way, mean, least, most, _, first, middle, last, _ in rows
    )
    best = max(rows, key=lambda row: float(row[2]))
    return (
        f"Networks of {layers} layers on {_TOKENS} tokens, {epochs} epochs, {seeds} seeds, the same starts and batches for "
        f"every way; logits of the plans start standard normal. Mean accuracy on {images} images not trained on (least to most "
        "over seeds; one network's standard error is about 2 % at 0.8), and sigma2 of the first, a middle and the last "
        f"layer: {seen}. Best is {best[0]}, {best[1]}. A floor acts as a colder temperature, set for each layer; it does not "
        "make a task need mixing. Accuracy is that after these epochs, not at convergence. "
        "sigma2 holds on the tokens' mean-free part, for softmax too; that of the product is the geometric mean over seeds."
    )


def train_networks(
    plans: Mixing,
    networks: Sequence[tuple[float, int]],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    epochs: int,
    layers: int,
) -> Outcome:
    """Train ``networks`` of (a, seed), whose plans ``plans`` makes of their logits, and measure them."""
    model = Networks([seed for _, seed in networks], layers)
    a = torch.tensor([a for a, _ in networks])[:, None, None, None]
    order = [torch.Generator().manual_seed(1000 + seed) for _, seed in networks]

    def mixing() -> tuple[Tensor, Tensor]:
        P = plans(model.start["logits"])
        return P, (1 - a) * torch.eye(_TOKENS) + a * P

    with torch.enable_grad():
        optimiser = torch.optim.Adam(model.parameters(), _RATE)
        with torch.no_grad():
            before = _sigma2(mixing()[0])
        for _ in range(epochs):
            shuffled = torch.stack([torch.randperm(len(train[1]), generator=one) for one in order])
            for batch in shuffled.split(_BATCH, 1):
                found = model(train[0][batch].transpose(1, 2), mixing()[1])
                losses = nn.functional.cross_entropy(found.flatten(0, 1), train[1][batch].flatten(), reduction="none")
                optimiser.zero_grad()
                losses.reshape(len(networks), -1).mean(1).sum().backward()
                optimiser.step()
    with torch.no_grad():
        P, R = mixing()
        right = model(test[0].transpose(0, 1).expand(len(networks), -1, -1, -1), R).argmax(-1) == test[1]
        product = [product_sigma2(R[:, : layer + 1].unbind(1)) for layer in range(layers)]
        return Outcome(right.double().mean(1), before, _sigma2(P), torch.stack(product, 1))


def _start(draw_from: torch.Generator, layers: int) -> dict[str, Tensor]:
    """One network's parameters: matrices of variance 1 / lines, the MLP's output smaller by sqrt(L); plans' logits normal."""

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return std * torch.randn(*shape, generator=draw_from)

    return {
        "embed": normal(_PATCH**2, _WIDTH, std=1 / _PATCH),
        "place": normal(_TOKENS, _WIDTH, std=0.5),
        "logits": normal(layers, _TOKENS, _TOKENS),
        "up": normal(layers, _WIDTH, _HIDDEN, std=1 / math.sqrt(_WIDTH)),
        "bias": torch.zeros(layers, _HIDDEN),
        "down": normal(layers, _HIDDEN, _WIDTH, std=1 / math.sqrt(_HIDDEN * layers)),
        "read": normal(_TOKENS * _WIDTH, _CLASSES, std=1 / math.sqrt(_TOKENS * _WIDTH)),
    }


def split() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Train and test: images as tokens (count, n, 4), of zero mean and unit variance over all, and digits (count,)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, digits = torch.tensor(data.images, dtype=torch.float32), torch.tensor(data.target)
    count, blocks = len(images), _SIDE // _PATCH
    tokens = images.reshape(count, blocks, _PATCH, blocks, _PATCH).transpose(2, 3).reshape(count, _TOKENS, _PATCH**2)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(8))
    held, used = order[:_TEST], order[_TEST:]
    tokens = (tokens - tokens[used].mean()) / tokens[used].std()
    return (tokens[used], digits[used]), (tokens[held], digits[held])


def _normalised(x: Tensor) -> Tensor:
    """LayerNorm over the features, without weights."""
    return nn.functional.layer_norm(x, x.shape[-1:])


def _sigma2(plans: Tensor) -> Tensor:
    found = sigma2(plans)
    return found


def _range(accuracy: Tensor) -> tuple[float, float, float]:
    return number(accuracy.mean()), number(accuracy.min()), number(accuracy.max())


def _geometric(x: Tensor) -> Tensor:
    """Geometric mean over seeds, the first dimension."""
    return x.log().mean(0).exp()
