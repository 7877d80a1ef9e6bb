"""What a caller gets wrong is refused with its name, and the engine goes on with what it has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from tests.support.stack import TOKEN, Held, Stack, Weights, wait_until
from weightsync.codec import pack
from weightsync.errors import (
    AuthError,
    BodyTooLargeError,
    ManifestError,
    NonFiniteError,
    NoSessionError,
    ProtocolMismatchError,
    StaleVersionError,
    WeightSyncError,
)
from weightsync.protocol import PROTOCOL_VERSION

pytestmark = pytest.mark.nixl

QUERY = "model.layers.0.self_attn.q_proj.weight"
LIMIT_NBYTES = 1 << 20
UNPACKED_NBYTES = 4 << 20


@pytest.fixture(scope="module")
def agent_options() -> list[str]:
    limits = ("--max-body-nbytes", LIMIT_NBYTES), ("--max-unpacked-nbytes", UNPACKED_NBYTES)
    return [str(word) for option in limits for word in option]


@pytest.fixture
def held(stack: Stack) -> Held:
    return stack.held()


def refused(stack: Stack, held: Held, weights: Weights, kind: type[WeightSyncError]) -> Any:
    """The error of a push of wrong weights, which the engine never noticed."""
    with stack.events() as events:
        with pytest.raises(kind) as caught:
            stack.push(weights)
        stack.assert_serves(held)
        assert {e["state"] for e in events if "state" in e} == {"ready"}  # not even paused
    assert "nothing was written" in caught.value.__notes__[-1]
    stack.assert_a_whole_push_works()
    return caught.value


def test_a_missing_tensor_is_named_and_the_engine_never_pauses(stack: Stack, held: Held) -> None:
    weights = stack.weights()
    del weights[QUERY]
    error = refused(stack, held, weights, ManifestError)
    assert f"checkpoint tensors are missing: {QUERY}" in str(error)
    assert "publish every tensor" in error.hint


def test_an_unknown_tensor_is_named_and_the_engine_never_pauses(stack: Stack, held: Held) -> None:
    unknown = "model.layers.0.mlp.what_proj.weight"
    error = refused(stack, held, stack.weights() | {unknown: torch.ones(4)}, ManifestError)
    assert f"refuses {unknown}" in str(error)
    assert "no such tensor" in str(error)


@pytest.mark.parametrize("packed", [True, False])
def test_a_tensor_declared_twice_is_named(stack: Stack, held: Held, packed: bool) -> None:
    specs = [(QUERY, "bfloat16", (256, 256), "")] * 2
    names = ("name", "dtype", "shape", "alias_of")
    plain = [dict(zip(names, spec, strict=True)) for spec in specs]
    error = stack.refusal(
        "/init_transfer",
        protocol_version=PROTOCOL_VERSION,
        session="s-twice",
        manifest=pack(plain) if packed else {"tensors": plain},
    )
    assert isinstance(error, ManifestError)
    assert QUERY in error.message
    assert "twice" in error.message
    stack.assert_serves(held)
    stack.assert_a_whole_push_works()


def test_a_wrong_shape_names_tensor_expected_and_got(stack: Stack, held: Held) -> None:
    weights = stack.weights()
    weights[QUERY] = weights[QUERY][:-1]
    error = refused(stack, held, weights, ManifestError)
    assert f"{QUERY}: expected shape (256, 256), got (255, 256)" in str(error)


def test_a_wrong_kind_of_dtype_names_tensor_and_both_dtypes(stack: Stack, held: Held) -> None:
    weights = stack.weights()
    weights[QUERY] = weights[QUERY].to(torch.int64)
    error = refused(stack, held, weights, ManifestError)
    assert f"{QUERY} is torch.int64, and the engine keeps it as torch.bfloat16" in str(error)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused_before_the_pause(
    stack: Stack, held: Held, value: float
) -> None:
    weights = stack.weights()
    weights[QUERY][3, 5] = value
    error = refused(stack, held, weights, NonFiniteError)
    assert error.context["phase"] == "fill"
    assert f"{QUERY!r}: 1 of 65536 values are NaN or infinite" in str(error)


def test_an_old_version_is_refused_with_the_lowest_good_one(stack: Stack, held: Held) -> None:
    stack.assert_a_whole_push_works()
    held = stack.held()
    with pytest.raises(StaleVersionError) as caught:
        stack.publisher.push(stack.weights(), version=held.version)
    assert caught.value.context["lowest"] == held.version + 1
    assert f"push version {held.version + 1} or later" in caught.value.hint
    stack.assert_serves(held)
    assert stack.publisher.push(stack.weights(), version=held.version + 5).version


def test_another_protocol_version_names_both_versions(
    stack: Stack, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightsync_client.answers.PROTOCOL_VERSION", PROTOCOL_VERSION + 1)
    with stack.new_publisher() as publisher, pytest.raises(ProtocolMismatchError) as caught:
        publisher.push(stack.weights())
    monkeypatch.undo()
    assert caught.value.context["expected"] == PROTOCOL_VERSION
    assert caught.value.context["got"] == PROTOCOL_VERSION + 1
    assert "same version of weightsync" in caught.value.hint
    stack.assert_serves(held)
    stack.assert_a_whole_push_works()


@pytest.mark.parametrize("token", ["", "a-wrong-token"])
def test_a_missing_or_wrong_token_opens_nothing(
    stack: Stack, held: Held, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WEIGHTSYNC_TOKEN", raising=False)
    with stack.new_publisher(token=token) as publisher, pytest.raises(AuthError) as caught:
        publisher.push(stack.weights())
    assert "bearer token is missing or wrong" in str(caught.value)
    assert "Authorization: Bearer" in caught.value.hint
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with httpx.Client(base_url=stack.agent.url, headers=headers, trust_env=False) as outsider:
        for path in ("/pause", "/resume", "/init_transfer", "/connect", "/begin_update",
                     "/commit_update", "/abort_update", "/attach", "/internal/reply"):  # fmt: skip
            answer = outsider.post(path, json={})
            assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized"), path
        for path in ("/status", "/events", "/checksums", "/metrics"):
            # ten wrong tokens are looked at, then their address waits
            assert outsider.get(path).status_code in (401, 429), path
        assert outsider.get("/readyz").status_code == 200  # a probe brings no token

    def heard() -> bool:
        right = {"Authorization": f"Bearer {TOKEN}"}
        url = f"{stack.agent.url}/status"
        return httpx.get(url, headers=right, trust_env=False).status_code == 200

    wait_until(heard, "the right token is heard again, on any connection", 15)
    stack.assert_serves(held)
    stack.assert_a_whole_push_works()


def test_a_push_without_rendezvous_changes_nothing(stack: Stack, held: Held) -> None:
    push = {"session": "s-never-opened", "epoch": 999, "push_id": "p-alone", "version": 999}
    for path, more in (("/begin_update", {}), ("/commit_update", {"ranks": []})):
        error = stack.refusal(path, **push, **more)
        assert isinstance(error, NoSessionError), error
        assert "no session s-never-opened with epoch 999" in error.message
        assert "/init_transfer first" in error.hint
    stack.assert_serves(held)
    # and one that did pause the engine gives it back
    assert stack.post("/pause", push_id="p-alone").json()["state"] == "paused"
    assert isinstance(stack.refusal("/begin_update", **push), NoSessionError)
    aborted = stack.post("/abort_update", session="s-never-opened", push_id="p-alone")
    assert aborted.json()["state"] == "ready"
    stack.assert_serves(held)
    stack.assert_a_whole_push_works()


MALFORMED = {
    "no JSON": b"{",
    "not UTF-8": b"\xff\xfe",
    "a list": b"[]",
    "an unknown field": b'{"protocol_version": 1, "session": "s", "manifest": "", "x": 1}',
    "a missing field": b'{"protocol_version": 1}',
    "a bad id": b'{"protocol_version": 1, "session": "../s", "manifest": ""}',
    "no base64": b'{"protocol_version": 1, "session": "s", "manifest": "%%"}',
    "no manifest": json.dumps(
        {"protocol_version": 1, "session": "s", "manifest": pack({"not": "tensors"})}
    ).encode(),
    "an endless deadline": b'{"protocol_version": 1, "session": "s", "manifest": "",'
    b' "timeout_s": 1e999}',
    "a negative shape": json.dumps(
        {"protocol_version": 1, "session": "s", "manifest": pack([(QUERY, "bfloat16", (-1,), "")])}
    ).encode(),
    "nested without end": b"[" * 100_000,
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_body_is_refused_and_the_agent_stays_ready(
    stack: Stack, held: Held, what: str
) -> None:
    answer = stack.raw_post("/init_transfer", MALFORMED[what])
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["code"] in {"invalid_input", "manifest_mismatch"}
    assert problem["detail"]
    assert problem["hint"]
    stack.assert_serves(held)


def test_a_huge_body_is_refused_unread_and_the_agent_stays_ready(stack: Stack, held: Held) -> None:
    def endless() -> Iterator[bytes]:  # no Content-Length tells how much it is
        for _ in range(64):
            yield b" " * 65536

    for content in (b" " * (LIMIT_NBYTES + 1), endless()):
        answer = stack.raw_post("/init_transfer", content)
        assert answer.status_code == 413
        assert answer.json()["code"] == "body_too_large"
        assert answer.json()["context"]["limit"] == LIMIT_NBYTES
        assert "--max-body-nbytes" in answer.json()["hint"]
    stack.assert_serves(held)
    stack.assert_a_whole_push_works()


def test_a_small_body_that_inflates_beyond_the_limit_is_refused(stack: Stack, held: Held) -> None:
    bomb = pack("x" * (2 * UNPACKED_NBYTES))
    assert len(bomb) < LIMIT_NBYTES
    error = stack.refusal(
        "/init_transfer", protocol_version=PROTOCOL_VERSION, session="s-bomb", manifest=bomb
    )
    assert isinstance(error, BodyTooLargeError)
    assert str(UNPACKED_NBYTES) in error.message
    stack.assert_serves(held)
    stack.assert_a_whole_push_works()
