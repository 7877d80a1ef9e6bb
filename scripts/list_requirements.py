"""Lists what ``.venv`` needs beside the packages that ``setup.sh`` installs by name.

Printed, one requirement a line: weightsync's dependencies with the extras for development and the
demo, and the requirements of an installed distribution (vLLM's CPU build), less the torch family.
"""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

if TYPE_CHECKING:
    from collections.abc import Iterable

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
OWN_EXTRAS = ("dev", "demo", "docs", "torch-engine")
TORCH_FAMILY = frozenset({"torch", "torchaudio", "torchvision", "torchcodec"})


def without_torch(requirements: Iterable[str]) -> list[str]:
    """Returns the requirements that hold here, without markers, and without the torch family.

    Args:
        requirements: as they stand in a distribution's metadata, with markers and extras.
    """
    kept = []
    for line in requirements:
        requirement = Requirement(line)
        holds = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if holds and requirement.name.lower() not in TORCH_FAMILY:
            requirement.marker = None
            kept.append(str(requirement))
    return kept


def own_requirements(pyproject: Path) -> list[str]:
    """Returns the dependencies that ``pyproject`` declares, with those of ``OWN_EXTRAS``."""
    project = tomllib.loads(pyproject.read_text())["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *(line for name in OWN_EXTRAS for line in extras[name])]


def main(distributions: list[str]) -> None:
    """Prints the list for our own project and for each of the installed ``distributions``."""
    lines = without_torch(own_requirements(PYPROJECT))
    for distribution in distributions:
        lines += without_torch(requires(distribution) or ())
    print("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
