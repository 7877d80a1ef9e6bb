"""A call that is sent twice has one effect, and both get the same answer."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.support.stack import Stack

pytestmark = pytest.mark.nixl


@pytest.fixture
def recorded(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bytes, Any]]:
    """Every POST of a push, its body and its answer, as they went over the wire."""
    calls: list[tuple[str, bytes, Any]] = []
    http = stack.publisher._held.fleet._http
    stream = http.stream

    def recording(method: str, url: str, **options: Any) -> Any:
        if method == "POST":
            calls.append((httpx.URL(url).path, options["content"], None))
        return stream(method, url, **options)

    monkeypatch.setattr(http, "stream", recording)
    return calls


def repeat(stack: Stack, path: str, body: bytes) -> httpx.Response:
    """From the same trainer: a session is its own."""
    http = stack.publisher._held.fleet._http
    with http.stream(
        "POST", f"{stack.agent.url}{path}", content=body, timeout=httpx.Timeout(20), extensions={},
        headers={"Content-Type": "application/json"},
    ) as answer:  # fmt: skip
        return httpx.Response(answer.status_code, content=b"".join(answer.iter_bytes()))


def test_every_call_of_a_push_repeated_gets_the_same_answer_and_no_second_effect(
    stack: Stack, recorded: list[tuple[str, bytes, Any]]
) -> None:
    weights = stack.weights()
    report = stack.push(weights)
    calls = {path: body for path, body, _ in recorded}
    assert {"/pause", "/begin_update", "/commit_update", "/resume"} <= calls.keys()
    with stack.events() as events:
        for path, state in (
            ("/commit_update", "paused"),
            ("/begin_update", "receiving"),
            ("/pause", "paused"),
            ("/resume", "ready"),
            ("/commit_update", "paused"),
        ):
            answer = repeat(stack, path, calls[path])
            assert answer.status_code == 200, answer.text
            assert answer.json()["state"] == state, path
        again = repeat(stack, "/commit_update", calls["/commit_update"])
        assert again.json() == answer.json()
        assert again.json()["version"] == report.version
        stack.assert_holds(weights, report.version)
        assert len(events) == 1, "a repeat had an effect"
    stack.assert_a_whole_push_works()


def test_a_commit_repeated_after_the_next_push_does_not_bring_the_old_version_back(
    stack: Stack, recorded: list[tuple[str, bytes, Any]]
) -> None:
    first = stack.push()
    commit = next(body for path, body, _ in recorded if path == "/commit_update")
    weights = stack.weights()
    second = stack.push(weights)
    answer = repeat(stack, "/commit_update", commit)
    assert answer.json()["version"] == first.version
    stack.assert_holds(weights, second.version)
    stack.assert_a_whole_push_works()


def test_a_push_id_used_for_another_version_is_refused(
    stack: Stack, recorded: list[tuple[str, bytes, Any]]
) -> None:
    weights = stack.weights()
    report = stack.push(weights)
    commit = next(body for path, body, _ in recorded if path == "/commit_update")
    other = commit.replace(b'"version":%d' % report.version, b'"version":%d' % (report.version + 1))
    assert other != commit
    answer = stack.raw_post("/commit_update", other)
    assert answer.is_client_error
    assert answer.json()["hint"]
    stack.assert_holds(weights, report.version)
    stack.assert_a_whole_push_works()
