"""Where the model runs: its memory, what a pass becomes there, and what the machine could do at best."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np

from kestrel_kernels import _info, _library
from kestrel_kernels._demo.errors import DemoError
from kestrel_kernels._demo.meter import Call, Program, Roof
from kestrel_kernels._op import as_tensor
from kestrel_kernels.fused_linear_residual_ops import linear_into


class Block:
    """Small arrays that host and device exchange, all of them in one copy: `host[name]`, and `tensors[name]` for ops.
    On the CPU both are the same memory."""

    def __init__(self, **arrays: tuple[int, type]) -> None:
        """name=(length, dtype)"""
        self._places, self.nbytes = {}, 0
        for name, (length, dtype) in arrays.items():
            size = length * np.dtype(dtype).itemsize
            self._places[name] = slice(self.nbytes, self.nbytes + size), dtype
            self.nbytes += -(-size // 64) * 64
        memory = self._allocate()
        self.host = self._views(memory)
        memory[:] = 0
        self.tensors = {name: as_tensor(array) for name, array in self._views(self._device_memory()).items()}

    def upload(self) -> None:
        """From the host to the device."""

    def _views(self, memory: Any) -> dict[str, Any]:
        return {name: memory[place].view(dtype) for name, (place, dtype) in self._places.items()}

    def _allocate(self) -> np.ndarray:
        self._memory = np.empty(self.nbytes, np.uint8)
        return self._memory

    def _device_memory(self) -> Any:
        return self._memory


class Cpu:
    """NumPy arrays."""

    workspace: Any = None  # of linear layers and attention
    block: type[Block] | Callable[..., Block] = Block

    def __init__(self) -> None:
        self._cores = len(os.sched_getaffinity(0))
        self.name = f"{_cpu_name()}, {self._cores} cores"

    def put(self, array: np.ndarray) -> Any:
        return array

    def get(self, array: Any) -> np.ndarray:
        """Its values now. On the CPU the array itself."""
        return array

    def tensor(self, array: Any) -> Any:
        """For ops, on the memory of an array that `put` gave, or of a part of it."""
        return as_tensor(array)

    def program(self, phase: str, calls: list[Call], inputs: Block, outputs: Block) -> Program:
        """Of calls that read `inputs` and write `outputs`."""
        return Program(phase, calls)

    def roof(self, seconds: float = 0.2) -> Roof:
        """The best of many short copies (larger than the caches) and of many products, for `seconds` each."""
        source, target = np.ones(64 << 20, np.uint8), np.ones(64 << 20, np.uint8)
        with ThreadPoolExecutor(self._cores) as pool:  # NumPy copies without the interpreter's lock
            pieces = np.array_split(target, self._cores), np.array_split(source, self._cores)
            copy = _best(lambda: list(pool.map(np.copyto, *pieces)), seconds)
        a, c = np.ones((512, 512), np.float32), np.empty((512, 512), np.float32)
        product = _best(lambda: np.matmul(a, a, out=c), seconds)
        own = partial(linear_into, as_tensor(c), as_tensor(a), as_tensor(a))  # NumPy's library may not be the faster
        return Roof(2 * source.nbytes / copy, 2 * 512**3 / min(product, _best(own, seconds)))


def open_device(name: str) -> Any:
    """ "cpu", "cuda" or "auto": the first GPU where that can be used, else the CPU.

    Raises:
        DemoError: "cuda" where it cannot be used, and why.
    """
    if name == "cpu":
        return Cpu()
    gpus = _info.gpus()
    problem = ""
    if not gpus:
        problem = "no GPU seen"
    elif not _library.load().cuda_architectures():
        problem = "this build of the package has no CUDA kernels"
    else:
        try:
            from kestrel_kernels._demo.cuda import Cuda

            device = Cuda()
            device.try_kernel()
            return device
        except ModuleNotFoundError as error:
            if error.name != "cupy":
                raise
            problem = "the GPU needs the package cupy: pip install 'kestrel-kernels[demo-gpu]'"
        except RuntimeError as error:  # another architecture, an old driver
            problem = str(error).splitlines()[0]
    if name == "cuda":
        raise DemoError(f"--device cuda: {problem}")
    if gpus:
        print(f"kestrel-kernels demo: on the CPU: {problem}", file=sys.stderr)
    return Cpu()


def _best(run: Callable[[], object], seconds: float) -> float:
    times: list[float] = []
    end = perf_counter() + seconds
    while len(times) < 5 or perf_counter() < end:
        start = perf_counter()
        run()
        times.append(perf_counter() - start)
    return min(times)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "CPU")
    except OSError:
        return "CPU"
