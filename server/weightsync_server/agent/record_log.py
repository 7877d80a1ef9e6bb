"""A file of JSON objects, a line each: begun whole, then added to.

A new one is a neighbour first that then takes the file's place, so that a crash at any moment
leaves the old one or the new one.  A line that a crash or a full disk cut short is none: who reads
stops before it, and nothing is ever written behind it.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger(__name__)

_MAGIC = b"weightsync-journal-2"
#: bytes of added lines after which the file has to be begun anew
_MAX_ADDED_NBYTES = 256 * 1024


class RecordLog:
    """One such file.  Writing takes microseconds, but for :meth:`draft` and :meth:`sync_folder`.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._neighbour = path.with_name(path.name + ".new")
        self._fd = -1
        self._inode = (0, 0)
        self._nbytes = self._begun_nbytes = 0

    def read(self) -> list[bytes]:
        """The lines that are whole, the oldest first; none: there is no file.

        Raises:
            OSError: It cannot be read.
            ValueError: It is no such file, or its first line is not whole.
        """
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            return []
        head, *rest = raw.split(b"\n")
        if head != _MAGIC:
            raise ValueError(f"it begins with {head[:40]!r}, not with {_MAGIC!r}")
        bodies = []
        for line in rest[:-1]:  # behind the last line's end is nothing, or a line without one
            body = line[9:]
            if line + b"\n" != _line(body):
                break
            bodies.append(body)
        if not bodies:
            raise ValueError("its checksum is wrong")
        if ignored := len(raw) - len(_MAGIC) - 1 - sum(len(_line(body)) for body in bodies):
            log.warning("the last %d bytes of %s are no whole line: ignored", ignored, self.path)
        return bodies

    def draft(self, body: bytes, *, sync: bool) -> int:
        """Write a neighbour that holds ``body`` alone; ``sync``: and have it on the disk.

        Returns:
            It, open: :meth:`begin` has it take the file's place.

        Raises:
            OSError: It could not be written.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        fd = os.open(self._neighbour, flags, 0o600)
        try:
            _write(fd, _MAGIC + b"\n" + _line(body))
            if sync:
                os.fsync(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def begin(self, draft: int, bodies: Sequence[bytes]) -> None:
        """Have the draft, with ``bodies`` behind what it holds, take the file's place.

        Raises:
            OSError: It has not.
        """
        try:
            for body in bodies:
                _write(draft, _line(body))
            made = os.fstat(draft)
            self._neighbour.replace(self.path)
        except BaseException:
            os.close(draft)
            raise
        self.close()
        self._fd, self._inode = draft, (made.st_dev, made.st_ino)
        self._nbytes = self._begun_nbytes = made.st_size

    def sync_folder(self) -> None:
        """Have it on the disk that the last draft took the file's place.

        Raises:
            OSError: Nobody can tell whether it is.
        """
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def add(self, body: bytes) -> bool:
        """Write a line behind the others, without syncing it: some microseconds.

        Returns:
            False: it is not in the file, which has to be begun anew: by this process for the first
            time, or because it is no longer as it was left, because it has grown too long, or
            because of an error that will tell itself then.
        """
        line = _line(body)
        if self._fd < 0 or self._nbytes + len(line) > self._begun_nbytes + _MAX_ADDED_NBYTES:
            return False
        try:
            # an open file can be written to though it was deleted, or another took its place;
            # and behind a line that was cut short no reader looks
            there = self.path.stat()
            as_left = (*self._inode, self._nbytes)
            if (there.st_dev, there.st_ino, there.st_size) != as_left:
                return False
            written = os.write(self._fd, line)
        except OSError:
            return False
        if written != len(line):
            return False
        self._nbytes += len(line)
        return True

    def close(self) -> None:
        """Let go of the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _write(fd: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def _line(body: bytes) -> bytes:
    return b"%08x %s\n" % (zlib.crc32(body), body)
