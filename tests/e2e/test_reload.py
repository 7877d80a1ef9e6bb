"""A real engine that a push left torn goes back to its checkpoint, byte for byte."""

from __future__ import annotations

import pytest

from tests.support.cli import Run
from tests.support.stack import Stack
from weightsync.errors import TransportError
from weightsync.transport.nixl import NixlTransport

pytestmark = pytest.mark.nixl


def test_a_torn_engine_serves_its_checkpoint_again_after_a_reload(
    stack: Stack, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run("reload", stack.agent.url, "--json")
    assert first.code == 0, first.err
    assert first.json["agents"][0]["state"] == "ready"
    as_started = stack.held()
    assert as_started.version == 0

    post = NixlTransport.post

    def half(self: NixlTransport, *given: object) -> None:
        post(self, *given)  # type: ignore[arg-type]
        raise TransportError("the cable is out", hint="put it in")

    monkeypatch.setattr(NixlTransport, "post", half)
    stack.failing_push(TransportError)
    monkeypatch.undo()
    stack.assert_torn()
    assert stack.get("/checksums").json()["sha256"] != as_started.sha256

    done = run("reload", stack.agent.url)
    assert done.code == 0, done.err
    assert "ready, version 0" in done.out
    stack.assert_serves(as_started)
    stack.assert_a_whole_push_works()
