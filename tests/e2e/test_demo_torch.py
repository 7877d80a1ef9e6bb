"""``weightsync demo --engine torch``: the whole path with the small engine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.support.models import config_of
from tests.support.traces import read_trace
from weightsync_client.demo import DemoOptions, run_demo, stack
from weightsync_client.demo.result import EXIT_BAD_ARGUMENTS, EXIT_FAILED, EXIT_REFUSED

pytestmark = [pytest.mark.nixl, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-c", "from weightsync_client.cli import main; main()", "demo"]
TIMES = ("fill_s", "pause_s", "write_s", "commit_s", "resume_s", "total_s", "paused_s")


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """The demo's processes find the packages where this one does."""
    folders = [ROOT, ROOT / "server", ROOT / "client", os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))


def processes_below(folder: Path) -> list[str]:
    """Command lines of processes that name a folder."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in lines if str(folder) in line]


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, "--engine", "torch", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def test_json_proves_every_push_against_a_fresh_load(tmp_path):
    workdir = tmp_path / "demo"
    done = demo("--json", "--workdir", str(workdir))
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["ok"] is True
    assert said["engine"].startswith("torch ")
    assert [push["version"] for push in said["pushes"]] == [1, 2, 3]
    for push in said["pushes"]:
        assert push["nbytes"] > 1_000_000
        assert all(push[name] > 0 for name in TIMES)
        assert push["paused_s"] < push["total_s"]
    assert said["kernel_tensors"] == said["direct"] > 20
    assert (said["staged"], said["refused"], said["refusals"]) == (0, 0, [])
    assert said["bytes_equal_fresh_load"] is True
    assert said["logprobs_equal_fresh_load"] is True
    assert (workdir / "trained" / "model.safetensors").exists()
    assert processes_below(workdir) == []


@pytest.mark.parametrize("one_agent", [False, True], ids=["an agent each", "one agent"])
def test_two_fsdp2_ranks_push_into_two_engines(one_agent, tmp_path):
    workdir = tmp_path / "demo"
    trace = tmp_path / "push.json"
    options = ["--trainer-ranks", "2", "--replicas", "2", "--pushes", "2", "--trace", str(trace)]
    options += ["--one-agent"] if one_agent else []
    done = demo("--json", "--workdir", str(workdir), *options)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["ok"] is True
    assert [push["version"] for push in said["pushes"]] == [1, 2]
    saved = (workdir / "trained" / "model.safetensors").stat().st_size
    for push in said["pushes"]:  # the weights, to each of the two engines once
        assert push["nbytes"] == pytest.approx(2 * saved, rel=0.01)
    lanes = read_trace(trace)
    assert {process for process, _ in lanes if process.startswith("rank")} == {"rank 0", "rank 1"}
    assert len([lane for _, lane in lanes if lane.startswith("engine")]) == 2
    assert len([lane for _, lane in lanes if lane.startswith("write to")]) == 4
    assert "50 of 50 tensors of 2 engines have the fresh load's SHA-256" in done.stderr
    assert processes_below(workdir) == []


def test_two_bf16_ranks_push_into_an_engine_of_fp8_blocks(tmp_path):
    """Experts too; the checkpoint that the engine is compared with was not made by the push."""
    path, workdir = tmp_path / "config.json", tmp_path / "demo"
    config_of("qwen3_moe").to_json_file(path)
    options = ["--trainer-ranks", "2", "--pushes", "2", "--model-config", str(path)]
    done = demo("--json", "--workdir", str(workdir), "--quantization", "fp8", *options)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["ok"] is True
    assert (said["bytes_equal_fresh_load"], said["logprobs_equal_fresh_load"]) == (True, True)
    with safe_open(workdir / "trained" / "model.safetensors", "pt") as saved:
        names = set(saved.keys())
        one = "model.layers.1.mlp.experts.7.down_proj.weight"
        assert saved.get_slice(one).get_dtype() == "F8_E4M3"
    scales = {name for name in names if name.endswith("_scale_inv")}
    assert len(scales) == 2 * (4 + 3 * 8)
    assert "model.layers.0.mlp.gate.weight_scale_inv" not in scales


def test_plain_lines_show_a_moe_that_publishes_one_tensor_an_expert(tmp_path):
    path = tmp_path / "config.json"
    config_of("qwen3_moe").to_json_file(path)
    done = demo("--pushes", "1", "--model-config", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Qwen3MoeForCausalLM" in done.stdout
    assert "pushed v1" in done.stdout
    assert "the engine with v0 answers tokens" in done.stdout
    assert "FAILED" not in done.stdout
    assert "\x1b" not in done.stdout


def test_refused_tensors_end_with_3_and_the_engine_keeps_its_weights(tmp_path, monkeypatch):
    ours = stack.engine_command

    def refusing(*arguments):
        command = ours(*arguments)
        command[command.index("-m") + 1] = "tests.support.refusing_host"
        return command

    monkeypatch.setattr(stack, "engine_command", refusing)
    result = run_demo(DemoOptions(engine="torch", workdir=tmp_path / "demo"))
    assert result.exit_code == EXIT_REFUSED, result.error
    assert result.old_weights_served
    layers = [f"model.layers.{i}.mlp.{name}_proj" for i in (0, 1) for name in ("gate", "up")]
    modules = ["lm_head", *layers]
    assert [r["tensor"] for r in result.refusals] == [f"{module}.weight" for module in modules]
    for module, refusal in zip(modules, result.refusals, strict=True):
        assert module in refusal["reason"]
    assert (result.refused, result.pushes, result.ok) == (5, [], False)
    assert processes_below(tmp_path) == []


def test_an_engine_that_dies_is_told_with_its_log(tmp_path, monkeypatch):
    dies = [sys.executable, "-c", "raise SystemExit('no room on this device')"]
    monkeypatch.setattr(stack, "engine_command", lambda *_: dies)
    result = run_demo(DemoOptions(engine="torch", workdir=tmp_path / "demo"))
    assert result.exit_code == EXIT_FAILED
    assert "first engine ended unexpectedly" in result.error
    assert "no room on this device" in result.error


def test_the_whole_demo_has_a_deadline(tmp_path, monkeypatch):
    sleeps = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(stack, "engine_command", lambda *_: sleeps)
    started = time.monotonic()
    result = run_demo(DemoOptions(engine="torch", workdir=tmp_path / "demo", timeout_s=8))
    assert result.exit_code == EXIT_FAILED
    assert "the demo was not over after 8 s" in result.error
    assert time.monotonic() - started < 40


def test_config_that_no_model_can_be_made_from_ends_with_2(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "no-such-model"}')
    result = run_demo(DemoOptions(engine="torch", config_file=path, workdir=tmp_path / "demo"))
    assert result.exit_code == EXIT_BAD_ARGUMENTS
    assert "no-such-model" in result.error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_ends_every_process(number, tmp_path):
    workdir = tmp_path / "demo"
    command = [*COMMAND, "--engine", "torch", "--json", "--workdir", str(workdir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        until = time.monotonic() + 60
        while not ((workdir / "v0").exists() and len(processes_below(workdir)) >= 3):
            assert time.monotonic() < until  # for the demo, the trainer and the engine
            time.sleep(0.05)
        process.send_signal(number)
        out, _ = process.communicate(timeout=40)
    assert process.returncode == 128 + number
    assert out == b""
    assert processes_below(workdir) == []
