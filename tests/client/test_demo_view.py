"""Both views show every step, with no terminal codes where there is no terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from weightsync_client.demo.ask import Answer
from weightsync_client.demo.options import DemoOptions
from weightsync_client.demo.view import PlainView, TerminalView, View

REPORT = {
    "version": 1, "nbytes": 2_900_000, "rendezvous_s": 1.2, "fill_s": 0.02, "pause_s": 0.006,
    "begin_s": 0.004, "write_s": 0.01, "commit_s": 0.014, "resume_s": 0.005, "paused_s": 0.04,
    "total_s": 1.3, "rate_bytes_per_s": 290e6,
}  # fmt: skip


def shown(view: View, out: io.StringIO) -> str:
    view.opened(DemoOptions(tp=2))
    view.working("starting vllm")
    view.done("vllm 0.32.0 serves it")
    view.answered(0, Answer((1, 2, 3, 4, 5), (-1.25, -2.5, -3.0, -4.0, -5.0)))
    for phase in ("status", "fill", "write"):
        view.phase(1, phase, None)
        view.phase(1, phase, 0.5)
    view.pushed(REPORT)
    view.proven([("all bytes are equal", True), ("all [logprobs] are equal", False)])
    view.refused(
        [{"tensor": "lm_head.weight", "reason": "differs [at] 3"}], old_weights_served=True
    )
    view.close()
    return out.getvalue()


@pytest.fixture(params=["plain", "terminal"])
def text(request):
    out = io.StringIO()
    if request.param == "plain":
        return shown(PlainView(out), out)
    console = Console(file=out, force_terminal=True, width=100, color_system=None)
    return shown(TerminalView(console), out)


def test_view_names_every_phase_and_what_the_engine_answers(text):
    for phase in ("rendezvous 1.20 s", "fill 20.0 ms", "write 10.0 ms", "commit 14.0 ms"):
        assert phase in text
    assert "paused 40.0 ms" in text
    assert "2.9 MB written at 290.0 MB/s" in text
    assert "tokens 1 2 3 4 …  logprobs -1.2500 -2.5000" in text
    assert "vllm 0.32.0 serves it" in text


def test_view_shows_what_holds_and_what_does_not(text):
    good, bad = ("ok: ", "FAILED: ") if "ok: " in text else ("✓  ", "✗  ")
    assert f"{good}all bytes are equal" in text
    assert f"{bad}all [logprobs] are equal" in text


def test_view_lists_refusals_as_they_were_told(text):
    assert "lm_head.weight" in text
    assert "differs [at] 3" in text
    assert "still serves its old weights" in text


def test_plain_lines_have_no_terminal_codes():
    out = io.StringIO()
    assert "\x1b" not in shown(PlainView(out), out)
