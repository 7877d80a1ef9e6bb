"""Meetings: all ranks get the decision or the same error, and none is left behind (WS-5)."""

from __future__ import annotations

import time
from typing import Any

import pytest
from thread_ranks import ThreadRanks, Wire, on_all

from weightsync.errors import (
    EngineTornError,
    InputError,
    NonFiniteError,
    RankFailedError,
    WeightSyncError,
)
from weightsync_client.ranks import Ranks, SoloRanks


def world(size: int, **options: float) -> list[ThreadRanks]:
    wire = Wire(size)
    return [ThreadRanks(wire, rank, **options) for rank in range(size)]


def meet(ranks: Ranks, work=lambda: 1, decide=sum, phase="fill", **options: Any) -> Any:
    return ranks.meet(phase, work, decide, kind=int, result=int, **options)


def test_every_rank_gets_what_rank_0_decided_from_all_parts() -> None:
    ranks = world(4)
    for _ in range(3):
        results = on_all([lambda r=r: meet(r, lambda: 10**r.rank) for r in ranks])
        assert results == [1111] * 4


def fail(error: BaseException):
    def work() -> int:
        raise error

    return work


@pytest.mark.parametrize("origin", [0, 1, 2])
def test_a_ranks_error_is_raised_on_all_with_class_context_hint_and_rank(origin: int) -> None:
    ranks = world(3)
    error = NonFiniteError("'w' is NaN", hint="look", tensors=[{"tensor": "w"}])
    undone: list[Any] = []
    results = on_all(
        [
            lambda r=r: meet(r, fail(error) if r.rank == origin else lambda: 1, undo=undone.append)
            for r in ranks
        ]
    )
    assert [type(r) for r in results] == [NonFiniteError] * 3
    for result in results:
        assert str(result) == f"rank {origin}: 'w' is NaN (look)"
        assert result.context == {"tensors": [{"tensor": "w"}], "rank": origin}
    assert results[origin] is error or origin
    assert len(undone) == 1
    assert on_all([lambda r=r: meet(r) for r in ranks]) == [3] * 3, "the ranks are still in step"


def test_what_rank_0_fails_in_deciding_all_ranks_raise_after_it_was_undone() -> None:
    ranks = world(3)
    order: list[str] = []

    def undo(error: BaseException) -> None:
        error.add_note("aborted")
        time.sleep(0.2)
        order.append("undone")

    def call(r: ThreadRanks) -> None:
        try:
            meet(r, decide=fail_deciding, undo=undo)
        except EngineTornError:
            order.append(f"rank {r.rank} raised")
            raise

    def fail_deciding(_: list[int]) -> int:
        raise EngineTornError("torn", hint="push")

    results = on_all([lambda r=r: call(r) for r in ranks])
    assert order[0] == "undone"
    assert {type(r) for r in results} == {EngineTornError}
    assert all(r.__notes__ == ["aborted"] for r in results)


def test_the_lowest_rank_that_failed_is_told_and_the_others_are_notes() -> None:
    ranks = world(3)
    works = [lambda: 1, fail(InputError("first")), fail(NonFiniteError("second"))]
    results = on_all([lambda r=r: meet(r, works[r.rank]) for r in ranks])
    assert [str(r) for r in results] == ["rank 1: first"] * 3
    assert all("NonFiniteError: rank 2: second" in r.__notes__[0] for r in results)
    assert isinstance(results[2].__cause__, NonFiniteError), "its own traceback is not lost"


def test_an_error_of_another_kind_is_a_rank_failed_error_everywhere() -> None:
    ranks = world(2)
    works = [lambda: 1, fail(ZeroDivisionError("by zero"))]
    results = on_all([lambda r=r: meet(r, works[r.rank]) for r in ranks])
    assert [type(r) for r in results] == [RankFailedError] * 2
    assert all("rank 1: ZeroDivisionError: by zero" in str(r) for r in results)
    assert isinstance(results[1].__cause__, ZeroDivisionError)


@pytest.mark.parametrize("origin", [0, 1])
def test_ctrl_c_on_one_rank_stays_there_and_the_others_hear_of_it(origin: int) -> None:
    ranks = world(2)
    works = [lambda: 1, lambda: 1]
    works[origin] = fail(KeyboardInterrupt())
    results = on_all([lambda r=r: meet(r, works[r.rank]) for r in ranks])
    assert type(results[origin]) is KeyboardInterrupt
    assert type(results[1 - origin]) is RankFailedError
    assert f"rank {origin}: KeyboardInterrupt" in str(results[1 - origin])


def test_a_rank_that_does_not_come_is_named_to_all_others_within_the_bound() -> None:
    ranks = world(3, apart_s=0.3)
    started = time.monotonic()
    results = on_all([lambda r=r: meet(r) for r in (ranks[0], ranks[2])])
    assert time.monotonic() - started < 5
    assert [str(r) for r in results] == ["rank 1 did not report"] * 2
    # and the next push does not wait again
    later = on_all([lambda r=r: meet(r) for r in (ranks[0], ranks[2])])
    assert all("in an earlier push" in str(r) for r in later)
    assert [type(r) for r in later] == [RankFailedError] * 2


def test_ranks_that_are_in_different_steps_are_told_so() -> None:
    ranks = world(2)
    phases = ["fill", "status"]
    results = on_all([lambda r=r: meet(r, phase=phases[r.rank]) for r in ranks])
    assert all("rank 1 is in step 1 (status), rank 0 in step 1 (fill)" in str(r) for r in results)


def test_bytes_that_are_no_frame_are_an_error_and_nothing_is_evaluated() -> None:
    ranks = world(2)
    ranks[1].wire.reports[1].put(b"\x80\x04\x95cos\nsystem\n")
    (result,) = on_all([lambda: meet(ranks[0])])
    assert isinstance(result, RankFailedError)
    assert "same version" in result.hint


def test_alone_errors_are_raised_as_they_are() -> None:
    with pytest.raises(ZeroDivisionError):
        meet(SoloRanks(), fail(ZeroDivisionError()))
    with pytest.raises(WeightSyncError, match=r"^x$"):
        meet(SoloRanks(), fail(InputError("x")))
    assert meet(SoloRanks()) == 1
