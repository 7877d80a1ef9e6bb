"""Names and sizes of the element types, without torch.

Names are torch's, without the ``torch.`` in front.
"""

from __future__ import annotations

from weightsync.errors import ManifestError

ITEMSIZE: dict[str, int] = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
}


def itemsize(dtype: str) -> int:
    """Bytes of one element of ``dtype``.

    Raises:
        ManifestError: The name is none that weightsync moves.
    """
    try:
        return ITEMSIZE[dtype]
    except KeyError:
        raise ManifestError(
            f"unknown dtype {dtype!r}", hint=f"use one of {', '.join(ITEMSIZE)}", dtype=dtype
        ) from None
