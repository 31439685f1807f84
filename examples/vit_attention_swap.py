"""A vision transformer whose softmax attention becomes Sinkhorn's, weights kept.

``fastdsm.integrations.convert(model)`` replaces the attention of a model in place; a state_dict and an optimiser fit as
before. In softmax attention each query shares out one unit, and some keys get nearly all of it; in a doubly-stochastic plan
each key receives one unit, too. The model is timm's VisionTransformer, or where timm is missing one of torch's layers, and is
trained on scikit-learn's handwritten digits (8 x 8 pixels, 16 patches).

One sees: without sweeps the converted model is the one before, to rounding; with three it is another function, and some steps
of fine-tuning bring accuracy back.
"""

import copy
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastdsm


class TorchViT(nn.Module):
    """Patches of 2 x 2 pixels, a learnt place each, and torch's own encoder."""

    def __init__(self, width: int = 48, depth: int = 2, heads: int = 3) -> None:
        super().__init__()
        self.embed, self.place = nn.Conv2d(1, width, 2, stride=2), nn.Parameter(0.02 * torch.randn(16, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, 8, 8) to (B, 10)."""
        tokens = self.embed(images).flatten(2).mT + self.place
        logits: Tensor = self.head(self.encoder(tokens).mean(1))
        return logits


def vision_transformer() -> nn.Module:
    """timm's, or torch's where timm or its torchvision is missing."""
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ImportError:
        return TorchViT()
    model: nn.Module = VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=48, depth=2, num_heads=3
    )  # fmt: skip
    return model


def train(model: nn.Module, images: Tensor, digits: Tensor, steps: int, rate: float) -> None:
    """Batches of 64."""
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(images), (64,))
        loss = nn.functional.cross_entropy(model(images[batch]), digits[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, digits: Tensor) -> float:
    """Share of images that are told right."""
    return (model(images).argmax(-1) == digits).float().mean().item()


def main(steps: int = 300, tuning: int = 100) -> dict[str, Any]:
    """Train with softmax, swap, compare, tune."""
    torch.manual_seed(0)
    data = load_digits()
    images, digits = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 6 - 1, torch.tensor(data.target)
    order = torch.randperm(len(images))
    seen, unseen = ((images[part], digits[part]) for part in (order[:1400], order[1400:]))
    model = vision_transformer()
    train(model, *seen, steps, 5e-3)
    before = accuracy(model, *unseen)

    same = copy.deepcopy(model)
    fastdsm.integrations.convert(same, n_iters=0)
    with torch.no_grad():
        difference = (same(unseen[0]) - model(unseen[0])).abs().max().item()
    print(f"{type(model).__name__}; without sweeps the logits differ by {difference:.1e} at most")

    print(report := fastdsm.integrations.convert(model, n_iters=3))
    swapped = accuracy(model, *unseen)
    train(model, *seen, tuning, 3e-3)
    tuned = accuracy(model, *unseen)
    print(f"accuracy: softmax {before:.3f}, swapped {swapped:.3f}, after {tuning} steps of tuning {tuned:.3f}")
    return {"difference": difference, "report": report, "before": before, "swapped": swapped, "tuned": tuned}


if __name__ == "__main__":
    main()
