"""Parts of a large write: the same bytes, and the message behind all of them."""

from __future__ import annotations

import signal
import threading
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightsync.transport import nixl_request
from weightsync.transport.base import DRAM, Side, WriteOp
from weightsync.transport.nixl_request import Request, Threads, split

SIZES = st.lists(st.integers(1, 300), min_size=1, max_size=8)


def ops_of(sizes: list[int]) -> list[WriteOp]:
    return [WriteOp(1000 * k, 70_000 + 3000 * k, size) for k, size in enumerate(sizes)]


def bytes_of(ops: list[WriteOp]) -> list[tuple[int, int]]:
    return [(op.local_addr + n, op.remote_addr + n) for op in ops for n in range(op.nbytes)]


@given(SIZES, st.integers(1, 5))
def test_the_parts_are_the_same_bytes_in_the_same_order(sizes, count):
    ops = ops_of(sizes)
    parts = split(ops, count)
    assert bytes_of([op for part in parts for op in part]) == bytes_of(ops)


@given(SIZES, st.integers(1, 5))
def test_the_parts_are_of_one_size_and_the_last_one_is_small(sizes, count):
    *parts, end = ([op.nbytes for op in part] for part in split(ops_of(sizes), count))
    assert sum(end) == min(64, sizes[-1])
    assert len(parts) <= count
    for part in parts[:-1]:
        assert sum(part) == sum(parts[0])
    assert all(0 < sum(part) <= sum(parts[0]) for part in parts)


class Agent:
    """Remembers what is posted; a request completes when the test says so."""

    def __init__(self) -> None:
        self.made: list[tuple] = []
        self.posted: list[tuple[int, bytes]] = []
        self.done: set[int] = set()
        self.released: list[int] = []
        self.stuck: set[int] = set()
        self.refused = 99

    def __getattr__(self, name):
        """What the binding calls them."""
        calls = {
            "createXferReq": self.create,
            "postXferReq": self.post,
            "getXferStatus": self.status,
            "releaseXferReq": self.release,
        }
        return calls[name]

    def create(self, op, here, there, peer, message, backends):
        if len(self.made) == self.refused:
            raise RuntimeError("not registered")
        self.made.append((here[1].tolist(), there[1].tolist(), threading.current_thread().name))
        return len(self.made)

    def post(self, handle, message):
        self.posted.append((handle, message))
        return self.status(handle)

    def status(self, handle):
        return SimpleNamespace(name="NIXL_SUCCESS" if handle in self.done else "NIXL_IN_PROG")

    def release(self, handle):
        if handle in self.stuck:
            raise RuntimeError(f"{handle} is in flight")
        self.released.append(handle)


NIXL = SimpleNamespace(
    NIXL_WRITE="write", DRAM_SEG="host", VRAM_SEG="gpu", nixlXferDList=lambda *args: args
)


@pytest.fixture
def agent() -> Agent:
    return Agent()


@pytest.fixture
def threads():
    threads = Threads(2)
    yield threads
    threads.close()


@pytest.fixture
def make(agent, threads, monkeypatch):
    monkeypatch.setattr(nixl_request, "_LEAST_PARTED_NBYTES", 1000)

    def make(sizes, local=DRAM, remote=DRAM):
        return Request(NIXL, lambda: agent, threads, "peer", ops_of(sizes), local, remote)

    return make


def test_the_message_goes_when_all_parts_have_completed(make, agent):
    request = make([600, 600])
    request.post(b"v1")
    for done in (set(), {2}):
        agent.done = done
        assert not request.is_done()
        assert sorted(agent.posted) == [(1, b""), (2, b"")]
    agent.done = {1, 2}
    assert not request.is_done()
    assert agent.posted[2:] == [(3, b"v1")]
    assert not request.is_done()
    agent.done = {1, 2, 3}
    assert request.is_done()
    assert len(agent.posted) == 3


def test_it_is_posted_again_as_the_first_time(make, agent):
    request = make([600, 600])
    agent.done = {1, 2, 3}
    for message in (b"v1", b"v2"):
        agent.posted.clear()
        request.post(message)
        assert request.is_done()
        assert sorted(agent.posted) == [(1, b""), (2, b""), (3, message)]


def test_each_part_is_made_by_a_thread_of_its_own(make, agent):
    make([600, 600])
    make([600, 600])
    names = [name for *_, name in agent.made]
    assert names[0] != names[1]
    assert names[:3] == names[3:]


@pytest.mark.parametrize(
    ("sizes", "local", "remote"),
    [
        ([999], DRAM, DRAM),
        ([4000], Side("VRAM", 1), DRAM),
        ([4000], DRAM, Side("VRAM", 1)),
        ([4000], Side("VRAM", 1), Side("VRAM", 0)),
    ],
)
def test_what_is_small_or_on_a_gpu_goes_whole(make, agent, sizes, local, remote):
    request = make(sizes, local, remote)
    [(here, there, _)] = agent.made
    assert here == [[0, sizes[0], local.device_id]]
    assert there == [[70_000, sizes[0], remote.device_id]]
    agent.done = {1}
    request.post(b"v1")
    assert agent.posted == [(1, b"v1")]
    assert request.is_done()


def test_parts_of_a_request_that_nixl_refuses_are_released(make, agent):
    agent.refused = 2
    with pytest.raises(RuntimeError, match="not registered"):
        make([600, 600])
    assert agent.released == [1, 2]


def test_parts_that_cannot_be_released_are_tried_again_alone(make, agent):
    request = make([600, 600])
    agent.stuck = {2}
    with pytest.raises(RuntimeError, match="2 is in flight"):
        request.release()
    agent.stuck = set()
    request.release()
    request.release()
    assert agent.released == [1, 3, 2]


def test_ctrl_c_comes_when_all_have_ended(threads):
    ended = threading.Event()

    def interrupts():
        threading.Event().wait(0.05)  # until it is waited for
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    def takes_longer():
        threading.Event().wait(0.2)
        ended.set()

    with pytest.raises(KeyboardInterrupt):
        threads.each([takes_longer, interrupts])
    assert ended.is_set()


def test_a_part_that_fails_is_told_when_the_others_have_ended(threads):
    ended = threading.Event()

    def fails():
        raise RuntimeError("refused")

    def takes_longer():
        threading.Event().wait(0.05)
        ended.set()

    with pytest.raises(RuntimeError, match="refused"):
        threads.each([fails, takes_longer])
    assert ended.is_set()
