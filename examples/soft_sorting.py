"""Soft sorting: ranks with a gradient, from a plan between numbers and places.

Numbers x_i and places y_1 < ... < y_n on a line: the plan that carries one onto the other at the least squared distance puts
the smallest number at the first place and so on. With entropy (Cuturi, Teboul and Vert, arXiv 1905.11885) it is a Sinkhorn
projection, and what it says of ranks has a gradient.

One sees: as the temperature falls, the soft ranks become those of argsort; and a linear scorer learns an order from ranks
alone, without ever seeing a score, until the hard ranks of items that it has not seen are right.
"""

import torch
from torch import Tensor

import fastdsm


def soft_ranks(scores: Tensor, temperature: float) -> Tensor:
    """(..., n): between 0 for the smallest and n - 1, differentiable."""
    n = scores.shape[-1]
    x = (scores - scores.mean(-1, keepdim=True)) / scores.std(-1, keepdim=True)
    places = torch.linspace(-1.7, 1.7, n).to(x)  # numbers of mean 0 and variance 1, spread evenly
    distances = (x.unsqueeze(-1) - places).square()
    plan = fastdsm.sinkhorn(-distances, temperature=temperature, solver="newton", n_iters=60)  # converged, implicit gradient
    return plan @ torch.arange(n).to(x)


def hard_ranks(scores: Tensor) -> Tensor:
    """(..., n): places in ascending order."""
    return scores.argsort(-1).argsort(-1)


def main(items: int = 48, features: int = 8, steps: int = 60) -> dict[str, float]:
    """Compare with argsort, then learn an order."""
    torch.manual_seed(0)

    # Lower temperatures come nearer to the ranks of argsort.
    numbers = torch.randn(items, dtype=torch.float64)
    errors = []
    for temperature in (1.0, 0.1, 0.01, 0.001, 0.0001):
        error = (soft_ranks(numbers, temperature) - hard_ranks(numbers)).abs().mean()
        errors.append(error.item())
        print(f"temperature {temperature:<6}  mean error of a rank {error:.4f}")

    # Items are described by features; their order is that of a hidden linear score. Known are the ranks, eight lists of them.
    hidden = torch.randn(features)
    lists, unseen = torch.randn(8, items, features), torch.randn(items, features)
    ranks, unseen_ranks = hard_ranks(lists @ hidden), hard_ranks(unseen @ hidden)
    scorer = torch.zeros(features, requires_grad=True)
    with torch.no_grad():
        scorer += torch.randn(features)
    before = (hard_ranks(unseen @ scorer) - unseen_ranks).abs().float().mean().item()

    # The gradient goes through the ranks.
    optimizer = torch.optim.Adam([scorer], lr=0.1)
    for _ in range(steps):
        loss = ((soft_ranks(lists @ scorer, 0.05) - ranks) / items).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = (hard_ranks(unseen @ scorer) - unseen_ranks).abs().float().mean().item()
    alike = torch.cosine_similarity(scorer.detach(), hidden, dim=0).item()
    print(f"unseen items are {before:.2f} places off before, {after:.2f} after; cosine to the hidden score {alike:.4f}")

    return {"coldest": errors[-1], "warmest": errors[0], "before": before, "after": after, "cosine": alike}


if __name__ == "__main__":
    main()
