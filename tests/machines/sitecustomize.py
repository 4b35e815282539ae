"""Another machine for the tests: every Python process of a run with ``pytest --fake-machine`` loads this module.

The variable ``FAKE_MACHINE`` says what is faked, joined by commas: ``amx`` for a processor that multiplies matrices of
bfloat16 in hardware, ``no-amx`` for one that does not, ``cores=N`` for one of N cores, ``l2=BYTES`` for one with such a
cache. Nothing is imported before the process itself imports it.
"""

import importlib.abc
import importlib.util
import os
import sys


class _PatchCapabilities(importlib.abc.MetaPathFinder):
    """Lets ``torch.cpu`` be loaded as it is, then changes what it says of the processor."""

    def __init__(self, changes: dict) -> None:
        self._changes = changes

    def find_spec(self, name, path, target=None):
        if name != "torch.cpu":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module) -> None:
            load(module)
            capabilities = module.get_capabilities
            module.get_capabilities = lambda: {**capabilities(), **self._changes}

        spec.loader.exec_module = exec_module
        return spec


def _fake_cores(n: int) -> None:
    os.cpu_count = lambda: n
    if hasattr(os, "sched_getaffinity"):
        os.sched_getaffinity = lambda pid: set(range(n))


_changes = {}
for _part in filter(None, os.environ.get("FAKE_MACHINE", "").split(",")):
    if _part in {"amx", "no-amx"}:
        _changes["amx_bf16"] = _part == "amx"
    elif _part.startswith("l2="):
        _changes["l2_cache_size"] = int(_part.removeprefix("l2="))
    elif _part.startswith("cores="):
        _fake_cores(int(_part.removeprefix("cores=")))
    else:
        raise SystemExit(f"FAKE_MACHINE: no such machine: {_part}")
if _changes:
    sys.meta_path.insert(0, _PatchCapabilities(_changes))
