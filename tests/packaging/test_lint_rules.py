"""The rules of pyproject.toml catch what they are there to catch."""

from __future__ import annotations

import json
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sysconfig.get_path("scripts"))
TIMEOUT_S = 100.0


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def ruff_codes(tmp_path: Path, source: str) -> set[str]:
    """The codes of what ruff finds in a module with this source, under our configuration."""
    module = tmp_path / "module.py"
    module.write_text(f'"""A module."""\n\nfrom __future__ import annotations\n\n{source}\n')
    done = run(
        *(BIN / "ruff", "check", "--no-cache", "--config", ROOT / "pyproject.toml"),
        *("--output-format", "json", module),
        cwd=tmp_path,
    )
    assert done.returncode in {0, 1}, done.stderr
    return {finding["code"] for finding in json.loads(done.stdout)}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\n\nprint(pickle)",
        "from pickle import loads\n\nprint(loads)",
        "import cloudpickle\n\nprint(cloudpickle)",
        "import dill\n\nprint(dill)",
        "import marshal\n\nprint(marshal)",
        "import shelve\n\nprint(shelve)",
        "import torch\n\nWEIGHTS = torch.load('x')",
    ],
)
def test_ruff_refuses_what_unpickles(tmp_path, source):
    assert "TID251" in ruff_codes(tmp_path, source)


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("print(1)", "T201"),
        ("def f(x: int) -> int:\n    return x", "D103"),
        ('def f(x):\n    """Gives it back."""\n    return x', "ANN001"),
        ('def f(x: int) -> None:\n    """Checks it."""\n    assert x > 0', "S101"),
    ],
)
def test_ruff_asks_for_docstrings_and_types_and_bars_print_and_assert(tmp_path, source, code):
    assert code in ruff_codes(tmp_path, source)


def test_ruff_lets_a_plain_module_pass(tmp_path):
    source = '\ndef double(x: int) -> int:\n    """Returns twice ``x``."""\n    return 2 * x'
    assert ruff_codes(tmp_path, source) == set()


def lint_imports(cwd: Path) -> subprocess.CompletedProcess[str]:
    config = ROOT / "pyproject.toml"
    return run(BIN / "lint-imports", "--no-cache", "--no-logo", "--config", config, cwd=cwd)


@pytest.fixture
def packages(tmp_path) -> Path:
    """The three import names as empty packages, before the checkout on import-linter's path."""
    for name in ("weightsync", "weightsync_client", "weightsync_server"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / "weightsync" / "transport").mkdir()
    (tmp_path / "weightsync" / "transport" / "__init__.py").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("module", "source", "contract"),
    [
        ("weightsync_client/m.py", "import weightsync_server", "server and client never import"),
        ("weightsync_server/m.py", "import weightsync_client", "server and client never import"),
        ("weightsync/m.py", "import weightsync_client", "the core imports neither side"),
        ("weightsync/m.py", "def f():\n    import fastapi", "the core imports neither side"),
        ("weightsync_client/m.py", "from vllm import LLM", "a trainer needs neither"),
        ("weightsync_server/m.py", "import nixl._api", "NIXL is imported in one file"),
    ],
)
def test_import_contract_is_broken_by(packages, module, source, contract):
    (packages / module).write_text(source)
    done = lint_imports(packages)
    broken = [line for line in done.stdout.splitlines() if line.endswith("BROKEN")]
    assert done.returncode == 1, done.stdout + done.stderr
    assert [line.startswith(contract) for line in broken] == [True]


def test_nixl_may_be_imported_by_its_transport(packages):
    (packages / "weightsync" / "transport" / "nixl.py").write_text(
        "from nixl._api import nixl_agent"
    )
    assert lint_imports(packages).returncode == 0


def test_import_contracts_hold():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
