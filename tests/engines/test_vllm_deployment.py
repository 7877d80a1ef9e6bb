"""vLLM's deployments, from its config: who answers, what is refused, what is warned of."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from weightsync.errors import EngineError
from weightsync_server.engines import vllm_compat
from weightsync_server.engines.vllm_deployment import (
    check_deployment,
    commanded_workers,
    deployment_warnings,
)


def config(*, speculative: str | None = None, **parallel):
    """Like vLLM's ``VllmConfig`` of an API server; by default one worker."""
    lb = {"external": False, "hybrid": False} | parallel.pop("lb", {})
    values = {
        "world_size": 1, "data_parallel_size": 1, "data_parallel_size_local": 1,
        "prefill_context_parallel_size": 1, "nnodes_within_dp": 1, "enable_eplb": False,
        "local_engines_only": lb["external"] or lb["hybrid"],
    }  # fmt: skip
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**values | parallel),
        speculative_config=speculative and SimpleNamespace(method=speculative),
    )


@pytest.mark.parametrize(
    ("parallel", "workers"),
    [
        ({}, 1),
        ({"world_size": 8}, 8),
        ({"world_size": 2, "data_parallel_size": 4, "data_parallel_size_local": 4}, 8),
        # one API server for each node: it commands the engines there
        (
            {
                "world_size": 2, "data_parallel_size": 8, "data_parallel_size_local": 4,
                "lb": {"hybrid": True},
            },
            8,
        ),
        # one for each engine
        ({"world_size": 2, "data_parallel_size": 8, "lb": {"external": True}}, 2),
    ],
    ids=["one", "tp", "dp", "hybrid", "external"],
)  # fmt: skip
def test_a_command_reaches_the_workers_of_the_engines_that_the_api_server_leads(parallel, workers):
    made = config(**parallel)
    check_deployment(made)
    assert commanded_workers(made.parallel_config) == workers


@pytest.mark.parametrize(
    ("parallel", "option"),
    [
        ({"enable_eplb": True}, "--enable-eplb"),
        ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size"),
        ({"nnodes_within_dp": 2}, "--nnodes"),
        ({"data_parallel_size": 4, "data_parallel_size_local": 2}, "--data-parallel-hybrid-lb"),
    ],
    ids=["eplb", "prefill context", "nodes", "data parallel over nodes"],
)
def test_what_no_push_can_be_right_for_is_refused_and_named(parallel, option):
    with pytest.raises(EngineError) as caught:
        check_deployment(config(**parallel))
    assert option in f"{caught.value.message} {caught.value.hint}"
    assert caught.value.hint.startswith("start vLLM ")


@pytest.mark.parametrize("method", ["eagle3", "mtp", "draft_model", "medusa"])
def test_a_drafter_with_weights_is_warned_of(method):
    (warning,) = deployment_warnings(config(speculative=method))
    assert f"drafter ({method}) keeps the weights that it was loaded with" in warning


@pytest.mark.parametrize("method", [None, "ngram", "ngram_gpu", "suffix"])
def test_a_drafter_without_weights_is_not(method):
    assert deployment_warnings(config(speculative=method)) == []


class DataParallelCore:
    """Like vLLM's client of several engine cores."""

    core_engines = (b"0", b"1")

    def __init__(self, *answers: bool) -> None:
        self.answers = dict(zip(self.core_engines, answers, strict=True))

    async def _call_utility_async(self, method, *args, engine):
        assert (method, args) == ("reset_prefix_cache", (True, True))
        return self.answers[engine]


@pytest.mark.asyncio
async def test_every_data_parallel_engine_must_have_reset_its_cache():
    await vllm_compat.reset_caches(SimpleNamespace(engine_core=DataParallelCore(True, True)))
    with pytest.raises(EngineError, match="did not reset its prefix cache"):
        await vllm_compat.reset_caches(SimpleNamespace(engine_core=DataParallelCore(True, False)))
