"""Training: a small character language model on mHC streams, and what becomes of its mixes.

The text is ``pydoc_data.topics``, 0.5 MB of English that every Python ships; a tenth of it, the end, is held back. The model is
a transformer of pre-norm attention and MLPs, each a branch on n = 4 residual streams (:class:`fastdsm.nn.HyperConnection`),
that predicts each next character. Four ways from the same starts, on the same batches:

    plain       one residual stream
    mHC         H by 20 sweeps, as the paper has it
    floor       the same with sigma2(H) held at a floor by the temperature
    identity    H = I: streams that are read and written, and never mixed

Logits of H start ``_OFFSET`` lower beside the diagonal, for a sigma2 of about 0.3, so that mixes work from the start; the
gates are open, as streams that are read and written alike stay equal, and no mix is seen. Beside the loss stand, for each layer
and over the steps, what :class:`fastdsm.diagnostics.StreamRow` has: how much of the streams' difference a mix leaves (sigma2),
how much the product of all mixes so far, what that all but loses (its smallest singular value), and how alike streams are
(their cosine).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..diagnostics import SpectralMonitor, StreamRow
from ..nn import HyperConnection
from .result import ACCENT, DARK, GREY, SECOND, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OFFSET, _GATE = 1.0, 0.5
_WIDTH, _HEADS, _CONTEXT, _BATCH, _RATE, _STREAMS, _FLOOR = 64, 4, 64, 8, 3e-3, 4, 0.5
_HELD, _EVALUATED, _BLOCKS = 10, 12, 3  # a tenth is held back; batches of a validation; attention and MLP each
WAYS = ("plain", "mHC", f"mHC, floor {_FLOOR}", "identity mixing")


@dataclass
class Outcome:
    """One way and seed: losses on the text held back (step, nats a character), and the streams' rows of those steps."""

    losses: list[tuple[int, float]] = field(default_factory=list)
    streams: list[StreamRow] = field(default_factory=list)


class Attention(nn.Module):
    """Causal self-attention behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(_WIDTH)
        self.inner, self.outer = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to the same."""
        q, k, v = self.inner(self.norm(x)).unflatten(-1, (3 * _HEADS, -1)).transpose(1, 2).chunk(3, 1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.outer(mixed.transpose(1, 2).flatten(2))
        return out


class Model(nn.Module):
    """Characters (B, N) to logits of the next ones (B, N, V), by one of ``WAYS``."""

    def __init__(self, way: str, characters: int, blocks: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(characters, _WIDTH), nn.Parameter(0.02 * torch.randn(_CONTEXT, _WIDTH))
        branches: list[nn.Module] = []
        for _ in range(blocks):
            inner, outer = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)
            branches += [Attention(), nn.Sequential(nn.LayerNorm(_WIDTH), inner, nn.GELU(), outer)]
        self.norm, self.read = nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, characters)
        self.plain = way == WAYS[0]
        self.layers = nn.ModuleList(branches if self.plain else [_connected(branch, way) for branch in branches])

    def forward(self, text: Tensor) -> Tensor:
        """Logits."""
        x = self.embed(text) + self.place
        first = self.layers[0]
        if self.plain or not isinstance(first, HyperConnection):
            for branch in self.layers:
                x = x + branch(x)
        else:
            x = first.expand(x)
            for layer in self.layers:
                x = layer(x)
            x = first.reduce(x)
        found: Tensor = self.read(self.norm(x))
        return found


def _connected(branch: nn.Module, way: str) -> HyperConnection:
    """A branch on streams; e^-100 off the diagonal is H = I, and stays so."""
    offset, floor = 100.0 if way == WAYS[3] else _OFFSET, _FLOOR if way == WAYS[2] else None
    layer = HyperConnection(branch, _WIDTH, _STREAMS, sigma2_floor=floor, offset=offset)
    nn.init.constant_(layer.scale, _GATE)
    return layer


def text() -> tuple[Tensor, Tensor, int]:
    """Characters as numbers, to train on and held back, and how many kinds there are."""
    from pydoc_data.topics import topics

    whole = "\n".join(topics[name] for name in sorted(topics))
    kinds = {character: k for k, character in enumerate(sorted(set(whole)))}
    numbers = torch.tensor([kinds[character] for character in whole])
    held = len(numbers) // _HELD
    return numbers[:-held], numbers[-held:], len(kinds)


def run(seeds: int = 3, steps: int = 240, blocks: int = _BLOCKS) -> Result:
    """Train every way from ``seeds`` starts; ``blocks`` of attention and MLP."""
    train, held, kinds = text()
    found = {way: [train_model(way, seed, train, held, kinds, steps, blocks) for seed in range(seeds)] for way in WAYS}
    rows: list[tuple[float | str, ...]] = []
    for way, outcomes in found.items():
        last = torch.tensor([x.losses[-1][1] for x in outcomes])
        first_loss, spectra = torch.tensor([x.losses[0][1] for x in outcomes]).mean().item(), [math.nan] * 6
        if outcomes[0].streams:
            begin, end = ([_of_step(x, step) for x in outcomes] for step in (0, -1))
            spectra = [
                *(_mean([x[len(x) // 2].singular_values[0] for x in some]) for some in (begin, end)),
                _mean([x[-1].through_depth[0] for x in end]),
                _mean([x[-1].through_depth[-1] for x in end]),
                *(_mean([x[-1].cosine for x in some]) for some in (begin, end)),
            ]
        rows.append((way, last.mean().item(), last.min().item(), last.max().item(), first_loss, *spectra))
    columns = (
        "way", "loss, mean", "least", "most", "at the start", "sigma2 of a middle mix, at the start", "after training",
        "through depth: sigma2", "sigma min", "cosine before the last layer, at the start", "after training",
    )  # fmt: skip

    def draw(axes: Sequence[Axes]) -> None:
        for way, colour in zip(WAYS, (GREY, ACCENT, SECOND, DARK), strict=True):
            outcomes = found[way]
            for k, x in enumerate(outcomes):
                axes[0].plot(*zip(*x.losses, strict=True), color=colour, label=way if k == 0 else None)
            if outcomes[0].streams:
                ends = [_of_step(x, -1) for x in outcomes]
                numbers = range(1, len(ends[0]) + 1)
                for part, line in ((0, "-"), (-1, "--")):
                    values = [_mean([x[layer].through_depth[part] for x in ends]) for layer in range(len(ends[0]))]
                    axes[1].plot(numbers, values, line, color=colour)
                axes[2].plot(numbers, [_mean([x[layer].cosine for x in ends]) for layer in range(len(ends[0]))], color=colour)
        axes[0].set(xlabel="step", ylabel="nats a character, text held back")
        axes[1].set(xlabel="layer", ylabel="product of mixes: σ₂ (–), smallest (- -)", yscale="log")
        axes[2].set(xlabel="layer", ylabel="cosine between streams that come in")
        axes[0].legend(frameon=False)

    title = "Training: a character language model on mHC streams"
    return Result("language", title, _text(rows, seeds, steps, 2 * blocks), columns, rows, 3, draw)


def train_model(way: str, seed: int, train: Tensor, held: Tensor, kinds: int, steps: int, blocks: int) -> Outcome:
    """Train one model and measure it at ten steps and the last."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = Model(way, kinds, blocks)
        batches, outcome = torch.Generator().manual_seed(1000 + seed), Outcome()
        optimiser = torch.optim.AdamW(model.parameters(), _RATE)
        every = max(steps // 10, 1)
        monitor = None if model.plain else SpectralMonitor(model, every=every, sample=32)
        for step in range(steps + 1):
            if step % every == 0 or step == steps:
                outcome.losses.append((step, _loss_of(model, held)))
            if step == steps:
                break
            loss = _loss(model, _windows(train, batches))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        if monitor is not None:
            monitor.close()
            outcome.streams = monitor.stream_rows
        return outcome


def _windows(numbers: Tensor, draw_from: torch.Generator) -> Tensor:
    begins = torch.randint(len(numbers) - _CONTEXT - 1, (_BATCH,), generator=draw_from)
    return numbers[begins[:, None] + torch.arange(_CONTEXT + 1)]


def _loss(model: nn.Module, windows: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def _loss_of(model: nn.Module, held: Tensor) -> float:
    """On the same windows every time."""
    draw_from = torch.Generator().manual_seed(1)
    model.eval()
    found = torch.stack([_loss(model, _windows(held, draw_from)) for _ in range(_EVALUATED)]).mean().item()
    model.train()
    return found


def _of_step(outcome: Outcome, which: int) -> list[StreamRow]:
    """Rows of the first or last step that was recorded."""
    step = sorted({row.step for row in outcome.streams})[which]
    return [row for row in outcome.streams if row.step == step]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _text(rows: Sequence[Sequence[float | str]], seeds: int, steps: int, layers: int) -> str:
    seen = "; ".join(f"{row[0]}: {row[1]:.3f} ({row[2]:.3f} to {row[3]:.3f})" for row in rows)
    spread = max(float(row[3]) - float(row[2]) for row in rows)
    best = min(rows, key=lambda row: float(row[1]))
    gap = max(float(row[1]) for row in rows) - float(best[1])
    within = "less" if gap < spread else "more"
    return (
        f"A transformer of {layers} branches, width {_WIDTH}, context {_CONTEXT}, {steps} steps of {_BATCH} windows, {seeds} "
        f"seeds, the same starts and batches for every way. Loss on text held back, mean (least to most over seeds): {seen}. "
        f"The lowest mean is that of {best[0]}; means are up to {gap:.3f} apart, {within} than the seeds of one way "
        f"({spread:.3f}). These are losses after few steps of a small model: they say what these layers do here, not what they "
        "do at scale. Spectra are means over tokens and seeds; through depth: of the product of all mixes."
    )
