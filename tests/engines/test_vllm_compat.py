"""What differs between vLLM 0.24 and 0.32, each with the shapes that either has."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from weightsync.errors import EngineError
from weightsync_server.engines import vllm_compat


class Client024:
    """The engine client of 0.24, as far as a push uses it; one engine core."""

    engine_core: SimpleNamespace | None = None

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, object]]] = []
        self.reset_answer: bool = True

    async def pause_generation(self, *, mode: str = "abort", clear_cache: bool = True) -> None:
        self.calls.append(("pause", {"mode": mode, "clear_cache": clear_cache}))

    async def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        options = {"running": reset_running_requests, "connector": reset_connector}
        self.calls.append(("reset", options))
        return self.reset_answer


class ClientWithEncoder(Client024):
    """As 0.32: it has a cache of encoder outputs, too."""

    async def reset_encoder_cache(self) -> None:
        self.calls.append(("encoder", {}))


class ClientWithoutModes:
    """Older than any tested: a pause that takes no mode."""

    async def pause_generation(self) -> None:
        raise AssertionError("must not be called")


async def test_a_pause_keeps_the_caches_so_that_an_abort_costs_nothing():
    client = Client024()
    await vllm_compat.pause(client, "keep")
    assert client.calls == [("pause", {"mode": "keep", "clear_cache": False})]


async def test_the_engine_core_is_paused_without_the_sleep_that_follows_it_in_the_client():
    client, core = Client024(), Client024()
    client.engine_core = SimpleNamespace(pause_scheduler_async=core.pause_generation)
    await vllm_compat.pause(client, "wait")
    assert (client.calls, core.calls) == ([], [("pause", {"mode": "wait", "clear_cache": False})])


async def test_a_client_whose_pause_takes_no_mode_is_refused_with_the_tested_versions():
    with pytest.raises(EngineError, match="takes no mode") as error:
        await vllm_compat.pause(ClientWithoutModes(), "keep")
    assert all(version in str(error.value.hint) for version in vllm_compat.TESTED_VERSIONS)


async def test_kept_requests_are_computed_anew_and_the_encoder_cache_goes_where_there_is_one():
    old, new = Client024(), ClientWithEncoder()
    for client in (old, new):
        await vllm_compat.reset_caches(client)
    assert old.calls == [("reset", {"running": True, "connector": True})]
    assert new.calls == [*old.calls, ("encoder", {})]


async def test_a_cache_that_was_not_reset_is_an_error():
    client = Client024()
    client.reset_answer = False
    with pytest.raises(EngineError, match="did not reset"):
        await vllm_compat.reset_caches(client)


@pytest.mark.parametrize("answers", [(True, True), (True, False)])
async def test_every_data_parallel_core_is_asked_since_024_tells_of_the_first_alone(answers):
    asked = []

    async def call(method: str, running: bool, connector: bool, *, engine: int) -> bool:
        asked.append((method, running, connector, engine))
        return answers[engine]

    client = Client024()
    client.engine_core = SimpleNamespace(core_engines=[0, 1], _call_utility_async=call)
    if all(answers):
        await vllm_compat.reset_caches(client)
    else:
        with pytest.raises(EngineError, match="did not reset"):
            await vllm_compat.reset_caches(client)
    assert asked == [("reset_prefix_cache", True, True, 0), ("reset_prefix_cache", True, True, 1)]


def attention_module(**names: object) -> ModuleType:
    made = ModuleType("vllm.model_executor.layers.attention")
    for name, value in names.items():
        setattr(made, name, value)
    return made


def with_attention(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    """Make ``from vllm.model_executor.layers import attention`` give that module."""
    layers = ModuleType("vllm.model_executor.layers")
    layers.attention = module  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.model_executor"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers", layers)
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.attention", module)


class Attends:
    def process_weights_after_loading(self) -> None: ...


class Other: ...


def test_032_tells_by_itself_what_is_finished_after_all_other_layers(monkeypatch):
    test = attention_module(is_deferred_attention_layer=lambda m: isinstance(m, Attends))
    with_attention(monkeypatch, test)
    assert vllm_compat.is_attention(Attends())
    assert not vllm_compat.is_attention(Other())


def test_for_024_its_three_classes_are_what_is_finished_last(monkeypatch):
    classes = attention_module(Attention=Attends, MLAAttention=int, MMEncoderAttention=Other)
    with_attention(monkeypatch, classes)
    assert vllm_compat.is_attention(Attends())
    assert not vllm_compat.is_attention(Other())  # one of the three, with nothing to finish


@pytest.mark.parametrize(
    ("cache", "scales"), [("auto", ("k_scale", "v_scale")), ("fp8", ()), ("fp8_e4m3", ())]
)
def test_scales_of_a_cache_that_is_not_quantised_are_idle(monkeypatch, cache, scales):
    class Method: ...

    kv_cache = ModuleType("vllm.model_executor.layers.quantization.kv_cache")
    kv_cache.BaseKVCacheMethod = Method  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, kv_cache.__name__, kv_cache)
    parents = kv_cache.__name__.split(".")[:-1]
    for depth in range(1, len(parents) + 1):
        name = ".".join(parents[:depth])
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    attention = SimpleNamespace(
        kv_cache_dtype=cache, quant_method=Method(), _parameters={"v_scale": 1, "k_scale": 1}
    )
    assert vllm_compat.idle_scales(attention) == scales
    attention.quant_method = None
    assert vllm_compat.idle_scales(attention) == ()


@pytest.mark.parametrize(
    ("version", "warned"), [("0.24.0", False), ("0.32.1", False), ("0.27.3", True)]
)
def test_a_version_that_was_never_tested_gets_a_warning_that_names_the_tested(
    monkeypatch, version, warned
):
    vllm = ModuleType("vllm")
    vllm.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    parallel = SimpleNamespace(
        world_size=1, data_parallel_size=1, data_parallel_size_local=1, local_engines_only=False,
        prefill_context_parallel_size=1, nnodes_within_dp=1, enable_eplb=False,
    )  # fmt: skip
    config = SimpleNamespace(
        parallel_config=parallel, speculative_config=None,
        model_config=SimpleNamespace(model="m"),
    )  # fmt: skip
    identity = vllm_compat.identify(SimpleNamespace(vllm_config=config))
    assert (identity.version, identity.workers) == (version, 1)
    assert [all(v in w for v in vllm_compat.TESTED_VERSIONS) for w in identity.warnings] == (
        [True] if warned else []
    )
