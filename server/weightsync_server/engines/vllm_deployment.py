"""How a vLLM was started, read from its config: who answers a command, and what cannot be right.

Read in the sources of 0.24 and 0.32.  An API server process commands the engine cores of its
load-balancing mode: all of them (internal), those of its node (hybrid), or one (external); with
several API server processes each commands the same ones.  Every core gets a pause, a resume and a
``collective_rpc``.  The cores of a dense model do not know of each other: their config says that
there is one, and only ``data_parallel_index`` tells them apart.
"""

from __future__ import annotations

from typing import Any

from weightsync.errors import EngineError

#: proposers without weights of their own
_NO_WEIGHTS = ("ngram", "suffix")


def commanded_workers(parallel: Any) -> int:
    """Workers that one ``collective_rpc`` of an API server with this parallel config reaches."""
    if parallel.local_engines_only:
        cores = parallel.data_parallel_size_local
    else:
        cores = parallel.data_parallel_size
    return int(parallel.world_size) * int(cores)


def check_deployment(config: Any) -> None:
    """Refuse what a push cannot be made right for.

    Args:
        config: The API server's ``VllmConfig``.

    Raises:
        EngineError: Names the option, and says what to do.
    """
    parallel = config.parallel_config
    if parallel.enable_eplb:
        raise EngineError(
            "this vLLM moves and doubles experts while it serves (--enable-eplb): where an expert "
            "is may change between the plan of a push and its writes",
            hint="start vLLM without --enable-eplb, and without redundant experts",
        )
    if parallel.prefill_context_parallel_size > 1:
        raise EngineError(
            "this vLLM splits prefill over "
            f"{parallel.prefill_context_parallel_size} workers that hold the same weights "
            "(--prefill-context-parallel-size), which weightsync cannot tell apart",
            hint="start vLLM without --prefill-context-parallel-size",
        )
    if parallel.nnodes_within_dp > 1:
        raise EngineError(
            f"the workers of this vLLM are on {parallel.nnodes_within_dp} nodes (--nnodes): they "
            "answer the agent over loopback",
            hint="start vLLM so that each engine fits on a node; tensor and pipeline parallel "
            "within it",
        )
    if (
        not parallel.local_engines_only
        and parallel.data_parallel_size_local < parallel.data_parallel_size
    ):
        raise EngineError(
            f"{parallel.data_parallel_size - parallel.data_parallel_size_local} of "
            f"{parallel.data_parallel_size} data-parallel engines of this vLLM are on other nodes "
            "(--data-parallel-size-local): their workers answer the agent over loopback",
            hint="start vLLM with --data-parallel-hybrid-lb, and an agent on every node",
        )


def deployment_warnings(config: Any) -> list[str]:
    """What a person must know of a deployment that can be pushed to."""
    speculative = config.speculative_config
    method = "" if speculative is None else str(speculative.method)
    if speculative is None or method.startswith(_NO_WEIGHTS):
        return []
    warning = (
        f"the speculative drafter ({method}) keeps the weights that it was loaded with: a push "
        "updates the target model alone.  Answers stay right, but the further the pushed weights "
        "move, the fewer drafts are accepted; restart the engine with a new drafter, or without"
    )
    return [warning]
