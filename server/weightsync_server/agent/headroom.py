"""Whether the engines have room for shadows of all their weights."""

from __future__ import annotations

from collections.abc import Sequence

from weightsync.errors import HeadroomError
from weightsync_server.agent.status import HeadroomStatus, WorkerStatus


def check_headroom(workers: Sequence[WorkerStatus]) -> None:
    """Check that every worker's shadow fits, and those in the host's memory all together.

    What nobody knows is not refused: the rendezvous looks again.

    Raises:
        HeadroomError: One does not.
    """
    host: list[tuple[str, HeadroomStatus]] = []
    for worker in workers:
        for memory in worker.shadow_headroom:
            if memory.kind == "DRAM":
                host.append((worker.place, memory))
            else:
                _check(worker.place, "of its GPU's memory", [memory])
    if host:
        who = host[0][0] if len(host) == 1 else f"the {len(host)} workers"
        _check(who, "of the host's memory", [memory for _, memory in host])


def _check(who: str, what: str, of: Sequence[HeadroomStatus]) -> None:
    known = [memory.free_nbytes for memory in of if memory.free_nbytes is not None]
    needed = sum(max(memory.needed_nbytes - memory.held_nbytes, 0) for memory in of)
    if known and needed > min(known):
        raise HeadroomError(
            f"{who}: a shadow of all weights needs {needed} bytes {what}, and {min(known)} are "
            "free, but --require-shadow is set",
            hint="start the engine with a smaller share for weights and KV cache (vLLM: "
            "--gpu-memory-utilization); or the agent with --shadow-device cpu, or without "
            "--require-shadow: then with --max-shadow-nbytes for a shadow of a part",
            needed_nbytes=needed,
            free_nbytes=min(known),
        )
