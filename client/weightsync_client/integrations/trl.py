"""TRL and transformers: push after the optimiser's step, or where TRL would update its server.

:class:`WeightsyncCallback` fits every trainer that is a ``transformers.Trainer``.
:func:`server_weights` takes the place of TRL's own update of a vLLM server: generation stays TRL's,
and neither NCCL nor vLLM's development mode is needed for the weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from transformers import TrainerCallback

from weightsync.errors import InputError
from weightsync_client.publisher import Publisher
from weightsync_client.report import PushReport
from weightsync_client.source import Weights


class WeightsyncCallback(TrainerCallback):
    """Pushes the model after every ``every_steps``-th optimiser step, and once before the first.

    In a distributed job every rank has one, with a publisher of the same arguments.  A push that
    fails ends the training with its error; the engines then serve what they had, or nothing.

    Args:
        publisher: Left open: who made it closes it.
        every_steps: Optimiser steps from push to push.
        before_training: Push the weights that training starts from.

    Attributes:
        reports: Of every push, the newest last.
    """

    def __init__(
        self, publisher: Publisher, *, every_steps: int = 1, before_training: bool = True
    ) -> None:
        if every_steps < 1:
            raise InputError(f"every_steps is {every_steps}", hint="1 or more")
        self.reports: list[PushReport] = []
        self._publisher = publisher
        self._every_steps = every_steps
        self._before_training = before_training

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Called by the trainer."""
        if self._before_training:
            self._push(model)

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Called by the trainer, right after the optimiser."""
        if state.global_step % self._every_steps == 0:
            self._push(model)

    def _push(self, model: nn.Module | None) -> None:
        if model is None:
            raise InputError("the trainer has no model", hint="construct it with one")
        self.reports.append(self._publisher.push(model))


@contextlib.contextmanager
def server_weights(publisher: Publisher) -> Iterator[None]:
    """Within this, TRL's trainers with ``vllm_mode="server"`` push through ``publisher``.

    The trainer is constructed and run in it.  Plain, DDP and FSDP2 models go as they are, each
    rank its shards; of a PEFT model the merged weights are copied first, on every rank.  The prefix
    cache is dropped by the commit.

    Args:
        publisher: Of agents beside the servers that TRL generates with.

    Raises:
        InputError: In the first update: FSDP1 or ZeRO-3, whose parameters exist only while TRL
            gathers them.
    """
    from trl.generation import vllm_generation
    from trl.generation.vllm_client import VLLMClient

    generation: Any = vllm_generation.VLLMGeneration

    def open_nothing(self: Any, device: Any = 0) -> None:
        """The publisher connects at its first push."""

    def sync_weights(self: Any) -> None:
        if self.mode != "server":
            sync_before(self)
            return
        publisher.push(_weights_of(self))

    sync_before, init_before = generation.sync_weights, VLLMClient.init_communicator
    generation.sync_weights, VLLMClient.init_communicator = sync_weights, open_nothing
    try:
        yield
    finally:
        generation.sync_weights, VLLMClient.init_communicator = sync_before, init_before


def _weights_of(generation: Any) -> Weights:
    backend = generation._dist  # noqa: SLF001 - TRL tells nobody else how the model is sharded
    if backend.is_zero3 or backend.fsdp_version == 1:
        raise InputError(
            f"weights under {'ZeRO-3' if backend.is_zero3 else 'FSDP1'} cannot be pushed: they "
            "are whole only while they are gathered",
            hint="train with FSDP2 (fsdp_version: 2), DDP or ZeRO-2",
        )
    model = cast("nn.Module", generation.model)
    if not hasattr(model, "merge_adapter"):
        return model
    # TRL merges the adapter for the length of this loop only
    merged = generation._iter_named_params()  # noqa: SLF001 - it knows PEFT's names
    with torch.no_grad():
        return {name: tensor.clone() for name, tensor in merged}
