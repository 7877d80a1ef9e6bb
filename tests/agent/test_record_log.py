"""What a journal's file holds after a crash, on a full disk, and when others touch it."""

from __future__ import annotations

import asyncio
import errno
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightsync.errors import JournalError
from weightsync.state import AgentState
from weightsync_server.agent.journal import Journal, Record, Remembered
from weightsync_server.agent.record_log import RecordLog

BODIES = [b'{"a": 1}', b'{"a": 2}', b'{"a": 3}']


@pytest.fixture
def path(tmp_path):
    return tmp_path / "the.journal"


def begin(log, body):
    log.begin(log.draft(body, sync=False), [])


@pytest.fixture
def filled(path):
    log = RecordLog(path)
    begin(log, BODIES[0])
    assert log.add(BODIES[1])
    assert log.add(BODIES[2])
    yield log
    log.close()


@pytest.fixture
def journal(path):
    made = Journal(path, lambda error: None)
    made.open()
    yield made
    made.close()


@pytest.fixture
def read(path):
    """What the next agent reads."""

    def read() -> Record:
        return Record.of(RecordLog(path).read())

    return read


@pytest.fixture
def whole_writes(monkeypatch):
    """Every record that is written whole, and whether it is synced."""
    seen = []
    draft = RecordLog.draft

    def counted(self, body, *, sync):
        seen.append(sync)
        return draft(self, body, sync=sync)

    monkeypatch.setattr(RecordLog, "draft", counted)
    return seen


def at_once(coroutine):
    """Run what must not wait for anything."""
    with pytest.raises(StopIteration):
        coroutine.send(None)


def held(version, push_id="p1"):
    return Record(state=AgentState(phase="paused", version=version, owner=push_id))


def free(version):
    return Record(state=AgentState(phase="ready", version=version))


# ------------------------------------------------------------------ the file


def test_a_line_that_was_cut_anywhere_is_ignored_and_those_before_it_are_read(filled, path, caplog):
    raw = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(raw) if byte == ord("\n")][1:]
    for cut in range(ends[0], len(raw)):
        path.write_bytes(raw[:cut])
        assert filled.read() == BODIES[: sum(end <= cut for end in ends)]
    assert "are no whole line: ignored" in caplog.text
    path.write_bytes(raw)
    assert filled.read() == BODIES


@pytest.mark.parametrize("at", [1, 20, 22, 29, 30, 38])
def test_a_damaged_first_line_or_head_is_refused(filled, path, at):
    raw = path.read_bytes()
    path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    with pytest.raises(ValueError, match=r"it begins with|checksum"):
        filled.read()


def test_behind_a_damaged_line_nothing_is_believed(filled, path):
    path.write_bytes(path.read_bytes().replace(b'{"a": 2}', b'{"a": 7}'))
    assert filled.read() == BODIES[:1]


def test_nothing_is_written_behind_a_line_that_was_cut_short(filled, path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:5]))
    assert not filled.add(b'{"a": 4}')
    monkeypatch.undo()
    torn = path.read_bytes()
    assert not filled.add(b'{"a": 5}')
    assert path.read_bytes() == torn
    begin(filled, b'{"a": 6}')
    assert filled.add(b'{"a": 7}')
    assert filled.read() == [b'{"a": 6}', b'{"a": 7}']


def test_a_file_that_another_took_the_place_of_is_not_added_to(filled, path):
    path.rename(path.with_name("elsewhere"))
    assert not filled.add(b'{"a": 4}'), "it is gone"
    path.write_bytes(path.with_name("elsewhere").read_bytes())
    assert not filled.add(b'{"a": 4}'), "it is another, though the same to read"


def test_a_file_grows_no_longer_than_some_hundred_kilobytes(filled, path):
    body = b'{"a": "%s"}' % (b"x" * 1000)
    while filled.add(body):
        assert path.stat().st_size < 300_000
    assert path.stat().st_size > 200_000
    begin(filled, body)
    assert filled.add(body)


# ------------------------------------------------------------------ the journal


async def test_while_a_push_holds_the_engine_nothing_is_waited_for_nor_written_whole(
    journal, read, path, whole_writes
):
    await journal.save(free(1))
    assert whole_writes == [True]
    inode = path.stat().st_ino
    for version in (1, 2, 3):
        at_once(journal.save(journal.record.model_copy(update={"state": held(version).state})))
        assert read() == journal.record
        answer = Remembered(asked="x")
        journal.save_soon(journal.record.with_answer("p1", str(version), answer))
        async with asyncio.timeout(5):
            while read() != journal.record:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert set(read().answers["p1"]) == {str(v + 1) for v in range(version)}
    assert whole_writes == [True]
    assert path.stat().st_ino == inode


async def test_what_ends_a_push_is_written_whole_and_synced_in_one_go(journal, read, whole_writes):
    await journal.save(free(1))
    at_once(journal.save(held(2)))
    whole_writes.clear()
    journal.save_soon(free(2))
    journal.save_soon(journal.record.with_answer("p1", "resume", Remembered(asked="x")))
    await journal.flush()
    assert read() == journal.record
    assert whole_writes == [True]
    assert len(RecordLog(journal.path).read()) == 1


async def test_a_push_writes_no_file_whole_from_its_pause_to_its_resume(
    make_agent, engine, trainer, whole_writes
):
    agent = await make_agent(engine.url)
    t = await trainer(agent).rendezvous()
    await agent.agent.service.journal.flush()
    whole_writes.clear()
    await t.begin(1, pause="keep")
    await t.commit(1)
    assert not whole_writes
    await t.resume()
    await agent.agent.service.journal.flush()
    assert whole_writes
    assert all(whole_writes), "synced"


@pytest.mark.parametrize("harm", ["deleted", "replaced", "grown", "emptied"])
async def test_a_journal_that_somebody_touched_is_written_whole_in_the_midst_of_a_push(
    journal, read, path, harm
):
    await journal.save(free(1))
    at_once(journal.save(held(1)))
    match harm:
        case "deleted":
            path.unlink()
        case "replaced":
            path.with_name("other").write_bytes(b"of somebody else")
            path.with_name("other").replace(path)
        case "grown":
            with path.open("ab") as file:
                file.write(b"something")
        case "emptied":
            path.write_bytes(b"")
    await journal.save(held(2))
    assert read() == held(2)
    at_once(journal.save(held(3)))
    assert read() == held(3)
    assert not journal.trouble


async def test_a_journal_whose_folder_is_gone_refuses_and_goes_on_when_it_is_back(
    journal, read, path
):
    await journal.save(free(1))
    away = path.parent.rename(path.parent.with_name("away"))
    with pytest.raises(JournalError, match="No such file"):
        await journal.save(held(1))
    assert journal.trouble
    assert journal.record == free(1), "what was refused is not written later, either"
    away.rename(path.parent)
    journal.retry()
    await journal.flush()
    assert not journal.trouble
    assert read() == free(1)


async def test_a_disk_with_room_for_half_a_line_refuses_and_keeps_what_there_was(
    journal, read, monkeypatch
):
    await journal.save(free(1))
    at_once(journal.save(held(1)))
    write, room = os.write, [20]

    def full(fd, data):
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= (written := write(fd, data[: room[0]]))
        return written

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(JournalError, match="No space left"):
        await journal.save(held(2))
    assert read() == held(1)
    monkeypatch.undo()
    await journal.save(held(3))
    assert read() == held(3)


@pytest.fixture
def slow_disk(monkeypatch):
    """Whole files are begun, and are written when it is set; counts those under way at once."""
    disk = threading.Event()
    disk.running = disk.most = 0
    draft = RecordLog.draft

    def slow(self, body, *, sync):
        disk.running += 1
        disk.most = max(disk.most, disk.running)
        try:
            assert disk.wait(5)
            return draft(self, body, sync=sync)
        finally:
            disk.running -= 1

    monkeypatch.setattr(RecordLog, "draft", slow)
    return disk


async def test_a_push_does_not_wait_for_what_is_written_whole_and_nothing_is_lost(
    journal, read, slow_disk
):
    slow_disk.set()
    await journal.save(free(1))
    slow_disk.clear()
    whole = asyncio.create_task(journal.save(free(2)))
    while not slow_disk.running:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    assert read() == free(2)
    at_once(journal.save(held(3)))
    assert read() == held(3)
    slow_disk.set()
    await journal.flush()
    await whole
    assert read() == held(3), "it went along when the new file took the old one's place"
    at_once(journal.save(held(4)))
    assert read() == held(4)


async def test_one_thread_writes_though_who_waited_was_cancelled(journal, read, slow_disk):
    first = asyncio.create_task(journal.save(free(1)))
    while not slow_disk.running:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    first.cancel()
    second = asyncio.create_task(journal.save(free(2)))
    await asyncio.sleep(0.02)
    slow_disk.set()
    await second
    assert (slow_disk.most, read()) == (1, free(2))


async def test_a_push_that_left_everything_as_it_was_is_over_in_the_journal_too(journal, read):
    await journal.save(free(1))
    at_once(journal.save(held(1)))
    journal.save_soon(free(1))
    await journal.flush()
    assert read() == free(1)
    assert len(RecordLog(journal.path).read()) == 1


# ------------------------------------------------------------------ what is new in a record

STATES = st.builds(
    AgentState,
    version=st.integers(0, 3),
    target=st.none() | st.just(4),
    owner=st.none() | st.sampled_from(["p1", "p2"]),
)
CHANGES = st.tuples(
    st.one_of(
        STATES.map(lambda state: {"state": state}),
        st.dictionaries(st.sampled_from("ab"), st.sampled_from("xy")).map(
            lambda instances: {"instances": instances}
        ),
        st.tuples(st.integers(1, 7), st.sampled_from(["pause", "begin"])),
    ),
    st.booleans(),
)


@given(st.lists(CHANGES, max_size=30))
def test_all_that_was_new_put_together_is_the_record(changes):
    record = told = Record()
    parts = []
    for number, (change, tell) in enumerate(changes):
        if isinstance(change, dict):
            record = record.model_copy(update=change)
        else:
            push_id, call = f"p{change[0]}", change[1]
            answer = Remembered(asked=str(number), answer={"seconds": {"a": 0.5}})
            record = record.with_answer(push_id, call, answer)
        if tell:
            parts.append(record.since(told))
            told = record
    parts.append(record.since(told))
    made = Record.of(parts)
    assert made == record
    assert list(made.answers) == list(record.answers), "the oldest is the next to be forgotten"
