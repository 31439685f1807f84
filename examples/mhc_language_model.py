"""A character language model on four residual streams: manifold-constrained hyper-connections (mHC, arXiv 2512.24880).

``fastdsm.nn.HyperConnections`` puts branches, here causal attention and MLPs, on n residual streams, which a
doubly-stochastic n x n matrix of their own mixes for every token and layer. The same layer is there as calls, under the names
that mHC code has. The text is the help that ships in every Python.

One sees: the loss falls below that of the characters' frequencies, so that the model has learnt from what came before; the
stack's output is that of the calls, made one by one with its weights; the mix of streams is doubly stochastic.
"""

from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

import fastdsm


class Attention(nn.Module):
    """Causal self-attention behind a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(width), heads
        self.inner, self.outer = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to the same."""
        query, key, value = self.inner(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.outer(mixed.transpose(1, 2).flatten(2))
        return out


class LanguageModel(nn.Module):
    """Characters (B, N) to logits of the next ones (B, N, V)."""

    def __init__(self, characters: int, context: int, width: int = 64, blocks: int = 2) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(characters, width), nn.Parameter(0.02 * torch.randn(context, width))
        branches: list[nn.Module] = []
        for _ in range(blocks):
            mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            branches += [Attention(width, 4), mlp]
        self.stack = fastdsm.nn.HyperConnections(branches, width, streams=4, variant="deepseek")
        self.read = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, characters))

    def forward(self, text: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.read(self.stack(self.embed(text) + self.place))
        return logits


def by_calls(stack: fastdsm.nn.HyperConnections, x: Tensor) -> tuple[Tensor, Tensor]:
    """The stack's output for x (B, N, C) from ``fastdsm.mhc``, and the last mixes of streams (B, N, n, n)."""
    streams = x.unsqueeze(-2).expand(*x.shape[:-1], stack.streams, x.shape[-1])
    for layer in stack.layers:
        assert isinstance(layer, fastdsm.nn.HyperConnection)
        h, (post, comb) = fastdsm.mhc.mhc_pre(streams, layer.fn, layer.scale, layer.base, variant="deepseek")
        streams = fastdsm.mhc.mhc_post(layer.branch(h), streams, post, comb)
    return streams.mean(-2), comb


def main(steps: int = 60, context: int = 64) -> dict[str, float]:
    """Train, and compare with the calls."""
    torch.manual_seed(0)
    whole = "\n".join(topics[name] for name in sorted(topics))
    numbers = {character: k for k, character in enumerate(sorted(set(whole)))}
    text = torch.tensor([numbers[character] for character in whole])
    frequencies = text.bincount() / len(text)
    chance = torch.special.entr(frequencies).sum().item()
    model = LanguageModel(len(numbers), context)

    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(steps):
        windows = text[torch.randint(len(text) - context, (16, 1)) + torch.arange(context + 1)]
        loss = nn.functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    first, last = losses[0], sum(losses[-5:]) / 5
    print(f"nats a character: {first:.2f} at first, {last:.2f} after {steps} steps; frequencies alone {chance:.2f}")

    with torch.no_grad():
        x = model.embed(windows[:, :-1]) + model.place
        found, mixes = by_calls(model.stack, x)
        difference = (found - model.stack(x)).abs().max().item()
    off = max((mixes.sum(side) - 1).abs().max().item() for side in (-1, -2))
    print(f"stack and calls differ by {difference:.1e}; rows and columns of the last mixes sum to 1 within {off:.1e}")
    return {"first": first, "last": last, "chance": chance, "difference": difference, "off": off}


if __name__ == "__main__":
    main()
