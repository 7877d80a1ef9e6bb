"""vLLM's own weight-transfer API with the backend ``weightsync``, on vLLM's own classes."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.integrations import doc
from tests.support.models import new_model
from tests.support.stack import TOKEN, Stack, environ
from tests.support.torch_host import ROOT
from weightsync.errors import (
    AuthError,
    InputError,
    NonFiniteError,
    ProtocolMismatchError,
    VerifyError,
)
from weightsync.protocol import PROTOCOL_VERSION
from weightsync_server.engines import vllm_compat
from weightsync_server.integrations import vllm_plugin
from weightsync_server.secret import prove

transfer = pytest.importorskip("vllm.distributed.weight_transfer")

SECRET = "a-secret-of-this-test"


class Client:
    """vLLM's control plane, as its trainers see it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []

    def init_weight_transfer_engine(self, init_info: dict[str, object]) -> None:
        self.calls.append(("init", init_info))

    def start_weight_update(self) -> None:
        self.calls.append(("start", None))

    def update_weights(self, update_info: object) -> None:
        self.calls.append(("update", update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.calls.append(("finish", weight_version))


# ------------------------------------------------------------------ the plugin


def entry_point() -> EntryPoint:
    group = "vllm.general_plugins"
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][group]
    return EntryPoint("weightsync", table["weightsync"], group)


def test_the_plugin_enters_both_halves_and_may_run_again():
    register = entry_point().load()
    register()
    register()
    engines = transfer.WeightTransferEngineFactory._registry
    trainers = transfer.WeightTransferTrainerFactory._registry
    assert engines["weightsync"]().__name__ == "WeightsyncWorkerEngine"
    assert trainers["weightsync"]().__name__ == "WeightsyncTrainerEngine"
    assert "nccl" in engines


def test_the_plugin_loads_nothing_that_vllm_has_not_loaded():
    code = (
        "import sys, json\n"
        "from weightsync_server.integrations.vllm_plugin import register\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ(), capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert not loaded & {"torch", "vllm", "pydantic", "msgspec", "nixl", "fastapi"}


@pytest.mark.parametrize("lack", ["module", "factory", "method"])
def test_a_vllm_that_lacks_what_the_plugin_needs_starts_as_ever(lack, monkeypatch):
    name = "vllm.distributed.weight_transfer.factory"
    known = SimpleNamespace(register_engine=None)
    module = {
        "module": None,
        "factory": SimpleNamespace(WeightTransferEngineFactory=known),  # as 0.24
        "method": SimpleNamespace(
            WeightTransferEngineFactory=SimpleNamespace(__name__="A"),
            WeightTransferTrainerFactory=SimpleNamespace(__name__="B"),
        ),
    }[lack]
    monkeypatch.setitem(sys.modules, name, module)
    vllm_plugin.register()


# ------------------------------------------------------------------ the workers' half


class Endpoint:
    """The worker's door, and what went through it."""

    def __init__(self, adapter) -> None:
        self.commands: list[str] = []
        self.closed = 0
        self.receiver = SimpleNamespace(version=0, dirty=False, adapter=adapter, close=self.close)

    def call(self, command: str) -> None:
        self.commands.append(command)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def worker_engine(monkeypatch):
    from weightsync_server.integrations import vllm_backend

    monkeypatch.setattr(vllm_backend, "WorkerEndpoint", Endpoint)
    monkeypatch.setenv("WEIGHTSYNC_ENGINE_SECRET", SECRET)
    parallel = SimpleNamespace(
        rank=1, tensor_parallel_size=2, pipeline_parallel_size=1, data_parallel_index=0,
        data_parallel_rank=0, enable_expert_parallel=False,
    )  # fmt: skip
    config = SimpleNamespace(parallel_config=parallel, model_config=None)
    return vllm_backend.WeightsyncWorkerEngine(
        None, config, torch.device("cpu"), torch.nn.Linear(2, 2)
    )


def command(engine, text: str = "{}") -> Endpoint:
    ask(engine, command=text, proof=prove(text, SECRET))
    return engine._endpoint


def ask(engine, **init_info: object) -> None:
    """As vLLM's worker does."""
    engine.init_transfer_engine(engine.parse_init_info(init_info))


def test_a_command_is_run_only_with_the_proof_of_the_shared_secret(worker_engine):
    for proof in ("", "0" * 64, prove("another", SECRET), prove("{}", "another" * 4)):
        with pytest.raises(AuthError, match="without its proof"):
            ask(worker_engine, command="{}", proof=proof)
    assert worker_engine._endpoint is None
    endpoint = command(worker_engine)
    assert command(worker_engine, "more") is endpoint
    assert endpoint.commands == ["{}", "more"]
    assert str(endpoint.receiver.adapter.place) == "engine0/dp0/pp0/tp1/ep0"
    assert endpoint.receiver.adapter.live is worker_engine.model


async def test_the_agents_commands_go_to_the_backend_where_vllm_has_it(worker_engine):
    async def collective_rpc(method: str, **options: object) -> None:
        assert (method, options["timeout"]) == ("init_weight_transfer_engine", 3.0)
        ask(worker_engine, **options["kwargs"]["init_info"])

    backend = SimpleNamespace(backend="weightsync")
    config = SimpleNamespace(weight_transfer_config=backend)
    client = SimpleNamespace(vllm_config=config, collective_rpc=collective_rpc)
    await vllm_compat.call_workers(client, "the command", 3.0)
    assert worker_engine._endpoint.commands == ["the command"]


def test_a_trainer_of_another_protocol_or_backend_is_refused(worker_engine):
    ask(worker_engine, protocol_version=PROTOCOL_VERSION)
    with pytest.raises(ProtocolMismatchError):
        ask(worker_engine, protocol_version=PROTOCOL_VERSION + 1)
    with pytest.raises(InputError):
        ask(worker_engine)
    with pytest.raises(ValueError, match="packed"):
        ask(worker_engine, packed=True)


def test_an_update_is_confirmed_only_where_that_version_is_whole(worker_engine):
    with pytest.raises(VerifyError, match="no agent"):
        worker_engine.update_weights({"version": 7})
    worker_engine.shutdown()
    endpoint = command(worker_engine)
    receiver = endpoint.receiver
    receiver.version = 7
    assert not worker_engine.supports_draft_weight_update
    worker_engine.start_weight_update()
    worker_engine.update_weights({"version": 7})
    worker_engine.finish_weight_update()
    for wrong in (6, 8):
        with pytest.raises(VerifyError, match=f"holds version 7, not {wrong}"):
            worker_engine.update_weights({"version": wrong})
    receiver.dirty = True
    with pytest.raises(VerifyError, match="not whole"):
        worker_engine.update_weights({"version": 7})
    worker_engine.shutdown()
    assert endpoint.closed == 1


# ------------------------------------------------------------------ the trainer's half


@pytest.fixture
def trainer(stack: Stack):
    from weightsync_client.integrations.vllm import WeightsyncTrainerInitInfo

    made = []

    def make(source: object, client: object):
        options = {"token": TOKEN, "progress": "off", "deadlines": stack.deadlines}
        info = WeightsyncTrainerInitInfo(rank=0, agents=[stack.agent.url], options=options)
        engine = transfer.WeightTransferTrainerFactory.trainer_init(
            info, client=client, source=source
        )
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.shutdown()


@pytest.mark.nixl
def test_a_trainer_of_vllms_api_pushes_and_then_has_vllm_confirm(stack, trainer):
    client = Client()
    model = new_model("qwen3", seed=11)
    engine = trainer(transfer.ModuleSource(model), client)
    assert client.calls == [("init", {"protocol_version": PROTOCOL_VERSION})]
    engine.send_weights()
    version = engine.report.version
    told = [("start", None), ("update", {"version": version}), ("finish", str(version))]
    assert client.calls[1:] == told
    stack.assert_holds(model.state_dict(), version)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        engine.send_weights()
    assert client.calls[1:] == told  # nothing of a push that failed


@pytest.mark.nixl
def test_any_source_of_vllms_is_taken_and_no_client_is_needed(stack, trainer):
    weights = load_file(stack.checkpoint / "model.safetensors")

    class Source(transfer.WeightSource):
        def metadata(self):
            return [transfer.ParamMeta(n, t.dtype, tuple(t.shape)) for n, t in weights.items()]

        def __iter__(self):
            yield from weights.items()
            yield "of.another.rank", None

    engine = trainer(Source(), None)
    engine.send_weights()
    stack.assert_holds(weights, engine.report.version)


def test_a_trainer_without_a_source_is_refused():
    from weightsync_client.integrations.vllm import WeightsyncTrainerInitInfo

    info = WeightsyncTrainerInitInfo(rank=0, agents=["http://127.0.0.1:1"])
    with pytest.raises(InputError, match="no source"):
        transfer.WeightTransferTrainerFactory.trainer_init(info, client=None)


@pytest.mark.nixl
def test_the_pages_example_of_vllms_api_runs(stack, monkeypatch):
    import vllm.distributed.weight_transfer as package

    client = Client()
    monkeypatch.setattr(package, "HTTPVLLMWeightSyncClient", lambda url: client)
    model = new_model("qwen3", seed=12)
    code = doc.block("vLLM's own weight-transfer API", "python")
    trainer = doc.run(code, monkeypatch, agent=stack.agent.url, model=model)["trainer"]
    trainer.shutdown()
    stack.assert_holds(model.state_dict(), trainer.report.version)
    assert client.calls[-1] == ("finish", str(trainer.report.version))
