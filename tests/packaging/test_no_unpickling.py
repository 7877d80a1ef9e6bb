"""WS-10: nothing in the product unpickles or evaluates; whatever lint skips."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("weightsync", "server", "client", "scripts", "docs/examples", "deploy")
MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle"}
NAMES = {"eval", "exec", "compile", "__import__"}
#: torch.load unpickles; object collectives do, at the other end
CALLS = {
    "torch.load", "torch.hub.load", "yaml.load", "yaml.unsafe_load", "numpy.load", "np.load",
    "pandas.read_pickle", "dist.all_gather_object", "dist.broadcast_object_list",
    "dist.gather_object", "dist.scatter_object_list", "dist.send_object_list",
    "dist.recv_object_list",
}  # fmt: skip


def offences(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of everything that unpickles or evaluates."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            if name.partition(".")[0] in MODULES:
                yield node.lineno, name
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in NAMES or called in CALLS or called.endswith("_object_list"):
            yield node.lineno, called
        if (
            called.endswith("import_module")
            and node.args
            and ast.unparse(node.args[0])[1:-1] in MODULES
        ):
            yield node.lineno, called
        if any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords):
            yield node.lineno, "allow_pickle"


SOURCES = sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))


def test_no_source_unpickles_or_evaluates():
    assert len(SOURCES) > 150
    found = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in SOURCES
        for line, what in offences(path.read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from cloudpickle import loads", "import os, marshal", "eval('1')",
     "torch.load('x', weights_only=True)", "dist.broadcast_object_list([1])",
     "importlib.import_module('pickle')", "numpy.array(1, allow_pickle=True)"],
)  # fmt: skip
def test_it_finds(source):
    assert len(list(offences(source))) == 1


def test_it_lets_methods_of_those_names_pass():
    assert list(offences("model.eval()\nre.compile('x')\nunpack(x)")) == []
