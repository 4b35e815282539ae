"""The store kit as a fixture."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def kit() -> ModuleType:
    """tests/cache/store_kit.py; loaded by path, because test folders are no packages."""
    spec = importlib.util.spec_from_file_location("store_kit", Path(__file__).with_name("store_kit.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
