"""What every transport must do.  Each claim runs against each implementation."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from weightsync.errors import (
    DeadlineError,
    RegistrationError,
    TransferFailedError,
    TransportError,
)
from weightsync.transport import LocalMemory, WriteOp

MIB = 1 << 20


def whole(src: np.ndarray, dst: np.ndarray) -> WriteOp:
    return WriteOp(src.ctypes.data, dst.ctypes.data, src.nbytes)


@pytest.fixture
def pair(wire):
    """Writer, target, 1 MiB at each, and the target's name at the writer."""
    writer, target = wire.end(), wire.end()
    src, dst = wire.memory(writer, MIB), wire.memory(target, MIB)
    return writer, target, src, dst, writer.add_peer(target.metadata())


def test_names_are_unique(wire):
    assert wire.end().name != wire.end().name


def test_peer_is_called_by_its_own_name(pair):
    _, target, _, _, peer = pair
    assert peer == target.name


@pytest.mark.parametrize(
    "memory",
    [
        [],
        [LocalMemory(4096, 0)],
        [LocalMemory(4096, -1)],
        [LocalMemory(0, 10)],
        [LocalMemory((1 << 64) - 4096, 4096)],
    ],
    ids=["nothing", "zero length", "negative length", "null", "beyond user space"],
)
def test_registering_what_is_no_memory_is_refused(wire, memory):
    with pytest.raises(RegistrationError):
        wire.end().register(memory)


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 100), (10, 10), (-10, 20), (99, 1), (-50, 300)])
def test_registering_an_overlap_is_refused(wire, offset, nbytes):
    end = wire.end()
    array = np.zeros(1000, np.uint8)
    base = array.ctypes.data + 200
    with end.register([LocalMemory(base, 100)]):
        with pytest.raises(RegistrationError, match="overlaps"):
            end.register([LocalMemory(base + offset, nbytes)])
        end.register([LocalMemory(base + 100, 100), LocalMemory(base - 100, 100)]).close()


def test_a_refused_registration_leaves_nothing_behind(wire):
    end = wire.end()
    array = np.zeros(1000, np.uint8)
    with pytest.raises(RegistrationError):
        end.register([LocalMemory(array.ctypes.data, 500), LocalMemory(array.ctypes.data + 500, 0)])
    end.register([LocalMemory(array.ctypes.data, 1000)]).close()


def test_memory_can_be_registered_again_after_close(wire):
    end = wire.end()
    array = np.zeros(1000, np.uint8)
    for _ in range(2):
        registration = end.register([LocalMemory(array.ctypes.data, 1000)])
        registration.close()
        registration.close()


def test_all_bytes_arrive_and_nothing_else_is_touched(wire, pair):
    writer, _, src, dst, peer = pair
    src[:] = np.random.default_rng(0).integers(0, 256, MIB, np.uint8)
    ops = [WriteOp(src.ctypes.data + 100, dst.ctypes.data + 1000, MIB - 2000)]
    with writer.prepare(peer, ops) as write:
        assert (write.nbytes, write.descriptors, write.peer) == (MIB - 2000, 1, peer)
        writer.post(write, b"v1")
        writer.wait([write], timeout_s=10)
    assert np.array_equal(dst[1000:-1000], src[100:-1900])
    assert not dst[:1000].any()
    assert not dst[-1000:].any()


def test_many_scattered_writes_arrive(wire, pair):
    writer, _, src, dst, peer = pair
    src[:] = np.random.default_rng(1).integers(0, 256, MIB, np.uint8)
    nbytes, count = 100, 5000
    order = np.random.default_rng(2).permutation(count)
    ops = [
        WriteOp(src.ctypes.data + i * nbytes, dst.ctypes.data + int(j) * (nbytes + 7), nbytes)
        for i, j in enumerate(order)
    ]
    write = writer.prepare(peer, ops)
    writer.post(write, b"v1")
    writer.wait([write], timeout_s=10)
    want = np.zeros_like(dst)
    rows = want[: count * (nbytes + 7)].reshape(count, nbytes + 7)
    rows[order, :nbytes] = src[: count * nbytes].reshape(count, nbytes)
    assert np.array_equal(dst, want)


def test_one_prepared_write_carries_new_bytes_and_a_new_message_each_time(wire, pair):
    writer, target, src, dst, peer = pair
    write = writer.prepare(peer, [whole(src, dst)])
    for version in range(1, 6):
        src[:] = version
        writer.post(write, f"v{version}".encode())
        writer.wait([write], timeout_s=10)
        assert wire.receive(target, 1) == {writer.name: [f"v{version}".encode()]}
        assert (dst == version).all()
    assert not target.notifications()


def test_metadata_of_some_memory_opens_no_other_until_all_of_it_comes(wire):
    writer, target = wire.end(), wire.end()
    src, dst, other = (wire.memory(end, 1000) for end in (writer, target, target))
    kind = "VRAM" if wire.kind.startswith("cuda_ipc") else "DRAM"
    told = [LocalMemory(dst.ctypes.data, 1000, kind)]
    peer = writer.add_peer(target.metadata(told))
    src[:] = 7
    first = writer.prepare(peer, [whole(src, dst)])
    with pytest.raises(TransportError):
        writer.prepare(peer, [whole(src, other)])
    assert writer.add_peer(target.metadata()) == peer
    for write in (first, writer.prepare(peer, [whole(src, other)])):
        writer.post(write, b"v1")
        writer.wait([write], timeout_s=10)
    assert (dst == 7).all()
    assert (other == 7).all()


def test_one_that_tells_of_no_memory_can_be_a_peer(wire):
    writer, target = wire.end(), wire.end()
    src, dst = wire.memory(writer, 1000), wire.memory(target, 1000)
    assert target.add_peer(writer.metadata(())) == writer.name
    write = writer.prepare(writer.add_peer(target.metadata()), [whole(src, dst)])
    writer.post(write, b"v1")
    writer.wait([write], timeout_s=10)
    assert wire.receive(target, 1) == {writer.name: [b"v1"]}
    target.remove_peer(writer.name)


def test_who_sees_the_notification_sees_all_bytes(wire):
    writer, target = wire.end(), wire.end()
    src, dst = wire.memory(writer, 8 * MIB), wire.memory(target, 8 * MIB)
    peer = writer.add_peer(target.metadata())
    step = 8 * MIB // 64
    ops = [
        WriteOp(src.ctypes.data + at, dst.ctypes.data + at, step)
        for at in reversed(range(0, 8 * MIB, step))
    ]
    write = writer.prepare(peer, ops)
    for version in range(1, 11):
        src[:] = version
        writer.post(write, b"v")
        waiter = threading.Thread(target=writer.wait, args=([write],), kwargs={"timeout_s": 10})
        waiter.start()
        got = wire.receive(target, 1)
        arrived = bool((dst == version).all())
        waiter.join()
        assert got == {writer.name: [b"v"]}
        assert arrived


def test_messages_may_be_any_bytes_and_keep_their_sender(wire):
    target, first, second = wire.end(), wire.end(), wire.end()
    dst = wire.memory(target, 2000)
    messages = {first.name: b"\x00\xff\n", second.name: b"m" * 5000}
    for at, writer in ((0, first), (1000, second)):
        src = wire.memory(writer, 1000)
        src[:] = 1 + at // 1000
        peer = writer.add_peer(target.metadata())
        write = writer.prepare(peer, [WriteOp(src.ctypes.data, dst.ctypes.data + at, 1000)])
        writer.post(write, messages[writer.name])
        writer.wait([write], timeout_s=10)
    assert wire.receive(target, 2) == {name: [message] for name, message in messages.items()}
    assert (dst[:1000] == 1).all()
    assert (dst[1000:] == 2).all()


def test_one_writer_reaches_several_peers_in_one_wait(wire):
    writer, targets = wire.end(), [wire.end(), wire.end()]
    src = wire.memory(writer, MIB)
    src[:] = 7
    arrays = [wire.memory(target, MIB) for target in targets]
    writes = [
        writer.prepare(writer.add_peer(target.metadata()), [whole(src, dst)])
        for target, dst in zip(targets, arrays, strict=True)
    ]
    for write in writes:
        writer.post(write, b"v1")
    writer.wait(writes, timeout_s=10)
    for target, dst in zip(targets, arrays, strict=True):
        assert (dst == 7).all()
        assert wire.receive(target, 1) == {writer.name: [b"v1"]}


def test_a_message_can_be_sent_without_a_write(wire, pair):
    writer, target, _, _, peer = pair
    writer.notify(peer, b"hello")
    assert wire.receive(target, 1) == {writer.name: [b"hello"]}


@pytest.mark.parametrize("side", ["local", "remote"])
@pytest.mark.parametrize(("offset", "nbytes"), [(MIB, 10), (MIB - 5, 10), (-1, 10), (0, 0)])
def test_writes_outside_registered_memory_are_refused(wire, pair, side, offset, nbytes):
    writer, _, src, dst, peer = pair
    here, there = (offset, 0) if side == "local" else (0, offset)
    ops = [
        WriteOp(src.ctypes.data, dst.ctypes.data, 10),
        WriteOp(src.ctypes.data + here, dst.ctypes.data + there, nbytes),
    ]
    with pytest.raises(TransportError):
        writer.prepare(peer, ops)


def test_no_writes_cannot_be_prepared(pair):
    writer, _, _, _, peer = pair
    with pytest.raises(TransportError, match="no writes"):
        writer.prepare(peer, [])


def test_memory_registered_after_the_metadata_is_out_of_reach_until_it_is_exchanged_again(
    wire, pair
):
    writer, target, src, _, peer = pair
    later = wire.memory(target, MIB)
    src[:] = 9
    with pytest.raises(TransportError):
        writer.prepare(peer, [whole(src, later)])
    assert writer.add_peer(target.metadata()) == peer
    write = writer.prepare(peer, [whole(src, later)])
    writer.post(write, b"v1")
    writer.wait([write], timeout_s=10)
    assert (later == 9).all()


def test_unknown_peer_is_refused(wire, pair):
    writer, _, src, dst, _ = pair
    with pytest.raises(TransportError, match="nobody"):
        writer.prepare("nobody", [whole(src, dst)])
    with pytest.raises(TransportError, match="nobody"):
        writer.notify("nobody", b"hello")
    writer.remove_peer("nobody")


def test_damaged_metadata_is_refused_and_the_right_one_works_after_it(wire):
    writer, target = wire.end(), wire.end()
    src, dst = wire.memory(writer, 100), wire.memory(target, 100)
    good = target.metadata()
    middle = len(good) // 2
    damaged = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
    for bad in (b"", b"garbage", good[:-1], good[:middle], b"x" + good, damaged):
        with pytest.raises(TransportError):
            writer.add_peer(bad)
    src[:] = 5
    write = writer.prepare(writer.add_peer(good), [whole(src, dst)])
    writer.post(write, b"v1")
    writer.wait([write], timeout_s=10)
    assert (dst == 5).all()


def test_an_end_is_no_peer_of_its_own(wire):
    end = wire.end()
    with pytest.raises(TransportError):
        end.add_peer(end.metadata())


def test_deadline_error_names_the_peer_that_is_late_and_no_other(wire):
    writer, stalled, good = wire.end(), wire.stalled_end(), wire.end()
    src = wire.memory(writer, MIB)
    writes = []
    for end in (stalled, good):
        dst = wire.memory(end, MIB)
        writes.append(writer.prepare(writer.add_peer(end.metadata()), [whole(src, dst)]))
    for write in writes:
        writer.post(write, b"v1")
    writer.wait([writes[1]], timeout_s=10)
    with pytest.raises(DeadlineError, match=stalled.name) as caught:
        writer.wait(writes, timeout_s=0.3)
    assert caught.value.context["peers"] == [stalled.name]
    assert wire.receive(good, 1) == {writer.name: [b"v1"]}


def test_a_write_in_flight_can_be_closed(wire):
    writer, stalled = wire.end(), wire.stalled_end()
    src, dst = wire.memory(writer, MIB), wire.memory(stalled, MIB)
    write = writer.prepare(writer.add_peer(stalled.metadata()), [whole(src, dst)])
    writer.post(write, b"v1")
    write.close()
    write.close()
    with pytest.raises(TransferFailedError, match="closed"):
        writer.wait([write], timeout_s=1)
    with pytest.raises(TransferFailedError, match="closed"):
        writer.post(write, b"v2")


def test_posting_twice_without_a_wait_is_refused_and_the_first_completes(wire, pair):
    writer, target, src, dst, peer = pair
    src[:] = 3
    write = writer.prepare(peer, [whole(src, dst)])
    writer.post(write, b"v1")
    with pytest.raises(TransferFailedError, match=peer):
        writer.post(write, b"v2")
    writer.wait([write], timeout_s=10)
    assert (dst == 3).all()
    assert wire.receive(target, 1) == {writer.name: [b"v1"]}
    writer.post(write, b"v2")
    writer.wait([write], timeout_s=10)


def test_a_write_belongs_to_the_end_that_prepared_it(wire, pair):
    writer, _, src, dst, peer = pair
    write = writer.prepare(peer, [whole(src, dst)])
    stranger = wire.end()
    with pytest.raises(TransferFailedError, match="not prepared by this transport"):
        stranger.post(write, b"v1")
    with pytest.raises(TransferFailedError, match="not prepared by this transport"):
        stranger.wait([write], timeout_s=1)


def test_an_empty_notification_is_refused(pair):
    writer, _, src, dst, peer = pair
    write = writer.prepare(peer, [whole(src, dst)])
    with pytest.raises(TransferFailedError, match="empty"):
        writer.post(write, b"")


def test_waiting_for_what_was_not_posted_returns_at_once(pair):
    writer, _, src, dst, peer = pair
    writer.wait([], timeout_s=0)
    writer.wait([writer.prepare(peer, [whole(src, dst)])], timeout_s=0)


def test_a_removed_peer_is_unknown_and_its_writes_are_closed(pair):
    writer, _, src, dst, peer = pair
    write = writer.prepare(peer, [whole(src, dst)])
    writer.remove_peer(peer)
    writer.remove_peer(peer)
    with pytest.raises(TransportError):
        writer.post(write, b"v1")
    with pytest.raises(TransportError, match="unknown"):
        writer.prepare(peer, [whole(src, dst)])


def test_closing_twice_is_safe_and_a_closed_end_refuses_everything(wire, pair):
    writer, target, src, dst, peer = pair
    write = writer.prepare(peer, [whole(src, dst)])
    registration = writer.register([LocalMemory(wire.memory(target, 10).ctypes.data, 10)])
    writer.close()
    writer.close()
    registration.close()
    write.close()
    writer.remove_peer(peer)
    for call in (
        lambda: writer.register([LocalMemory(src.ctypes.data, 10)]),
        writer.metadata,
        lambda: writer.add_peer(target.metadata()),
        lambda: writer.prepare(peer, [whole(src, dst)]),
        lambda: writer.post(write, b"v1"),
        lambda: writer.notify(peer, b"v1"),
        writer.notifications,
    ):
        with pytest.raises(TransportError):
            call()


def test_the_body_of_a_with_keeps_its_error(wire):
    writer, stalled = wire.end(), wire.stalled_end()
    src, dst = wire.memory(writer, MIB), wire.memory(stalled, MIB)
    peer = writer.add_peer(stalled.metadata())

    def push() -> None:
        with writer, writer.prepare(peer, [whole(src, dst)]) as write:
            writer.post(write, b"v1")
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        push()
