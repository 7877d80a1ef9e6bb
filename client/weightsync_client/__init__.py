"""The trainer's side of weightsync: ``Publisher(agents).push(model)``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightsync_client.conversion import ConversionSpec, Rule
    from weightsync_client.conversions import register_conversion
    from weightsync_client.held import LocalShard
    from weightsync_client.operations import Concat, Rearrange, Split, Stack, Unstack
    from weightsync_client.policy import Quorum
    from weightsync_client.publisher import Publisher
    from weightsync_client.quantization import QuantizationSpec
    from weightsync_client.report import AgentOutcome, PushReport, WarmupReport
    from weightsync_client.settings import Deadlines
    from weightsync_client.source import ModuleSource, StateDictSource, WeightSource

__all__ = [
    "AgentOutcome",
    "Concat",
    "ConversionSpec",
    "Deadlines",
    "LocalShard",
    "ModuleSource",
    "Publisher",
    "PushReport",
    "QuantizationSpec",
    "Quorum",
    "Rearrange",
    "Rule",
    "Split",
    "Stack",
    "StateDictSource",
    "Unstack",
    "WarmupReport",
    "WeightSource",
    "register_conversion",
]

#: torch takes seconds to import, and ``weightsync plan`` needs none of it
_HOMES = {
    "AgentOutcome": "report",
    "Concat": "operations",
    "ConversionSpec": "conversion",
    "Deadlines": "settings",
    "LocalShard": "held",
    "ModuleSource": "source",
    "Publisher": "publisher",
    "PushReport": "report",
    "QuantizationSpec": "quantization",
    "Quorum": "policy",
    "Rearrange": "operations",
    "Rule": "conversion",
    "Split": "operations",
    "Stack": "operations",
    "StateDictSource": "source",
    "Unstack": "operations",
    "WarmupReport": "report",
    "WeightSource": "source",
    "register_conversion": "conversions",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
