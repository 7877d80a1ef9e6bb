"""The decoder's pauses, without a model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest

from weightsync.errors import DeadlineError, EngineError, StateError
from weightsync_server.engines.torch_decoder import Decoder, Token

WAIT_S = 5.0
MANY = 1_000_000


class Model:
    """Counts up from the last token; can be made to fail or to hang."""

    def __init__(self) -> None:
        self.version = 0
        self.fails = False
        self.gate = threading.Event()
        self.gate.set()

    def next_token(self, token_ids: list[int]) -> Token:
        assert self.gate.wait(WAIT_S)
        if self.fails:
            raise RuntimeError("broken weights")
        time.sleep(0.0005)
        return Token(token_ids[-1] + 1, -1.0, self.version)


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def decoder(model: Model) -> Iterator[Decoder]:
    decoder = Decoder(model.next_token)
    yield decoder
    decoder.close(timeout_s=WAIT_S)


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "the condition never came true"
        time.sleep(0.001)


def begun(decoder: Decoder, max_tokens: int = MANY) -> Future:
    before = decoder.load().tokens_made
    done = decoder.submit([0], max_tokens)
    until(lambda: decoder.load().tokens_made > before + 1)
    return done


def test_requests_that_run_together_get_their_own_tokens(decoder: Decoder):
    one, two = decoder.submit([0], 20), decoder.submit([5, 100], 30)
    assert [token.token_id for token in one.result(WAIT_S).tokens] == list(range(1, 21))
    assert [token.token_id for token in two.result(WAIT_S).tokens] == list(range(101, 131))


def test_keep_freezes_between_tokens_and_resume_goes_on(decoder: Decoder, model: Model):
    done = begun(decoder, 200)

    decoder.pause("keep").result(WAIT_S)
    frozen = decoder.load()
    model.version = 7
    time.sleep(0.05)
    assert decoder.load() == frozen
    assert not done.done()
    decoder.resume().result(WAIT_S)

    tokens = done.result(WAIT_S).tokens
    assert [token.token_id for token in tokens] == list(range(1, 201))
    assert {token.weight_version for token in tokens} == {0, 7}


def test_wait_lets_running_requests_end_and_holds_new_ones(decoder: Decoder):
    done = begun(decoder, 100)

    paused = decoder.pause("wait")
    late = decoder.submit([0], 1)
    paused.result(WAIT_S)

    assert done.done()
    assert done.result().finish_reason == "length"
    assert not late.done()
    decoder.resume().result(WAIT_S)
    assert late.result(WAIT_S).finish_reason == "length"


def test_abort_ends_running_and_waiting_requests(decoder: Decoder):
    running = begun(decoder)
    decoder.pause("keep").result(WAIT_S)
    waiting = decoder.submit([0], 1)

    decoder.pause("abort").result(WAIT_S)

    assert running.result(WAIT_S).finish_reason == "abort"
    assert len(running.result().tokens) > 1
    assert waiting.result(WAIT_S).tokens == ()
    assert decoder.load().paused


def test_wait_after_keep_thaws_what_was_frozen(decoder: Decoder):
    done = begun(decoder, 100)
    decoder.pause("keep").result(WAIT_S)

    decoder.pause("wait").result(WAIT_S)

    assert done.done()


@pytest.mark.parametrize("other", ["resume", "keep"])
def test_a_wait_that_is_overtaken_fails_instead_of_hanging(decoder: Decoder, other):
    begun(decoder)
    waiting = decoder.pause("wait")

    (decoder.resume() if other == "resume" else decoder.pause("keep")).result(WAIT_S)

    with pytest.raises(StateError, match="before the running requests had ended"):
        waiting.result(WAIT_S)
    assert decoder.load().paused == (other == "keep")


def test_a_pause_that_nobody_waits_for_any_more_still_holds(decoder: Decoder):
    done = begun(decoder, 100)
    decoder.pause("wait").cancel()
    done.result(WAIT_S)
    late = decoder.submit([0], 1)
    until(lambda: decoder.load().waiting == 1)
    assert not late.done()


def test_a_cancelled_request_is_dropped_also_while_paused(decoder: Decoder):
    running = begun(decoder)
    decoder.pause("keep").result(WAIT_S)
    waiting = decoder.submit([0], MANY)
    assert running.cancel()
    assert waiting.cancel()

    decoder.resume().result(WAIT_S)

    until(lambda: decoder.load()[1:3] == (0, 0))
    assert decoder.submit([0], 1).result(WAIT_S).finish_reason == "length"


def test_commands_run_between_tokens_and_their_errors_reach_the_caller(decoder: Decoder):
    begun(decoder)

    def fail() -> None:
        raise ValueError("from the command")

    assert decoder.call(threading.current_thread).result(WAIT_S).name == "decoder"
    with pytest.raises(ValueError, match="from the command"):
        decoder.call(fail).result(WAIT_S)
    assert decoder.load().running == 1


def test_a_command_cancelled_before_it_began_never_runs(decoder: Decoder, model: Model):
    ran: list[int] = []
    model.gate.clear()
    decoder.submit([0], MANY)
    until(lambda: decoder.load().running == 1)
    assert decoder.call(lambda: ran.append(1)).cancel()
    model.gate.set()
    decoder.call(lambda: ran.append(2)).result(WAIT_S)
    assert ran == [2]


def test_a_failing_model_fails_its_request_and_not_the_decoder(decoder: Decoder, model: Model):
    model.fails = True
    with pytest.raises(EngineError, match="broken weights"):
        decoder.submit([0], 3).result(WAIT_S)
    model.fails = False
    assert decoder.submit([0], 3).result(WAIT_S).finish_reason == "length"


def test_close_ends_everything_and_refuses_more(decoder: Decoder):
    done = begun(decoder)
    draining = decoder.pause("wait")

    decoder.close(timeout_s=WAIT_S)

    assert done.result(WAIT_S).finish_reason == "abort"
    with pytest.raises(StateError):
        draining.result(WAIT_S)
    with pytest.raises(EngineError, match="shutting down"):
        decoder.submit([0], 1)
    decoder.close(timeout_s=WAIT_S)


def test_close_has_a_deadline(decoder: Decoder, model: Model):
    model.gate.clear()
    decoder.submit([0], 1)
    until(lambda: decoder.load().running == 1)
    with pytest.raises(DeadlineError, match=r"still runs after 0\.05 s"):
        decoder.close(timeout_s=0.05)
    model.gate.set()
