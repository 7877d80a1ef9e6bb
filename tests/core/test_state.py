"""The agent's state machine: every state against every call, and no torn engine ever resumed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from weightsync import errors as e
from weightsync.state import AgentState, Effect, step
from weightsync.state_events import (
    AbortAsked,
    Aborted,
    AttachAsked,
    Attached,
    BeginAsked,
    CommitAsked,
    Committed,
    ConnectAsked,
    Connected,
    EngineLost,
    InitAsked,
    PauseAsked,
    Paused,
    PauseFailed,
    PushFailed,
    ResumeAsked,
    Resumed,
    ResumeFailed,
    SessionOpened,
)
from weightsync.state_outcomes import FOUND_WHOLE

LINKED = AgentState("ready", version=3, session="s", epoch=2, connected=True, committed=3)
DETACHED = replace(LINKED, phase="detached")
READY = LINKED
BY_HAND = replace(LINKED, phase="paused")
OURS = replace(LINKED, phase="paused", owner="p")
UNSURE = replace(OURS, may_run=True)
RECEIVING = replace(OURS, phase="receiving", target=4)
TORN = AgentState("torn", version=3, target=4, epoch=2, committed=3)
REPAIR = replace(TORN, epoch=3, session="s", connected=True, owner="p")
DONE = replace(OURS, version=4, committed=4, committed_by="p")

PAUSE, PAUSE_HAND = PauseAsked("p"), PauseAsked(None)
RESUME, RESUME_HAND = ResumeAsked("p"), ResumeAsked(None)
BEGIN, COMMIT = BeginAsked("s", 2, "p", 4), CommitAsked("s", 2, "p", 4)
ABORT, INIT, CONNECT, ATTACH = AbortAsked("p"), InitAsked("n"), ConnectAsked("s", 2), AttachAsked()


@pytest.mark.parametrize(
    ("state", "ask", "expected"),
    [
        (DETACHED, PAUSE, e.EngineDetachedError),
        (DETACHED, RESUME_HAND, e.EngineDetachedError),
        (DETACHED, BEGIN, e.EngineDetachedError),
        (DETACHED, COMMIT, e.EngineDetachedError),
        (DETACHED, ABORT, e.EngineDetachedError),
        (DETACHED, INIT, e.EngineDetachedError),
        (DETACHED, CONNECT, e.EngineDetachedError),
        (DETACHED, ATTACH, (Effect.ATTACH,)),
        (READY, PAUSE, (Effect.PAUSE,)),
        (READY, PAUSE_HAND, (Effect.PAUSE,)),
        (READY, RESUME, ()),
        (READY, RESUME_HAND, ()),
        (READY, BEGIN, e.StateError),
        (READY, COMMIT, e.StateError),
        (READY, ABORT, ()),
        (READY, INIT, (Effect.OPEN,)),
        (READY, CONNECT, (Effect.CONNECT,)),
        (READY, ATTACH, (Effect.ATTACH,)),
        (BY_HAND, PAUSE, e.EnginePausedError),
        (BY_HAND, PAUSE_HAND, ()),
        (BY_HAND, RESUME, e.EnginePausedError),
        (BY_HAND, RESUME_HAND, (Effect.RESUME,)),
        (BY_HAND, BEGIN, e.EnginePausedError),
        (BY_HAND, COMMIT, e.StateError),
        (BY_HAND, ABORT, ()),
        (BY_HAND, INIT, (Effect.OPEN,)),
        (BY_HAND, ATTACH, (Effect.ATTACH,)),
        (OURS, PAUSE, ()),
        (OURS, PAUSE_HAND, e.PushInProgressError),
        (OURS, PauseAsked("q"), e.PushInProgressError),
        (OURS, RESUME, (Effect.RESUME,)),
        (OURS, RESUME_HAND, e.PushInProgressError),
        (OURS, ResumeAsked("q"), e.PushInProgressError),
        (OURS, BEGIN, (Effect.BEGIN,)),
        (OURS, COMMIT, e.StateError),
        (OURS, ABORT, (Effect.RESUME,)),
        (OURS, AbortAsked("q"), e.PushInProgressError),
        (OURS, INIT, e.PushInProgressError),
        (OURS, CONNECT, e.PushInProgressError),
        (OURS, ATTACH, e.PushInProgressError),
        (UNSURE, PAUSE, (Effect.PAUSE,)),
        (UNSURE, BEGIN, e.StateError),
        (UNSURE, ABORT, (Effect.RESUME,)),
        (RECEIVING, PAUSE, ()),
        (RECEIVING, PauseAsked("q"), e.PushInProgressError),
        (RECEIVING, RESUME, e.PushInProgressError),
        (RECEIVING, RESUME_HAND, e.PushInProgressError),
        (RECEIVING, replace(BEGIN, version=5), e.StateError),
        (RECEIVING, replace(BEGIN, push_id="q"), e.PushInProgressError),
        (RECEIVING, COMMIT, (Effect.COMMIT,)),
        (RECEIVING, replace(COMMIT, version=5), e.StateError),
        (DONE, COMMIT, ()),
        (DONE, replace(COMMIT, version=5), e.StateError),
        (DONE, replace(COMMIT, push_id="q"), e.PushInProgressError),
        (replace(DONE, phase="ready", owner=None), COMMIT, ()),
        (RECEIVING, replace(COMMIT, push_id="q"), e.PushInProgressError),
        (RECEIVING, ABORT, (Effect.ABORT,)),
        (RECEIVING, AbortAsked("q"), e.PushInProgressError),
        (RECEIVING, INIT, e.PushInProgressError),
        (RECEIVING, ATTACH, e.PushInProgressError),
        (TORN, PAUSE, (Effect.PAUSE,)),
        (TORN, PAUSE_HAND, (Effect.PAUSE,)),
        (TORN, RESUME, e.EngineTornError),
        (TORN, RESUME_HAND, e.EngineTornError),
        (TORN, BEGIN, e.StaleEpochError),
        (TORN, COMMIT, e.EngineTornError),
        (TORN, ABORT, ()),
        (TORN, INIT, (Effect.OPEN,)),
        (TORN, ATTACH, (Effect.ATTACH,)),
        (REPAIR, RESUME, e.EngineTornError),
        (REPAIR, PauseAsked("q"), e.PushInProgressError),
        (REPAIR, replace(BEGIN, epoch=3), (Effect.BEGIN,)),
        (REPAIR, ABORT, ()),
    ],
)
def test_every_call_in_every_state(state, ask, expected):
    if isinstance(expected, tuple):
        assert step(state, ask).effects == expected
    else:
        with pytest.raises(expected) as raised:
            step(state, ask)
        assert type(raised.value) is expected
        assert raised.value.hint


@pytest.mark.parametrize(
    ("state", "ask", "error"),
    [
        (OURS, replace(BEGIN, version=3), e.StaleVersionError),
        (OURS, replace(BEGIN, version=0), e.StaleVersionError),
        (OURS, replace(BEGIN, epoch=1), e.StaleEpochError),
        (OURS, replace(BEGIN, session="x"), e.StaleEpochError),
        (OURS, replace(BEGIN, epoch=9), e.NoSessionError),
        (replace(OURS, connected=False), BEGIN, e.NoSessionError),
        (replace(OURS, session=None, epoch=0), BEGIN, e.NoSessionError),
        (replace(REPAIR, target=None), replace(BEGIN, epoch=3, version=3), e.StaleVersionError),
        (REPAIR, replace(BEGIN, epoch=3, version=3), e.StaleVersionError),
        (RECEIVING, replace(COMMIT, epoch=1), e.StaleEpochError),
        (READY, ConnectAsked("s", 1), e.StaleEpochError),
        (READY, ConnectAsked("s", 3), e.NoSessionError),
    ],
)
def test_sessions_and_versions_are_checked(state, ask, error):
    with pytest.raises(error):
        step(state, ask)


@pytest.mark.parametrize(
    ("state", "event", "expected", "effects"),
    [
        (READY, Paused("p"), OURS, ()),
        (READY, Paused(None), BY_HAND, ()),
        (TORN, Paused("p"), replace(TORN, owner="p"), ()),
        (READY, PauseFailed("p"), OURS, (Effect.RESUME,)),
        (TORN, PauseFailed("p"), TORN, ()),
        (OURS, Resumed(), READY, ()),
        (OURS, ResumeFailed(), UNSURE, ()),
        (BY_HAND, ResumeFailed(), replace(BY_HAND, may_run=True), ()),
        (UNSURE, Resumed(), READY, ()),
        (UNSURE, Paused("p"), OURS, ()),
        (TORN, Resumed(), TORN, ()),
        (RECEIVING, Committed(4), DONE, ()),
        (RECEIVING, Committed(5), RECEIVING, ()),
        (
            RECEIVING,
            Committed(4, epoch_over=True),
            replace(DONE, session=None, connected=False),
            (Effect.CLOSE,),
        ),
        (RECEIVING, PushFailed(reachable=True), RECEIVING, (Effect.ABORT,)),
        (RECEIVING, PushFailed(reachable=False), TORN, ()),
        (RECEIVING, Aborted(frozenset({3}), dirty=True), TORN, (Effect.CLOSE,)),
        (RECEIVING, Aborted(frozenset(), dirty=True), TORN, ()),
        (
            RECEIVING,
            Aborted(frozenset({3, 4}), dirty=False),
            replace(TORN, target=5),
            (Effect.CLOSE,),
        ),
        (
            RECEIVING,
            Aborted(frozenset({3}), dirty=False),
            replace(OURS, session=None, connected=False),
            (Effect.CLOSE, Effect.RESUME),
        ),
        (RECEIVING, EngineLost(), replace(RECEIVING, phase="detached"), ()),
        (DETACHED, Resumed(), DETACHED, ()),
        (DETACHED, Committed(4), DETACHED, ()),
        (READY, SessionOpened("n", 2), replace(READY, session="n"), ()),
        (READY, SessionOpened("n", 1), READY, ()),
        (replace(READY, session=None), Connected(2), replace(READY, session=None), ()),
        (replace(READY, connected=False), Connected(2), READY, ()),
    ],
)
def test_outcomes(state, event, expected, effects):
    assert step(state, event) == (expected, effects)


def attached(versions=(3,), *, dirty=False, paused=False, epoch=2, same=True):
    return Attached(frozenset(versions), dirty, paused, epoch, same)


def test_the_same_engine_back_keeps_its_session():
    assert step(DETACHED, attached()).state == READY


def test_a_new_engine_process_ends_the_epoch():
    state = step(DETACHED, attached((0,), epoch=0, same=False)).state
    assert (state.phase, state.version, state.session, state.epoch) == ("ready", 0, None, 2)


def test_an_engine_found_paused_is_paused_by_hand():
    state = step(AgentState(), attached(paused=True, same=False)).state
    assert (state.phase, state.owner) == ("paused", None)


def test_an_engine_found_paused_again_still_belongs_to_its_push():
    lost = step(OURS, EngineLost()).state
    assert step(lost, attached(paused=True)).state == UNSURE


def test_a_dirty_engine_found_running_is_stopped():
    state, effects = step(AgentState(), attached(dirty=True, same=False))
    assert (state.phase, effects) == ("torn", (Effect.PAUSE,))


def test_workers_of_different_versions_are_torn_and_only_a_newer_one_repairs():
    state, _ = step(AgentState(), attached((3, 4), paused=True, same=False))
    assert (state.phase, state.version, state.target) == ("torn", 3, 5)


def test_an_engine_lost_in_mid_push_comes_back_torn_and_knows_the_interrupted_version():
    lost = step(RECEIVING, EngineLost()).state
    state, effects = step(lost, attached(dirty=True, paused=True))
    assert (state.phase, state.target, state.owner, state.session) == ("torn", 4, None, None)
    assert effects == (Effect.CLOSE,)


def test_a_push_that_the_engine_outlived_without_a_scratch_does_not_go_on():
    lost = step(RECEIVING, EngineLost()).state
    state, _ = step(lost, attached(paused=True))
    assert (state.phase, state.owner, state.session) == ("paused", "p", None)


def test_a_commit_that_only_a_dead_agent_heard_of_is_found_whole():
    lost = step(RECEIVING, EngineLost()).state
    state, effects = step(lost, attached((4,), paused=True))
    assert (state.phase, state.version, state.owner, effects) == ("paused", 4, "p", ())
    assert (state.committed, state.committed_by) == (4, "p")
    assert step(state, COMMIT) == (state, ())


@pytest.mark.parametrize(
    ("state", "lowest"),
    [
        (AgentState("ready"), 1),
        (READY, 4),
        (TORN, 4),
        (replace(TORN, target=7), 7),
        (replace(READY, version=0, committed=7), 7),  # started again: it is given what it had
        (replace(READY, version=3, committed=7), 8),
        (replace(TORN, version=0, target=2, committed=7), 7),
    ],
)
def test_versions_grow_across_restarts(state, lowest):
    assert state.lowest == lowest
    ready = replace(state, session="s", epoch=2, connected=True, owner="p")
    ready = replace(ready, phase="torn" if state.phase == "torn" else "paused")
    assert step(ready, replace(BEGIN, version=lowest)).effects == (Effect.BEGIN,)
    with pytest.raises(e.StaleVersionError) as refused:
        step(ready, replace(BEGIN, version=lowest - 1))
    assert refused.value.context["lowest"] == lowest


def test_an_engine_that_was_thought_torn_and_is_whole_is_started_again():
    lost = step(replace(TORN, session=None, connected=False), EngineLost()).state
    state, effects = step(lost, attached(paused=True))
    assert (state.phase, state.owner, state.target) == ("paused", FOUND_WHOLE, None)
    assert effects == (Effect.CLOSE, Effect.RESUME)
    assert step(state, Resumed()).state.owner is None
    assert step(lost, attached(paused=True, same=False)).effects == ()


def test_a_start_of_an_engine_that_was_thought_torn_is_tried_again():
    lost = step(replace(TORN, session=None, connected=False), EngineLost()).state
    found = step(lost, attached(paused=True)).state
    # the resume fails; or the agent dies before it, and the next one finds it in the journal
    again = step(replace(found, phase="detached"), attached(paused=True)).state
    for state in (step(found, ResumeFailed()).state, again):
        assert (state.phase, state.owner) == ("paused", FOUND_WHOLE)
        assert step(state, AbortAsked(FOUND_WHOLE)).effects == (Effect.RESUME,)


class OneEngine(RuleBasedStateMachine):
    """An agent, an engine whose workers tear for real, callers that call anything at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.state = AgentState()
        self.paused = False  # the truth about the engine
        self.dirty = [False, False]
        self.versions = [0, 0]
        self.worker_epoch = 0
        self.known = False
        self.answers: list[bool] = []
        self.tell(AttachAsked())

    def tell(self, event) -> None:
        """Feed an event, carry its effects out, feed what became of them."""
        try:
            self.state, effects = step(self.state, event)
        except e.StateError:
            return
        for effect in effects:
            if self.state.phase == "detached" and effect is not Effect.ATTACH:
                return  # the agent drops what it wanted of a lost engine
            self.carry_out(effect, event)

    def carry_out(self, effect, event) -> None:
        works = self.answers.pop() if self.answers else True
        torn = any(self.dirty) or len(set(self.versions)) > 1
        match effect:
            case Effect.RESUME:
                assert not torn, "a torn engine was resumed"
                self.paused = False  # whether the answer comes or not
                self.tell(Resumed() if works else ResumeFailed())
            case Effect.PAUSE:
                push_id = getattr(event, "push_id", None)
                self.paused = self.paused or works
                self.tell(Paused(push_id) if works else PauseFailed(push_id))
            case Effect.ATTACH:
                if works:
                    self.tell(self.describe())
                    self.known = True
            case Effect.OPEN if works:
                self.worker_epoch = self.state.epoch
                self.tell(SessionOpened(event.session, self.state.epoch))
            case Effect.CONNECT if works:
                self.tell(Connected(event.epoch))
            case Effect.BEGIN:
                assert self.paused, "WS-1"
                self.dirty = [True, works]
                if not works:
                    self.tell(PushFailed(reachable=bool(self.answers)))
            case Effect.COMMIT:
                self.dirty[0], self.versions[0] = False, event.version
                if works:
                    self.dirty[1], self.versions[1] = False, event.version
                    self.tell(Committed(event.version))
                else:
                    self.tell(PushFailed(reachable=bool(self.answers)))
            case Effect.ABORT:
                versions = frozenset(self.versions) if works else frozenset()
                self.tell(Aborted(versions, dirty=any(self.dirty) or not works))
            case _:
                pass

    def describe(self):
        return Attached(
            frozenset(self.versions), any(self.dirty), self.paused, self.worker_epoch, self.known
        )

    pushes = st.sampled_from(["p", "q"])
    sessions = st.sampled_from(["s", "n"])
    steps = st.integers(-1, 1)
    works = st.lists(st.booleans(), max_size=3)

    @rule(works=works)
    def engine_blinks(self, works):
        self.answers = works
        self.tell(EngineLost())
        self.tell(AttachAsked())

    @rule(push_id=st.none() | pushes, works=works)
    def pause(self, push_id, works):
        self.answers = works
        self.tell(PauseAsked(push_id))

    @rule(push_id=st.none() | pushes, works=works)
    def resume(self, push_id, works):
        self.answers = works
        self.tell(ResumeAsked(push_id))

    @rule(session=sessions, works=works)
    def rendezvous(self, session, works):
        self.answers = works
        self.tell(InitAsked(session))
        self.tell(ConnectAsked(session, self.state.epoch))

    @rule(push_id=pushes, session=sessions, back=st.integers(0, 1), ahead=steps, works=works)
    def begin(self, push_id, session, back, ahead, works):
        self.answers = works
        version = max(0, self.state.lowest - 1 + ahead)
        self.tell(BeginAsked(session, self.state.epoch - back, push_id, version))

    @rule(push_id=pushes, works=works)
    def commit(self, push_id, works):
        self.answers = works
        session, target = self.state.session, self.state.target
        self.tell(CommitAsked(session or "s", self.state.epoch, push_id, target or 0))

    @rule(session=sessions, push_id=pushes, commits=st.booleans(), works=works)
    def push(self, session, push_id, commits, works):
        """Random calls alone seldom get this far."""
        self.answers = []
        self.tell(InitAsked(session))
        epoch, version = self.state.epoch, self.state.lowest
        self.tell(ConnectAsked(session, epoch))
        self.tell(PauseAsked(push_id))
        self.tell(BeginAsked(session, epoch, push_id, version))
        if commits:
            self.answers = works
            self.tell(CommitAsked(session, epoch, push_id, version))
            self.tell(ResumeAsked(push_id))

    @rule(push_id=pushes, works=works)
    def abort(self, push_id, works):
        self.answers = works
        self.tell(AbortAsked(push_id))

    @rule(event=st.sampled_from(["engine restarts", "agent restarts", "agent keeps a journal"]))
    def restart(self, event):
        if event == "engine restarts":
            self.paused, self.dirty, self.versions = False, [False, False], [0, 0]
            self.worker_epoch, self.known = 0, False
        if event == "agent restarts":
            self.state, self.known = AgentState(), False
        # else the journal tells the new agent what the old one knew
        self.answers = []
        self.tell(EngineLost())
        self.tell(AttachAsked())

    @rule()
    def somebody_resumes_behind_our_back_and_the_agent_restarts(self):
        self.paused = False
        self.restart("agent restarts")

    @invariant()
    def ready_means_whole(self):
        if self.state.phase == "ready":
            assert not any(self.dirty)
            assert set(self.versions) == {self.state.version}

    @invariant()
    def a_torn_engine_never_serves(self):
        if any(self.dirty) or len(set(self.versions)) > 1:
            assert self.paused

    @precondition(lambda self: self.state.phase == "torn")
    @rule()
    def a_whole_push_repairs(self):
        self.answers = []
        self.tell(AbortAsked(self.state.owner or "x"))
        self.push("repair", "r", commits=True, works=[])
        assert self.state.phase == "ready"


OneEngine.TestCase.settings = settings(max_examples=300, stateful_step_count=25)
test_a_torn_engine_is_never_resumed = OneEngine.TestCase
