"""What the ucxx transport says on the wire, and the part of ucxx that it uses.

ucxx 0.52 binds UCX's two-sided messages alone: no ``ucp_put``, no remote keys.  So a write is four
steps, of which the target's process takes part in all: *ask* (what goes where, with the target's
key), *go* (the target has looked at every address and posted its receives), the bytes, straight
into place, and *done*.  Nothing moves before *go*, and no tag is ever used twice, so no late byte
of one write can land in another (WS-8).
"""

from __future__ import annotations

import ctypes
import importlib
import select
import struct
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TypeAlias

import msgspec

from weightsync.errors import TransportError, WeightSyncError
from weightsync.layout import MemoryKind
from weightsync.transport import ucx
from weightsync.transport.base import Side

#: writes of one *ask*: the rest of a tag's 64 bits numbers the streams
MAX_OPS = 1 << 22
_CONTROL_TAG = 1
_DATA_TAG = 1 << 62
_OP = struct.Struct("<QQQ")


class Ask(msgspec.Struct, frozen=True, tag="ask"):
    """A write wants to start.  ``ops`` are (interval, address, bytes) at the target."""

    write: int
    sender: str
    address: bytes
    key: bytes
    kind: MemoryKind
    device_id: int
    ops: bytes
    message: bytes


class Go(msgspec.Struct, frozen=True, tag="go"):
    """The target's receives are posted."""

    write: int
    stream: int


class Done(msgspec.Struct, frozen=True, tag="done"):
    """All bytes are in place; ``why``: they are not, and will not be."""

    write: int
    why: str = ""


class Note(msgspec.Struct, frozen=True, tag="note"):
    """A message on its own."""

    sender: str
    key: bytes
    body: bytes


Control: TypeAlias = Ask | Go | Done | Note
_decoder = msgspec.msgpack.Decoder(Control)


def pack_ops(ops: Sequence[tuple[int, int, int]]) -> bytes:
    """(interval, address, bytes) of every write of an *ask*."""
    return b"".join(_OP.pack(*op) for op in ops)


def unpack_ops(raw: bytes) -> list[tuple[int, int, int]]:
    """What :func:`pack_ops` packed.

    Raises:
        struct.error: It is nothing of the kind.
    """
    return list(_OP.iter_unpack(raw))


def load_bindings() -> tuple[Any, Any]:
    """The classes of ucxx, and its buffer class.

    Raises:
        TransportError: ucxx is not installed, or does not load.
    """
    try:
        importlib.import_module("ucxx")  # finds its own UCX
        api = importlib.import_module("ucxx._lib.libucxx")
        return api, importlib.import_module("ucxx._lib.arr").Array
    except (ImportError, OSError, RuntimeError) as error:
        raise TransportError(
            f"ucxx cannot be loaded: {error}",
            hint='pip install "weightsync[ucxx]" (Linux), or choose another transport',
        ) from error


class _DeviceBytes:
    """Device memory by its address, as CUDA's array interface shows it."""

    def __init__(self, addr: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (addr, False), "shape": (nbytes,), "typestr": "|u1", "version": 3,
        }  # fmt: skip


class Wire:
    """One UCX worker, and the messages that it sends and gets.  Not thread-safe.

    Args:
        gpu: PCI address of the GPU whose NICs it uses; None: UCX's choice.

    Raises:
        TransportError: ucxx cannot be loaded, or UCX does not start.
    """

    def __init__(self, gpu: str | None) -> None:
        def make() -> tuple[Any, Any]:
            # loaded here, where UCX finds the options of its log
            self._api, self._array = load_bindings()
            features = (self._api.Feature.TAG, self._api.Feature.WAKEUP)
            context = self._api.UCXContext(feature_flags=features)
            options = {"enable_delayed_submission": False, "enable_python_future": False}
            return context, self._api.UCXWorker(context, **options)

        try:
            self._context, self._worker = ucx.start(make, gpu)
            self._worker.init_blocking_progress_mode()
        except WeightSyncError:
            raise
        except Exception as error:
            raise TransportError(
                f"UCX does not start: {error}", hint="look at UCX_TLS and UCX_NET_DEVICES"
            ) from error
        self.address = bytes(self._worker.address.tobytes())
        self.error: type[Exception] = self._api.UCXError
        self._device: int | None = None
        self._arriving: list[tuple[Any, Any]] = []
        #: what is being sent, with the memory that it is read from
        self._leaving: list[tuple[Any, Any]] = []

    @property
    def sending(self) -> bool:
        """Whether memory is being read."""
        return any(not request.completed for request, _ in self._leaving)

    def connect(self, address: bytes) -> Any:
        """An endpoint; a wrong address shows when it is used."""
        peer = self._api.UCXAddress.create_from_buffer(address)
        return self._worker.create_endpoint_from_worker_address(peer, True)

    def memory(self, addr: int, nbytes: int, side: Side) -> Any:
        """Memory by its address, as ucxx takes it."""
        if side.kind == "VRAM":
            self._device = side.device_id
            return self._array(_DeviceBytes(addr, nbytes))
        return self._array((ctypes.c_ubyte * nbytes).from_address(addr))

    def say(self, endpoint: Any, message: Control) -> Any:
        """Send a message; its request."""
        raw = bytearray(msgspec.msgpack.encode(message))
        held = self._array((ctypes.c_ubyte * len(raw)).from_buffer(raw))
        request = endpoint.tag_send(held, self._api.UCXXTag(_CONTROL_TAG))
        self._leaving.append((request, held))
        return request

    def send(self, endpoint: Any, stream: int, index: int, memory: Any) -> None:
        """Send the bytes of one write."""
        self._leaving.append((endpoint.tag_send(memory, self._tag(stream, index)), memory))

    def receive(self, stream: int, index: int, memory: Any) -> Any:
        """Take the bytes of one write into place."""
        return self._worker.tag_recv(memory, self._tag(stream, index))

    def progress(self) -> list[Control]:
        """Let UCX work; the messages that came in, in their order."""
        while self._worker.progress_once():
            pass
        tag = self._api.UCXXTag(_CONTROL_TAG)
        while (found := self._worker.tag_probe(tag)).matched:
            raw = (ctypes.c_ubyte * found.length)()
            self._arriving.append((self._worker.tag_recv(self._array(raw), tag), raw))
        self._leaving = [pair for pair in self._leaving if not pair[0].completed]
        messages: list[Control] = []
        while self._arriving and self._arriving[0][0].completed:
            _, raw = self._arriving.pop(0)
            with suppress(msgspec.DecodeError):  # nothing of ours: not even an answer is due
                messages.append(_decoder.decode(bytes(raw)))
        return messages

    def rest(self, timeout_s: float) -> None:
        """Return when something came in, or after ``timeout_s``.  Any thread, at any time."""
        poll = select.poll()  # one object is one thread's
        poll.register(self._worker.epoll_file_descriptor, select.POLLIN)
        poll.poll(timeout_s * 1000)

    def use_device(self) -> None:
        """Give this thread the CUDA context that UCX copies with, if there is device memory."""
        if self._device is not None:
            importlib.import_module("ucxx._cuda_context").ensure_cuda_context(self._device)

    def arm(self) -> bool:
        """Whether there is nothing left to do, so that :meth:`rest` may be called."""
        return bool(self._worker.arm())

    def cancel(self) -> None:
        """Give up everything in flight: no memory is read or written after it."""
        self._worker.cancel_inflight_requests(period=10**8, max_attempts=10)
        self.progress()

    @staticmethod
    def disconnect(endpoint: Any) -> None:
        """Close an endpoint at once; what it had in flight fails."""
        endpoint.close_blocking(period=10**8, max_attempts=10)

    def _tag(self, stream: int, index: int) -> Any:
        return self._api.UCXXTag(_DATA_TAG | stream * MAX_OPS | index)
