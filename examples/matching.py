"""Matching with dustbins: keypoints of two views, of which some have no partner.

Two views show k points that they share, and points of their own. A row of the plan is a point of one view, a column of the
other, and one dustbin more on each side takes what has no partner (SuperGlue, arXiv 1911.11763). ``fastdsm.compat.superglue``
has its call, by its name; the dustbin's score is a parameter, and learns when to give up.

One sees: with a dustbin whose score is far too low outliers are matched, too, and a third of all pairs is wrong; trained on
other views, by the logarithm of the plan, planted pairs are found and outliers lie in the dustbin.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdsm.compat.superglue import log_optimal_transport


class Views(NamedTuple):
    """Descriptors of length 1, (B, m, d) and (B, n, d), and each first one's partner (B, m), n for none."""

    left: Tensor
    right: Tensor
    partner: Tensor


def views(batch: int, shared: int, left: int, right: int, width: int = 32, noise: float = 0.7) -> Views:
    """The shared points come first on the left, shuffled on the right; all others are random."""
    points, other = torch.randn(batch, left, width), torch.randn(batch, right, width)
    other[:, :shared] = points[:, :shared] + noise * other[:, :shared]
    points, other = (nn.functional.normalize(x, dim=-1) for x in (points, other))
    order = torch.rand(batch, right).argsort(-1)
    partner = torch.full((batch, left), right)
    partner[:, :shared] = order.argsort(-1)[:, :shared]
    return Views(points, other.gather(1, order.unsqueeze(-1).expand_as(other)), partner)


class Matcher(nn.Module):
    """Two numbers to learn: how sharp scores are, and the dustbin's score."""

    def __init__(self) -> None:
        super().__init__()
        self.sharpness, self.dustbin = nn.Parameter(torch.tensor(10.0)), nn.Parameter(torch.tensor(-8.0))

    def forward(self, seen: Views) -> Tensor:
        """The log-plan (B, m + 1, n + 1), dustbins last."""
        scores = self.sharpness * (seen.left @ seen.right.mT)
        return log_optimal_transport(scores, self.dustbin, 50)


def loss_of(log_plan: Tensor, seen: Views) -> Tensor:
    """Negative log-likelihood of where each point lies: at its partner, or in the dustbin of the other side."""
    left = log_plan[:, :-1].gather(-1, seen.partner.unsqueeze(-1))
    is_partner = nn.functional.one_hot(seen.partner, log_plan.shape[-1]).any(1)[:, :-1]
    return -left.mean() - log_plan[:, -1, :-1][~is_partner].mean()


def judge(log_plan: Tensor, seen: Views) -> dict[str, float]:
    """Of the pairs that are made how many are right, how many of the planted are made, and what becomes of outliers."""
    best, dustbin = log_plan[:, :-1].argmax(-1), log_plan.shape[-1] - 1
    made, planted, right = best < dustbin, seen.partner < dustbin, best == seen.partner
    return {
        "precision": (right & made).sum().item() / made.sum().item(),
        "recall": (right & planted).sum().item() / planted.sum().item(),
        "outliers in the dustbin": (right & ~planted).sum().item() / (~planted).sum().item(),
    }


def main(shared: int = 40, left: int = 60, right: int = 70, steps: int = 60) -> dict[str, dict[str, float]]:
    """Judge, learn, judge again."""
    torch.manual_seed(0)
    train, test = views(8, shared, left, right), views(8, shared, left, right)
    matcher = Matcher()

    found = {"before": judge(matcher(test), test)}
    optimizer = torch.optim.Adam(matcher.parameters(), lr=0.3)
    for _ in range(steps):
        loss = loss_of(matcher(train), train)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found["after"] = judge(matcher(test), test)

    for when, numbers in found.items():
        print(f"{when:<6}", "  ".join(f"{name} {value:.3f}" for name, value in numbers.items()))
    masses = matcher(test).exp().sum(-2)[0]
    print(f"the dustbin's score is {matcher.dustbin.item():.2f}; it holds {masses[-1]:.1f}, every other column {masses[0]:.1f}")
    return found


if __name__ == "__main__":
    main()
