"""The processes of a module's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .pool import Pool, pool


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with pool(tmp_path_factory.mktemp("gloo")) as made:
        yield made
