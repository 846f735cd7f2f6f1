"""Inference kernels for NVIDIA Hopper GPUs, with CPU twins, for arrays of any DLPack framework.

Each op stands in the module of its name; functions whose name is no module's stand here too. Importing the package
loads no library, no framework and no driver: that happens on the first call of an op.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("kestrel-kernels")
except PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0+unknown"


def _modules(path: Iterable[str], prefix: str = "") -> list[str]:
    """The modules that name ops: all but the package's own, which begin with an underscore."""
    found = []
    for info in pkgutil.iter_modules(path):
        if not info.name.startswith("_"):
            found.append(prefix + info.name)
            if info.ispkg:
                package = importlib.import_module(f"{__name__}.{prefix}{info.name}")
                found += _modules(package.__path__, f"{prefix}{info.name}.")
    return found


_MODULES = _modules(__path__)


@functools.cache
def _names() -> dict[str, str]:
    """Public function -> its module; a module's own name goes before a function of that name."""
    names: dict[str, str] = {}
    for module in _MODULES:
        for name in getattr(importlib.import_module(f"{__name__}.{module}"), "__all__", ()):
            if name not in _MODULES:
                names.setdefault(name, module)
    return names


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if not name.startswith("_") and (module := _names().get(name)):
        value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    own = {name for name in globals() if name.startswith("__")}
    return sorted(own | {name for name in _MODULES if "." not in name} | set(_names()))
