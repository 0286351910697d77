# SPDX-License-Identifier: Apache-2.0
"""Fixtures that more than one test file uses."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The developers' folder of real data, robots and reference tensors; it is not part of the project."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs the developers' shared data folder beside the checkout, which is absent")
    return SHARED
