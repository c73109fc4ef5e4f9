"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of small real data sets: TARQ_DATA, or `../shared/data` beside the repository."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("TARQ_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: set TARQ_DATA to the folder of real data sets")
    return folder
