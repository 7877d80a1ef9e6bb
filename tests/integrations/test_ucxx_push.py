"""A whole push over ucxx: trainer, agent and engine are three processes."""

from __future__ import annotations

import pytest

from tests.integrations import doc
from tests.support.stack import Stack, new_engine
from weightsync.errors import TransportError

pytestmark = [pytest.mark.integrations, pytest.mark.timeout(200)]
pytest.importorskip("ucxx")


@pytest.fixture
def ucxx_stack(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("WEIGHTSYNC_TRANSPORT", "ucxx")
    engine = new_engine(checkpoint, tmp_path / "engine.log")
    engine.start()
    try:
        engine.wait_alive()
        stack = Stack(checkpoint, tmp_path, engine)
        try:
            stack.agent.start()
            stack.agent.wait_alive()
            stack.wait_for_state("ready")
            yield stack
        finally:
            stack.close()
    finally:
        engine.stop()


def test_pushes_over_ucxx_leave_every_byte_where_it_belongs(ucxx_stack):
    with ucxx_stack.new_publisher(transport="ucxx") as publisher:
        for _ in range(3):
            weights = ucxx_stack.weights()
            report = publisher.push(weights)
            ucxx_stack.assert_holds(weights, report.version)
        with ucxx_stack.new_publisher(transport="ucxx", max_slot_bytes=1 << 18) as bounded:
            weights = ucxx_stack.weights()
            report = bounded.push(weights)
            assert report.rounds > 2
            ucxx_stack.assert_holds(weights, report.version)


def test_ends_with_different_transports_are_told_so_and_nothing_is_sent(ucxx_stack):
    held = ucxx_stack.held()
    with (
        ucxx_stack.new_publisher(transport="nixl") as publisher,
        pytest.raises(TransportError, match=r"metadata"),
    ):
        publisher.push(ucxx_stack.weights())
    ucxx_stack.assert_serves(held)


def test_the_pages_example_of_ucxx_runs(ucxx_stack, monkeypatch):
    weights = ucxx_stack.weights()
    code = doc.block("ucxx, for hosts without NIXL", "python")
    doc.run(code, monkeypatch, agent=ucxx_stack.agent.url, model=weights)
    ucxx_stack.assert_holds(weights, ucxx_stack.status()["version"])
