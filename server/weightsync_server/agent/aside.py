"""Bulky bodies are worked on in a thread; handing a small one over would take longer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_SMALL_NBYTES = 64 << 10


async def aside(nbytes: int, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What ``call`` returns, which works on so many bytes."""
    if nbytes <= _SMALL_NBYTES:
        return call(*args, **kwargs)
    return await asyncio.to_thread(call, *args, **kwargs)
