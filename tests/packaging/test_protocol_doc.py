"""docs/protocol.md and the code say the same: calls, fields, states, errors, metrics, limits."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import torch
from pydantic import BaseModel

from weightsync import layout, manifest, protocol, worker_messages
from weightsync.codec import unpack
from weightsync.digest import digests
from weightsync.errors import StateError, all_errors
from weightsync.process import Writer
from weightsync.state import AgentState, Effect, Phase, step
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
    Event,
    InitAsked,
    PauseAsked,
    Paused,
    PauseFailed,
    PrepareAsked,
    PushFailed,
    ReloadAsked,
    Reloaded,
    ResumeAsked,
    Resumed,
    ResumeFailed,
    RollbackAsked,
    RolledBack,
    SessionOpened,
)
from weightsync_client import Deadlines
from weightsync_server import middleware
from weightsync_server.agent import app as agent_app
from weightsync_server.agent import status
from weightsync_server.agent.auth import REPLY_PATH
from weightsync_server.agent.metrics import Metrics
from weightsync_server.agent.settings import AgentSettings

DOCS = Path(__file__).resolve().parents[2] / "docs"
TEXT = (DOCS / "protocol.md").read_text()
#: other tests derive errors of their own
CODES = {e.code: e.status for e in all_errors() if e.__module__ == StateError.__module__}
#: names that are no field, code, setting or metric: HTTP's own errors, an outcome, a part of a
#: commit, an answer of the engine server
OTHER_NAMES = {
    "not_found",
    "method_not_allowed",
    "engine_lost",
    "rolled_back",
    "reset_prefix_cache",
    "is_paused",
}
ASKS = {
    "/attach": AttachAsked,
    "/pause": PauseAsked,
    "/resume": ResumeAsked,
    "/init_transfer": InitAsked,
    "/connect": ConnectAsked,
    "/begin_update": BeginAsked,
    "/prepare_commit": PrepareAsked,
    "/commit_update": CommitAsked,
    "/abort_update": AbortAsked,
    "/rollback": RollbackAsked,
    "/reload": ReloadAsked,
}


class Table(NamedTuple):
    """One table of the document, under its heading; cells without their backticks."""

    heading: str
    columns: tuple[str, ...]
    rows: list[list[str]]

    def column(self, name: str) -> list[str]:
        index = self.columns.index(name)
        return [row[index] for row in self.rows]


def tables(text: str) -> Iterator[Table]:
    heading, table = "", None
    for line in text.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if not line.startswith("|"):
            table = None
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if table is None:
            table = Table(heading, tuple(c.strip("`") for c in cells), [])
            yield table
        elif set(cells[0]) - set("-"):
            table.rows.append([c[1:-1] if re.fullmatch("`[^`]*`", c) else c for c in cells])


TABLES = list(tables(TEXT))
TABLES += list(tables((DOCS / "observability.md").read_text()))


def table(heading: str, *columns: str) -> Table:
    found = [t for t in TABLES if t.heading == heading and t.columns[: len(columns)] == columns]
    assert len(found) == 1, f"{len(found)} tables {columns} under {heading!r}"
    return found[0]


@pytest.fixture(scope="module")
def agent():
    settings = AgentSettings(engine_url="http://127.0.0.1:8000")
    return agent_app.Agent(settings, "a-secret-for-the-tests")


# ---------------------------------------------------------------- calls


def test_the_calls_are_those_of_the_agent(agent):
    served = {
        f"{method.upper()} {path}"
        for path, methods in agent.app.openapi()["paths"].items()
        for method in methods
    }
    assert set(table("Calls of the agent", "call").column("call")) == served | {
        f"POST {REPLY_PATH}"
    }


def test_the_engine_servers_calls_are_those_of_the_middleware():
    routes = middleware.WeightsyncMiddleware(None, secret="a-secret-for-the-tests")._routes
    served = {f"{method} {middleware.PREFIX}{name}" for method, name in routes}
    assert set(table("Calls of the engine server", "call").column("call")) == served


def test_the_operations_and_their_bodies_are_those_of_the_workers():
    operations = table("Operations", "op")
    assert operations.column("op") == list(
        get_args(protocol.WorkerCommand.model_fields["op"].annotation)
    )
    for op, body, reply, _ in operations.rows:
        assert body in ("", f"{op.capitalize()}Body")
        assert reply in ("", f"{op.capitalize()}Reply")
        assert bool(body) == hasattr(worker_messages, f"{op.capitalize()}Body")
        assert bool(reply) == hasattr(worker_messages, f"{op.capitalize()}Reply")


# ---------------------------------------------------------------- fields


def records() -> dict[str, type]:
    """Every record on the wire, by its name."""
    models = [
        cls
        for module in (protocol, status)
        for cls in vars(module).values()
        if isinstance(cls, type)
        and issubclass(cls, BaseModel)
        and cls.__module__ == module.__name__
        and cls.model_fields
    ]
    models += [agent_app.Health, agent_app.ChecksumsResponse, middleware.EnginePauseRequest]
    models += [middleware.EngineResumeRequest]
    plain = [
        cls
        for module in (worker_messages, layout)
        for cls in vars(module).values()
        if dataclasses.is_dataclass(cls) and cls.__module__ == module.__name__
    ]
    return {cls.__name__: cls for cls in [*models, *plain, manifest.TensorSpec, Writer]}


def fields_of(record: type) -> dict[str, Any]:
    """Each field's default, or ``required``."""
    if issubclass(record, BaseModel):
        return {
            name: "required" if f.is_required() else f.get_default(call_default_factory=True)
            for name, f in record.model_fields.items()
        }
    found: dict[str, Any] = {}
    for f in dataclasses.fields(record):
        found[f.name] = "required"
        if f.default is not dataclasses.MISSING:
            found[f.name] = f.default
        elif f.default_factory is not dataclasses.MISSING:
            found[f.name] = f.default_factory()
    return found


def documented() -> dict[str, Table]:
    return {
        name: t
        for t in TABLES
        if t.columns[:3] == ("field", "type", "default")
        for name in t.heading.split(", ")
    }


def test_every_record_has_a_table_and_every_table_a_record():
    assert set(documented()) == set(records())


@pytest.mark.parametrize("name", sorted(records()))
def test_fields_and_defaults_are_those_of(name):
    rows = documented()[name]
    told = {
        field: default if default == "required" else json.loads(default)
        for field, default in zip(rows.column("field"), rows.column("default"), strict=True)
    }
    made = fields_of(records()[name])
    assert told == {k: list(v) if isinstance(v, tuple) else v for k, v in made.items()}
    assert list(told) == list(made), "in the same order"


# ---------------------------------------------------------------- states


def events_at(state: AgentState) -> Iterator[Event]:
    """Whatever may happen to an agent in this state."""
    yield from (AttachAsked(), InitAsked("s"), EngineLost(), Resumed(), ResumeFailed())
    yield from (SessionOpened("s", state.epoch), Connected(state.epoch))
    for push_id in (None, "p", "q"):
        yield from (PauseAsked(push_id), ResumeAsked(push_id))
        yield from (Paused(push_id), PauseFailed(push_id))
    for push_id in ("p", "q"):
        yield from (AbortAsked(push_id), RollbackAsked(push_id), ReloadAsked(push_id))
        for session, epoch in (("s", state.epoch), ("t", 1), ("t", state.epoch + 1)):
            yield ConnectAsked(session, epoch)
            for version in (1, 2):
                yield from (
                    BeginAsked(session, epoch, push_id, version, shadow) for shadow in (False, True)
                )
                yield PrepareAsked(session, epoch, push_id, version)
                yield CommitAsked(session, epoch, push_id, version)
    yield from (
        Committed(version, over, before)
        for version in (1, 2)
        for over in (False, True)
        for before in (None, 1)
    )
    yield Reloaded()
    if state.rollback_to is not None:
        yield RolledBack(state.rollback_to, state.version)
    yield from (PushFailed(reachable) for reachable in (False, True))
    for versions in (frozenset[int](), frozenset({1}), frozenset({2}), frozenset({1, 2})):
        for one in (False, True):
            yield from (Aborted(versions, one, before) for before in (None, 1))
            for two in (False, True):
                # the answer to an attach, which only some states allow
                if versions and allows_attach(state):
                    yield Attached(versions, dirty=one, paused=two, epoch=1, same=True)
                    yield Attached(versions, dirty=one, paused=two, epoch=1, same=False)


def allows_attach(state: AgentState) -> bool:
    try:
        return step(state, AttachAsked()).effects == (Effect.ATTACH,)
    except StateError:
        return False


class Walk(NamedTuple):
    """What a walk through all states saw: changes of state, calls taken, codes of those refused."""

    changes: set[tuple[str, str, str]]
    taken: set[tuple[str, str]]
    refused: set[tuple[str, str, str]]


@pytest.fixture(scope="module")
def walk():
    def alike(state):
        """Equal for states in which the same calls are legal."""
        newest = state.lowest > state.version + 1, state.committed_by is not None
        return replace(state, committed=0, committed_by=None, rolled_back_from=0), newest

    seen = {alike(AgentState())}
    todo = deque([AgentState()])
    walk = Walk(set(), set(), set())
    while todo:
        state = todo.popleft()
        for event in events_at(state):
            name = type(event).__name__
            try:
                after = step(state, event).state
            except StateError as error:
                walk.refused.add((name, state.phase, error.code))
                continue
            walk.taken.add((name, state.phase))
            if after.phase != state.phase:
                walk.changes.add((state.phase, name, after.phase))
            if alike(after) not in seen and after.epoch <= 2:
                seen.add(alike(after))
                todo.append(after)
    return walk


def test_the_states_are_those_of_the_agent():
    assert table("States", "state").column("state") == list(get_args(Phase))


def test_the_transitions_are_all_that_a_walk_through_the_state_machine_finds(walk):
    rows = table("Transitions", "from", "by", "to").rows
    assert {(before, event, after) for before, event, after, _ in rows} == walk.changes
    assert len(rows) == len(walk.changes)


@pytest.mark.parametrize("call", ASKS)
def test_a_call_is_taken_and_refused_as_told(walk, call):
    rows = table("Which call is legal when", "call")
    assert rows.column("call") == list(ASKS)
    name = ASKS[call].__name__
    for phase in get_args(Phase):
        cell = dict(zip(rows.column("call"), rows.column(phase), strict=True))[call]
        assert cell.startswith("yes") == ((name, phase) in walk.taken), (call, phase)
        codes = set(re.findall(r"[a-z]+_[a-z_]+", cell))
        assert codes == {c for n, p, c in walk.refused if (n, p) == (name, phase)}, (call, phase)


# ---------------------------------------------------------------- errors, events, metrics, limits


def test_the_error_codes_and_their_statuses_are_those_of_the_error_tree():
    rows = table("Errors", "code", "status")
    told = dict(zip(rows.column("code"), map(int, rows.column("status")), strict=True))
    assert told == CODES
    assert len(rows.rows) == len(CODES)


def test_an_events_fields_are_those_that_the_agent_sends(agent):
    told = table("Events", "field", "type").column("field")
    assert told == [*agent.service.snapshot(), "cause"]


def test_the_metrics_are_those_that_prometheus_gets():
    made = {}
    for metric in Metrics().registry.collect():
        name = metric.name + ("_total" if metric.type == "counter" else "")
        made[name] = metric.type
    rows = table("Metrics", "metric", "type")
    assert dict(zip(rows.column("metric"), rows.column("type"), strict=True)) == made


def numbers(t: Table, key: str) -> dict[str, float]:
    defaults = (float(d.replace(",", "")) for d in t.column("default"))
    return dict(zip(t.column(key), defaults, strict=True))


def test_the_agents_limits_are_its_defaults():
    told = numbers(table("Limits and deadlines", "setting"), "setting")
    fields = AgentSettings.model_fields
    assert told == {name: fields[name].default for name in told}
    assert set(told) == {
        n for n, f in fields.items() if n.endswith(("_s", "_nbytes")) and f.default is not None
    }


def test_the_trainers_deadlines_are_its_defaults():
    assert numbers(table("Limits and deadlines", "deadline"), "deadline") == dict(Deadlines())


# ---------------------------------------------------------------- bytes, names


def test_the_packed_example_unpacks_to_what_is_told():
    found = re.search(r"The string `([^`]+)` unpacks to `([^`]+)`", TEXT)
    assert found is not None
    rows = unpack(found[1], list[tuple[int, int, int]])
    assert str(rows) == found[2]


def test_the_digest_example_is_right():
    found = re.search(r"bytes `([a-z]+)` is `([0-9a-f]{32})`", TEXT)
    assert found is not None
    data = torch.frombuffer(bytearray(found[1].encode()), dtype=torch.uint8)
    assert digests([data])[0].hex() == found[2]


def test_the_protocol_version_is_told():
    assert f"This is protocol version **{protocol.PROTOCOL_VERSION}**" in TEXT


def test_no_name_in_the_text_is_unknown_to_the_code():
    known = set(CODES) | OTHER_NAMES | set(AgentSettings.model_fields) | set(Deadlines.model_fields)
    known |= {field for record in records().values() for field in fields_of(record)}
    known |= set(table("Metrics", "metric").column("metric"))
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    names = {n for n in re.findall(r"`(?:context\.)?([^`]+)`", prose) if "_" in n}
    assert {n for n in names if re.fullmatch(r"[a-z]+(_[a-z]+)+", n)} <= known


def test_every_link_within_the_page_has_its_heading():
    headings = {
        re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-")
        for h in re.findall(r"^#+ (.*)$", TEXT, flags=re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= headings
