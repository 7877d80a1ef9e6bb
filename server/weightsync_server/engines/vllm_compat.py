"""What differs between vLLM versions: the one place that knows.

Its first part drives whatever looks like vLLM's ``AsyncLLM`` (the *engine client* of its API
server): real vLLM, or an embedded engine with the same methods and ``engine_name``,
``engine_version``, ``model_path`` and ``world_size`` as attributes.

What a finished pause promises (WS-1), read in the sources of the tested versions: with each mode
the call returns after the scheduler has no work and the batch queue is empty, on every
data-parallel engine.  From 0.32 it also waits for the devices.  0.24 does not, so the worker's
``begin`` synchronises its device itself, whatever the version.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from weightsync import TESTED_VLLM
from weightsync.errors import EngineError
from weightsync.protocol import PauseMode
from weightsync_server.engines.vllm_deployment import (
    check_deployment,
    commanded_workers,
    deployment_warnings,
)
from weightsync_server.integrations.vllm_plugin import BACKEND
from weightsync_server.secret import load_secret, prove

TESTED_VERSIONS = TESTED_VLLM

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineIdentity:
    """Who the engine is, and how many workers answer each command."""

    engine: str
    version: str
    model: str
    workers: int
    warnings: tuple[str, ...] = ()


def identify(client: Any) -> EngineIdentity:
    """Name, version, model and worker count of the engine behind ``client``.

    Raises:
        EngineError: It is started in a way that no push can be right for.
    """
    config = getattr(client, "vllm_config", None)
    if config is None:
        return EngineIdentity(
            engine=str(getattr(client, "engine_name", "unknown")),
            version=str(getattr(client, "engine_version", "unknown")),
            model=str(getattr(client, "model_path", "")),
            workers=int(client.world_size),
        )
    import vllm

    version = str(vllm.__version__)
    check_deployment(config)
    warnings = deployment_warnings(config)
    if ".".join(version.split(".")[:2]) not in TESTED_VERSIONS:
        warnings.insert(
            0, f"vLLM {version} is untested with weightsync; tested: {', '.join(TESTED_VERSIONS)}"
        )
    return EngineIdentity(
        engine="vllm",
        version=version,
        model=str(config.model_config.model),
        workers=commanded_workers(config.parallel_config),
        warnings=tuple(warnings),
    )


def server_processes(client: Any) -> int:
    """How many API server processes lead the engine (``--api-server-count``)."""
    parallel = getattr(getattr(client, "vllm_config", None), "parallel_config", None)
    return int(getattr(parallel, "_api_process_count", 1))


async def pause(client: Any, mode: PauseMode) -> None:
    """Stop generation and wait until the engine is drained.  Caches stay: see ``reset_caches``."""
    # an aborted push must cost nothing, so the caches are kept until new weights are there
    core = getattr(client, "engine_core", None)
    # vLLM's client sleeps 20 ms after this same call, so that callers see the last outputs first
    stop = getattr(core, "pause_scheduler_async", None) or client.pause_generation
    await stop(**_accepted(stop, {"mode": mode}, {"clear_cache": False}))


async def resume(client: Any) -> None:
    """Start generation."""
    await client.resume_generation()


async def is_paused(client: Any) -> bool:
    """Whether generation is stopped."""
    return bool(await client.is_paused())


async def reset_caches(client: Any) -> None:
    """Drop all that was computed with the old weights: prefix blocks and encoder outputs.

    Requests that a ``keep`` pause froze are computed anew from their tokens: without that their
    blocks stay in use and the prefix cache cannot be reset.

    Raises:
        EngineError: The engine did not reset its prefix cache.
    """
    options = {"reset_running_requests": True, "reset_connector": True}
    core: Any = getattr(client, "engine_core", None)
    if len(getattr(core, "core_engines", ())) > 1:
        # each data-parallel engine has a cache; 0.24 hands back the first one's answer alone
        reset = core._call_utility_async  # noqa: SLF001 - there is no public way
        resets = [
            reset("reset_prefix_cache", *options.values(), engine=engine)
            for engine in core.core_engines
        ]
    else:
        reset = client.reset_prefix_cache
        resets = [reset(**_accepted(reset, {}, options))]
    if (reset_encoder := getattr(client, "reset_encoder_cache", None)) is not None:
        resets.append(reset_encoder())
    # an engine does them in this order, and nobody waits for the ways between them
    if False in await asyncio.gather(*resets):
        raise EngineError(
            "the engine did not reset its prefix cache",
            hint="is there a KV connector that holds blocks? answers would mix old and new weights",
        )


async def call_workers(client: Any, command: str, timeout_s: float) -> None:
    """Hand one command to every worker and wait until each has returned.

    It goes to the worker extension, or to the weight-transfer backend where vLLM has that instead.
    """
    method = "weightsync_call"
    kwargs: dict[str, Any] = {"command": command}
    transfer = getattr(getattr(client, "vllm_config", None), "weight_transfer_config", None)
    if getattr(transfer, "backend", None) == BACKEND:
        info = {"command": command, "proof": prove(command, load_secret())}
        method, kwargs = "init_weight_transfer_engine", {"init_info": info}
    await client.collective_rpc(method, timeout=timeout_s, kwargs=kwargs)


@contextlib.contextmanager
def buildable_on_meta() -> Iterator[None]:
    """Within this a model can be built on the meta device, and loaded afterwards."""
    import torch
    from vllm.model_executor.layers.fused_moe import expert_map_manager
    from vllm.model_executor.models import utils

    # it remembers by id() which layers a pipeline stage lacks, and ids of twins come again
    utils._model_to_pp_missing_layer_names.clear()  # noqa: SLF001 - it has no public way
    # the map of experts is read while a model is built and loaded: it needs real memory
    determine = expert_map_manager.determine_expert_map

    def determine_on_cpu(*args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"):
            return determine(*args, **kwargs)

    expert_map_manager.determine_expert_map = determine_on_cpu
    try:
        yield
    finally:
        expert_map_manager.determine_expert_map = determine


def is_attention(module: Any) -> bool:
    """Whether a worker's module is post-processed after all others, from their weights.

    vLLM 0.32 has a test for it; 0.24 lists three classes in its loader.
    """
    from vllm.model_executor.layers import attention

    test = getattr(attention, "is_deferred_attention_layer", None)
    if test is not None:
        return bool(test(module))
    kinds = (attention.Attention, attention.MLAAttention, attention.MMEncoderAttention)
    return isinstance(module, kinds) and hasattr(module, "process_weights_after_loading")


def idle_scales(module: Any) -> tuple[str, ...]:
    """Scales of an attention layer's quantised cache, where its cache is not quantised.

    fp8 checkpoints rarely have them, and post-processing drops them unread.
    """
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

    plain = str(getattr(module, "kv_cache_dtype", "")) in ("auto", "bfloat16", "float16")
    if not plain or not isinstance(getattr(module, "quant_method", None), BaseKVCacheMethod):
        return ()
    scales = ("q_scale", "k_scale", "v_scale", "prob_scale")
    return tuple(name for name in scales if name in module._parameters)  # noqa: SLF001


def _accepted(
    method: Callable[..., Any], needed: dict[str, Any], wanted: dict[str, Any]
) -> dict[str, Any]:
    """``needed`` and those of ``wanted`` that ``method`` takes.

    Raises:
        EngineError: It does not take what is needed.
    """
    parameters = inspect.signature(method).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return needed | wanted
    if lacking := sorted(needed.keys() - parameters.keys()):
        raise EngineError(
            f"this engine's {method.__name__} takes no {', '.join(lacking)}",
            hint=f"use a tested vLLM: {', '.join(TESTED_VERSIONS)}",
        )
    return needed | {k: v for k, v in wanted.items() if k in parameters}
