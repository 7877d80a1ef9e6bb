from __future__ import annotations

from pathlib import Path

import pytest

from tests.receiver.mixed import make
from tests.receiver.toys import ToyAdapter


@pytest.fixture
def engine(tmp_path: Path) -> ToyAdapter:
    return make(tmp_path)
