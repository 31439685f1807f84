"""What watching costs: python -m benchmarks.monitor_cost [pairs]

A 12-layer transformer of width 256 with four mHC streams per token (24 hyper-connections, one 4 x 4 matrix per token each)
takes AdamW steps on 1,024 tokens on a CPU, every second one with a SpectralMonitor on every layer: pairs of steps in one
process, in alternating order. Printed: median seconds without, the median difference of a pair over it, and the ratios,
in wall time and in processor time, which other processes disturb less.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from torch import Tensor, nn

from fastdsm.diagnostics import SpectralMonitor
from fastdsm.nn import HyperConnection

_LAYERS, _WIDTH, _STREAMS, _TOKENS, _VOCABULARY = 12, 256, 4, 1024, 256


class _Attention(nn.Module):
    """Pre-normalised causal softmax attention of eight heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.into, self.out = nn.RMSNorm(_WIDTH), nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.into(self.norm(x)).unflatten(-1, (3, 8, -1)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(out.transpose(1, 2).flatten(2))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.RMSNorm(_WIDTH), nn.Linear(_WIDTH, 4 * _WIDTH), nn.GELU(), nn.Linear(4 * _WIDTH, _WIDTH))


class Transformer(nn.Module):
    """The network described at the top."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(_VOCABULARY, _WIDTH), nn.Linear(_WIDTH, _VOCABULARY)
        branches = [branch for _ in range(_LAYERS) for branch in (_Attention(), _mlp())]
        self.layers = nn.ModuleList(HyperConnection(branch, _WIDTH, _STREAMS) for branch in branches)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, N, vocabulary)."""
        x = self.embedding(tokens).unsqueeze(-2).repeat(1, 1, _STREAMS, 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(-2))


def main() -> None:
    """Measure and print."""
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    torch.manual_seed(0)
    model = Transformer()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(_VOCABULARY, (1, _TOKENS))

    def step() -> tuple[float, float]:
        start = time.perf_counter(), time.process_time()
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimiser.step()
        return time.perf_counter() - start[0], time.process_time() - start[1]

    def watched() -> tuple[float, float]:
        monitor = SpectralMonitor(model)
        seconds = step()
        assert len(monitor.rows) == 2 * _LAYERS
        monitor.close()
        return seconds

    step(), watched()  # warm-up
    without: list[tuple[float, float]] = []
    with_monitor: list[tuple[float, float]] = []
    for pair in range(pairs):
        for call, into in ((step, without), (watched, with_monitor))[:: 1 if pair % 2 else -1]:
            into.append(call())
    for k, clock in enumerate(("wall", "processor")):
        plain, more = [x[k] for x in without], [x[k] for x in with_monitor]
        ratios = [b / a for a, b in zip(plain, more, strict=True)]
        extra, base = statistics.median(b - a for a, b in zip(plain, more, strict=True)), statistics.median(plain)
        print(f"{clock} time: step {base:.3f} s, monitored {1e3 * extra:+.1f} ms, {100 * extra / base:+.1f} %")
        print(f"    ratio of a pair: median {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
