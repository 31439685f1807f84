"""Docstrings as Markdown: roles, as :func:`fastdsm.sinkhorn`, are links, and a ">" that begins an entry is no quotation."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|mod|data|meth|attr):<code>~?([\w.]+)</code>")
MORE = re.compile(r"(?<=: )>(?==? )")


class Escaped(griffe.Extension):
    """What mkdocstrings loads, by its option ``extensions``."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Before the docstring is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = MORE.sub(r"\\>", obj.docstring.value)


def on_page_content(html: str, **_: Any) -> str:
    """Roles as links where the name has an entry, else as code, before mkdocs-autorefs looks for its elements."""
    return ROLE.sub(r'<autoref optional identifier="\1"><code>\1</code></autoref>', html)
