"""What every test can rely on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def default_dtype() -> Iterator[None]:
    """Give torch its default dtype back after a test that changed it."""
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)
