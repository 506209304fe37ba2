"""Models that several of these tests ask."""

from pathlib import Path

import pytest
from small import three_teachers


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three teachers, to be read."""
    return three_teachers(tmp_path_factory.mktemp("teachers"))
