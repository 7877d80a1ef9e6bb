"""A push that left the fast path says so once an epoch, after it has ended well."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest
from reference import Agent
from torch import nn

from weightsync.transport import Fabric, InMemoryTransport, slow_path
from weightsync.transport.base import PreparedWrite
from weightsync.transport.slow_path import SlowPathWarning
from weightsync_client import Publisher


class Slow(InMemoryTransport):
    def wait(self, writes: Sequence[PreparedWrite], *, timeout_s: float) -> None:
        time.sleep(0.2)
        super().wait(writes, timeout_s=timeout_s)


def test_the_first_push_warns_of_a_slow_path_and_the_second_does_not_repeat_it(
    agent: Agent,
    make_publisher: Callable[..., Publisher],
    fabric: Fabric,
    model: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("weightsync_client.session.cuda_address", lambda device: "0000:13:00.0")
    monkeypatch.setattr(slow_path, "_CONNECT_S", 0.1)
    monkeypatch.setattr(slow_path, "_ENOUGH_NBYTES", 0)
    publisher = make_publisher(agent, transport=lambda: Slow(fabric, "trainer"))
    with pytest.warns(SlowPathWarning, match=r"of GPU 0000:13:00.0 took 0\.\d s"):
        assert publisher.push(model).version == 1
    assert publisher.push(model).version == 2


def test_a_push_from_host_memory_says_nothing_however_slow(
    agent: Agent,
    make_publisher: Callable[..., Publisher],
    fabric: Fabric,
    model: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slow_path, "_CONNECT_S", 0.1)
    monkeypatch.setattr(slow_path, "_ENOUGH_NBYTES", 0)
    publisher = make_publisher(agent, transport=lambda: Slow(fabric, "trainer"))
    assert publisher.push(model).version == 1
