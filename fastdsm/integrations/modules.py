"""Which modules of a model are attention, as far as their code tells."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from types import CodeType

from torch import nn

_ATTENTION = re.compile("attention|attn", re.IGNORECASE)


def mentions(kind: type[nn.Module], name: str) -> bool:
    """Whether a class's ``forward`` names ``name``, as a global or an attribute."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return isinstance(code, CodeType) and name in code.co_names


def attends(module: nn.Module) -> bool:
    """Whether a module's own forward computes attention, by torch's function or transformers' registry."""
    return any(mentions(type(module), name) for name in ("scaled_dot_product_attention", "ALL_ATTENTION_FUNCTIONS"))


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What computes attention, and what is named after it and holds nothing of that kind, with paths; each module once."""

    def suspected(module: nn.Module) -> bool:
        return attends(module) or any(_ATTENTION.search(kind.__name__) for kind in type(module).__mro__)

    for path, module in model.named_modules():
        inner = (x for x in module.modules() if x is not module)
        if attends(module) or (suspected(module) and not any(map(suspected, inner))):
            yield path, module
