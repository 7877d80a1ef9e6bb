"""What UCX finds around it when an agent starts: network cards, CPUs, where its log goes.

UCX reads ``UCX_NET_DEVICES`` and its like when a context is made, anew for each agent, and the
options of its log once, when the library is loaded.  Both happen while NIXL makes its backend (seen
with NIXL 1.5), so our values are in the environment for that long and the former ones are put back:
NCCL, MPI, and NIXL agents of others in this process and in its children find what they were given.

The threads that NIXL and UCX start meanwhile inherit the CPUs of the thread that starts them.  On
the GPU's NUMA node they allocate there too, by first touch: no memory policy is needed.

``WEIGHTSYNC_NICS`` says which cards: ``auto`` (the default, :mod:`weightsync.topology`), ``keep``
(whatever UCX and its variables choose), or names, ``mlx5_0:1,mlx5_1:1``.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from weightsync.errors import InputError
from weightsync.topology import Machine, read_machine

logger = logging.getLogger(__name__)

SETTING = "WEIGHTSYNC_NICS"
_NET_DEVICES, _RAILS, _LOG_FILE = "UCX_NET_DEVICES", "UCX_MAX_RMA_RAILS", "UCX_LOG_FILE"
#: NICs that one write is spread over, as NIXL sets it
_USUAL_RAILS = 2

_one_at_a_time = threading.Lock()
T = TypeVar("T")


def start(
    make: Callable[[], T], gpu: str | None, *, sysfs: str | Path = "/sys", dev: str | Path = "/dev"
) -> T:
    """Call ``make``, which starts an agent, with the NICs and on the CPUs that are near a GPU.

    Where UCX cannot start on the NICs that were chosen here it starts on its own choice, with a
    warning; on those that the user named it must.

    Args:
        make: Makes an agent and its backend; called again after a failure.
        gpu: PCI address; None: host memory, so the choice is left to UCX.
        sysfs: For tests.
        dev: For tests.

    Raises:
        InputError: ``WEIGHTSYNC_NICS`` is wrong.
        Exception: Whatever ``make`` raises.
    """
    machine = read_machine(sysfs, dev)
    named = _named(machine, Path(sysfs))
    chosen = named
    if chosen is None and gpu is not None and gpu in machine.shares:
        chosen = [nic.name for nic in machine.shares[gpu].nics]
    values = {} if _LOG_FILE in os.environ else {_LOG_FILE: "stderr"}  # stdout is for results
    with _one_at_a_time, _on_cpus(machine.cpus_near(gpu) if gpu else frozenset()):
        if chosen:
            try:
                with _environment(values | _nic_variables(chosen)):
                    return make()
            except Exception as error:
                if named is not None:
                    raise
                logger.warning(
                    "UCX does not start on %s, near GPU %s (%s): it chooses by itself now, TCP "
                    "perhaps; %s names others or keeps its choice",
                    chosen, gpu, error, SETTING,
                )  # fmt: skip
        with _environment(values):
            return make()


def _named(machine: Machine, sysfs: Path) -> list[str] | None:
    """What the user says: names, none for UCX's own choice; None: nothing.

    Raises:
        InputError: A name is of no NIC or network interface here.
    """
    setting = os.environ.get(SETTING, "").strip()
    if setting in {"", "auto"}:
        return None
    if setting == "keep":
        return []
    names = [name.strip() for name in setting.split(",")]
    known = {nic.name for nic in machine.nics} | {nic.name.split(":")[0] for nic in machine.nics}
    if (sysfs / "class/net").is_dir():
        known |= {entry.name for entry in (sysfs / "class/net").iterdir()}
    if unknown := [name for name in names if name not in known]:
        raise InputError(
            f"{SETTING}={setting}: there is no {', '.join(map(repr, unknown))} on this machine",
            hint=f"auto, keep, or a list of {', '.join(sorted(known)) or 'NICs: it has none'}",
        )
    return names


def _nic_variables(names: list[str]) -> dict[str, str]:
    values = {_NET_DEVICES: ",".join(names)}
    if len(names) > _USUAL_RAILS and _RAILS not in os.environ:
        values[_RAILS] = str(len(names))
    former = os.environ.get(_NET_DEVICES, values[_NET_DEVICES])
    if former != values[_NET_DEVICES]:
        logger.warning(
            "%s=%s is set aside for this agent, which uses %s; %s=keep keeps it",
            _NET_DEVICES, former, values[_NET_DEVICES], SETTING,
        )  # fmt: skip
    return values


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment, and put back what was there."""
    former = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _on_cpus(cpus: frozenset[int]) -> Iterator[None]:
    """Run this thread on those of its CPUs that are in ``cpus``; on all of them if none is."""
    allowed = os.sched_getaffinity(0)  # 0: this thread
    if not allowed & cpus:
        yield
        return
    with suppress(OSError):  # a sandbox may forbid it
        os.sched_setaffinity(0, allowed & cpus)
    try:
        yield
    finally:
        with suppress(OSError):
            os.sched_setaffinity(0, allowed)
