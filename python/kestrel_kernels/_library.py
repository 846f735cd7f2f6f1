"""Finds and loads the two libraries of the package, once, on the first call of an op."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any


def folder(name: str) -> Path:
    """A folder of installed files: `lib`, `include`. In an editable install it lies apart from the Python modules."""
    import kestrel_kernels

    for path in kestrel_kernels.__path__:
        if (found := Path(path) / name).is_dir():
            return found
    raise ImportError(
        f"kestrel_kernels: no folder {name!r} in {list(kestrel_kernels.__path__)}: the package was not built; "
        "install it with 'pip install .'"
    )


@functools.cache
def load() -> Any:
    """The binding, as a tvm-ffi module. Imports tvm_ffi, which takes seconds where torch is installed too."""
    import tvm_ffi

    tvm_ffi.register_error("NotImplementedError", NotImplementedError)
    return tvm_ffi.load_module(str(folder("lib") / "libkestrel_ffi.so"))
