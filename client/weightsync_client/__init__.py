"""The trainer's side of weightsync: ``Publisher(agents).push(model)``."""

from weightsync_client.held import LocalShard
from weightsync_client.publisher import Publisher
from weightsync_client.report import AgentOutcome, PushReport
from weightsync_client.settings import Deadlines
from weightsync_client.source import ModuleSource, StateDictSource, WeightSource

__all__ = [
    "AgentOutcome",
    "Deadlines",
    "LocalShard",
    "ModuleSource",
    "Publisher",
    "PushReport",
    "StateDictSource",
    "WeightSource",
]
