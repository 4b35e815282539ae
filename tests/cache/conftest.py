"""The store kit as a fixture."""

from types import ModuleType

import pytest

from kit import stores


@pytest.fixture(scope="session")
def kit() -> ModuleType:
    """Small stores for tests, and what is in them."""
    return stores
