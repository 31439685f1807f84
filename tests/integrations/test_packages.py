"""Packages come with the first use of what needs them, and where one is missing the error says what to install."""

from __future__ import annotations

import sys

import pytest

import fastdsm


@pytest.mark.parametrize(
    ("name", "remedy"), [("transformers", r"pip install 'transformers>=5\.20'"), ("timm", "torchvision.*: pip install timm")]
)
def test_a_package_that_is_missing(name: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, f"fastdsm.integrations.{name}", raising=False)
    monkeypatch.delitem(vars(fastdsm.integrations), name, raising=False)
    for module in [x for x in sys.modules if x.split(".", 1)[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=remedy):
        getattr(fastdsm.integrations, name)
    assert fastdsm.integrations.convert is not None


def test_late() -> None:
    pytest.importorskip("transformers", minversion="5.20", reason="the extra parity")
    assert callable(fastdsm.integrations.transformers.register)
    with pytest.raises(AttributeError, match=r"'fastdsm\.integrations' has no attribute 'jax'"):
        _ = fastdsm.integrations.jax
