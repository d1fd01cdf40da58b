"""Fixtures that every test file may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the real inputs (``megc2019/``, ``htnet_release/``, ...); skips where it is absent.

    It lies beside the checkout and is not part of the repository; HTNET_SHARED names another place.
    """
    data = Path(os.environ.get("HTNET_SHARED", ROOT.parent / "shared")) / "data"
    if not data.is_dir():
        pytest.skip(f"real data not found at {data}; set HTNET_SHARED to the folder that holds data/")
    return data
