"""The disk of the agent's journal is full."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.conftest import OPTIONS
from tests.chaos.moments import DEADLINES, settled, strike
from tests.support.stack import Daemon, Stack

pytestmark = [
    pytest.mark.nixl,
    pytest.mark.chaos,
    pytest.mark.timeout(240),
    pytest.mark.skipif(os.geteuid() != 0, reason="a small disk needs root"),
]


class Disk:
    """A file system of a few KiB."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self) -> None:
        # the journal's last block, too: a line of some hundred bytes would fit in there
        for name in ("filler", "journal"):
            with contextlib.suppress(OSError), (self.folder / name).open("ab", 0) as file:
                while True:
                    file.write(bytes(512))

    def empty(self) -> None:
        (self.folder / "filler").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    folder = tmp_path_factory.mktemp("disk")
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=True, timeout=10
    )
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=10)


@pytest.fixture(scope="module")
def _on_disk(
    checkpoint: Path, engine: Daemon, disk: Disk, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    options = [*OPTIONS, "--journal", str(disk.folder / "journal")]
    stack = Stack(checkpoint, tmp_path_factory.mktemp("stack"), engine, options, DEADLINES)
    try:
        yield stack
    finally:
        stack.close()


@pytest.fixture
def on_disk(_on_disk: Stack, disk: Disk) -> Stack:
    disk.empty()
    _on_disk.heal()
    return _on_disk


@pytest.mark.parametrize("when", ["pause", "begin"])
def test_a_journal_that_cannot_be_written_refuses_the_push_and_the_engine_serves_on(
    on_disk: Stack, disk: Disk, when: str
) -> None:
    on_disk.push()
    held = on_disk.held()
    struck = strike(on_disk, when, disk.fill)
    assert struck.how == "JournalError"
    assert settled(on_disk) == "ready"
    on_disk.assert_serves(held)
    assert on_disk.status()["journal"]["trouble"]
    disk.empty()
    on_disk.assert_a_whole_push_works()
    assert not on_disk.status()["journal"]["trouble"]


@pytest.mark.parametrize("when", ["write", "commit", "resume"])
def test_a_disk_that_fills_up_after_the_begin_costs_the_push_nothing(
    on_disk: Stack, disk: Disk, when: str
) -> None:
    struck = strike(on_disk, when, disk.fill)
    assert struck.how == "done"
    assert struck.report is not None
    on_disk.assert_holds(struck.weights, struck.report.version)
    assert on_disk.status()["journal"]["trouble"]
    disk.empty()
    on_disk.assert_a_whole_push_works()
