"""Hosts in network namespaces, and the switch between them: it delays, loses, and parts them.

Each namespace has a TAP device whose other end is this process, so that what ``tc netem`` does
needs no kernel module.  Linux, root and ``/dev/net/tun`` are needed.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import os
import random
import selectors
import struct
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_TUNSETIFF = 0x400454CA
_IFF_TAP_NO_PI = 0x0002 | 0x1000
_NET = "10.77.0"


def why_not() -> str:
    """Why there can be no network here; "" if there can."""
    if os.geteuid() != 0:
        return "namespaces need root"
    if not Path("/dev/net/tun").exists():
        return "no /dev/net/tun"
    try:
        probe = subprocess.run(
            ["ip", "netns", "list"], capture_output=True, timeout=10, check=False
        )
    except FileNotFoundError:
        return "no ip command"
    return "" if probe.returncode == 0 else "ip netns does not work"


@dataclass
class Host:
    """``exec``: what a command is started with to run there; "" is the test's own host."""

    name: str
    address: str
    fd: int

    @property
    def exec(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.name) if self.name else ()


@dataclass
class Network:
    """A switch.  ``delay_s`` and ``loss`` are of every frame; ``apart``: hosts that nobody reaches.

    A broadcast goes to all; what goes to one host is told by its Ethernet address.
    """

    hosts: list[Host] = field(default_factory=list)
    delay_s: float = 0.0
    loss: float = 0.0
    apart: set[str] = field(default_factory=set)
    frames: int = 0
    lost: int = 0
    _known: dict[bytes, int] = field(default_factory=dict)
    _over: bool = False

    def host(self, name: str) -> Host:
        """A new host; its loopback and its one device are up."""
        index = len(self.hosts) + 1
        device, address = f"wstap{index}", f"{_NET}.{index}"
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH", device.encode(), _IFF_TAP_NO_PI))
        inside: tuple[str, ...] = ()
        if name:
            _ip("netns", "add", name)
            _ip("link", "set", device, "netns", name)
            inside = ("-n", name)
            _ip(*inside, "link", "set", "lo", "up")
        _ip(*inside, "addr", "add", f"{address}/24", "dev", device)
        _ip(*inside, "link", "set", device, "up")
        made = Host(name, address, fd)
        self.hosts.append(made)
        return made

    def close(self) -> None:
        self._over = True
        for host in self.hosts:
            os.close(host.fd)
            if host.name:
                _ip("netns", "del", host.name)

    def run(self) -> None:
        """Passes frames on until it is closed; in a thread of its own."""
        draw = random.Random(1)
        waiting: list[tuple[float, int, int, bytes]] = []
        with selectors.DefaultSelector() as ready:
            for index, host in enumerate(self.hosts):
                ready.register(host.fd, selectors.EVENT_READ, index)
            while not self._over:
                left_s = max(waiting[0][0] - time.monotonic(), 0) if waiting else 0.05
                for key, _ in ready.select(min(left_s, 0.05)):
                    for frame in _frames(key.fd):
                        self._take(key.data, frame, draw, waiting)
                now = time.monotonic()
                while waiting and waiting[0][0] <= now:
                    _, _, to, frame = heapq.heappop(waiting)
                    with contextlib.suppress(OSError):  # a full device drops, like any other
                        os.write(self.hosts[to].fd, frame)

    def _take(
        self,
        came_from: int,
        frame: bytes,
        draw: random.Random,
        waiting: list[tuple[float, int, int, bytes]],
    ) -> None:
        self._known[frame[6:12]] = came_from
        one = self._known.get(frame[:6])
        for to in range(len(self.hosts)) if one is None else (one,):
            names = {self.hosts[to].name, self.hosts[came_from].name}
            if to == came_from or names & self.apart:
                continue
            self.frames += 1
            if draw.random() < self.loss:
                self.lost += 1
                continue
            heapq.heappush(waiting, (time.monotonic() + self.delay_s, self.frames, to, frame))


def _frames(fd: int) -> Iterator[bytes]:
    for _ in range(64):
        try:
            yield os.read(fd, 65_536)
        except OSError:
            return


@contextlib.contextmanager
def network(names: Sequence[str]) -> Iterator[Network]:
    """Hosts of these names, connected; the first without a name is the test's own."""
    made = Network()
    thread = threading.Thread(target=made.run, daemon=True)
    try:
        for name in names:
            made.host(name)
        thread.start()
        yield made
    finally:
        made._over = True
        if thread.is_alive():
            thread.join(5)
        made.close()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=10)
