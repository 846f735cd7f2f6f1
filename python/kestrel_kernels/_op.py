"""The way from a Python call to the library: arrays of any framework in, one C++ function called.

An op's module declares `op = Op("name", "out x eps", writes="out")` and says `op.call(out, x, eps)`. Torch tensors and
numbers go straight through; everything else is converted first, without copying. Shapes, dtypes, strides and values
are checked by the library alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from kestrel_kernels import _compiled, _jax, _library

Array = Any  # torch.Tensor, numpy.ndarray, jax.Array, cupy.ndarray, or any other object that speaks DLPack
ArrayT = TypeVar("ArrayT")

_SCALARS = frozenset({int, float, bool, str, type(None)})
_direct = _SCALARS  # types that go straight through: with tvm_ffi.Tensor, from the first call on
_torch_types: frozenset[type] = frozenset()  # so do these; filled on the first call, which imports torch if it can
_ops: dict[str, Op] = {}
# Types as the binding names them.
_WORDS = {"DLTensor*": "an array", "bool": "a bool", "int": "an integer", "float": "a number", "str": "a string"}


class Op:
    """A function of the library, bound on first use."""

    __slots__ = ("_arguments", "_function", "_operator_types", "_writes", "name")

    def __init__(self, name: str, arguments: str, writes: str) -> None:
        self.name = name
        self._arguments = arguments.split()
        self._writes = frozenset(writes.split())
        self._function: Callable[..., None] | None = None
        self._operator_types: str | None = None
        _ops[name] = self

    def call(self, *args: Any) -> None:  # not __call__: the way there takes Python 0.1 us
        if _in_graph():
            _compiled.call(self.name, _operator_types(self.name), args)
            return
        function = self._function or self._bind()
        grad_enabled = _grad_enabled()
        for arg in args:
            kind = type(arg)
            if kind in _torch_types:
                if grad_enabled and arg.requires_grad:
                    break
            elif kind not in _direct:
                break
        else:
            try:
                function(*args)
            except TypeError as error:
                raise self._named(error, args) from None
            return
        self._call_converted(function, args)

    def _bind(self) -> Callable[..., None]:
        global _direct
        self._function = function = getattr(_library.load(), self.name)
        if torch := sys.modules.get("torch"):
            _know_torch(torch)
        _direct = _SCALARS | {sys.modules["tvm_ffi"].Tensor}
        return function

    def _call_converted(self, function: Callable[..., None], args: Sequence[Any]) -> None:
        converted = [
            _convert(f"{self.name}: {name}", arg, name in self._writes)
            for name, arg in zip(self._arguments, args, strict=True)
        ]
        on_gpu = [tensor for arg, tensor in zip(args, converted, strict=True) if _is_jax_on_gpu(arg)]
        try:
            if on_gpu:
                _jax.call(lambda: function(*converted), args, on_gpu[0])
                return
            with _stream_of(args):
                function(*converted)
        except TypeError as error:
            raise self._named(error, args) from None

    def _named(self, error: TypeError, args: Sequence[Any]) -> Exception:
        """What the binding says of an argument by its number ("Mismatched type on argument #3 when calling ...
        Expected `float` but got `None`"), as this package says it. Other errors as they are."""
        found = re.search(r"argument #(\d+)\b.*?(?:Expected `(.+?)` but got|to `(.+?)`)", str(error), re.DOTALL)
        if not found:
            return error
        name, given, kind = self._arguments[int(found[1])], args[int(found[1])], found[2] or found[3]
        if type(given) is int and kind in ("int", "float"):
            return ValueError(f"{self.name}: {name} must fit in 64 bits, got {given}")
        inner = kind.removeprefix("Optional<").removesuffix(">")
        expected = _WORDS.get(inner, inner) + (" or None" if inner != kind else "")
        got = "None" if given is None else type(given).__name__
        return TypeError(f"{self.name}: {name} must be {expected}, got {got}")

    def operator_types(self) -> str:
        """Of the operator that stands for this op in a graph; made now if it was not."""
        if self._operator_types is None:
            self._operator_types = _compiled.register(self, self._arguments, self._writes)
        return self._operator_types


def _operator_types(name: str) -> str:
    return _ops[name].operator_types()


def _in_graph() -> bool:
    """Does torch.compile trace this call? In eager calls False at once."""
    return False


def _grad_enabled() -> bool:
    """Torch's, where that is known."""
    return False


_FunctionT = TypeVar("_FunctionT", bound=Callable[..., Any])
_constants: list[Callable[..., Any]] = []


def constant_in_graphs(function: _FunctionT) -> _FunctionT:
    """A decorator: while a graph is traced the function is called, not traced, with numbers and texts alone."""
    _constants.append(function)
    if _torch_types:
        sys.modules["torch"].compiler.assume_constant_result(function)  # marks it, and returns it
    return function


def _know_torch(torch: Any) -> None:
    global _grad_enabled, _in_graph, _operator_types, _torch_types
    if _torch_types:
        return
    _torch_types = frozenset({torch.Tensor, torch.nn.Parameter})
    _grad_enabled = torch.is_grad_enabled
    _in_graph = torch.compiler.is_dynamo_compiling
    # Called while a graph is traced, not in the graph.
    _operator_types = torch.compiler.assume_constant_result(_operator_types)
    for function in _constants:
        torch.compiler.assume_constant_result(function)


def _is(array: Any, module: str, name: str) -> bool:
    """isinstance(array, module.name), without importing the module."""
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(array, getattr(loaded, name))


def _is_jax_on_gpu(array: Any) -> bool:
    return isinstance(array, _jax.Unfinished) or (_is(array, "jax", "Array") and _jax.on_gpu(array))


def _convert(what: str, array: Any, written: bool) -> Any:
    import tvm_ffi

    if type(array) in _SCALARS or isinstance(array, tvm_ffi.Tensor):
        return array
    if _is(array, "torch", "Tensor"):
        torch = sys.modules["torch"]
        if array.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{what} must not require grad (inference only: call under torch.no_grad()), got one that does"
            )
        if type(array) not in _torch_types and hasattr(array, "fake_mode"):
            raise TypeError(f"{what} must hold data, got a {type(array).__name__}")
        return array
    if _is(array, "numpy", "ndarray"):
        return _convert_numpy(what, array, written)
    if _is(array, "numpy", "generic"):
        return array.item()
    if _is(array, "jax", "Array"):
        if written:
            raise TypeError(f"{what} must be writable, got a JAX array, which is immutable")
        return tvm_ffi.from_dlpack(array)
    if isinstance(array, _jax.Unfinished):
        return tvm_ffi.from_dlpack(array.array)
    if hasattr(array, "__dlpack__"):
        return tvm_ffi.from_dlpack(array)
    raise TypeError(
        f"{what} must be an array (PyTorch, NumPy, JAX, CuPy or any DLPack object), got {type(array).__name__}"
    )


def as_tensor(array: Array, dtype: str | None = None) -> Any:
    """A tvm_ffi.Tensor on the array's memory. Ops take it as it is, where a NumPy array is converted on every call
    (1 us, bf16 and fp8 7 us), but they no longer see whether it may be written. `dtype`: what integers of the same
    width stand for, "bfloat16" or "float8_e4m3fn"."""
    if dtype is None:
        return _convert("as_tensor: array", array, written=False)
    return _relabelled(array, dtype)


# DLPack's codes of the dtypes that NumPy knows from ml_dtypes, and the NumPy dtype of the same width.
_EXTENSION_DTYPES = {"bfloat16": (4, "uint16"), "float8_e4m3fn": (10, "uint8")}


def _convert_numpy(what: str, array: Any, written: bool) -> Any:
    import tvm_ffi

    if written and not array.flags.writeable:
        raise TypeError(f"{what} must be writable, got a read-only NumPy array")
    if not array.dtype.isnative:
        raise TypeError(f"{what} must be in native byte order, got {array.dtype}")
    if array.dtype.name not in _EXTENSION_DTYPES:
        try:
            return tvm_ffi.from_dlpack(array.__dlpack__(max_version=(1, 1)))
        except BufferError:
            raise TypeError(f"{what} has a dtype that DLPack does not carry, got {array.dtype}") from None
    return _relabelled(array.view(_EXTENSION_DTYPES[array.dtype.name][1]), array.dtype.name)


def _relabelled(integers: Any, dtype: str) -> Any:
    """NumPy and CuPy export no extension dtype: export integers and put its code into the capsule's DLTensor."""
    import tvm_ffi

    capsule = integers.__dlpack__(max_version=(1, 1))
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    address = pointer(capsule, b"dltensor_versioned")
    # DLManagedTensorVersioned.dl_tensor.dtype.code
    ctypes.c_uint8.from_address(address + 32 + 20).value = _EXTENSION_DTYPES[dtype][0]
    return tvm_ffi.from_dlpack(capsule)


def _stream_of(args: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    """The current stream of a framework that tvm-ffi does not know. Torch's is taken from its tensors."""
    cupy = sys.modules.get("cupy")
    for arg in args:
        if cupy is not None and isinstance(arg, cupy.ndarray):
            import tvm_ffi

            stream = cupy.cuda.get_current_stream(arg.device.id)
            return tvm_ffi.use_raw_stream(tvm_ffi.device(f"cuda:{arg.device.id}"), stream.ptr)
    return contextlib.nullcontext()


def shape_of(what: str, array: Any, rank: int = 1) -> tuple[int, ...]:
    """The shape of an argument of at least `rank` dimensions, for a functional form that sizes its result by it."""
    shape = getattr(array, "shape", None)
    if shape is None:
        raise TypeError(
            f"{what} must be an array (PyTorch, NumPy, JAX, CuPy or any DLPack object), got {type(array).__name__}"
        )
    if len(shape) < rank:
        raise ValueError(f"{what} must have at least {rank} dimension{'s' * (rank > 1)}, got shape {list(shape)}")
    return tuple(shape)


def new_array(like: Any, shape: Sequence[int], dtype: str | None = None) -> Any:
    """An uninitialized array of `like`'s framework, device and, unless given, dtype. Pass it through `result`."""
    if _is(like, "torch", "Tensor"):
        # Sizes as arguments of their own: torch takes a tuple apart in 0.3 us more.
        return like.new_empty(*shape, dtype=dtype and getattr(sys.modules["torch"], dtype))
    if _is(like, "cupy", "ndarray"):
        if dtype == "float8_e4m3fn":
            dtype = "uint8"  # CuPy has no e4m3: its bits
        return sys.modules["cupy"].empty(shape, _numpy_dtype(dtype) if dtype else like.dtype)
    if _is_jax_on_gpu(like):
        return _jax.Unfinished(like, shape, _numpy_dtype(dtype) if dtype else like.dtype)
    if _is(like, "numpy", "ndarray") or _is(like, "jax", "Array"):
        import numpy as np

        return np.empty(shape, _numpy_dtype(dtype) if dtype else like.dtype)
    raise TypeError(
        f"functional forms return PyTorch, NumPy, JAX or CuPy arrays; use the into form for {type(like).__name__}"
    )


def scratch(like: Any, size: int) -> Any:
    """uint8 memory for a call that writes `like`, on its device. None on the CPU, where ops need none, and where no
    framework that could give it is loaded. An array that is no framework's gets it from a loaded one, in the order of
    the stream that tvm-ffi has for the call, and as a tensor of tvm-ffi's: the call stays on that stream."""
    if _is(like, "torch", "Tensor"):
        return like.new_empty(size, dtype=sys.modules["torch"].uint8) if like.is_cuda else None
    if isinstance(like, _jax.Unfinished):
        return _jax.Unfinished(like.array, (size,), "uint8")
    place = getattr(like, "__dlpack_device__", None)
    kind, index = place() if place else (1, 0)
    if kind != 2:  # kDLCUDA
        return None
    cupy, torch = sys.modules.get("cupy"), sys.modules.get("torch")
    if cupy and _is(like, "cupy", "ndarray"):
        with cupy.cuda.Device(index):
            return cupy.empty(size, "uint8")
    if not torch and not cupy:
        return None
    import tvm_ffi

    stream = tvm_ffi.get_raw_stream(tvm_ffi.device(f"cuda:{index}"))
    if torch:
        with torch.cuda.stream(torch.cuda.ExternalStream(stream, f"cuda:{index}")):
            return tvm_ffi.from_dlpack(torch.empty(size, dtype=torch.uint8, device=f"cuda:{index}"))
    assert cupy
    with cupy.cuda.Device(index), cupy.cuda.ExternalStream(stream, index):
        return tvm_ffi.from_dlpack(cupy.empty(size, "uint8"))


def result(array: Any, like: Any) -> Any:
    """What `new_array(like, ...)` gave, once written, as an array of `like`'s framework."""
    if _is(like, "torch", "Tensor") or not _is(like, "jax", "Array"):  # a graph cannot ask JAX about torch's tensors
        return array
    return array.array if isinstance(array, _jax.Unfinished) else sys.modules["jax"].numpy.asarray(array)


def _numpy_dtype(name: str) -> Any:
    import numpy as np

    if name in _EXTENSION_DTYPES:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
    return np.dtype(name)


if sys.modules.get("torch") is not None:  # else on the first call: a graph may be the first caller
    _know_torch(sys.modules["torch"])
