"""Finds and loads the two libraries of the package, once, on the first call of an op."""

from __future__ import annotations

import functools
import importlib.util
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
    library = tvm_ffi.load_module(str(folder("lib") / "libkestrel_ffi.so"))
    if nvidia := importlib.util.find_spec("nvidia"):  # the namespace of NVIDIA's wheels, cuBLASLt's among them
        library.set_nvidia_folders(":".join(nvidia.submodule_search_locations or ()))
    return library


def cublaslt_info(name: str = "") -> tuple[int, str]:
    """Version (130100 is 13.1.0) and path of the cuBLASLt that products on the GPU go to; loads it.

    Args:
        name: a library file name to look for instead of libcublasLt.so.13 and .12.

    Raises:
        RuntimeError: there is none; the message names all places that were looked at.
    """
    version, path = load().cublaslt_info(name)
    return version, path
