"""verl: a checkpoint engine named ``weightsync``.

``custom_backend_module: weightsync_client.integrations.verl`` makes verl import this module, and
``backend: weightsync`` picks it.  Weights go from the actors straight into the rollouts' vLLM;
verl's rollout workers carry none of them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from verl.checkpoint_engine import CheckpointEngine, CheckpointEngineRegistry

from weightsync.errors import InputError
from weightsync_client.publisher import Publisher


@CheckpointEngineRegistry.register("weightsync")
class WeightsyncCheckpointEngine(CheckpointEngine):
    """Pushes what verl hands to ``send_weights``; an actor and a rollout worker each have one.

    Args:
        bucket_size: verl's, in bytes; nothing goes in buckets here.
        is_master: verl's.
        agents: ``http://host:port`` of every agent; from ``engine_kwargs.weightsync``.
        publisher_options: Everything else of :class:`weightsync_client.Publisher`.
    """

    # A delta flush that holds nothing is how verl says that a rollout has nothing to load.
    wire_format = "delta_flush"

    def __init__(
        self,
        bucket_size: int,
        is_master: bool = False,
        agents: Sequence[str] = (),
        **publisher_options: Any,
    ) -> None:
        if not agents:
            raise InputError(
                "the weightsync checkpoint engine was given no agents",
                hint="checkpoint_engine.engine_kwargs.weightsync.agents: [http://host:9100, ...]",
            )
        self._agents = list(agents)
        self._options = publisher_options
        self._publisher: Publisher | None = None

    def prepare(self) -> None:
        """Nothing: the publisher keeps its memory and its peers from push to push."""

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Any]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """No arguments for anybody: actors meet the engines through the agents."""
        return {}, {}

    def init_process_group(self, **kwargs: Any) -> None:
        """Nothing: the publisher has connections of its own."""

    def finalize(self) -> None:
        """Nothing; see :meth:`prepare`."""

    @torch.no_grad()
    async def send_weights(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        global_steps: int | None = None,
    ) -> dict[str, float]:
        """Push, on every actor at once; the metrics of the push.

        Each actor keeps a copy of its share of the tensors that verl gathers, by bytes, and sends
        that.  Versions are the fleet's own: verl sends some steps twice.

        Raises:
            WeightSyncError: See :meth:`weightsync_client.Publisher.push`.
        """
        if self._publisher is None:
            self._publisher = Publisher(self._agents, **self._options)
        alone = not dist.is_initialized()
        rank, world_size = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
        report = self._publisher.push(share(weights, rank, world_size))
        return {
            "weightsync/version": float(report.version),
            "weightsync/bytes": float(report.nbytes),
            "weightsync/total_s": report.total_s,
            "weightsync/paused_s": report.paused_s,
        }

    async def receive_weights(
        self, global_steps: int | None = None
    ) -> AsyncGenerator[tuple[list[tuple[str, torch.Tensor]], bool], None]:
        """Nothing, at once: the actors write into the engines, and verl waits for the actors."""
        return
        yield


def share(
    weights: Iterable[tuple[str, torch.Tensor]], rank: int, world_size: int
) -> dict[str, torch.Tensor]:
    """Copies of the tensors that are ``rank``'s to send: each goes to who has the fewest bytes.

    Every rank reads all of ``weights``, which may be a collective, and every rank comes to the
    same shares, since all see the same sizes in the same order.
    """
    mine: dict[str, torch.Tensor] = {}
    nbytes = [0] * world_size
    for name, tensor in weights:
        whose = min(range(world_size), key=nbytes.__getitem__)
        nbytes[whose] += tensor.nbytes
        if whose == rank:
            # verl may gather the next tensor into the same memory
            mine[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    return mine
