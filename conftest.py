"""What holds for every test and for every example of a docstring or a page: fixed numbers."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    """All draw the same numbers, whichever tests run before."""
    torch.manual_seed(0)
