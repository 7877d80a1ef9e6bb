"""A bound on the slot memory: a push that does not fit goes through it in rounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from reference import Agent, Region
from test_push import Make, arrived
from torch import nn

from weightsync.errors import DeadlineError, InputError, NonFiniteError, PeerLostError, PlanError
from weightsync.layout import CopyRecord, KernelRegion, WorkerLayout, WorkerPlace
from weightsync.manifest import Manifest
from weightsync.plan import build_plan
from weightsync.slab import ALIGN_NBYTES
from weightsync.transport.base import PreparedWrite
from weightsync.transport.inmemory import Fabric, Faults, InMemoryTransport
from weightsync.transport.nixl import NixlTransport
from weightsync_client import Deadlines, Publisher
from weightsync_client.lending import Loan
from weightsync_client.session import Session
from weightsync_client.slots import Slots
from weightsync_client.source import as_source

PAGE = ALIGN_NBYTES


class Watched(InMemoryTransport):
    """Keeps what was posted, and that no two writes to a peer are on their way at once."""

    def __init__(self, fabric: Fabric) -> None:
        super().__init__(fabric, "trainer")
        self.posts: list[tuple[str, str]] = []
        self.open: Counter[str] = Counter()
        self.fail_at: dict[int, Exception] = {}

    def post(self, write: PreparedWrite, notification: bytes) -> None:
        if error := self.fail_at.get(len(self.posts)):
            raise error
        assert not self.open[write.peer], "an earlier write to this worker is still in flight"
        self.posts.append((write.peer, notification.decode()))
        self.open[write.peer] += 1
        super().post(write, notification)

    def wait(self, writes: Sequence[PreparedWrite], *, timeout_s: float) -> None:
        super().wait(writes, timeout_s=timeout_s)
        self.open.subtract(Counter(write.peer for write in writes))


@pytest.fixture
def wire(fabric: Fabric) -> list[Watched]:
    return []


@pytest.fixture
def publisher_of(make_publisher: Make, fabric: Fabric, wire: list[Watched]) -> Callable[..., Any]:
    def make_transport() -> Watched:
        wire.append(Watched(fabric))
        return wire[-1]

    return lambda *agents, **options: make_publisher(*agents, transport=make_transport, **options)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    """40 KiB, the largest more than a round of one page."""
    torch.manual_seed(0)
    sizes = {"a": (64, 100), "b": (3,), "c": (64, 50), "d": (1000,)}
    return {name: torch.randn(size) for name, size in sizes.items()}


@pytest.fixture
def fused(make_agent: Callable[..., Agent]) -> Agent:
    """Two workers that want a and c as the columns of one transposed kernel tensor, in bf16."""
    wanted = [Region("ac", "bfloat16", ["a", "c"], transposed=True), Region("b", "float32", ["b"])]
    return make_agent(n_workers=2, regions=lambda _: [*wanted, Region("d", "float32", ["d"])])


def landed(agent: Agent, weights: dict[str, torch.Tensor]) -> bool:
    ac = torch.cat([weights["a"].t().reshape(-1), weights["c"].t().reshape(-1)]).bfloat16()
    expected = {"ac": ac, "b": weights["b"], "d": weights["d"]}
    return all(arrived(agent, expected, worker=w) for w in range(len(agent.workers)))


@pytest.mark.parametrize("delay_s", [0.0, 0.02])
def test_what_does_not_fit_goes_through_two_halves_and_all_of_it_lands(
    delay_s: float, fused: Agent, publisher_of: Make, weights: dict[str, torch.Tensor],
    fabric: Fabric, wire: list[Watched], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A delayed write reads its slots late: one that was refilled too soon would show (WS-3)."""
    publisher = publisher_of(fused, max_slot_bytes=2 * PAGE)
    prepare = Session.prepare

    def prepare_and_delay(session: Session, urls: list[str]) -> Any:
        for worker in fused.workers:
            fabric.inject(worker.transport.name, Faults(delay_s=delay_s))
        return prepare(session, urls)

    monkeypatch.setattr(Session, "prepare", prepare_and_delay)
    for version in (1, 2):
        for tensor in weights.values():
            tensor.add_(1)
        report = publisher.push(weights)
        assert (report.version, report.rounds) == (version, 6)
        assert f"{report.rounds} rounds" in str(report)
        assert landed(fused, weights)
        assert publisher._held.session.slots.slab.nbytes == 2 * PAGE
    assert fused.calls.count("/init_transfer") == 1
    assert len(wire) == 1
    assert not any(wire[0].open.values())


def test_the_notification_of_a_push_goes_with_the_last_write_to_each_worker(
    fused: Agent, publisher_of: Make, weights: dict[str, torch.Tensor], wire: list[Watched]
) -> None:
    publisher_of(fused, max_slot_bytes=2 * PAGE).push(weights)
    for worker in fused.workers:
        told = [text for peer, text in wire[0].posts if peer == worker.transport.name]
        assert told[-1] == f"ws:{fused.state.epoch}:1:0"
        assert told[:-1] == [f"part:{fused.state.epoch}:1:0:{k}" for k in range(len(told) - 1)]
        assert len(told) > 2


def test_a_worker_that_gets_nothing_in_the_last_round_is_told_when_its_own_last_write_is_done(
    make_agent: Callable[..., Agent], publisher_of: Make, weights: dict[str, torch.Tensor],
    wire: list[Watched],
) -> None:  # fmt: skip
    first = make_agent(regions=lambda _: [Region("a", "float32", ["a"])])
    second = make_agent(regions=lambda _: [Region("d", "float32", ["d"])])
    only = {"a": weights["a"], "d": weights["d"]}
    publisher_of(first, second, max_slot_bytes=2 * PAGE, ignore=["*"]).push(only)
    assert arrived(first, {"a": weights["a"]})
    assert arrived(second, {"d": weights["d"]})
    texts = [text for _, text in wire[0].posts]
    assert sum(text.startswith("ws:") for text in texts) == 2
    assert texts.index(f"ws:{first.state.epoch}:1:0") < len(texts) - 1


def test_one_round_where_all_fits(
    fused: Agent, publisher_of: Make, weights: dict[str, torch.Tensor], wire: list[Watched]
) -> None:
    report = publisher_of(fused, max_slot_bytes=1 << 20).push(weights)
    assert report.rounds == 1
    assert "rounds" not in str(report)
    assert [text for _, text in wire[0].posts] == [f"ws:{fused.state.epoch}:1:0"] * 2
    assert landed(fused, weights)


def test_weights_that_are_not_finite_in_any_round_are_all_named_before_the_engine_pauses(
    fused: Agent, publisher_of: Make, weights: dict[str, torch.Tensor], wire: list[Watched]
) -> None:
    publisher = publisher_of(fused, max_slot_bytes=2 * PAGE)
    weights["a"][63, 99] = float("nan")
    weights["d"][0] = float("inf")
    with pytest.raises(NonFiniteError) as caught:
        publisher.push(weights)
    bad = caught.value.context["tensors"]
    assert {t["tensor"]: (t["count"], t["numel"]) for t in bad} == {"a": (1, 6400), "d": (1, 1000)}
    assert "/pause" not in fused.calls
    assert wire[0].posts == []
    weights["a"].zero_()
    weights["d"].zero_()
    assert publisher.push(weights).version == 1
    assert landed(fused, weights)


@pytest.mark.parametrize("at", [0, 3, 7])
def test_a_peer_that_dies_in_a_round_tears_the_engine_and_the_next_push_repairs_it(
    at: int, fused: Agent, publisher_of: Make, weights: dict[str, torch.Tensor],
    wire: list[Watched],
) -> None:  # fmt: skip
    publisher = publisher_of(fused, max_slot_bytes=2 * PAGE)
    publisher.push(weights)
    posted = len(wire[0].posts)
    wire[0].fail_at[posted + at] = PeerLostError("peer is gone")
    with pytest.raises(PeerLostError):
        publisher.push(weights)
    assert len(wire[0].posts) == posted + at
    assert fused.state.phase == "torn"
    assert not fused.generating
    assert publisher.push(weights).version == 3
    assert landed(fused, weights)
    assert len(wire) == 2, "nothing of the epoch is used again"


def test_a_refill_that_fails_is_raised_and_tears_the_engine(
    fused: Agent, publisher_of: Make, weights: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    publisher = publisher_of(fused, max_slot_bytes=2 * PAGE)

    def fail(slots: Slots, source: object, number: int) -> None:
        raise InputError(f"round {number}")

    with monkeypatch.context() as patch:
        patch.setattr(Slots, "refill", fail)
        with pytest.raises(InputError, match="round 2"):
            publisher.push(weights)
    assert fused.state.phase == "torn"
    publisher.push(weights)
    assert landed(fused, weights)


def test_one_deadline_covers_all_rounds(
    fused: Agent, publisher_of: Make, weights: dict[str, torch.Tensor], fabric: Fabric
) -> None:
    publisher = publisher_of(fused, max_slot_bytes=2 * PAGE)
    publisher.push(weights)
    for worker in fused.workers:
        fabric.inject(worker.transport.name, Faults(delay_s=0.1))
    session = publisher._held.session
    with pytest.raises(DeadlineError):
        session.write(2, as_source(weights), timeout_s=0.25)


def test_a_bound_that_is_too_small_says_the_least_that_works(
    agent: Agent, make_publisher: Make, model: nn.Module
) -> None:
    with pytest.raises(InputError, match="4096 or more"):
        make_publisher(agent, max_slot_bytes=100)
    publisher = make_publisher(agent, max_slot_bytes=PAGE, zero_copy_bytes=0)
    with pytest.raises(PlanError) as caught:
        publisher.push({"w": torch.zeros(3 << 20, dtype=torch.uint8)})
    least = caught.value.context["least"]
    assert str(least) in caught.value.hint
    assert agent.generating
    report = make_publisher(agent, max_slot_bytes=least, zero_copy_bytes=0).push(
        {"w": torch.ones(3 << 20, dtype=torch.uint8)}
    )
    assert report.rounds == 1024
    with pytest.raises(PlanError):
        make_publisher(agent, max_slot_bytes=least - 1, zero_copy_bytes=0).push(
            {"w": torch.ones(3 << 20).byte()}
        )


@pytest.mark.gpu
def test_a_refill_on_a_gpu_waits_for_no_work_of_the_trainer() -> None:
    device = torch.device("cuda:0")
    weights = {f"w{k}": torch.randn(1 << 16, device=device) for k in range(6)}
    source = as_source(weights)
    manifest = Manifest.of(source.manifest())
    records = tuple(CopyRecord(n, (1 << 16,), 0, (1,), k, 0, (1,)) for k, n in enumerate(weights))
    regions = tuple(KernelRegion(n, "bfloat16", (1 << 16,), 1 << 17, "direct", 0) for n in weights)
    layout = WorkerLayout(WorkerPlace(), regions, records)
    plan = build_plan(manifest, [layout], max_slot_nbytes=1 << 18)
    slots = Slots(plan, manifest, device, Loan(None, manifest, device))
    slots.fill(source, 0)
    slots.refill(source, 2)  # the stream is made, the kernels are loaded
    slots.fill(source, 0)
    torch.cuda.synchronize()
    torch.cuda._sleep(4_000_000_000)  # seconds of work on the trainer's stream
    training = torch.cuda.Event()
    training.record()
    slots.refill(source, 2)
    assert not training.query(), "the refill waited for the trainer"
    torch.cuda.synchronize()
    third = [(w.slot_offset, w.nbytes) for w in plan.rounds[2].writes[0]]
    landed = torch.cat([piece.view(torch.bfloat16) for piece in slots.pieces(third)])
    assert torch.equal(landed, weights["w2"].bfloat16())
    slots.close()


@pytest.mark.gpu
@pytest.mark.nixl
def test_rounds_from_a_gpu_land_whole(make_agent: Callable[..., Agent]) -> None:
    agent = make_agent(n_workers=2, make_transport=lambda: NixlTransport("worker"))
    weights = {f"w{k}": torch.randn(50_000 + k, device="cuda:0") for k in range(8)}
    with Publisher(
        [agent.url], progress="off", deadlines=Deadlines(write_s=20), max_slot_bytes=200_000
    ) as publisher:
        for version in (1, 2):
            for tensor in weights.values():
                tensor.normal_()
            report = publisher.push(weights)
            assert (report.version, report.rounds) == (version, 17)
            cpu = {name: tensor.cpu() for name, tensor in weights.items()}
            assert all(arrived(agent, cpu, worker=w) for w in range(2))
