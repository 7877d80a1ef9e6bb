"""A TCP link of the tests' own: it can be cut, stand still, be slow, or lose what comes back."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time

_CHUNK = 4096


class Link:
    """Listens on a port of its own and passes everything on to another, both ways.

    Moods: ``pass``; ``refuse``: connections are reset, new ones refused; ``stall``: nothing is
    passed on; ``deaf``: what is asked is passed on, and the connection is reset when the answer
    comes; ``slow``: a few chunks a second.
    """

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.mood = "pass"
        #: how many answers are lost before the link passes again; None: all
        self.loses: int | None = None
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._closed = False
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def become(self, mood: str, *, loses: int | None = None) -> None:
        """Change, for what is under way, too."""
        if self.mood == "refuse" and mood != "refuse":
            self._listener = socket.create_server(("127.0.0.1", self.port))
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()
        elif mood == "refuse" and self.mood != "refuse":
            self._shut_listener()
        self.mood, self.loses = mood, loses
        if mood == "refuse":
            self._reset_all()

    def close(self) -> None:
        self._closed = True
        self._shut_listener()
        self._reset_all()

    def _shut_listener(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _reset_all(self) -> None:
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                _reset(end)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self._target, timeout=5)
            except OSError:
                _reset(near)
                continue
            far.settimeout(None)
            with self._lock:
                self._pairs.append((near, far))
            for source, sink, asks in ((near, far, True), (far, near, False)):
                threading.Thread(target=self._pump, args=(source, sink, asks), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, asks: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK):
                while self.mood == "stall" and not self._closed:
                    time.sleep(0.01)
                if self.mood == "slow":
                    time.sleep(0.05)
                if self.mood == "deaf" and not asks:
                    if self.loses is not None:
                        self.loses -= 1
                        if self.loses <= 0:
                            self.mood = "pass"
                    break
                sink.sendall(data)
        for end in (source, sink):
            _reset(end)


def _reset(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
