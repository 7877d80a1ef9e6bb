"""What a worker tells about itself and its weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.receiver.mixed import F32, make, weights
from tests.receiver.toys import (
    Bag,
    ToyAdapter,
    new_pair,
    random_like,
)
from weightsync.errors import (
    LayoutError,
)
from weightsync.transport.inmemory import Fabric, InMemoryTransport
from weightsync.worker_messages import (
    AttachBody,
)
from weightsync_server.receiver.receiver import Receiver


def test_a_worker_tells_what_it_holds(engine):
    receiver, trainer = new_pair(engine)
    reply = receiver.attach(AttachBody("windows"))
    assert (reply.kernel_tensors, reply.direct, reply.staged) == (6, 5, 1)
    trainer.rendezvous(weights())
    trainer.push(weights(1), 1)
    told = receiver.describe()
    assert (told.version, told.dirty, told.epoch, told.checkpoint) == (1, False, 1, True)


def test_checksums_of_a_pushed_and_a_fresh_engine_are_equal_with_or_without_proofs(tmp_path):
    engine, fresh = make(tmp_path), make(None, start=weights(1))
    receiver, trainer = new_pair(engine)
    trainer.rendezvous(weights())
    trainer.push(weights(1), 1)
    unproven = Receiver(fresh, lambda: InMemoryTransport(Fabric()))
    sums = receiver.checksums().sha256
    assert sums == unproven.checksums().sha256
    assert any("derived" in k for k in sums)
    fresh.live.copied.copy[0, 0] += 1
    assert sums != unproven.checksums().sha256


def opaque(read: bool) -> ToyAdapter:
    def finish(module: nn.Module) -> None:
        if hasattr(module, "weight"):
            packed = module.weight.data.clone()
            module.compute = lambda x: x @ packed.t()
            module.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def columns(module: nn.Module, _: str, which: torch.Tensor) -> torch.Tensor:
        return module.compute(torch.eye(8)[which]).t()

    return ToyAdapter(
        lambda: Bag(weight=torch.empty(8, 8)),
        start={"weight": random_like(F32, 8, 8)},
        finish=finish,
        read_back=columns if read else None,
    )


def test_checksums_see_opaque_weights_though_nothing_was_proven():
    first, second = opaque(read=True), opaque(read=True)
    sums = [Receiver(e, lambda: InMemoryTransport(Fabric())).checksums() for e in (first, second)]
    assert sums[0] == sums[1]
    assert "weight (read back)" in sums[0].sha256
    other = torch.zeros(8, 8)
    second.live.compute = lambda x: x @ other
    now = Receiver(second, lambda: InMemoryTransport(Fabric())).checksums()
    assert now != sums[0]


def test_checksums_are_refused_where_a_weight_cannot_be_seen():
    receiver = Receiver(opaque(read=False), lambda: InMemoryTransport(Fabric()))
    with pytest.raises(LayoutError, match=r"weight is emptied .* cannot be read back"):
        receiver.checksums()
