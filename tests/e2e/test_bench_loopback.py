"""``weightsync bench loopback``: real pushes and real baselines, of a few megabytes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.nixl, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-c", "from weightsync_client.cli import main; main()", "bench"]
PHASES = ("fill", "pause", "begin", "write", "commit", "resume")
BASELINES = {
    "write_vs_raw_nixl": ("write", "raw_nixl_write"),
    "write_vs_raw_nixl_threads": ("write", "raw_nixl_write_threads"),
    "write_vs_gloo_broadcast": ("write", "gloo_broadcast"),
    "paused_vs_gloo_broadcast": ("paused", "gloo_broadcast"),
    "push_vs_gloo_broadcast": ("push", "gloo_broadcast"),
    "push_vs_safetensors_reload": ("push", "safetensors_save_and_reload"),
}


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """The packages where this process finds them, and a folder of its own for what is left."""
    folders = [ROOT, ROOT / "server", ROOT / "client", os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(map(str, folders))
    return {**os.environ, "PYTHONPATH": path, "TMPDIR": str(tmp_path)}


def bench(environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], env=environ, capture_output=True, text=True, timeout=200,
        check=False,
    )  # fmt: skip


def left_behind(folder: Path) -> list[str]:
    """Command lines of processes that name the folder."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in lines if str(folder) in line]


def test_json_has_every_phase_and_ratio_computed_from_the_medians(environ, tmp_path: Path) -> None:
    in_memory = set(Path("/dev/shm").glob("weightsync-bench-*"))
    done = bench(
        environ, "loopback", "--nbytes", "4000000", "--rounds", "3", "--sets", "2",
        "--small-pushes", "4", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert (said["bench"], said["rounds"], said["failed"]) == ("loopback", 3, {})
    assert said["sets"] == 2
    assert said["engine"].startswith("torch ")
    assert said["nbytes"] > 3_000_000
    seconds = said["seconds"]
    for series in seconds.values():
        assert len(series["values"]) == 3
        assert series["median"] == statistics.median(series["values"]) > 0
        assert (series["low"], series["high"]) == (min(series["values"]), max(series["values"]))
    assert seconds["push"]["median"] > seconds["paused"]["median"] > seconds["write"]["median"]
    assert {*PHASES, "trainer_cpu_thread"} <= seconds.keys()
    for name, (ours, theirs) in BASELINES.items():
        # the same bytes: the ratio of the rates is that of the seconds, turned round
        expected = seconds[theirs]["median"] / seconds[ours]["median"]
        assert said["ratios"][name] == pytest.approx(expected)
    assert [target["met"] is not None for target in said["targets"]] == [True] * 8
    assert [row["what"] for row in said["predicted"]] == ["fill", "write"]
    assert all(row["predicted"] > 0 and row["measured"] > 0 for row in said["predicted"])
    cpu = said["cpu"]
    assert cpu["tensors"] == 399
    assert 0 < cpu["python_s_per_push"] < 1
    assert 0 < cpu["write_cpu_s_per_s"] < 5
    sizes = [row["nbytes"] for row in said["descriptors"]]
    assert sizes == sorted(sizes)
    assert [row["count"] for row in said["descriptors"]][-1] == 1
    assert list(tmp_path.glob("weightsync-bench-*")) == left_behind(tmp_path) == []
    assert set(Path("/dev/shm").glob("weightsync-bench-*")) <= in_memory


def test_ctrl_c_ends_every_process_and_removes_the_folder(environ, tmp_path: Path) -> None:
    command = [*COMMAND, "loopback", "--nbytes", "4000000"]
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 60
        while not len(left_behind(tmp_path)) >= 2:
            assert time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=40)
    assert process.returncode == 130
    assert "interrupted" in err
    assert list(tmp_path.glob("weightsync-bench-*")) == left_behind(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nbytes", "10"], "nbytes=10"),
        (["--rounds", "0"], "rounds=0"),
        (["--timeout", "nan"], "timeout_s=nan"),
        (["--plot", "/nonexistent/out.png"], "there is no folder"),
        (["--plot", "out.pdf"], "ends in .png"),
    ],
)
def test_a_bad_argument_is_refused_before_anything_starts(environ, arguments, words) -> None:
    from typer.testing import CliRunner

    from weightsync_client.cli import app

    done = CliRunner().invoke(app, ["bench", "loopback", *arguments])
    assert (done.exit_code, done.stdout) == (2, "")
    assert words in done.stderr


def test_a_trainer_that_dies_is_told_with_its_log(environ, tmp_path: Path) -> None:
    # torch alone takes more than this
    limited = {**environ, "PYTHONPATH": str(broken_transformers(tmp_path)) + os.pathsep
               + environ["PYTHONPATH"]}  # fmt: skip
    done = bench(limited, "loopback", "--nbytes", "4000000", "--json")
    assert done.returncode == 1
    assert "no transformers here" in json.loads(done.stdout)["error"]["detail"]
    assert "no transformers here" in done.stderr
    assert "logs are in" in done.stderr


def broken_transformers(folder: Path) -> Path:
    (folder / "site").mkdir()
    (folder / "site" / "transformers.py").write_text("raise RuntimeError('no transformers here')")
    return folder / "site"
