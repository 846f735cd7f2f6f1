"""JAX arrays on a GPU, as arguments and results.

JAX runs on streams of its own and frees memory in their order alone. So a call with JAX arrays waits on the host, first
until they are there (JAX's `__dlpack__` does so when it is given no stream), at the end until its own work is done:
whatever JAX does next with arguments or results comes after it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any


class Unfinished:
    """An array that a functional form is about to fill, and that nobody else has seen: the one kind that is written."""

    __slots__ = ("array",)

    def __init__(self, like: Any, shape: Sequence[int], dtype: Any) -> None:
        self.array = sys.modules["jax"].numpy.empty(shape, dtype, device=next(iter(like.devices())))


def on_gpu(array: Any) -> bool:
    """Of a jax.Array."""
    return bool(next(iter(array.devices())).platform != "cpu")


def call(function: Callable[[], None], args: Sequence[Any], view: Any) -> None:
    """Calls the function and waits for its work.

    That runs on the stream of the torch or CuPy arrays among `args`, else on one that JAX names. `view` is the
    tvm_ffi.Tensor of a JAX array in the call.
    """
    import tvm_ffi

    torch, cupy, jax = (sys.modules.get(name) for name in ("torch", "cupy", "jax"))
    for arg in args:
        if torch is not None and isinstance(arg, torch.Tensor) and arg.is_cuda:
            function()  # tvm-ffi takes the stream from the tensor
            torch.cuda.current_stream(arg.device).synchronize()
            return
        if cupy is not None and isinstance(arg, cupy.ndarray):
            stream = cupy.cuda.get_current_stream(arg.device.id)
            with tvm_ffi.use_raw_stream(tvm_ffi.device(f"cuda:{arg.device.id}"), stream.ptr):
                function()
            stream.synchronize()
            return
    assert jax is not None
    jax.numpy.from_dlpack(_Producer(function, view)).block_until_ready()


class _Producer:
    """A producer of DLPack's protocol: the consumer names a stream, and what is ready in its order has been produced.

    So the call is made there, and the array that JAX makes of `view` becomes ready at its end.
    """

    def __init__(self, function: Callable[[], None], view: Any) -> None:
        self._function, self._view = function, view

    def __dlpack_device__(self) -> tuple[int, int]:
        kind, index = self._view.__dlpack_device__()
        return int(kind), int(index)

    def __dlpack__(self, *, stream: int | None = None, **_: Any) -> Any:
        import tvm_ffi

        kind, index = self.__dlpack_device__()
        if kind != 2:  # kDLCUDA
            self._function()
        elif stream is None:
            raise NotImplementedError("this JAX names no stream for the arrays of others; use the into forms")
        else:
            with tvm_ffi.use_raw_stream(tvm_ffi.device(f"cuda:{index}"), stream):
                self._function()
        return self._view.__dlpack__()
