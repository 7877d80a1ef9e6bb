"""The trainer's half of the vLLM weight-transfer backend ``weightsync``.

A trainer that is written for vLLM's own API hands :class:`WeightsyncTrainerInitInfo` to
``WeightTransferTrainerFactory.trainer_init`` where it handed another backend's.  Importing this
module registers the backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from vllm.distributed.weight_transfer.base import (
    ModuleSource,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightSource,
)
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from weightsync.errors import InputError
from weightsync.protocol import PROTOCOL_VERSION
from weightsync_client.publisher import Publisher
from weightsync_client.report import PushReport
from weightsync_client.source import Weights


@dataclass
class WeightsyncTrainerInitInfo(TrainerInitInfo):
    """What ``trainer_init`` takes, on every rank.

    Attributes:
        agents: ``http://host:port`` of each agent.
        options: Everything else of :class:`weightsync_client.Publisher`.
    """

    backend: ClassVar[str] = "weightsync"
    agents: list[str]
    options: Mapping[str, Any] = field(default_factory=dict)


class WeightsyncTrainerEngine(TrainerWeightTransferEngine[WeightsyncTrainerInitInfo]):
    """Pushes through the agents, then has vLLM confirm the version.

    The agents pause and resume the engines, late and only for the writes: a trainer need not, and
    an engine that it paused through vLLM's own call runs again when ``send_weights`` returns.

    Attributes:
        report: Of the last push.
    """

    init_info_cls = WeightsyncTrainerInitInfo
    report: PushReport | None = None

    def __init__(
        self, *, client: Any, source: Any, is_sender: bool = True, publisher: Publisher
    ) -> None:
        super().__init__(client=client, source=source, is_sender=is_sender)
        self._publisher = publisher

    @classmethod
    def trainer_init(
        cls, init_info: WeightsyncTrainerInitInfo, *, client: Any, source: Any = None
    ) -> WeightsyncTrainerEngine:
        """Ready to send; the rendezvous is made by the first push.

        Args:
            init_info: Of this rank.
            client: vLLM's; None: the version is not told to vLLM, whose routes for that exist in
                its development mode alone.
            source: vLLM's, or anything that :meth:`weightsync_client.Publisher.push` takes.  Of
                vLLM's ``ModuleSource`` the shards go as they are; any other source of vLLM's is
                read to its end first, in each rank's memory.

        Raises:
            InputError: No source.
        """
        if source is None:
            raise InputError(
                "the weightsync backend was given no source of weights",
                hint="trainer_init(..., source=ModuleSource(model))",
            )
        if init_info.is_sender and client is not None:
            client.init_weight_transfer_engine({"protocol_version": PROTOCOL_VERSION})
        return cls(
            client=client,
            source=source,
            is_sender=init_info.is_sender,
            publisher=Publisher(init_info.agents, **init_info.options),
        )

    def send_weights(self) -> None:
        """Push; when this returns every worker of every engine serves the new version.

        Raises:
            WeightSyncError: See :meth:`weightsync_client.Publisher.push`; vLLM was told nothing.
        """
        self.report = self._publisher.push(_weights(self.source))
        if self.is_sender and self.client is not None:
            version = self.report.version
            self.client.start_weight_update()
            self.client.update_weights({"version": version})
            self.client.finish_weight_update(str(version))

    def shutdown(self) -> None:
        """Close the publisher; the engines keep what they have."""
        self._publisher.close()


def _weights(source: Any) -> Weights:
    if type(source) is ModuleSource:  # a subclass may have its own idea of what it yields
        module: Weights = source._module  # noqa: SLF001 - vLLM shows it to nobody
        return module
    if isinstance(source, WeightSource):
        # None stands for what another rank holds
        return {name: tensor for name, tensor in source if tensor is not None}
    weights: Weights = source
    return weights


if WeightsyncTrainerInitInfo.backend not in WeightTransferTrainerFactory._registry:  # noqa: SLF001
    WeightTransferTrainerFactory.register_engine(
        WeightsyncTrainerInitInfo.backend, WeightsyncTrainerEngine
    )
