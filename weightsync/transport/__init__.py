"""One end of the wire: the interface in ``base``, and what implements it.

The names are loaded when they are first asked for, so that importing this package loads neither
numpy nor NIXL.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightsync.transport.base import (
        LocalMemory,
        PreparedWrite,
        Registration,
        Side,
        Transport,
        WriteOp,
    )
    from weightsync.transport.cuda_ipc import CudaIpcTransport
    from weightsync.transport.inmemory import Fabric, Faults, InMemoryTransport
    from weightsync.transport.nixl import NixlTransport
    from weightsync.transport.ucxx import UcxxTransport

__all__ = [
    "CudaIpcTransport",
    "Fabric",
    "Faults",
    "InMemoryTransport",
    "LocalMemory",
    "NixlTransport",
    "PreparedWrite",
    "Registration",
    "Side",
    "Transport",
    "UcxxTransport",
    "WriteOp",
]

_MODULE_OF = dict.fromkeys(__all__, "base") | {
    "CudaIpcTransport": "cuda_ipc",
    "Fabric": "inmemory",
    "Faults": "inmemory",
    "InMemoryTransport": "inmemory",
    "NixlTransport": "nixl",
    "UcxxTransport": "ucxx",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
