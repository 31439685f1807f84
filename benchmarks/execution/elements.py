"""Element types: PTX's, NumPy's in which registers are kept, and the short names by which translated blocks call them."""

from __future__ import annotations

from typing import Any

import numpy as np

f2, f4, f8 = np.float16, np.float32, np.float64
i1, i2, i4, i8 = np.int8, np.int16, np.int32, np.int64
u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64

TYPES: dict[str, Any] = {
    "f2": f2, "f4": f4, "f8": f8, "i1": i1, "i2": i2, "i4": i4, "i8": i8, "u1": u1, "u2": u2, "u4": u4, "u8": u8,
}  # fmt: skip
SIZE = {**{name: np.dtype(t).itemsize for name, t in TYPES.items()}, "b1": 1}  # bytes; b1: a predicate
INTEGER = {1: "i1", 2: "i2", 4: "i4", 8: "i8"}  # by size
PTX_TYPE = {
    "f16": "f2", "f32": "f4", "f64": "f8", "s8": "i1", "s16": "i2", "s32": "i4", "s64": "i8",
    "u8": "u1", "u16": "u2", "u32": "u4", "u64": "u8", "b8": "u1", "b16": "i2", "b32": "i4", "b64": "i8", "pred": "b1",
}  # fmt: skip
PACKED = ("bf16", "bf16x2", "f16x2", "f32x2")  # what NumPy has no type for
WARP = 32


def bits_of(x: Any) -> Any:
    """As integers, so that NaN equals itself."""
    x = np.ascontiguousarray(x)
    return x.view(INTEGER[x.dtype.itemsize])
