"""Tokens: replaced without a restart, guessed slowly, and a right one is not held up for long."""

from __future__ import annotations

import asyncio
import logging

import httpx
import pytest

from weightsync.errors import AuthError, InputError, TooManyAttemptsError
from weightsync.tokens import read_tokens
from weightsync_client.control import Fleet
from weightsync_client.settings import Deadlines, token_from_env
from weightsync_server.agent import tokens as agent_tokens
from weightsync_server.agent.settings import AgentSettings, load_settings
from weightsync_server.agent.tokens import ALLOWED, LOCK_S, REMEMBERED, FailedAttempts, Tokens

OLD, NEW = "old-" + "o" * 28, "new-" + "n" * 28


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def put(path, text: str) -> None:
    """As an orchestrator does it: another file takes the name."""
    fresh = path.with_suffix(".fresh")
    fresh.write_text(text)
    fresh.replace(path)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "agent.token"
    path.write_text(OLD + "\n")
    return path


# ---------------------------------------------------------------- the file


async def test_a_token_is_replaced_without_a_restart_and_both_are_right_meanwhile(
    make_agent, engine, token_file, monkeypatch
):
    monkeypatch.setattr(agent_tokens, "LOOK_S", 0.0)
    agent = await make_agent(engine.url, token=OLD, token_file=token_file)

    async def codes() -> list[int]:
        return [
            (await agent.http.get("/status", headers=bearer(token))).status_code
            for token in (OLD, NEW)
        ]

    assert await codes() == [200, 401]
    put(token_file, f"{NEW}\n{OLD}\n")
    assert await codes() == [200, 200]
    put(token_file, NEW)
    assert await codes() == [401, 200]


@pytest.mark.parametrize("text", ["", "\n\n", "two words", "a\nb\nc", "ä" * 20, "x" * 5000])
def test_a_file_that_holds_no_tokens_changes_nothing_and_is_told(
    token_file, monkeypatch, caplog, text
):
    monkeypatch.setattr(agent_tokens, "LOOK_S", 0.0)
    settings = AgentSettings(engine_url="http://127.0.0.1:9", token_file=token_file)
    tokens = Tokens.of(settings)
    assert tokens is not None
    put(token_file, text)
    with caplog.at_level(logging.ERROR):
        assert tokens.accept(OLD)
    assert str(token_file) in caplog.text
    token_file.unlink()
    assert tokens.accept(OLD)
    put(token_file, NEW)
    assert tokens.accept(NEW)
    assert not tokens.accept(OLD)


def test_an_agent_does_not_start_with_a_bad_token_file(token_file):
    argv = ["--engine-url", "http://127.0.0.1:9", "--token-file", str(token_file)]
    assert load_settings(argv, {}).token.get_secret_value() == OLD
    put(token_file, "")
    with pytest.raises(InputError, match="token file"):
        load_settings(argv, {})


def test_a_token_that_others_can_read_or_guess_is_warned_of(token_file, caplog):
    settings = AgentSettings(engine_url="http://127.0.0.1:9", token_file=token_file)
    token_file.chmod(0o640)
    Tokens.of(settings)
    assert caplog.text == ""
    token_file.write_text("short")
    token_file.chmod(0o644)
    Tokens.of(settings)
    assert "can be guessed" in caplog.text
    assert f"chmod o= {token_file}" in caplog.text


def test_callers_send_the_first_line(token_file):
    put(token_file, f"{NEW}\n{OLD}\n")
    assert read_tokens(token_file)[0] == NEW


def test_tokens_are_compared_in_constant_time_at_one_length(monkeypatch):
    compared = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return a == b

    monkeypatch.setattr(agent_tokens.hmac, "compare_digest", compare)
    tokens = Tokens([OLD])
    assert tokens.accept(OLD)
    assert not tokens.accept("x")
    assert not tokens.accept("")
    assert compared == [(32, 32)] * 3


# ---------------------------------------------------------------- guesses


async def test_an_address_that_guesses_has_to_wait_and_an_open_connection_goes_on(
    make_agent, engine
):
    agent = await make_agent(engine.url, token=OLD)  # its connection has sent the right token
    async with httpx.AsyncClient(base_url=agent.url, trust_env=False) as other:
        for _ in range(ALLOWED):
            assert (await other.get("/status", headers=bearer("guess"))).status_code == 401
        for token in ("guess", OLD):  # unheard: a lucky guess is not told from another
            answer = await other.get("/status", headers=bearer(token))
            assert answer.status_code == 429
            assert answer.json()["code"] == "too_many_attempts"
            assert 1 <= int(answer.headers["retry-after"]) <= LOCK_S
        assert (await other.get("/healthz")).status_code == 200
    assert (await agent.http.get("/status")).status_code == 200


async def test_a_call_without_a_token_is_no_guess(make_agent, engine):
    agent = await make_agent(engine.url, token=OLD)
    async with httpx.AsyncClient(base_url=agent.url, trust_env=False) as other:
        codes = {(await other.get("/status")).status_code for _ in range(ALLOWED + 2)}
    assert codes == {401}


def test_a_right_token_waits_five_seconds_at_most_and_a_guesser_five_for_each():
    clock = Clock()
    attempts = FailedAttempts(clock)
    for _ in range(ALLOWED):
        attempts.check(("10.0.0.1", 1))
        attempts.failed(("10.0.0.1", 1))
    with pytest.raises(TooManyAttemptsError) as caught:
        attempts.check(("10.0.0.1", 2))
    assert 0 < caught.value.context["retry_after_s"] <= LOCK_S
    attempts.check(("10.0.0.2", 1))  # another address
    clock.now += LOCK_S
    attempts.check(("10.0.0.1", 2))
    attempts.failed(("10.0.0.1", 2))
    with pytest.raises(TooManyAttemptsError):
        attempts.check(("10.0.0.1", 3))
    clock.now += agent_tokens.FORGET_S
    for _ in range(ALLOWED - 1):
        attempts.failed(("10.0.0.1", 4))
        attempts.check(("10.0.0.1", 4))


def test_a_wrong_token_ends_the_trust_in_a_connection():
    attempts = FailedAttempts(Clock())
    attempts.succeeded(("10.0.0.1", 1))
    for _ in range(ALLOWED):
        attempts.failed(("10.0.0.1", 2))
    attempts.check(("10.0.0.1", 1))
    attempts.failed(("10.0.0.1", 1))
    with pytest.raises(TooManyAttemptsError):
        attempts.check(("10.0.0.1", 1))


def test_all_addresses_of_an_ipv6_network_count_as_one():
    attempts = FailedAttempts(Clock())
    for n in range(ALLOWED):
        attempts.failed((f"2001:db8::{n:x}", 1))
    with pytest.raises(TooManyAttemptsError):
        attempts.check(("2001:db8::ffff", 1))
    attempts.check(("2001:db8:0:1::1", 1))


def test_what_is_remembered_of_addresses_is_bounded():
    attempts = FailedAttempts(Clock())
    for n in range(REMEMBERED + 100):
        address = f"10.{n >> 16 & 255}.{n >> 8 & 255}.{n & 255}"
        attempts.failed((address, 1))
        attempts.succeeded((address, 2))
    assert len(attempts._failed) == len(attempts._trusted) == REMEMBERED


# ---------------------------------------------------------------- the trainer


def answers(*statuses: int, retry_after_s: float = 0.01):
    """A transport that answers with these statuses, one after another."""
    left = list(statuses)

    def handle(_request: httpx.Request) -> httpx.Response:
        status = left.pop(0)
        if status == 200:
            return httpx.Response(200, json={"state": "ready"})
        error = TooManyAttemptsError("too many", retry_after_s=retry_after_s)
        return httpx.Response(status, json=error.to_problem())

    return httpx.MockTransport(handle), left


def test_a_trainer_waits_until_its_address_is_heard_again():
    transport, left = answers(429, 429, 200)
    with Fleet(["http://a:1"], token=OLD, deadlines=Deadlines(), transport=transport) as fleet:
        assert fleet.agents[0].get("/status", timeout_s=5) == {"state": "ready"}
    assert not left


def test_a_trainer_waits_no_longer_than_its_deadline():
    transport, left = answers(429, 200, retry_after_s=60)
    deadlines = Deadlines(grace_s=5)
    with (
        Fleet(["http://a:1"], token=OLD, deadlines=deadlines, transport=transport) as fleet,
        pytest.raises(AuthError) as caught,
    ):
        fleet.agents[0].get("/status", timeout_s=5)
    assert caught.value.code == "too_many_attempts"
    assert left == [200]


async def test_a_trainer_follows_its_token_file(make_agent, engine, token_file, monkeypatch):
    monkeypatch.setattr(agent_tokens, "LOOK_S", 0.0)
    agent = await make_agent(engine.url, token=OLD, token_file=token_file)

    def ask(fleet: Fleet) -> str:
        return fleet.agents[0].get("/status", timeout_s=5)["state"]

    monkeypatch.delenv("WEIGHTSYNC_TOKEN", raising=False)
    monkeypatch.setenv("WEIGHTSYNC_TOKEN_FILE", str(token_file))
    with Fleet([agent.url], token=token_from_env(), deadlines=Deadlines()) as fleet:
        assert await asyncio.to_thread(ask, fleet) == "ready"
        put(token_file, NEW)
        assert await asyncio.to_thread(ask, fleet) == "ready"
        put(token_file, "")
        with pytest.raises(InputError, match="token file"):
            await asyncio.to_thread(ask, fleet)


def test_a_trainers_bad_token_is_refused_before_any_call(tmp_path):
    for token in (tmp_path / "none", "two words"):
        with pytest.raises(InputError):
            Fleet(["http://127.0.0.1:9"], token=token, deadlines=Deadlines())
