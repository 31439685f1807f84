"""Instructions that approximate (``.approx``): exact results rounded, or moved by a share of their documented error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .arithmetic import flush
from .elements import f4, f8, i8, u4

Noise = Callable[[Any], Any]
"""From numbers that look uniform in [-1, 1] to shares of the documented error: ``np.positive``, or at the worst ``np.sign``."""


class Approximations:
    """rcp, rsqrt, sqrt, ex2, lg2 and division of float32, arguments and results flushed."""

    def __init__(self, noise: Noise | None) -> None:
        self.noise = noise

    def _off(self, y: Any, *arguments: Any) -> Any:
        """What share of its documented error an approximation of these arguments is off by: always the same for the same.

        0 where the true result ``y`` is a power of two or 0: 2^0 is 1 by the PTX manual, and tables are exact at their ends.
        """
        assert self.noise is not None
        bits: Any = u4(0x9E3779B9)
        for x in arguments:
            bits = (np.asarray(x, f4).view(u4) ^ bits) * u4(0x85EBCA6B)
            bits = (bits ^ (bits >> u4(13))) * u4(0xC2B2AE35)
        share = self.noise((bits >> u4(8)).astype(f8) / 2.0**23 - 1.0)
        return np.where((np.abs(np.frexp(y)[0]) == 0.5) | (y == 0), 0.0, share)

    def _moved(self, y: Any, relative: float, *arguments: Any) -> Any:
        if self.noise is not None:
            y = y * (1.0 + relative * self._off(y, *arguments))
        return flush(np.asarray(y).astype(f4))

    def rcp(self, x: Any) -> Any:
        """1 / x."""
        return self._moved(1.0 / _wide(x), 2.0**-23, x)

    def rsqrt(self, x: Any) -> Any:
        """1 / sqrt(x)."""
        return self._moved(1.0 / np.sqrt(_wide(x)), 2.0**-22.9, x)

    def sqrt(self, x: Any) -> Any:
        """sqrt(x)."""
        return self._moved(np.sqrt(_wide(x)), 2.0**-23, x)

    def ex2(self, x: Any) -> Any:
        """2^x."""
        return self._moved(np.exp2(_wide(x)), 2.0**-22, x)

    def lg2(self, x: Any) -> Any:
        """log2(x), whose error is absolute near 1."""
        x = flush(x)
        y = np.log2(np.asarray(x).astype(f8))
        if self.noise is not None:
            error = np.where((x > 0.5) & (x < 2.0), 2.0**-22, np.abs(y) * 2.0**-22)
            y = np.where(np.isfinite(y), y + error * self._off(y, x), y)
        return np.asarray(y).astype(f4)

    def div(self, x: Any, y: Any) -> Any:
        """x / y."""
        return self._moved(np.asarray(x).astype(f8) / np.asarray(y).astype(f8), 2.0**-22, x, y)

    @staticmethod
    def upper_half(y: Any) -> Any:
        """What rcp and rsqrt ``.approx.ftz.f64`` keep: the upper 32 bits, so 20 of the mantissa."""
        y = np.asarray(y)
        return np.where(np.abs(y) < f8(2.2250738585072014e-308), y * f8(0), (y.view(i8) & i8(-0x100000000)).view(f8))


def _wide(x: Any) -> Any:
    return np.asarray(flush(x)).astype(f8)
