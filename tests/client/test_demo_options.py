"""The demo's command line, its JSON and its exit statuses, without any engine."""

from __future__ import annotations

import json
import signal

import pytest
from typer.testing import CliRunner

from weightsync_client import cli
from weightsync_client.demo import run as demo_run
from weightsync_client.demo.ask import make_prompts
from weightsync_client.demo.options import DemoOptions
from weightsync_client.demo.result import EXIT_OK, EXIT_REFUSED, PUSH_FIELDS, DemoResult
from weightsync_client.demo.stack import (
    context_tokens,
    engine_command,
    engine_environ,
    shared_environ,
)

JSON_FIELDS = [
    "ok", "engine", "pushes", "kernel_tensors", "direct", "staged", "refused",
    "bytes_equal_fresh_load", "logprobs_equal_fresh_load", "refusals",
]  # fmt: skip
REPORT = {name: i for i, name in enumerate(PUSH_FIELDS)} | {"push_id": "p-1", "begin_s": 1.0}


def demo(*arguments: str):
    return CliRunner().invoke(cli.app, ["demo", *arguments])


@pytest.fixture
def ended(monkeypatch):
    """Lets the demo end at once, with this result; ``asked`` holds the options it was given."""
    result, asked = DemoResult(), []
    monkeypatch.setattr(cli, "run_demo", lambda options, view: asked.append(options) or result)
    return result, asked


def test_json_has_exactly_the_fields_of_the_contract():
    result = DemoResult(engine="torch 5.0")
    result.add_push(REPORT)
    assert list(result.to_dict()) == JSON_FIELDS
    assert list(result.to_dict()["pushes"][0]) == [
        "version", "nbytes", "fill_s", "pause_s", "write_s", "commit_s", "resume_s", "total_s",
        "paused_s",
    ]  # fmt: skip


def test_json_prints_one_object_and_nothing_else(ended):
    result, _ = ended
    result.exit_code, result.folder = EXIT_OK, "/somewhere"
    answer = demo("--json")
    assert answer.exit_code == 0
    assert json.loads(answer.stdout) == result.to_dict()
    assert answer.stdout.count("\n") == 1
    assert "/somewhere" in answer.stderr


def test_refusal_exits_3_with_the_list(ended):
    result, _ = ended
    result.exit_code, result.error = EXIT_REFUSED, "1 kernel tensor is refused"
    result.refusals = [{"tensor": "lm_head.weight", "reason": "differs"}]
    answer = demo("--json")
    assert answer.exit_code == 3
    assert json.loads(answer.stdout)["ok"] is False
    assert json.loads(answer.stdout)["refusals"] == result.refusals
    assert "1 kernel tensor is refused" in answer.stderr


def test_failure_exits_1_and_says_why(ended):
    ended[0].error = "first engine ended unexpectedly"
    answer = demo("--json")
    assert answer.exit_code == 1
    assert json.loads(answer.stdout)["ok"] is False
    assert "first engine ended unexpectedly" in answer.stderr


def test_defaults_are_vllm_packed_and_three_pushes(ended):
    demo()
    assert ended[1] == [DemoOptions(engine="vllm", pushes=3, packed=True, tp=1)]


def test_options_reach_the_demo(ended, tmp_path):
    arguments = ["--engine", "vllm", "--plain", "--tp", "2", "--pushes", "5", "--keep"]
    arguments += ["--pp", "3", "--dp", "4", "--expert-parallel", "--replicas", "2"]
    arguments += ["--one-agent"]
    arguments += ["--trainer-ranks", "6", "--workdir", str(tmp_path / "w"), "--timeout", "30"]
    demo(*arguments, "--model-config", str(tmp_path / "c.json"))
    assert ended[1] == [
        DemoOptions(
            packed=False, tp=2, pp=3, dp=4, expert_parallel=True, replicas=2, one_agent=True,
            trainer_ranks=6, pushes=5, keep=True, workdir=tmp_path / "w", timeout_s=30,
            config_file=tmp_path / "c.json",
        )
    ]  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [
        ["--engine", "sglang"],
        ["--pushes", "0"],
        ["--tp", "0"],
        ["--timeout", "0"],
        ["--engine", "torch", "--tp", "2"],
        ["--engine", "torch", "--pp", "2"],
        ["--engine", "torch", "--dp", "2"],
        ["--engine", "torch", "--expert-parallel"],
        ["--replicas", "0"],
        ["--trainer-ranks", "0"],
        ["--model-config", "{folder}/missing.json"],
        ["--model-config", "{folder}/no-json.json"],
        ["--model-config", "{folder}/no-config.json"],
        ["--workdir", "{folder}"],
        ["--workdir", "{folder}/no-json.json"],
        ["--workdir", "{folder}/no-json.json/below"],
        ["--no-such-option"],
    ],
    ids=" ".join,
)
def test_bad_arguments_exit_2_and_start_nothing(arguments, tmp_path, monkeypatch):
    def no_process(*_):
        raise AssertionError("started a process")

    monkeypatch.setattr(demo_run, "Processes", no_process)
    (tmp_path / "no-json.json").write_text("{")
    (tmp_path / "no-config.json").write_text('{"hidden_size": 64}')
    answer = demo(*(a.format(folder=tmp_path) for a in arguments), "--json")
    assert answer.exit_code == 2
    assert answer.stderr
    # what the parser itself refuses it tells in words alone
    if answer.stdout:
        assert json.loads(answer.stdout)["error"]["code"] == "invalid_input"
    assert bool(answer.stdout) is ("Usage:" not in answer.stderr)


def test_interrupt_exits_130_and_sigterm_143(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_demo", interrupted)
    assert demo().exit_code == 130
    monkeypatch.setattr(cli, "run_demo", lambda *_: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert demo().exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_vllm_is_started_without_its_development_mode(tmp_path):
    options = DemoOptions(tp=2, packed=False)
    command = " ".join(engine_command(options, tmp_path, 8000, 128))
    assert "-m vllm.entrypoints.openai.api_server" in command
    assert "--worker-extension-cls weightsync_server.worker.WeightsyncWorker" in command
    assert "--middleware weightsync_server.middleware.WeightsyncMiddleware" in command
    assert "--tensor-parallel-size 2" in command
    assert engine_environ(options)["WEIGHTSYNC_VLLM_CPU_PLAIN"] == "1"
    assert "WEIGHTSYNC_VLLM_CPU_PLAIN" not in engine_environ(DemoOptions())
    caller = {"VLLM_SERVER_DEV_MODE": "1", "WEIGHTSYNC_TOKEN": "t", "PATH": "/bin"}
    shared = shared_environ(caller)
    assert "VLLM_SERVER_DEV_MODE" not in shared
    assert "WEIGHTSYNC_TOKEN" not in shared
    assert shared["PATH"] == "/bin"


def test_every_run_has_a_secret_of_its_own():
    one, other = (shared_environ({})["WEIGHTSYNC_ENGINE_SECRET"] for _ in range(2))
    assert one != other


def test_prompts_are_of_the_vocabulary_and_repeatable():
    assert make_prompts(97) == make_prompts(97)
    assert {len(p) for p in make_prompts(97)} == {3, 4, 7, 12}
    assert all(0 <= token < 97 for prompt in make_prompts(97) for token in prompt)


@pytest.mark.parametrize(("max_positions", "tokens"), [(None, 128), (4096, 128), (64, 64)])
def test_context_fits_the_model(max_positions, tokens):
    assert context_tokens(max_positions) == tokens
