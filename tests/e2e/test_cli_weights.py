"""``push``, ``verify`` and ``explain`` against a real agent."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.cli import Run
from tests.support.stack import Stack, save
from tests.support.torch_host import free_port
from tests.support.traces import read_trace, seconds
from weightsync_client.transaction import Transaction

pytestmark = pytest.mark.nixl
REPORT_FIELDS = {"version", "nbytes", "fill_s", "write_s", "paused_s", "total_s", "agents"}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for f in sorted(folder.glob("*.safetensors")) for k, t in load_file(f).items()}


def test_a_pushed_folder_is_what_the_engine_serves_and_verify_says_so(
    stack: Stack, run: Run, checkpoint: Path, second: Path, tmp_path: Path
) -> None:
    agent = ("--agent", stack.agent.url)
    trace = tmp_path / "push.json"
    pushed = run("push", second, *agent, "--json", "--trace", trace, "--log-format", "json")
    assert pushed.code == 0, pushed.err
    assert pushed.json.keys() >= REPORT_FIELDS
    lanes = read_trace(trace)
    assert seconds(lanes["rank 0", "phases"], "write") == pytest.approx(pushed.json["write_s"])
    stack.assert_holds(weights_of(second), pushed.json["version"])

    equal = run("verify", second, *agent, "--json")
    assert equal.code == 0, equal.err
    (verdict,) = equal.json["agents"]
    assert equal.json["equal"] is verdict["equal"] is True
    assert (verdict["version"], verdict["differs"]) == (pushed.json["version"], [])
    assert verdict["kernel_tensors"] == 25
    stack.assert_holds(weights_of(second), pushed.json["version"])

    other = run("verify", checkpoint, *agent, "--json")
    assert other.code == 1
    assert len(other.json["agents"][0]["differs"]) == 25
    told = run("verify", checkpoint, *agent).out
    assert (told.count("(from "), told.count("and 5 more: --json has all")) == (20, 1)


def test_verify_names_the_one_tensor_that_differs(
    stack: Stack, run: Run, second: Path, tmp_path: Path
) -> None:
    agent = ("--agent", stack.agent.url)
    assert run("push", second, *agent, "--max-slot-bytes", 2**20).out.startswith("v")
    weights = weights_of(second)
    name = "model.layers.1.self_attn.k_proj.weight"
    weights[name][3, 5] += 1
    folder = save(weights, stack.checkpoint, tmp_path / "other")
    (found,) = run("verify", folder, *agent, "--json").json["agents"][0]["differs"]
    assert name in found["checkpoint_tensors"]
    assert found["kernel_tensor"] == name
    told = run("verify", folder, *agent, "--max-slot-bytes", 2**20)
    assert told.code == 1
    assert f"(from {name})" in told.out
    assert "compared: 1 differ" in told.out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_push_that_is_ended_by_a_signal_leaves_the_engine_as_it_was(
    stack: Stack, run: Run, second: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    held = stack.held()
    # the engine is paused by then

    def ended_once_paused(push: Transaction) -> None:
        push.pause()
        signal.raise_signal(number)

    monkeypatch.setattr(Transaction, "pause_and_begin", ended_once_paused)
    done = run("push", second, "--agent", stack.agent.url)
    assert done.code == code
    stack.assert_serves(held)


def test_a_push_by_hand_is_refused_while_a_person_paused_the_engine(
    stack: Stack, run: Run, second: Path
) -> None:
    run("pause", stack.agent.url)
    done = run("push", second, "--agent", stack.agent.url, "--json")
    assert (done.code, done.json["error"]["code"]) == (1, "engine_paused")
    assert "nothing was written" in done.err
    assert run("verify", second, "--agent", stack.agent.url).code == 1  # it may be asked, though


def test_what_cannot_be_pushed_is_told_before_anything_moves(
    stack: Stack, run: Run, second: Path, tmp_path: Path
) -> None:
    agent = ("--agent", stack.agent.url)
    held = stack.held()
    empty = tmp_path / "empty"
    empty.mkdir()
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    part = tmp_path / "part"
    part.mkdir()
    weights = weights_of(second)
    save_file({k: weights[k] for k in sorted(weights)[1:]}, part / "model.safetensors")
    nan = weights | {"model.norm.weight": weights["model.norm.weight"] * float("nan")}
    save(nan, stack.checkpoint, tmp_path / "nan")
    for folder, code in (
        (tmp_path / "missing", "invalid_input"),
        (empty, "invalid_input"),
        (torn, "invalid_input"),
        (part, "manifest_mismatch"),
        (tmp_path / "nan", "non_finite_weights"),
    ):
        done = run("push", folder, *agent, "--json")
        assert (done.code, done.json["error"]["code"]) == (2, code), done.err
    gone = f"http://127.0.0.1:{free_port()}"
    assert run("push", second, *agent, "--agent", gone).code == 4
    assert run("push", second, *agent, "--version", 0).code == 2
    assert run("push", second, *agent, "--trace", tmp_path / "no" / "push.json").code == 2
    stack.assert_serves(held)


def test_explain_tells_where_every_byte_of_a_checkpoint_tensor_goes(stack: Stack, run: Run) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    done = run("explain", name, "--agent", stack.agent.url, "--json")
    assert done.code == 0, done.err
    (part,) = done.json["parts"]
    assert (part["checkpoint_tensor"], part["kernel_tensor"]) == (name, name)
    assert (part["module"], part["mode"]) == ("model.layers.0.mlp.down_proj", "direct")
    assert part["box"] == [[0, 256], [0, 512]]
    assert (part["start"], part["stop"], part["nbytes"]) == (0, 2 * 256 * 512, 2 * 256 * 512)
    shown = " ".join(run("explain", name, "--agent", stack.agent.url).out.split())
    assert f"{name}[0:256, 0:512], 262.1 kB -> {name} bytes [0, 262,144), direct" in shown


def test_explain_of_an_unknown_name_gives_the_nearest(stack: Stack, run: Run) -> None:
    done = run("explain", "model.norm.wieght", "--agent", stack.agent.url, "--json")
    assert (done.code, done.json["error"]["code"]) == (2, "invalid_input")
    assert "did you mean model.norm.weight" in done.err
    part = run("explain", "k_norm", "--agent", stack.agent.url)
    assert "did you mean model.layers.0.self_attn.k_norm.weight, model.layers.1." in part.err
