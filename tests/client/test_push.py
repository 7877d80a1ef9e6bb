from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import Agent, Region, plain_regions
from torch import nn

from weightsync.errors import (
    EnginePausedError,
    InputError,
    ManifestError,
    NonFiniteError,
    PushInProgressError,
    StaleVersionError,
)
from weightsync.manifest import Manifest
from weightsync.transport import InMemoryTransport
from weightsync_client import ModuleSource, Publisher

Make = Callable[..., Publisher]


def arrived(agent: Agent, tensors: dict[str, torch.Tensor], worker: int = 0) -> bool:
    return all(
        torch.equal(agent.workers[worker].tensor(n, t.dtype, tuple(t.shape)), t)
        for n, t in tensors.items()
        if t.numel()
    )


def test_every_byte_of_a_module_lands_and_the_engine_generates_again(
    agent: Agent, make_publisher: Make, model: nn.Module
) -> None:
    report = make_publisher(agent).push(model)
    assert arrived(agent, model.state_dict())
    assert agent.generating
    assert agent.state.phase == "ready"
    assert agent.state.version == report.version == 1
    assert report.nbytes == sum(t.nbytes for t in model.state_dict().values())


def test_a_rank_tells_engines_of_none_of_its_memory(
    agent: Agent, make_publisher: Make, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[bytes] = []
    add_peer = InMemoryTransport.add_peer

    def listening(self: InMemoryTransport, metadata: bytes) -> str:
        if self is agent.workers[0].transport:
            heard.append(metadata)
        return add_peer(self, metadata)

    monkeypatch.setattr(InMemoryTransport, "add_peer", listening)
    publisher = make_publisher(agent)
    publisher.push(model)
    transport = publisher._held.session._transport
    assert heard == [transport.metadata(())]
    assert heard != [transport.metadata()]


def test_calls_of_a_push_come_in_the_order_of_the_protocol(
    agent: Agent, make_publisher: Make, model: nn.Module
) -> None:
    make_publisher(agent).push(model)
    assert agent.calls == [
        "/status", "/init_transfer", "/connect", "/pause", "/begin_update", "/commit_update",
        "/resume",
    ]  # fmt: skip


@pytest.mark.parametrize("reset_caches", [True, False])
def test_engines_drop_what_they_computed_unless_they_are_told_not_to(
    reset_caches: bool, agent: Agent, make_publisher: Make, model: nn.Module
) -> None:
    make_publisher(agent, reset_caches=reset_caches).push(model)
    assert set(agent.resets) == {reset_caches}


def test_second_push_uses_the_first_ones_handles_and_connection(
    agent: Agent, make_publisher: Make, model: nn.Module
) -> None:
    publisher = make_publisher(agent)
    publisher.push(model)
    del agent.calls[:]
    with torch.no_grad():
        model[0].weight.add_(1)
    report = publisher.push(model)
    assert agent.calls == ["/status", "/pause", "/begin_update", "/commit_update", "/resume"]
    assert report.rendezvous_s == 0
    assert report.version == 2
    assert arrived(agent, model.state_dict())
    assert len(agent.connections) == 1


def test_parameters_replaced_between_pushes_are_read_anew(
    agent: Agent, make_publisher: Make, model: nn.Module
) -> None:
    publisher = make_publisher(agent)
    publisher.push(model)
    model[0].weight = nn.Parameter(torch.randn(32, 16, dtype=torch.bfloat16))
    model[1].bias.data = torch.randn(32, dtype=torch.bfloat16)
    publisher.push(model)
    assert arrived(agent, model.state_dict())
    assert agent.calls.count("/init_transfer") == 1


def test_fp32_weights_land_in_a_bf16_engine_as_torch_rounds_them(
    make_agent: Callable[..., Agent], make_publisher: Make
) -> None:
    agent = make_agent(regions=lambda m: [Region(t.name, "bfloat16", [t.name]) for t in m])
    model = nn.Linear(33, 7)
    make_publisher(agent).push(model)
    assert arrived(agent, {n: t.to(torch.bfloat16) for n, t in model.state_dict().items()})


def test_fp32_masters_of_a_bf16_checkpoint_are_rounded_before_an_fp32_region(
    make_agent: Callable[..., Agent], make_publisher: Make
) -> None:
    """WS-12: what the engine gets is the checkpoint's value, whatever it stores it in."""
    agent = make_agent(regions=lambda m: [Region(t.name, "float32", [t.name]) for t in m])
    model = nn.Linear(33, 7)
    make_publisher(agent).push(ModuleSource(model, dtype=torch.bfloat16))
    rounded = {n: t.to(torch.bfloat16).float() for n, t in model.state_dict().items()}
    assert arrived(agent, rounded)
    assert not torch.equal(rounded["weight"], model.weight)


def test_non_contiguous_sliced_and_expanded_tensors_land_by_value(
    agent: Agent, make_publisher: Make
) -> None:
    base = torch.randn(12, 10)
    tensors = {
        "transposed": base.t(),
        "columns": base[:, 2:5],
        "every_third": base[::3],
        "expanded": torch.randn(1, 6).expand(4, 6),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "ints": torch.arange(7),
        "flags": torch.tensor([True, False, True]),
    }
    make_publisher(agent).push(tensors)
    assert arrived(agent, {n: t.contiguous() for n, t in tensors.items()})


def test_slots_filled_together_or_one_by_one_hold_the_same_bytes(
    make_agent: Callable[..., Agent], make_publisher: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {
        "bf16": torch.randn(6, 4).bfloat16(), "turned": torch.randn(4, 6).T, "fp32": torch.randn(5),
        "one": torch.randn(1, 7), "int": torch.arange(9), "cast": torch.randn(8, 3),
    }  # fmt: skip

    def regions(manifest: Manifest) -> list[Region]:
        wanted = plain_regions(manifest)
        wanted[-1].dtype = "bfloat16"
        return wanted

    sent = []
    for small in (1 << 20, 0):
        monkeypatch.setattr("weightsync_client.filling._SMALL_NBYTES", small)
        agent = make_agent(regions=regions)
        publisher = make_publisher(agent, zero_copy_bytes=0)
        for _ in range(2):
            publisher.push(tensors)
        sent.append({n: bytes(b.numpy()) for n, b in agent.workers[0].buffers.items()})
    want = {n: t.to(torch.bfloat16) if n == "cast" else t for n, t in tensors.items()}
    flat = {n: t.contiguous().view(-1).view(torch.uint8) for n, t in want.items()}
    assert sent[0] == sent[1] == {n: bytes(t.numpy()) for n, t in flat.items()}


def test_fused_and_transposed_regions_are_filled_in_destination_order(
    make_agent: Callable[..., Agent], make_publisher: Make
) -> None:
    def regions(_: Manifest) -> list[Region]:
        return [
            Region("qkv", "bfloat16", ["q", "k", "v"]),
            Region("down_t", "float32", ["down"], transposed=True),
        ]

    agent = make_agent(regions=regions, n_workers=2)
    tensors = {n: torch.randn(8, 6, dtype=torch.bfloat16) for n in "qkv"}
    tensors["down"] = torch.randn(5, 9)
    report = make_publisher(agent).push(tensors)
    wanted = {
        "qkv": torch.cat([tensors[n] for n in "qkv"]),
        "down_t": tensors["down"].t().contiguous(),
    }
    assert arrived(agent, wanted)
    assert arrived(agent, wanted, worker=1)
    assert report.nbytes == 2 * sum(t.nbytes for t in wanted.values())


@pytest.mark.parametrize("takes", ["embed.weight", "head.weight"])
def test_tied_weights_may_be_taken_under_either_name(
    takes: str, make_agent: Callable[..., Agent], make_publisher: Make
) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    model["head"].weight = model["embed"].weight
    agent = make_agent(regions=lambda _: [Region(takes, "float32", [takes])])
    make_publisher(agent).push(model)
    assert arrived(agent, {takes: model["embed"].weight.detach()})


def test_a_tensor_that_the_engine_does_not_know_is_refused_and_may_be_ignored(
    make_agent: Callable[..., Agent], make_publisher: Make, model: nn.Module
) -> None:
    agent = make_agent(regions=lambda m: [Region(t.name, t.dtype, [t.name]) for t in list(m)[:-1]])
    with pytest.raises(ManifestError, match=r"1\.bias"):
        make_publisher(agent).push(model)
    assert "/pause" not in agent.calls
    make_publisher(agent, ignore=["1.*"]).push(model)
    assert agent.state.version == 1


def test_a_tensor_that_the_engine_misses_is_the_agents_error_with_its_class(
    make_agent: Callable[..., Agent], make_publisher: Make, model: nn.Module
) -> None:
    agent = make_agent(regions=lambda _: [Region("norm", "bfloat16", ["norm.weight"])])
    with pytest.raises(ManifestError, match=r"norm\.weight") as caught:
        make_publisher(agent).push(model)
    assert caught.value.context["agent"] == agent.url
    assert caught.value.context["phase"] == "rendezvous"
    assert agent.state.phase == "ready"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_non_finite_weights_are_refused_before_the_engine_is_paused(
    value: float, dtype: torch.dtype, agent: Agent, make_publisher: Make
) -> None:
    tensors = {n: torch.randn(40, 50).to(dtype) for n in ("a", "b", "c")}
    tensors["b"][7, 3] = value
    tensors["b"][39, 49] = value
    publisher = make_publisher(agent)
    with pytest.raises(NonFiniteError, match="'b': 2 of 2000 values are NaN or infinite") as caught:
        publisher.push(tensors)
    assert [t["tensor"] for t in caught.value.context["tensors"]] == ["b"]
    assert "/pause" not in agent.calls
    tensors["b"].zero_()
    publisher.push(tensors)
    assert agent.calls.count("/init_transfer") == 1


def test_large_finite_weights_whose_sum_overflows_are_pushed(
    agent: Agent, make_publisher: Make
) -> None:
    tensors = {"a": torch.full((64, 64), 6e4, dtype=torch.float16), "b": torch.full((9,), 3e38)}
    make_publisher(agent).push(tensors)
    assert arrived(agent, tensors)


def test_a_weight_that_overflows_in_the_engines_dtype_is_refused(
    make_agent: Callable[..., Agent], make_publisher: Make
) -> None:
    agent = make_agent(regions=lambda m: [Region(t.name, "float16", [t.name]) for t in m])
    with pytest.raises(NonFiniteError, match="'w': 1 of 9 values are out of the range of float16"):
        make_publisher(agent).push({"w": torch.tensor([7e4] + [1.0] * 8)})


def test_fp8_nan_is_refused(agent: Agent, make_publisher: Make) -> None:
    bad = torch.tensor([1.0, float("nan"), 2.0]).to(torch.float8_e4m3fn)
    with pytest.raises(NonFiniteError, match="'w': 1 of 3"):
        make_publisher(agent).push({"w": bad})


def test_non_finite_weights_are_pushed_on_request(agent: Agent, make_publisher: Make) -> None:
    make_publisher(agent, check_finite=False).push({"w": torch.tensor([float("inf"), 1.0])})
    assert agent.state.version == 1


def test_version_defaults_to_one_more_than_the_newest_engines(
    make_agent: Callable[..., Agent], make_publisher: Make, model: nn.Module
) -> None:
    agents = [make_agent(version=3), make_agent(version=8)]
    report = make_publisher(*agents).push(model)
    assert report.version == 9
    assert [o.version for o in report.agents] == [9, 9]


def test_an_old_version_is_refused_before_the_engine_is_paused(
    make_agent: Callable[..., Agent], make_publisher: Make, model: nn.Module
) -> None:
    agent = make_agent(version=5)
    with pytest.raises(StaleVersionError, match="version 5"):
        make_publisher(agent).push(model, version=5)
    assert agent.calls == ["/status"]


def test_push_to_an_engine_paused_by_hand_is_refused_and_leaves_it_paused(
    agent: Agent, make_publisher: Make, model: nn.Module
) -> None:
    agent.pause({})
    with pytest.raises(EnginePausedError) as caught:
        make_publisher(agent).push(model)
    assert "/resume" in caught.value.hint
    assert agent.state.phase == "paused"
    assert agent.calls[-1] == "/pause"


def test_a_changed_model_makes_a_new_rendezvous(agent: Agent, make_publisher: Make) -> None:
    publisher = make_publisher(agent)
    publisher.push({"w": torch.randn(3)})
    agent.workers[0].buffers.clear()
    publisher.push({"w": torch.randn(4, 4)})
    assert agent.calls.count("/init_transfer") == 2


def test_a_job_without_tensors_is_refused(agent: Agent, make_publisher: Make) -> None:
    with pytest.raises(ManifestError, match="empty"):
        make_publisher(agent).push({})
    assert agent.calls == ["/status"]


def test_report_adds_up(agent: Agent, make_publisher: Make, model: nn.Module) -> None:
    report = make_publisher(agent).push(model)
    paused = [report.pause_s, report.begin_s, report.write_s, report.commit_s, report.resume_s]
    assert all(s > 0 for s in paused)
    assert sum(paused) <= report.paused_s
    assert report.paused_s + report.fill_s + report.rendezvous_s <= report.total_s
    assert report.rate_bytes_per_s == pytest.approx(report.nbytes / report.write_s)
    told = report.to_dict()
    assert told["agents"] == (
        {
            "url": agent.url, "state": "ready", "version": 1, "seconds": {"verify": 0.5},
            "ok": True, "phase": "", "code": "", "error": "",
        },
    )  # fmt: skip
    assert told["rate_bytes_per_s"] == report.rate_bytes_per_s
    assert "v1" in str(report)


def test_each_phase_is_one_log_line(
    agent: Agent, make_publisher: Make, model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="weightsync.publisher")
    report = make_publisher(agent, progress="log").push(model)
    lines = [r.getMessage() for r in caplog.records if r.name == "weightsync.publisher"]
    phases = [line.split()[1] for line in lines]
    assert phases == [
        f"phase={p}"
        for p in ("rendezvous", "fill", "pause", "begin", "write", "commit", "resume", "done")
    ]
    assert all(f"version=1 push_id={report.push_id}" in line for line in lines)


def test_terminal_shows_one_line_a_push(
    agent: Agent, make_publisher: Make, model: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    make_publisher(agent, progress="terminal").push(model)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("✓ v1  1.2 kB  paused ")


def test_two_pushes_at_once_are_refused(
    agent: Agent, make_publisher: Make, model: nn.Module
) -> None:
    publisher = make_publisher(agent)
    refused: list[Any] = []

    def again() -> None:
        try:
            publisher.push(model)
        except PushInProgressError as error:
            refused.append(error)

    agent.before["/pause"] = again
    publisher.push(model)
    assert len(refused) == 1


def test_status_and_context_manager(agent: Agent, make_publisher: Make, model: nn.Module) -> None:
    with make_publisher(agent) as publisher:
        publisher.push(model)
        assert [s["version"] for s in publisher.status()] == [1]
    with pytest.raises(InputError, match="closed"):
        publisher.push(model)
