"""What the tests of all ops share: backends (a framework on a device), poisoned arrays, comparison with float64."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

FLOATS = ("bfloat16", "float16", "float32")
HALVES = ("bfloat16", "float16")

needs_cmake = pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("ninja")), reason="needs cmake and ninja")

# One rounding to the dtype is half a unit in the last place, 2^-(p); the rest allows for fp32 arithmetic before it.
_RELATIVE = {"float32": 4e-6, "float16": 2.0**-11 * 1.05, "bfloat16": 2.0**-8 * 1.01, "float8_e4m3fn": 2.0**-4 * 1.01}
_SMALLEST = {"float32": 1e-37, "float16": 2.0**-25, "bfloat16": 1e-38, "float8_e4m3fn": 2.0**-10}


def numpy_dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)


class Backend:
    """A framework on a device. `array` makes one of its arrays from values, `numpy` reads it back exactly."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.framework, _, device = name.partition("-")
        self.device = "cuda" if self.framework == "cupy" else device or "cpu"

    def __repr__(self) -> str:
        return self.name

    def array(self, values: Any, dtype: str) -> Any:
        host = np.asarray(values).astype(numpy_dtype(dtype))
        if self.framework == "numpy":
            return host
        if self.framework == "torch":
            return _to_torch(host).to(self.device)
        if self.framework == "cupy":
            import cupy

            return cupy.asarray(host.view(np.uint8) if dtype == "float8_e4m3fn" else host)  # CuPy has no e4m3
        if self.framework == "jax":
            import jax

            return jax.device_put(host, jax.devices(self.device)[0])
        raise ValueError(self.framework)

    def poisoned(self, shape: tuple[int, ...], dtype: str) -> Any:
        """An array that holds NaN, or the largest number of an integer dtype."""
        of = numpy_dtype(dtype)
        return self.array(np.full(shape, np.iinfo(of).max if of.kind in "iu" else np.nan), dtype)

    def before_nan(self, array: Any) -> Any:
        """The same array where 16 more rows stand behind it, of NaN. None stays None."""
        if array is None:
            return None
        host = self.bits(array)
        ones = f"i{host.itemsize}"  # all bits but the sign: NaN in every dtype of floats, e4m3 among them
        behind = np.full((16, *host.shape[1:]), np.iinfo(ones).max, ones).view(host.dtype)
        return self.array(np.concatenate([host, behind]), host.dtype.name)[: len(host)]

    def numpy(self, array: Any) -> np.ndarray:
        """The values, as float64 (integers: as they are)."""
        host = self.bits(array)
        if self.framework == "cupy" and host.dtype == np.uint8:
            host = host.view(numpy_dtype("float8_e4m3fn"))
        with np.errstate(invalid="ignore"):  # signalling NaN
            return host if host.dtype.kind in "iub" else host.astype(np.float64)

    def bits(self, array: Any) -> np.ndarray:
        """A NumPy copy in the array's own dtype."""
        if self.framework == "torch":
            return _from_torch(array)
        if self.framework == "cupy":
            return array.get()
        return np.array(array)


def _to_torch(host: np.ndarray) -> Any:
    import torch

    if host.dtype.name in ("bfloat16", "float8_e4m3fn"):
        stand_in = host.view(np.int16 if host.itemsize == 2 else np.uint8)
        return torch.from_numpy(stand_in.copy()).view(getattr(torch, host.dtype.name))
    return torch.from_numpy(host.copy())


def _from_torch(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach().cpu()
    name = str(tensor.dtype).removeprefix("torch.")
    if name in ("bfloat16", "float8_e4m3fn"):
        stand_in = tensor.contiguous().view(torch.int16 if name == "bfloat16" else torch.uint8).numpy()
        return stand_in.view(numpy_dtype(name)).copy()
    return tensor.numpy().copy()


def _available() -> list[str]:
    names = ["numpy"]
    if importlib.util.find_spec("torch"):
        import torch

        names += ["torch", "torch-cuda"] if torch.cuda.is_available() else ["torch"]
        if torch.cuda.is_available() and importlib.util.find_spec("cupy"):
            names.append("cupy")
    return names


BACKENDS = [Backend(name) for name in _available()]  # arrays that can be outputs too
CUDA_BACKENDS = [b for b in BACKENDS if b.device == "cuda"]
HAS_JAX = importlib.util.find_spec("jax") is not None
HAS_JAX_CUDA = bool(CUDA_BACKENDS) and any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))
if HAS_JAX_CUDA:  # torch and the others want memory too
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


# The activations in float64, and the gates that ops take by name.
_erfc = np.vectorize(math.erfc, otypes=[float])


def gelu(a: np.ndarray) -> np.ndarray:
    return a * _erfc(-a / math.sqrt(2)) / 2


def gelu_tanh(a: np.ndarray) -> np.ndarray:
    return a * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))) / 2


def silu(a: np.ndarray) -> np.ndarray:
    return a / (1 + np.exp(-a))


GATES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "gelu_residual": lambda a, b: gelu(a) * (b + 1),
    "silu_and_mul": lambda a, b: silu(a) * b,
    "gelu_and_mul": lambda a, b: gelu(a) * b,
    "gelu_tanh_and_mul": lambda a, b: gelu_tanh(a) * b,
}


def random(shape: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape) * scale


def assert_close(actual: np.ndarray, expected: np.ndarray, dtype: str, slack: float | np.ndarray = 0.0) -> None:
    """Equal to float64 `expected` but for one rounding to dtype (and `slack`, absolute, for sums of many terms)."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    limit = _RELATIVE[dtype] * np.abs(expected) + _SMALLEST[dtype] + slack
    with np.errstate(invalid="ignore"):
        near = np.abs(actual - expected) <= limit
    good = near | (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    if not good.all():
        where = np.unravel_index(np.argmin(good), good.shape)
        count = good.size - int(good.sum())
        raise AssertionError(f"{count} of {good.size} differ, first at {where}: {actual[where]} != {expected[where]}")


def assert_replays_repeat(graph: Any, *pairs: tuple[Any, Any]) -> None:
    """A thousand replays of torch's graph write into the first of each pair what the second holds."""
    differ = pairs[0][0].new_zeros((), dtype=sys.modules["torch"].bool)
    for _ in range(1000):
        graph.replay()
        for written, want in pairs:
            differ |= (written != want).any()
    assert not differ


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Frobenius norm of the difference over that of the expected values."""
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
