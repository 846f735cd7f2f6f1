"""A CUDA device for the demo, by CuPy: arrays, a stream, and a pass as one CUDA graph.

CuPy has neither bfloat16 nor e4m3: arrays hold their bits as integers, and only the tensors made for ops name them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import cupy
import ml_dtypes
import numpy as np
import tvm_ffi

from kestrel_kernels._demo.device import Block
from kestrel_kernels._demo.meter import Call, Program, Roof
from kestrel_kernels._op import as_tensor
from kestrel_kernels.activation import silu_and_mul_into
from kestrel_kernels.fused_linear_residual_ops import WORKSPACE_BYTES, linear_into

_BITS = {np.dtype(ml_dtypes.bfloat16): np.uint16, np.dtype(ml_dtypes.float8_e4m3fn): np.uint8}
_MEANING = {np.dtype(bits): dtype for dtype, bits in _BITS.items()}


class Cuda:
    """The GPU of this index."""

    def __init__(self, index: int = 0) -> None:
        self._device = cupy.cuda.Device(index)
        self._device.use()
        properties = cupy.cuda.runtime.getDeviceProperties(index)
        self.name = f"{properties['name'].decode()}, {properties['multiProcessorCount']} SMs"
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.workspace = as_tensor(cupy.empty(WORKSPACE_BYTES, cupy.uint8))
        self.block = partial(_PinnedBlock, self)

    def try_kernel(self) -> None:
        """RuntimeError where the GPU does not run the library's kernels."""
        x = self.tensor(self.put(np.ones((1, 8), np.float32)))
        self.capture([partial(silu_and_mul_into, self.tensor(self.put(np.ones((1, 4), np.float32))), x)])

    def put(self, array: np.ndarray) -> cupy.ndarray:
        copy = cupy.empty(array.shape, _BITS.get(array.dtype, array.dtype))
        copy.set(array.view(copy.dtype))
        return copy

    def get(self, array: cupy.ndarray) -> np.ndarray:
        values = array.get()
        return values.view(_MEANING.get(values.dtype, values.dtype))

    def tensor(self, array: cupy.ndarray) -> Any:
        meaning = _MEANING.get(array.dtype)
        return as_tensor(array, meaning and meaning.name)

    def program(self, phase: str, calls: list[Call], inputs: Block, outputs: Block) -> Program:
        assert isinstance(inputs, _PinnedBlock) and isinstance(outputs, _PinnedBlock)
        return _GraphProgram(self, phase, calls, inputs, outputs)

    def capture(self, calls: Sequence[Callable[[], object]]) -> cupy.cuda.Graph:
        """The calls as one graph. They run once before, so that nothing is loaded or chosen while capturing."""
        with tvm_ffi.use_raw_stream(tvm_ffi.device(f"cuda:{self._device.id}"), self.stream.ptr):
            for call in calls:
                call()
            self.stream.synchronize()
            self.stream.begin_capture()
            for call in calls:
                call()
            graph = self.stream.end_capture()
        graph.upload(self.stream)
        return graph

    def seconds(self, launch: Callable[[], object], launches: int) -> float:
        """Of one launch, when many follow each other."""
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        launch()
        start.record(self.stream)
        for _ in range(launches):
            launch()
        end.record(self.stream)
        end.synchronize()
        return cupy.cuda.get_elapsed_time(start, end) * 1e-3 / launches

    def roof(self) -> Roof:
        """Of a copy of 1 GiB and a bf16 product of 4096 x 4096 matrices."""
        source, target = cupy.empty(1 << 30, cupy.uint8), cupy.empty(1 << 30, cupy.uint8)
        runtime = cupy.cuda.runtime
        copy = partial(
            runtime.memcpyAsync, target.data.ptr, source.data.ptr, source.nbytes, runtime.memcpyDeviceToDevice,
            self.stream.ptr,
        )  # fmt: skip
        size = 4096
        a, c = (self.put(np.ones((size, size), ml_dtypes.bfloat16)) for _ in range(2))
        product = self.capture(
            [partial(linear_into, self.tensor(c), self.tensor(a), self.tensor(a), workspace=self.workspace)]
        )
        launch = partial(product.launch, self.stream)
        return Roof(2 * source.nbytes / self.seconds(copy, 20), 2 * size**3 / self.seconds(launch, 50))


class _PinnedBlock(Block):
    def __init__(self, device: Cuda, **arrays: tuple[int, type]) -> None:
        self._stream = device.stream
        super().__init__(**arrays)

    def _allocate(self) -> np.ndarray:
        self._pinned = cupy.cuda.alloc_pinned_memory(self.nbytes)
        return np.frombuffer(self._pinned, np.uint8, self.nbytes)

    def _device_memory(self) -> cupy.ndarray:
        self._copy = cupy.empty(self.nbytes, cupy.uint8)
        return self._copy

    # Straight to the runtime: CuPy's arrays refuse these copies while a graph is captured.
    def upload(self) -> None:
        runtime = cupy.cuda.runtime
        runtime.memcpyAsync(
            self._copy.data.ptr, self._pinned.ptr, self.nbytes, runtime.memcpyHostToDevice, self._stream.ptr
        )

    def download(self) -> None:
        runtime = cupy.cuda.runtime
        runtime.memcpyAsync(
            self._pinned.ptr, self._copy.data.ptr, self.nbytes, runtime.memcpyDeviceToHost, self._stream.ptr
        )


class _GraphProgram(Program):
    """One replay of one graph: the inputs go up, the calls run, the outputs come down."""

    def __init__(
        self, device: Cuda, phase: str, calls: list[Call], inputs: _PinnedBlock, outputs: _PinnedBlock
    ) -> None:
        super().__init__(phase, calls)
        self._device = device
        self._graph = device.capture([inputs.upload, *(call.run for call in calls), outputs.download])

    def run(self, keys: int) -> None:
        self._graph.launch(self._device.stream)
        self._device.stream.synchronize()
        self.keys.append(keys)

    def measure(self) -> None:
        """Replays the calls of each op in a graph of their own. The buffers keep nothing of worth after that."""
        for op in dict.fromkeys(call.op for call in self.calls):
            members = [i for i, call in enumerate(self.calls) if call.op == op]
            graph = self._device.capture([self.calls[i].run for i in members])
            each = self._device.seconds(partial(graph.launch, self._device.stream), 20) / len(members)
            for i in members:
                self.nanoseconds[i] = each * 1e9 * len(self.keys)
