"""Processes that write into others' memory, named so that their end can be told on their host.

Linux alone; elsewhere nobody has a name, and nobody is waited for.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_PROC = Path("/proc")
#: fields of /proc/PID/stat, counted behind the command's name
_STATE, _STARTED = 0, 19


@dataclass(frozen=True, slots=True)
class Writer:
    """One process of one host, for all time.

    Attributes:
        host: The kernel's boot id: another one is another host, or the same before it started anew.
        pid_namespace: What ``pid`` is counted in.
        pid: Its number, which others get later.
        started: Clock ticks between the host's start and its own.
    """

    host: str
    pid_namespace: int
    pid: int
    started: int


@cache
def _here() -> tuple[str, int]:
    boot_id = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    return boot_id, (_PROC / "self/ns/pid").stat().st_ino


def neighbourhood() -> str | None:
    """The same in processes that can be told to have ended; None where nobody tells.

    They are those of one host, until it starts anew, and of one namespace of pids.
    """
    try:
        boot_id, namespace = _here()
    except OSError:
        return None
    return f"{boot_id}:{namespace}"


def this_process() -> Writer | None:
    """The calling process; None where the system does not tell."""
    try:
        host, namespace = _here()
        started = int(_stat(os.getpid())[_STARTED])
    except (OSError, ValueError, IndexError):
        return None
    return Writer(host, namespace, os.getpid(), started)


def lives_since(pid: int) -> int | None:
    """The tick that a process of this namespace started at; None: none lives, or nobody tells."""
    try:
        stat = _stat(pid)
        return None if stat[_STATE] in "ZX" else int(stat[_STARTED])
    except (OSError, ValueError, IndexError):
        return None


def may_write_here(writer: Writer) -> bool:
    """Whether a process could still write into memory of this one without its help.

    It must live, stopped or not, on this host and in this namespace of pids: the kernel lets
    nobody else into a process's memory, and a network card ends access at deregistration.
    """
    try:
        if _here() != (writer.host, writer.pid_namespace):
            return False
        stat = _stat(writer.pid)
        return int(stat[_STARTED]) == writer.started and stat[_STATE] not in "ZX"
    except (OSError, ValueError, IndexError):
        return False


def _stat(pid: int) -> list[str]:
    # the command's name may hold spaces and brackets
    return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
