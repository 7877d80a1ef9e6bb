"""What is NIXL's own: its errors, its loading, and a peer in another process that dies."""

from __future__ import annotations

import os
import signal
import time
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

from tests.transport.peers import NBYTES, Peer, run_python
from weightsync.errors import (
    DeadlineError,
    PeerLostError,
    RegistrationError,
    TransferFailedError,
    TransportError,
)
from weightsync.transport import LocalMemory, NixlTransport, WriteOp, nixl_errors
from weightsync.transport.nixl import load_bindings


@pytest.mark.nixl
def test_every_exception_of_nixl_is_mapped_and_nothing_else():
    bindings = load_bindings()
    found = {
        name
        for name, value in vars(bindings).items()
        if isinstance(value, type) and issubclass(value, BaseException)
    }
    assert found == set(nixl_errors.ERRORS)


@pytest.mark.nixl
def test_every_status_of_nixl_is_done_in_progress_or_an_error():
    statuses = set(load_bindings().nixl_status_t.__members__)
    assert {"NIXL_SUCCESS", "NIXL_IN_PROG"} < statuses
    assert nixl_errors.is_done("NIXL_SUCCESS", "p")
    assert not nixl_errors.is_done("NIXL_IN_PROG", "p")
    for status in statuses - {"NIXL_SUCCESS", "NIXL_IN_PROG"}:
        with pytest.raises(TransferFailedError, match=status):
            nixl_errors.is_done(status, "p")


@pytest.mark.parametrize("name", sorted(nixl_errors.ERRORS))
def test_a_nixl_error_keeps_its_text_and_gets_a_hint_and_its_peer(name):
    kind, _ = nixl_errors.ERRORS[name]
    with (
        pytest.raises(kind, match=f"pushing.*trainer-7.*{name}.*broken") as caught,
        nixl_errors.translated("pushing", "trainer-7"),
    ):
        raise type(name, (Exception,), {})("broken")
    assert caught.value.hint
    assert caught.value.context == {"peer": "trainer-7"}


def test_an_error_that_nixl_never_documented_is_a_transport_error():
    with pytest.raises(TransportError, match="MemoryError"), nixl_errors.translated("pushing"):
        raise MemoryError


def test_without_nixl_the_module_imports_and_the_constructor_says_what_to_install():
    code = """
import sys
sys.modules["nixl"] = None
from weightsync.errors import TransportError
from weightsync.transport.nixl import NixlTransport
try:
    NixlTransport()
except TransportError as error:
    print(error.message, "|", error.hint)
"""
    said = run_python(code)
    assert "NIXL cannot be loaded" in said
    assert "pip install nixl-cu13" in said


def test_the_package_loads_neither_nixl_nor_numpy_nor_torch_before_a_name_is_asked_for():
    code = """
import sys, weightsync.transport
assert weightsync.transport.InMemoryTransport and weightsync.transport.Transport
print(sorted({"nixl", "numpy", "torch"} & set(sys.modules)))
import weightsync.transport.nixl
print(sorted({"nixl", "torch"} & set(sys.modules)))
"""
    assert run_python(code) == "[]\n[]"


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer("nixl")
    yield peer
    peer.close()


@pytest.fixture(params=[1, 3], ids=["whole", "parts"])
def threads(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def source() -> np.ndarray:
    return np.full(NBYTES, 7, np.uint8)


@pytest.fixture
def writer(source: np.ndarray, threads: int) -> Iterator[NixlTransport]:
    """A writer that has ``source`` registered; made after it, so that it is closed before it.

    With several threads its large writes go in parts.
    """
    with NixlTransport("writer", progress_thread=False, threads=threads) as writer:
        writer.register([LocalMemory(source.ctypes.data, NBYTES)])
        yield writer


@pytest.fixture
def over_tcp(monkeypatch: pytest.MonkeyPatch, threads: int) -> Iterator[tuple]:
    """A writer and two peers on TCP, where a write into a stopped process stays in flight.

    With several threads its large writes go in parts.
    """
    monkeypatch.setenv("UCX_TLS", "tcp")
    array = np.full(NBYTES, 7, np.uint8)
    first, second = Peer("nixl"), Peer("nixl")
    with NixlTransport("writer", progress_thread=False, threads=threads) as writer:
        writer.register([LocalMemory(array.ctypes.data, NBYTES)])
        yield writer, array, first, second
    first.close()
    second.close()


class Agent:
    """A NIXL agent of which some calls fail with the errors given for them, one a call."""

    def __init__(self, agent, **errors: list[Exception]) -> None:
        self.agent, self.errors = agent, errors
        self.calls: dict[str, list] = {name: [] for name in errors}

    def __getattr__(self, name):
        if name not in self.errors:
            return getattr(self.agent, name)

        def call(first, *rest):
            self.calls[name].append(first)
            if self.errors[name]:
                raise self.errors[name].pop()
            return getattr(self.agent, name)(first, *rest)

        return call


def push(writer, write, source, value: int) -> None:
    source[:] = value
    writer.post(write, f"v{value}".encode())
    writer.wait([write], timeout_s=20)


@pytest.mark.nixl
def test_a_push_reaches_another_process_whose_python_is_asleep(writer, source, peer):
    name = writer.add_peer(peer.metadata)
    write = writer.prepare(name, [WriteOp(source.ctypes.data, peer.addr, NBYTES)])
    for value in (1, 2):
        push(writer, write, source, value)
        assert peer.look() == f"[{value}] {{'{writer.name}': [b'v{value}']}}\n"


@pytest.mark.nixl
@pytest.mark.parametrize("pushes_before", [0, 1])
def test_a_peer_killed_between_pushes_is_lost_at_the_next(writer, source, peer, pushes_before):
    name = writer.add_peer(peer.metadata)
    write = writer.prepare(name, [WriteOp(source.ctypes.data, peer.addr, NBYTES)])
    for value in range(pushes_before):
        push(writer, write, source, value)
    peer.kill()
    start_s = time.monotonic()
    with pytest.raises(PeerLostError, match=name) as caught:
        push(writer, write, source, 9)
    assert time.monotonic() - start_s < 20
    assert caught.value.context["peer"] == name
    for call in (
        lambda: writer.wait([write], timeout_s=1),
        lambda: writer.prepare(name, [WriteOp(source.ctypes.data, peer.addr, 10)]),
        lambda: writer.notify(name, b"hello"),
        lambda: writer.add_peer(peer.metadata),
    ):
        with pytest.raises(PeerLostError, match=name):
            call()


@pytest.mark.nixl
def test_a_peer_killed_in_mid_write_ends_the_wait_and_spares_the_other_peer(over_tcp):
    writer, source, peer, other = over_tcp
    name, good = writer.add_peer(peer.metadata), writer.add_peer(other.metadata)
    write = writer.prepare(name, [WriteOp(source.ctypes.data, peer.addr, NBYTES)])
    spared = writer.prepare(good, [WriteOp(source.ctypes.data, other.addr, NBYTES)])
    push(writer, write, source, 1)
    os.kill(peer.process.pid, signal.SIGSTOP)
    writer.post(write, b"v2")
    with pytest.raises(DeadlineError, match=name):
        writer.wait([write], timeout_s=0.2)
    peer.kill()
    with pytest.raises(PeerLostError, match=name):
        writer.wait([write], timeout_s=20)
    push(writer, spared, source, 3)
    assert other.look() == f"[3] {{'{writer.name}': [b'v3']}}\n"
    writer.remove_peer(name)
    push(writer, spared, source, 4)
    assert other.look() == f"[4] {{'{writer.name}': [b'v4']}}\n"


@pytest.mark.nixl
def test_ten_thousand_descriptors_are_prepared_in_well_under_a_second(writer, source, peer):
    name = writer.add_peer(peer.metadata)
    ops = [WriteOp(source.ctypes.data + 2 * i, peer.addr + 3 * i, 2) for i in range(10_000)]
    start_s = time.monotonic()
    writer.prepare(name, ops).close()
    assert time.monotonic() - start_s < 1.0


@pytest.mark.nixl
def test_an_idle_end_with_a_progress_thread_leaves_the_core_alone():
    with NixlTransport("idle"):
        start_s = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - start_s < 0.1


@pytest.mark.nixl
def test_an_error_that_is_kept_does_not_keep_a_closed_agent_alive():
    with NixlTransport("writer") as writer:
        agent = weakref.ref(writer._agent)
        with pytest.raises(TransportError) as kept:
            writer.add_peer(writer.metadata())
    assert agent() is None
    assert "nixlInvalidParamError" in kept.value.message


@pytest.mark.nixl
def test_memory_that_nixl_refuses_is_a_registration_error_and_is_not_remembered(writer, source):
    other = np.zeros(100, np.uint8)
    memory = [LocalMemory(other.ctypes.data, 100)]
    writer._agent = Agent(writer._agent, registerMem=[RuntimeError("no pages left to pin")])
    with pytest.raises(RegistrationError, match=r"100 bytes of DRAM.*no pages left to pin"):
        writer.register(memory)
    writer.register(memory).close()


@pytest.mark.nixl
def test_clean_up_that_fails_is_logged_and_goes_on(writer, source, caplog):
    registration = writer.register([LocalMemory(source.ctypes.data - 64, 64)])
    writer._agent.deregisterMem(registration.lists[0], [])
    registration.close()
    assert "deregistering memory failed" in caplog.text
    writer.close()


@pytest.mark.nixl
def test_a_handle_that_cannot_be_released_yet_is_released_at_close(writer, source, caplog):
    with NixlTransport("target") as target:
        array = np.zeros(100, np.uint8)
        target.register([LocalMemory(array.ctypes.data, 100)])
        name = writer.add_peer(target.metadata())
        write = writer.prepare(name, [WriteOp(source.ctypes.data, array.ctypes.data, 100)])
        [handle] = write.request._handles
        writer._agent = agent = Agent(writer._agent, releaseXferReq=[RuntimeError("still active")])
        write.close()
        assert "not released yet" in caplog.text
        writer.close()
        assert agent.calls["releaseXferReq"] == [handle, handle]
