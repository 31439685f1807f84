"""timm, imported where torchvision is missing or does not load: its transforms and data sets play no part."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any
from unittest import mock

import pytest
import torch

_PARTS = (
    "",
    ".transforms",
    ".transforms.functional",
    ".datasets",
    ".ops",
    ".ops.misc",
    ".models",
    ".models.feature_extraction",
)
_libraries: list[torch.library.Library] = []


def import_timm() -> Any:
    """The package; a test module without it is skipped."""
    pytest.importorskip("PIL", reason="the extra parity")
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm, which make test installs without its dependencies", allow_module_level=True)
    if "timm" in sys.modules:
        return sys.modules["timm"]
    if importlib.util.find_spec("torchvision") is not None:
        _define_operators()
        return importlib.import_module("timm")
    stand_ins = {f"torchvision{part}": mock.MagicMock(__spec__=None) for part in _PARTS}
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module("timm")
    finally:
        for name in stand_ins:
            sys.modules.pop(name, None)


def _define_operators() -> None:
    """What a torchvision made for CUDA asks for at its import, and lacks beside torch's CPU build."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        name = operator.split("(", 1)[0]
        if not hasattr(torch.ops.torchvision, name):
            library.define(operator)
    _libraries.append(library)
