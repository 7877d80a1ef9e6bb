"""The wheel as its users get it."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from configparser import ConfigParser
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMPORT_NAMES = ("weightsync", "weightsync_client", "weightsync_server")
TIMEOUT_S = 100.0


def run(*command: str | Path, cwd: Path) -> str:
    """Runs a command without the checkout on its path; returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder that holds what the built wheel installs, and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    run(
        *(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT),
        cwd=folder,
    )
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    run(
        *(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index"),
        "--no-compile",
        *("--target", site, wheel),
        cwd=folder,
    )
    return site


@pytest.fixture(scope="module")
def dist_info(site) -> Path:
    (folder,) = site.glob("weightsync-*.dist-info")
    return folder


def test_wheel_installs_three_import_names_and_nothing_else(site, dist_info):
    installed = {path.name for path in site.iterdir()}
    assert installed == {*IMPORT_NAMES, dist_info.name, "bin"}
    assert {path.name for path in (site / "bin").iterdir()} == {"weightsync", "weightsync-agent"}


@pytest.mark.parametrize("name", IMPORT_NAMES)
def test_wheel_holds_every_module_of_the_checkout(site, name):
    parent = {"weightsync_client": "client", "weightsync_server": "server"}.get(name, ".")
    tracked = run("git", "ls-files", f"{parent}/{name}", cwd=ROOT).splitlines()
    expected = {Path(line).relative_to(parent) for line in tracked if (ROOT / line).exists()}
    missing = {path for path in expected if not (site / path).is_file()}
    assert not missing


@pytest.mark.parametrize("name", IMPORT_NAMES)
def test_wheel_marks_its_packages_as_typed(site, name):
    assert (site / name / "py.typed").is_file()


def test_wheel_ships_no_tests_and_no_docs(site):
    folders = {path.name for path in site.rglob("*") if path.is_dir()}
    assert not folders & {"tests", "docs", "deploy", "scripts", "server", "client"}
    assert not [path for path in site.rglob("*.py") if path.name.startswith(("test_", "conftest"))]


def test_wheel_declares_its_extras_and_license(dist_info):
    metadata = Parser().parsestr((dist_info / "METADATA").read_text())
    extras = set(metadata.get_all("Provides-Extra", []))
    assert extras == {"nixl", "ucxx", "torch-engine", "demo", "bench", "docs", "dev"}
    assert metadata["License-Expression"] == "Apache-2.0"
    assert (dist_info / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


@pytest.mark.parametrize(
    ("group", "name"),
    [
        ("console_scripts", "weightsync"),
        ("console_scripts", "weightsync-agent"),
        ("vllm.general_plugins", "weightsync"),
    ],
)
def test_entry_point_names_a_function_that_the_wheel_ships(site, dist_info, group, name):
    points = ConfigParser(delimiters=["="])
    points.read(dist_info / "entry_points.txt")
    module, _, function = points[group][name].partition(":")
    source = site / Path(*module.split(".")).with_suffix(".py")
    assert source.is_file(), f"{name} points at {module}, which the wheel does not ship"
    defined = {node.name for node in ast.parse(source.read_text()).body if hasattr(node, "name")}
    assert function in defined


def test_wheel_imports_without_the_checkout(site, tmp_path):
    code = "import weightsync; print(weightsync.__file__, weightsync.__version__)"
    program = f"import sys; sys.path.insert(0, {str(site)!r}); {code}"
    file, version = run(sys.executable, "-c", program, cwd=tmp_path).split()
    assert Path(file) == site / "weightsync" / "__init__.py"
    assert f"weightsync-{version}.dist-info" in {path.name for path in site.iterdir()}


def test_editable_install_resolves_all_three_names_to_the_checkout(tmp_path):
    try:
        origin = distribution("weightsync").read_text("direct_url.json")
    except PackageNotFoundError:
        origin = None
    if origin is None or not json.loads(origin).get("dir_info", {}).get("editable"):
        pytest.skip("this environment holds no editable install: make venv")
    program = (
        f"import importlib.util as u\nfor name in {IMPORT_NAMES!r}: print(u.find_spec(name).origin)"
    )
    found = [Path(line) for line in run(sys.executable, "-c", program, cwd=tmp_path).splitlines()]
    folders = {"weightsync_client": "client", "weightsync_server": "server", "weightsync": "."}
    assert found == [(ROOT / folders[name] / name / "__init__.py") for name in IMPORT_NAMES]
