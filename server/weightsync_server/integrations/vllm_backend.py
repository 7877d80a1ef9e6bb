"""The workers' half of the vLLM weight-transfer backend ``weightsync``.

vLLM makes one in every worker, and its receiver does what the worker extension's does: the agent's
commands come in through ``init_weight_transfer_engine``, each with a proof that its sender knows
the shared secret.  What a trainer calls of vLLM's API moves no bytes.  It confirms: ``200`` from
``update_weights`` means that each worker holds that version, whole and checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from weightsync.errors import AuthError, InputError, ProtocolMismatchError, VerifyError
from weightsync.protocol import PROTOCOL_VERSION
from weightsync_server.engines.vllm import VllmAdapter
from weightsync_server.receiver.endpoint import WorkerEndpoint
from weightsync_server.secret import load_secret, prove, same_secret


@dataclass
class WeightsyncInitInfo(WeightTransferInitInfo):
    """A trainer's greeting (``protocol_version``), or a command of the agent with its proof."""

    protocol_version: int | None = None
    command: str | None = None
    proof: str = ""


@dataclass
class WeightsyncUpdateInfo(WeightTransferUpdateInfo):
    """The version that the trainer has pushed."""

    version: int


class WeightsyncWorkerEngine(WeightTransferEngine[WeightsyncInitInfo, WeightsyncUpdateInfo]):
    """See the module's docstring.  Made by vLLM, its model loaded."""

    init_info_cls = WeightsyncInitInfo
    update_info_cls = WeightsyncUpdateInfo
    #: a push reaches the target model alone
    supports_draft_weight_update = False

    def __init__(
        self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        # as much of vLLM's worker as the adapter reads
        self._worker = SimpleNamespace(
            vllm_config=vllm_config,
            rank=vllm_config.parallel_config.rank,
            device=device,
            model_runner=SimpleNamespace(get_model=lambda: model),
        )
        # made when an agent comes: until then vLLM starts and serves as without weightsync
        self._endpoint: WorkerEndpoint | None = None

    def init_transfer_engine(self, init_info: WeightsyncInitInfo) -> None:
        """A command is run, and answered to the agent; a greeting is compared.

        Raises:
            AuthError: The command's proof is missing or wrong.
            ProtocolMismatchError: The trainer has another version of weightsync.
            InputError: Neither.
        """
        if init_info.command is not None:
            if not same_secret(init_info.proof, prove(init_info.command, load_secret())):
                raise AuthError(
                    "a command for weightsync's receiver came without its proof",
                    hint="agent and engine must have the same engine secret",
                )
            if self._endpoint is None:
                self._endpoint = WorkerEndpoint(VllmAdapter(self._worker))
            self._endpoint.call(init_info.command)
        elif init_info.protocol_version is None:
            raise InputError(
                "expected a protocol_version or a command", hint="use weightsync's trainer engine"
            )
        elif init_info.protocol_version != PROTOCOL_VERSION:
            raise ProtocolMismatchError(
                f"the trainer speaks protocol {init_info.protocol_version}, this engine "
                f"{PROTOCOL_VERSION}",
                hint="install the same version of weightsync on both sides",
                expected=PROTOCOL_VERSION,
                got=init_info.protocol_version,
            )

    def start_weight_update(self) -> None:
        """Nothing: the push has its own begin, through the agent."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As :meth:`receive_weights`.  There is nothing to wait for, on any device."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: WeightsyncUpdateInfo) -> None:
        """Confirm that this worker holds the version.

        Raises:
            VerifyError: It does not, or not whole.
        """
        if self._endpoint is None:
            raise VerifyError(
                f"no agent has joined this engine, so it has no version {update_info.version}",
                hint="start weightsync-agent --engine-url with this engine's address",
                expected=update_info.version,
            )
        receiver = self._endpoint.receiver
        if receiver.dirty or receiver.version != update_info.version:
            raise VerifyError(
                f"worker {receiver.adapter.place} holds version {receiver.version}"
                f"{', not whole' if receiver.dirty else ''}, not {update_info.version}",
                hint="push again, to every agent of this engine",
                expected=update_info.version,
                got=receiver.version,
            )

    def finish_weight_update(self) -> None:
        """Nothing: the version was real before vLLM heard of it."""

    def shutdown(self) -> None:
        """Release what the last rendezvous registered.  Safe to call twice."""
        if self._endpoint is not None:
            self._endpoint.receiver.close()
