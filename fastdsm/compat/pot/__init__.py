"""POT: ``from fastdsm.compat import pot as ot``, for ``ot.sinkhorn``, ``ot.sinkhorn2``, ``ot.bregman`` and ``ot.batch``.

Source: POT 0.9.7, ``ot/bregman/_sinkhorn.py`` and ``ot/batch``.
"""

from . import batch, bregman
from .bregman import sinkhorn, sinkhorn2

__all__ = ["batch", "bregman", "sinkhorn", "sinkhorn2"]

CONVENTIONS = tuple(
    row._replace(call=prefix + row.call)
    for prefix, module in (("", bregman), ("batch.", batch))
    for row in module.CONVENTIONS
)  # fmt: skip
