"""Monitoring a training run: sigma_2 of every Sinkhorn layer, step by step.

The task is to say a sequence backwards, which needs a layer whose plan is nearly a permutation. At the start attention's
logits are small, every plan is nearly the uniform one, and sigma_2, which is what a plan leaves of the differences between
its inputs, is close to 0: nothing passes. ``SpectralMonitor`` is one line beside the model.

One sees: all heads are flagged as collapsed to the uniform plan at first; as the loss falls sigma_2 rises in the layer that
learns to reverse, and with it the flags go.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import fastdsm


class Reverser(nn.Module):
    """Numbers (B, N) to logits of a number for every place (B, N, V)."""

    def __init__(self, length: int, numbers: int, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(numbers, width), nn.Parameter(torch.empty(length, width))
        self.layers = nn.ModuleList(
            fastdsm.nn.SinkhornAttention(width, 2, batch_first=True, n_iters=20, self_attention=True) for _ in range(depth)
        )
        for start in (self.embed.weight, self.place):
            nn.init.normal_(start, std=0.2)
        self.read = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, numbers))

    def forward(self, sequence: Tensor) -> Tensor:
        """Logits."""
        x = self.embed(sequence) + self.place
        for layer in self.layers:
            x = x + layer(x, x, x, need_weights=False)[0]
        logits: Tensor = self.read(x)
        return logits


def draw(steps: list[int], found: dict[str, list[float]], path: Path | None) -> None:
    """All curves over steps, into a file; a notebook shows them by itself."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 3.2), dpi=80, layout="constrained")
    for name, values in found.items():
        axis.plot(steps, values, "--" if name == "accuracy" else "-", label=name)
    axis.set_xlabel("step")
    axis.legend(frameon=False)
    if path is not None:
        figure.savefig(path)
        pyplot.close(figure)


def main(path: Path | None = None, length: int = 12, numbers: int = 10, steps: int = 200) -> dict[str, list[float]]:
    """Train beside a monitor, and say what it saw; ``path``: where to draw it."""
    torch.manual_seed(0)
    model = Reverser(length, numbers)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    # Every 20th forward is recorded. The numbers stay on the device, and are complete when the block ends.
    accuracy = []
    with fastdsm.diagnostics.SpectralMonitor(model, every=20) as monitor:
        for _ in range(steps):
            sequence = torch.randint(numbers, (32, length))
            logits, wanted = model(sequence), sequence.flip(-1)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            accuracy.append((logits.argmax(-1) == wanted).float().mean().item())

    # A row is a head of a layer at a step; of the two heads the larger sigma_2 counts, since one is enough to carry what a
    # place says. It may exceed 1 by a little: 20 sweeps leave the columns of a plan close to a permutation not quite exact.
    recorded = sorted({row.step for row in monitor.rows})
    layers = list(dict.fromkeys(row.layer for row in monitor.rows))
    found = {
        f"sigma_2 of {layer}": [
            max(row.sigma2 for row in monitor.rows if (row.step, row.layer) == (step, layer)) for step in recorded
        ]
        for layer in layers
    }
    found["accuracy"] = [accuracy[step] for step in recorded]
    collapsed = [sum(row.collapse == "uniform" for row in monitor.rows if row.step == step) for step in recorded]
    print(f"step  {'  '.join(found)}  heads collapsed")
    for k, step in enumerate(recorded):
        cells = "  ".join(f"{values[k]:{len(name)}.3f}" for name, values in found.items())
        print(f"{step:4}  {cells}  {collapsed[k]:15}")

    draw(recorded, found, path)

    return {**found, "collapsed": [float(count) for count in collapsed]}


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "monitoring.png"))
