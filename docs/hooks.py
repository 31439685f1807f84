"""Roles of docstrings, as :func:`fastdsm.sinkhorn`, made links of the site where the name has an entry, else code."""

from __future__ import annotations

import re
from typing import Any

ROLE = re.compile(r":(?:func|class|mod|data|meth|attr):<code>~?([\w.]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Before mkdocs-autorefs looks for its elements."""
    return ROLE.sub(r'<autoref optional identifier="\1"><code>\1</code></autoref>', html)
