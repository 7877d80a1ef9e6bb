"""Weights that are written from where the trainer has them, with no copy between."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from jobs import rows, same_report
from reference import Agent, Region
from test_push import arrived
from torch import nn

from weightsync.errors import InputError, NonFiniteError, RegistrationError
from weightsync.transport.base import LocalMemory, Registration
from weightsync.transport.inmemory import Fabric, InMemoryTransport
from weightsync_client import ConversionSpec, LocalShard, Publisher, Rule, StateDictSource, Unstack

PAGE = 4096
Make = Callable[..., Publisher]


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"a": torch.randn(64, 64), "b": torch.randn(5000).bfloat16(), "small": torch.randn(9)}


def changed(tensors: dict[str, torch.Tensor]) -> None:
    for tensor in tensors.values():
        tensor.normal_()


def lent(publisher: Publisher) -> set[str]:
    """Names of what is written from where it is; its memory is registered, and no more."""
    session = publisher._held.session
    loan = session.slots._loan
    assert len(session.slots.memory) == 1 + len(loan.memory)
    return {name for name, _ in loan.lent}


def test_a_large_weight_takes_no_slot_and_every_push_writes_its_values(
    agent: Agent, make_publisher: Make, weights: dict[str, torch.Tensor]
) -> None:
    publisher = make_publisher(agent, zero_copy_bytes=1024)
    for _ in range(3):
        changed(weights)
        publisher.push(weights)
        assert arrived(agent, weights)
    assert lent(publisher) == {"a", "b"}
    assert publisher._held.session.slots.slab.nbytes == PAGE
    addresses = {memory.addr for memory in publisher._held.session.slots.memory[1:]}
    assert addresses == {weights["a"].data_ptr(), weights["b"].data_ptr()}
    assert agent.calls.count("/init_transfer") == 1


def test_zero_lends_nothing_and_less_is_refused(
    agent: Agent, make_publisher: Make, weights: dict[str, torch.Tensor]
) -> None:
    publisher = make_publisher(agent, zero_copy_bytes=0)
    publisher.push(weights)
    assert lent(publisher) == set()
    with pytest.raises(InputError, match="zero_copy_bytes is -1"):
        make_publisher(agent, zero_copy_bytes=-1)


def test_on_a_cpu_a_mebibyte_is_lent_unless_told_otherwise(
    agent: Agent, make_publisher: Make
) -> None:
    publisher = make_publisher(agent)
    publisher.push({"large": torch.ones(1 << 20).byte(), "less": torch.ones((1 << 20) - 1).byte()})
    assert lent(publisher) == {"large"}


def test_a_weight_that_moved_is_copied_from_then_on(
    agent: Agent, make_publisher: Make, weights: dict[str, torch.Tensor]
) -> None:
    publisher = make_publisher(agent, zero_copy_bytes=1024)
    publisher.push(weights)
    weights["a"] = weights["a"] + 1
    publisher.push(weights)
    assert arrived(agent, weights)
    assert lent(publisher) == {"b"}
    assert agent.calls.count("/init_transfer") == 2
    weights["a"] = weights["a"] * 2
    publisher.push(weights)
    assert arrived(agent, weights)
    assert agent.calls.count("/init_transfer") == 2


def test_weights_that_are_made_anew_for_every_push_cost_one_more_rendezvous_and_no_more(
    agent: Agent, make_publisher: Make, weights: dict[str, torch.Tensor]
) -> None:
    publisher = make_publisher(agent, zero_copy_bytes=1024)
    for k in range(4):
        made = {name: tensor + k for name, tensor in weights.items()}
        publisher.push(iter(made.items()))
        assert arrived(agent, made)
    assert agent.calls.count("/init_transfer") == 2


def test_what_is_registered_stays_mapped_when_the_trainer_lets_go_of_it(
    agent: Agent, make_publisher: Make
) -> None:
    publisher = make_publisher(agent, zero_copy_bytes=1024)
    layer = nn.Linear(64, 64, bias=False)
    publisher.push(layer)
    before = layer.weight.data_ptr()
    layer.weight.data = torch.zeros(1)
    gc.collect()
    taken = [torch.empty(64, 64) for _ in range(8)]
    assert before not in {t.data_ptr() for t in taken}
    publisher.close()


def test_values_seen_in_another_order_are_noticed(agent: Agent, make_publisher: Make) -> None:
    publisher = make_publisher(agent, zero_copy_bytes=64)
    square = torch.randn(32, 32)
    publisher.push({"w": square})
    assert lent(publisher) == {"w"}
    publisher.push({"w": square.T})
    assert arrived(agent, {"w": square.T})
    assert lent(publisher) == set()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_lent_weight_that_is_not_finite_is_named_and_nothing_is_sent(
    agent: Agent, make_publisher: Make, weights: dict[str, torch.Tensor], value: float
) -> None:
    publisher = make_publisher(agent, zero_copy_bytes=1024)
    weights["a"][3, 3] = value
    with pytest.raises(NonFiniteError) as caught:
        publisher.push(weights)
    assert [(t["tensor"], t["count"]) for t in caught.value.context["tensors"]] == [("a", 1)]
    assert "/pause" not in agent.calls


def test_what_must_be_computed_is_copied(make_agent: Callable[..., Agent], fabric: Fabric) -> None:
    def regions(manifest: Any) -> list[Region]:
        del manifest
        return [
            Region("cast", "float32", ["cast"]),
            Region("turned", "float32", ["turned"], transposed=True),
            Region("rounded", "bfloat16", ["rounded"]),
            Region("view", "float32", ["view"]),
            Region("same", "float32", ["same"]),
        ]

    agent = make_agent(regions=regions)
    tensors = {
        "cast": torch.randn(64, 64).bfloat16(), "turned": torch.randn(64, 64),
        "rounded": torch.randn(64, 64), "view": torch.randn(64, 128)[:, ::2],
        "same": torch.randn(64, 64),
    }  # fmt: skip
    source = StateDictSource(tensors)
    with Publisher(
        [agent.url], transport=partial(InMemoryTransport, fabric, "trainer"), zero_copy_bytes=64,
        progress="off",
    ) as publisher:  # fmt: skip
        publisher.push(source)
        assert lent(publisher) == {"same"}
    worker = agent.workers[0]
    assert torch.equal(worker.tensor("cast", torch.float32, (64, 64)), tensors["cast"].float())
    assert torch.equal(worker.tensor("turned", torch.float32, (64, 64)), tensors["turned"].T)
    assert torch.equal(worker.tensor("same", torch.float32, (64, 64)), tensors["same"])
    assert torch.equal(worker.tensor("view", torch.float32, (64, 64)), tensors["view"])


def test_one_memory_seen_as_two_is_not_registered_twice(agent: Agent, make_publisher: Make) -> None:
    memory = bytearray(8192)
    one = torch.frombuffer(memory, dtype=torch.uint8, count=6000)
    other = torch.frombuffer(memory, dtype=torch.uint8, offset=2048, count=6000)
    apart = torch.ones(6000, dtype=torch.uint8)
    publisher = make_publisher(agent, zero_copy_bytes=64)
    one.fill_(7)
    publisher.push({"one": one, "other": other, "apart": apart})
    assert arrived(agent, {"one": one, "other": other, "apart": apart})
    assert lent(publisher) == {"apart"}


def test_views_of_one_memory_are_one_registration_and_neighbours_one_write(
    make_agent: Callable[..., Agent], make_publisher: Make
) -> None:
    agent = make_agent(regions=lambda _: [Region("w", "float32", [f"x.{k}" for k in range(4)])])
    spec = ConversionSpec("stacked", [Rule("x", "x.{k}", Unstack("k"))])
    publisher = make_publisher(agent, zero_copy_bytes=4 * 4096, conversion=spec)
    stacked = torch.randn(4, 32, 32)
    for _ in range(2):
        stacked.normal_()
        publisher.push({"x": stacked})
        assert torch.equal(agent.workers[0].tensor("w", torch.float32, (4, 32, 32)), stacked)
    assert lent(publisher) == {f"x.{k}" for k in range(4)}
    assert [list(w) for w in agent.workers[0].writes.values()] == [[(0, 0, 4 * 4096)]]
    assert publisher._held.session.slots.memory[1:] == [LocalMemory(stacked.data_ptr(), 4 * 4096)]


def test_what_is_lent_takes_no_round(agent: Agent, make_publisher: Make) -> None:
    torch.manual_seed(0)
    tensors = {f"w{k}": torch.randn(1000) for k in range(8)} | {"large": torch.randn(40_000)}
    publisher = make_publisher(agent, zero_copy_bytes=100_000, max_slot_bytes=2 * PAGE)
    for _ in range(2):
        changed(tensors)
        report = publisher.push(tensors)
        assert arrived(agent, tensors)
        assert report.rounds == 8
    assert lent(publisher) == {"large"}


def test_ranks_lend_their_shards_to_several_engines(
    make_agent: Callable[..., Agent],
    make_job: Any,
) -> None:
    agents = [make_agent(n_workers=2), make_agent()]
    whole = {"a": torch.randn(64, 64), "tiny": torch.randn(6), "b": torch.randn(33, 8)}
    job = make_job(*agents, ranks=2, zero_copy_bytes=256, coalesce_bytes=64)
    for _ in range(2):
        changed(whole)
        parts: Sequence[dict[str, LocalShard]] = [
            {name: rows(t, 2)[rank] for name, t in whole.items()} for rank in range(2)
        ]
        same_report(job.push(list(parts)))
        for agent in agents:
            assert all(arrived(agent, whole, worker=k) for k in range(len(agent.workers)))
    assert [lent(p) for p in job.publishers] == [{"a", "b"}, {"a", "b"}]
    assert agents[0].calls.count("/init_transfer") == 1


def test_weights_that_cannot_be_registered_are_copied(
    agent: Agent, make_publisher: Make, weights: dict[str, torch.Tensor], fabric: Fabric
) -> None:
    class Picky(InMemoryTransport):
        def register(self, memory: Sequence[LocalMemory]) -> Registration:
            if len(memory) > 1:
                raise RegistrationError("not pinnable", hint="none")
            return super().register(memory)

    publisher = make_publisher(
        agent, zero_copy_bytes=64, transport=partial(Picky, fabric, "trainer")
    )
    publisher.push(weights)
    assert arrived(agent, weights)
    assert lent(publisher) == set()


@pytest.mark.nixl
def test_lent_weights_land_over_nixl(
    make_agent: Callable[..., Agent], weights: dict[str, torch.Tensor]
) -> None:
    from weightsync.transport.nixl import NixlTransport

    agent = make_agent(n_workers=2, make_transport=lambda: NixlTransport("worker"))
    with Publisher([agent.url], progress="off", zero_copy_bytes=1024) as publisher:
        for _ in range(3):
            changed(weights)
            publisher.push(weights)
            assert all(arrived(agent, weights, worker=k) for k in range(2))
        assert lent(publisher) == {"a", "b"}


@pytest.mark.gpu
def test_gpu_weights_are_lent_where_they_are_plain_device_memory() -> None:
    from weightsync.manifest import Manifest, TensorSpec
    from weightsync_client.lending import Loan

    device = torch.device("cuda", torch.cuda.current_device())
    weight = torch.randn(1 << 20, device=device)
    manifest = Manifest.of([TensorSpec("w", "float32", (1 << 20,))])
    (segment,) = [
        s
        for s in torch.cuda.memory_snapshot()
        if s["address"] <= weight.data_ptr() < s["address"] + s["total_size"]
    ]
    loan = Loan(StateDictSource({"w": weight}), manifest, device)
    assert len(loan.lendable.places) == (0 if segment.get("is_expandable") else 1)
