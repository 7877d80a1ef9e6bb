from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.support.families import CONFIGS
from weightsync_client.cli import app

ROOT = Path(__file__).parents[2]
TRILLION = ROOT / "docs/examples/moe-1t.config.json"
KEYS = {
    "tensors", "slots", "writes", "bytes_total", "balance", "handles_per_rank",
    "slot_bytes_per_rank", "plan_seconds", "predicted", "proof",
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS["qwen3_moe"]))
    return path


def run(config: Path, *options: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["plan", "--model-config", str(config), *options])
    return done.exit_code, done.stdout, done.stderr


def test_json_is_one_object_with_all_figures(config: Path) -> None:
    code, out, err = run(config, "--trainer", "fsdp=4,ep=2", "--inference", "tp=2,dp=3", "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    answer: dict[str, Any] = json.loads(out)
    assert answer.keys() >= KEYS
    assert (answer["ranks"], answer["workers"]) == (4, 6)
    assert answer["proof"]["complete"] is True
    # what leaves the ranks is what reaches the workers
    assert answer["bytes_total"] == answer["proof"]["bytes"]
    assert answer["bytes_total"] == pytest.approx(answer["per_worker"]["bytes_in"]["mean"] * 6)
    assert answer["bytes_total"] == pytest.approx(answer["per_rank"]["bytes_out"]["mean"] * 4)
    assert answer["handles_per_rank"] == 6
    assert 1 <= answer["balance"] < 2
    assert answer["slots"] <= answer["writes"]


def test_more_engines_cost_writes_and_no_slots(config: Path) -> None:
    answers = []
    for engines in (1, 5):
        options = ("--trainer", "fsdp=4", "--inference", f"tp=2,dp={engines}", "--json")
        answers.append(json.loads(run(config, *options)[1]))
    one, five = answers
    assert five["slots"] == one["slots"]
    assert five["slot_bytes_per_rank"] == one["slot_bytes_per_rank"]
    assert five["writes"] == 5 * one["writes"]
    assert five["bytes_total"] == 5 * one["bytes_total"]


def test_a_faster_nic_predicts_a_shorter_wire(config: Path) -> None:
    wires = []
    for gbps in ("0.1", "0.2"):
        options = ("--trainer", "fsdp=2", "--inference", "tp=2", "--nic-gbps", gbps, "--json")
        wires.append(json.loads(run(config, *options)[1])["predicted"]["wire_seconds"])
    assert wires[0] == pytest.approx(2 * wires[1], rel=0.1)


def test_a_bound_of_the_slot_memory_is_held_in_rounds(config: Path) -> None:
    options = ("--trainer", "fsdp=2", "--inference", "tp=2", "--json")
    free = json.loads(run(config, *options)[1])
    bound = free["slot_bytes_per_rank"] // 2
    held = json.loads(run(config, *options, "--max-slot-bytes", str(bound))[1])
    assert free["rounds"] == 1
    assert held["rounds"] in {4, 5}
    assert held["slot_bytes_per_rank"] <= bound
    assert held["bytes_total"] == free["bytes_total"]
    code, _, err = run(config, *options, "--max-slot-bytes", "64")
    assert code == 1
    assert "raise max_slot_bytes to" in err


def test_small_tensors_are_gathered_and_cost_fewer_writes(config: Path) -> None:
    options = ("--trainer", "fsdp=4", "--inference", "tp=2", "--json")
    gathered, cut = (
        json.loads(run(config, *options, *more)[1]) for more in ((), ("--coalesce-bytes", "0"))
    )
    assert gathered["writes"] < cut["writes"] / 2
    assert gathered["gathered_bytes"] > cut["gathered_bytes"] == 0
    assert gathered["bytes_total"] == cut["bytes_total"]


def test_without_json_a_person_reads_tables(config: Path) -> None:
    options = ("--trainer", "fsdp=4", "--inference", "tp=2", "--scaling")
    code, out, err = run(config, *options)
    assert (code, err) == (0, "")
    for text in ("One push", "slot memory of a rank", "Planning time", "exactly once"):
        assert text in " ".join(out.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--trainer", "fsdpp=2", "--inference", "tp=2"), "did you mean 'fsdp'"),
        (("--trainer", "fsdp=2", "--inference", "tp=3"), "cannot be cut 3 ways"),
        (("--trainer", "fsdp=2,ep=4", "--inference", "tp=2"), "does not divide"),
        (("--trainer", "fsdp=2", "--inference", "tp=2", "--nic-gbps", "nan"), "--nic-gbps"),
        (("--trainer", "fsdp=2", "--inference", "tp=2", "--wire-dtype", "int4"), "bf16, fp8"),
    ],
)
def test_bad_arguments_exit_with_2_and_say_why(
    config: Path, options: tuple[str, ...], said: str
) -> None:
    code, out, err = run(config, *options, "--json")
    assert (code, json.loads(out)["error"]["code"]) == (2, "invalid_input")
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model_type": "gpt_neox"}'])
def test_a_file_that_is_no_known_config_exits_with_2(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    code, out, err = run(path, "--trainer", "fsdp=2", "--inference", "tp=2", "--json")
    assert (code, json.loads(out)["error"]["code"]) == (2, "invalid_input")
    assert str(path) in err


def test_a_trillion_parameters_are_planned_in_seconds_without_torch() -> None:
    code = (
        "import sys; from weightsync_client.cli import app;"
        "app(standalone_mode=False); sys.exit(any(m in sys.modules for m in"
        "('torch', 'vllm', 'nixl', 'transformers')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", "--model-config", str(TRILLION),
         "--trainer", "fsdp=256,ep=8", "--inference", "tp=8,dp=16,ep=8", "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": "client:."},
        timeout=100,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["ranks"], answer["workers"]) == (256, 128)
    assert answer["tensors"] > 60 * 384 * 3
    # CPU seconds: other processes of this machine say nothing about the plan
    assert answer["plan_cpu_seconds"] < 5
    assert answer["peak_memory_bytes"] < 1 << 30
    assert answer["proof"]["seconds"] < 300
