"""What holds for every array of every op: an argument that is a little wrong is an error before any write, or else the
call is right all the same; what is only read may be immutable, what is written may not."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

import kestrel_kernels
import numpy as np
import pytest
from kestrel_kernels import _moe_config, _op
from support import Backend, random

# Of each op the arguments of a good call. Arrays: dtype and shape, or their values; integers ascend from 0 where none
# stand here.
BF16, F32, E4M3, I32, I64 = "bfloat16", "float32", "float8_e4m3fn", "int32", "int64"
GATED: dict[str, Any] = {"out": (BF16, 4, 6), "x": (BF16, 4, 12)}
NORM: dict[str, Any] = {"out": (BF16, 4, 8), "x": (BF16, 4, 8), "weight": (BF16, 8), "eps": 1e-5}
QUANT: dict[str, Any] = {"out_bits": (E4M3, 4, 8), "x": (BF16, 4, 8)}
CACHES: dict[str, Any] = {
    "key_cache": (E4M3, 2, 2, 3, 8), "value_cache": (E4M3, 2, 2, 3, 8), "slot_mapping": (I64, 4),
    "kv_cache_dtype": "fp8", "k_scale": (F32, 3), "v_scale": (F32, 1),
}  # fmt: skip
ALIGN: dict[str, Any] = {
    "sorted_token_ids": (I32, 14), "expert_ids": (I32, 7), "num_tokens_post_pad": (I32, 1),
    "topk_ids": (I32, [[0, 1], [2, 3], [0, 5], [1, 1]]), "num_experts": 6, "block_size": 2,
    "expert_map": (I32, [0, 1, -1, 2, 3, 4]),
}  # fmt: skip
# Blocks of two assignments of T = 3 tokens, K = 2; 6 is none.
ROUTED: dict[str, Any] = {
    "topk_weights": (F32, 3, 2), "topk_ids": (I32, [[0, 1], [1, 0], [1, 1]]),
    "sorted_token_ids": (I32, [0, 3, 1, 2, 4, 5]), "expert_ids": (I32, [0, 1, 1]), "num_tokens_post_pad": (I32, [6]),
    "block_m": 2, "tile": -1,
}  # fmt: skip
UP: dict[str, Any] = {"out": (BF16, 3, 2, 6), "activation": "silu", **ROUTED}
DOWN: dict[str, Any] = {"out": (BF16, 3, 8), "reduce": True, **ROUTED}
MASK: dict[str, Any] = {
    "causal": False, "window_left": 3, "window_right": None, "softmax_scale": None, "softcap": 0.0,
    "learnable_sink": (F32, 4), "k_scale": (F32, 1), "v_scale": (F32, 1), "num_splits": 0, "fresh_tokens": None,
    "batch_invariant": False, "max_seqlen_q": None, "max_seqlen_k": None, "cu_seqlens_q": None, "cu_seqlens_k": None,
    "seqused_k": None, "page_table": None,
}  # fmt: skip
FUSED: dict[str, Any] = {
    "out": (BF16, 3, 8), "x": (BF16, 3, 8), "w_up": (BF16, 2, 12, 8), "w_up_scale": None, "w_down": (BF16, 2, 8, 6),
    "w_down_scale": None, "topk_weights": (F32, 3, 2), "topk_ids": (I32, [[0, 2], [1, 2], [2, 1]]),
    "expert_map": (I32, [0, -1, 1, 1]), "block_m": 2, "tile": -1, "activation": "gelu_residual",
}  # fmt: skip
CALLS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("gelu_residual", "silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul"), GATED),
    **dict.fromkeys(("layernorm", "layernorm_reload"), NORM | {"bias": (BF16, 8)}),
    "rmsnorm": NORM | {"residual": (BF16, 4, 8)},
    "embedding": {"out": (BF16, 4, 8), "table": (BF16, 4, 8), "ids": (I64, 4)},
    "fp8_quant_row": QUANT | {"out_scale": (F32, 4)},
    "fp8_quant_tensor": QUANT | {"out_scale": (F32, 1)},
    "fp8_quant_static": QUANT | {"scale": (F32, 1)},
    "reshape_and_cache_flash": {"key": (BF16, 4, 3, 8), "value": (BF16, 4, 3, 8), **CACHES},
    "rope_and_cache": {
        "positions": (I64, 4), "q": (BF16, 4, 3, 8), "k": (BF16, 4, 3, 8), "v": (BF16, 4, 3, 8),
        "cos_sin_cache": (F32, 4, 6), "interleaved": False, "tok_qv_lin": (BF16, 4, 6), "tau_pos_table": (BF16, 4, 3),
        **{name.replace("key", "k").replace("value", "v"): of for name, of in CACHES.items()},
    },
    "rotary_embedding": {
        "positions": (I64, 4), "query": (BF16, 4, 3, 8), "key": (BF16, 4, 2, 8), "head_size": 8,
        "cos_sin_cache": (F32, 4, 6), "interleaved": False,
    },
    "tau_tail_apply_into": {
        "qkv_out": (BF16, 4, 18), "tok_qv_lin": (BF16, 4, 6), "tau_pos_table": (F32, 4, 3), "position_ids": (I32, 4),
    },
    "moe_sum": {"out": (BF16, 4, 8), "x": (BF16, 4, 3, 8)},
    "merge_state": {
        **{name: (BF16, 4, 3, 8) for name in ("out", "out_a", "out_b")},
        **{name: (F32, 3, 4) for name in ("lse", "lse_a", "lse_b")},
    },
    "topk_fwd": {"values": (BF16, 4, 2), "indices": (I32, 4, 2), "scores": (BF16, 4, 8), "softmax": False},
    "topk_router": {
        "weights": (F32, 4, 2), "ids": (I32, 4, 2), "scores": (BF16, 4, 8), "bias": (F32, 8), "scoring": "sigmoid",
        "renormalize": True, "num_groups": 1, "topk_groups": 1, "scale": 1.0,
    },
    "sample_top_k": {
        "ids": (I32, 4), "logits": (BF16, 4, 8), "k": 2, "temperature": (F32, 1), "seed": (I64, 1), "offset": (I64, 1),
    },
    "moe_align_block_size": ALIGN,
    "moe_lora_align_block_size": ALIGN | {
        "sorted_token_ids": (I32, 2, 14), "expert_ids": (I32, 2, 7), "num_tokens_post_pad": (I32, 2),
        "token_lora_mapping": (I32, [0, 1, -1, 1]),
    },
    "linear": {
        "out": (BF16, 4, 6), "x": (BF16, 4, 8), "w": (BF16, 6, 8), "b": (BF16, 6), "residual": (BF16, 4, 6),
        "activation": "gelu",
    },
    "fused_mlp": {
        "out": (BF16, 4, 6), "hidden": (BF16, 4, 10), "x": (BF16, 4, 8), "w1": (BF16, 10, 8), "b1": (BF16, 10),
        "w2": (BF16, 6, 10), "b2": (BF16, 6), "residual": (BF16, 4, 6),
    },
    "moe_up": UP | {"hidden_states": (BF16, 3, 8), "w1": (BF16, 2, 6, 8), "w2": (BF16, 2, 6, 8)},
    "moe_up_fp8": UP | {
        "hidden": (E4M3, 3, 8), "hidden_scale": (F32, 3), "w1": (E4M3, 2, 6, 8), "w1_scale": (F32, 2, 6),
        "w2": (E4M3, 2, 6, 8), "w2_scale": (F32, 2, 6),
    },
    "moe_down": DOWN | {"moe_out": (BF16, 3, 2, 6), "w3": (BF16, 2, 8, 6)},
    "moe_down_fp8": DOWN | {
        "moe_out": (E4M3, 3, 2, 6), "moe_out_scale": (F32, 3, 2), "w3": (E4M3, 2, 8, 6), "w3_scale": (F32, 2, 8),
    },
    "fused_moe": FUSED,
    "flash_attn_func": MASK | {
        "out": (BF16, 2, 5, 4, 8), "lse": (F32, 2, 4, 5), "q": (BF16, 2, 5, 4, 8), "k": (BF16, 2, 7, 2, 8),
        "v": (BF16, 2, 7, 2, 8), "prefix_len": (I32, [3, 0]),
    },
    "flash_attn_varlen_func": MASK | {
        "out": (BF16, 5, 4, 8), "lse": (F32, 4, 5), "q": (BF16, 5, 4, 8), "k": (BF16, 7, 2, 8), "v": (BF16, 7, 2, 8),
        "prefix_len": None, "cu_seqlens_q": (I32, [0, 2, 5]), "cu_seqlens_k": (I32, [0, 3, 7]),
    },
    "flash_attn_with_kvcache": MASK | {
        "out": (BF16, 2, 2, 4, 8), "lse": (F32, 2, 4, 2), "q": (BF16, 2, 2, 4, 8), "k_cache": (E4M3, 4, 2, 2, 8),
        "v_cache": (E4M3, 4, 2, 2, 8), "prefix_len": None, "seqused_k": (I32, [3, 4]),
        "page_table": (I32, [[0, 1], [2, 3]]),
    },
}  # fmt: skip


def of_two_dimensions(op: str) -> tuple[str, dict[str, Any]]:
    """The tokens, 4 of them, as [2, 2]; of states [H, T] as [2, H, T]."""
    changed = {}
    for name, of in CALLS[op].items():
        tokens = isinstance(of, tuple) and of[1] == 4 and not re.search("table|cos_sin|slot|hidden", name)
        changed[name] = (of[0], 2, 2, *of[2:]) if tokens else (F32, 2, 3, 2) if name.startswith("lse") else of
    return op, changed


FP8_LAYER = FUSED | {
    "w_up": (E4M3, 2, 12, 8), "w_up_scale": (F32, 2, 12), "w_down": (E4M3, 2, 8, 6), "w_down_scale": (F32, 2, 8)
}  # fmt: skip
PACKED_KEYS = CALLS["flash_attn_func"] | {
    "k": (BF16, 7, 2, 8), "v": (BF16, 7, 2, 8), "cu_seqlens_k": (I32, [0, 3, 7])
}  # fmt: skip
TWO = ("rotary_embedding", "rope_and_cache", "tau_tail_apply_into", "merge_state", "linear", "fused_mlp")
CASES = [*CALLS.items(), ("fused_moe", FP8_LAYER), ("flash_attn_func", PACKED_KEYS), *map(of_two_dimensions, TWO)]
dir(kestrel_kernels)  # imports all modules, and so knows all ops


def host_arrays(arguments: dict[str, Any]) -> dict[str, tuple[np.ndarray, str]]:
    """name -> values, dtype"""
    arrays = {}
    for seed, (name, of) in enumerate(arguments.items()):
        if not isinstance(of, tuple):
            continue
        dtype, *shape = of
        if isinstance(shape[0], list):
            values = np.array(shape[0])
        elif dtype in (I32, I64):
            values = np.arange(np.prod(shape)).reshape(shape)
        else:
            values = -np.sort(-np.abs(random(tuple(shape), seed)) - 0.1)  # the best scores come first
        arrays[name] = values, dtype
    return arrays


class Call:
    """A good call of an op, and the same with one argument changed."""

    def __init__(self, backend: Backend, op: str, arguments: dict[str, Any]) -> None:
        self.backend, self.op, self.arguments = backend, _op._ops[op], arguments
        self.hosts = host_arrays(arguments)
        assert set(arguments) == set(self.op._arguments) - {"workspace"}
        self.workspace = backend.poisoned((1 << 25,), "uint8") if backend.device == "cuda" else None
        before = self.bits(self.arrays())
        self.want = self.run()
        self.written = [name for name, bits in before.items() if bits.tobytes() != self.want[name].tobytes()]
        assert self.written

    def arrays(self) -> dict[str, Any]:
        return {name: self.backend.array(*of) for name, of in self.hosts.items()}

    def bits(self, arrays: dict[str, Any]) -> dict[str, np.ndarray]:
        return {name: self.backend.bits(array) for name, array in arrays.items()}

    def run(self, **changed: Any) -> dict[str, np.ndarray]:
        """What the arrays hold afterwards. An error leaves all of them as they are, and comes through."""
        arguments = {"workspace": self.workspace} | self.arguments | self.arrays() | changed
        arrays = {name: arguments[name] for name in self.hosts}
        before = self.bits(arrays)
        try:
            self.op.call(*(arguments[name] for name in self.op._arguments))
        except (TypeError, ValueError) as error:
            assert re.match(rf"{self.op.name}: \w+ must [^\n]*, got [^\n]*$", str(error))
            after = self.bits(arrays)
            assert all(after[name].tobytes() == bits.tobytes() for name, bits in before.items())
            raise
        return self.bits(arrays)

    def is_right(self, got: dict[str, np.ndarray]) -> bool:
        """As in the good call but for what kernels for other layouts round differently."""
        numbers = [(got[name].astype(float), self.want[name].astype(float)) for name in self.written]
        return all(a.size == b.size and np.allclose(a.ravel(), b.ravel(), 0.02, 0.01) for a, b in numbers)


LONGER = {"sorted_token_ids", "expert_ids"}  # what alignment writes may have room to spare
# Sizes that no other array has and that the result goes by.
OWN = {
    ("moe_sum", "x", 1), ("rotary_embedding", "query", -2), ("rotary_embedding", "key", -2),
    ("moe_align_block_size", "topk_ids", 0), ("moe_align_block_size", "topk_ids", 1),
    ("moe_lora_align_block_size", "topk_ids", 1),
}  # fmt: skip


def changes(call: Call, name: str) -> Iterator[tuple[str, Any]]:
    """Of one array: another dtype, a dimension more, one index more or less, elements that lie apart."""
    host, dtype = call.hosts[name]
    array = call.backend.array
    yield "dtype", array(host, "int16")
    yield "rank", array(host[None], dtype)
    yield "rank 7", array(host.reshape((1,) * (7 - host.ndim) + host.shape), dtype)
    yield "stride", array(np.repeat(host, 2, axis=-1), dtype)[..., ::2]
    for axis in range(host.ndim):
        if {(call.op.name, name, axis), (call.op.name, name, axis - host.ndim)} & OWN:
            continue
        yield f"less of {axis}", array(np.delete(host, -1, axis), dtype)
        if not (name in LONGER and name in call.written):
            yield f"more of {axis}", array(np.insert(host, host.shape[axis], 0, axis), dtype)


@pytest.mark.parametrize(("op", "arguments"), CASES)
def test_a_little_wrong(backend: Backend, op: str, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KESTREL_CHECK", "1")
    call = Call(backend, op, arguments)
    for name in call.hosts:
        for what, array in changes(call, name):
            try:
                right = call.is_right(call.run(**{name: array})) and what not in ("dtype", "rank 7")
            except ValueError:
                right = what != "dtype"
            except TypeError:
                right = what == "dtype"
            assert right, (name, what)


@pytest.mark.parametrize("op", ["moe_up", "moe_down", "fused_moe"])
def test_tiles(backend: Backend, op: str) -> None:
    call = Call(backend, op, CALLS[op])
    numbers = [{i for tile, i in _moe_config.tiles().items() if tile.dtype == dtype} for dtype in ("bf16", "fp8")]
    wrong = [
        ({"tile": 10**6}, "tile must be below the number of compiled tiles, got 1000000"),
        ({"tile": min(numbers[1] - numbers[0])}, "tile must be one of this dtype's, got "),
        ({"tile": min(numbers[0])}, "block_m must be as high as the tile, got 2"),
        ({"block_m": 0}, "block_m must be .*, got 0"),
        ({"block_m": 2**31}, "block_m must be .*, got 2147483648"),
    ]
    if op == "fused_moe":
        wrong.append(({"block_m": 2**31 - 1}, "topk_ids must be of less than 2.31 elements, padded to whole blocks"))
    for changed, message in wrong:
        with pytest.raises(ValueError, match=f"^{op}: {message}"):
            call.run(**changed)


def test_every_op() -> None:
    assert set(CALLS) == set(_op._ops)


def test_defaults() -> None:
    """An into form has the defaults of its functional form, but for those that the call of the latter must give."""
    forms = 0
    for module in [module for name, module in sys.modules.items() if name.startswith("kestrel_kernels.")]:
        for name in getattr(module, "__all__", ()):
            if into := getattr(module, f"{name}_into", None):
                functional = inspect.signature(getattr(module, name)).parameters
                for argument, of in inspect.signature(into).parameters.items():
                    if of.default is not of.empty and argument in functional:
                        assert of.default == functional[argument].default, (name, argument)
                        forms += 1
    assert forms


@pytest.mark.parametrize(("op", "arguments"), CASES)
def test_leading_strides(backend: Backend, op: str, arguments: dict[str, Any]) -> None:
    """Each array, and all at once, inside a larger one of NaN or of large numbers, which stays as it is."""
    call = Call(backend, op, arguments)
    wholes = {}
    for name, (host, dtype) in call.hosts.items():
        if host.ndim > 1 and name != "moe_out_scale":  # the one that must be contiguous
            larger = backend.poisoned(tuple(size + 3 for size in host.shape), dtype)
            inside = tuple(slice(1, 1 + size) for size in host.shape)
            outside = backend.bits(larger)
            values = outside.copy()
            values[inside] = backend.bits(backend.array(host, dtype))
            wholes[name] = values, inside, outside
    for names in [[name] for name in wholes] + [list(wholes)]:
        larger = {name: backend.array(values, values.dtype.name) for name, (values, *_) in wholes.items()}
        inner = {name: larger[name][wholes[name][1]] for name in names}
        assert call.is_right(call.run(**inner)), names
        for name in names:
            values, inside, outside = wholes[name]
            got = backend.bits(larger[name])
            got[inside] = outside[inside]
            assert got.tobytes() == outside.tobytes(), name


@pytest.mark.parametrize(("op", "arguments"), CASES)
def test_read_only(op: str, arguments: dict[str, Any]) -> None:
    call = Call(Backend("numpy"), op, arguments)
    for name, array in call.arrays().items():
        array.flags.writeable = False
        if name in call.written:
            with pytest.raises(TypeError, match=f"^{op}: {name} must be writable, got a read-only NumPy array$"):
                call.run(**{name: array})
        else:
            assert call.is_right(call.run(**{name: array})), name


@pytest.mark.parametrize(("op", "arguments"), CASES)
def test_one_element_for_all(backend: Backend, op: str, arguments: dict[str, Any]) -> None:
    """Outputs of stride 0."""
    call = Call(backend, op, arguments)
    for name, array in call.arrays().items():
        if name in call.written and array.shape[0] > 1:
            if backend.framework == "torch":
                same = array[:1].expand(array.shape)
            else:
                tricks = __import__(backend.framework).lib.stride_tricks
                same = tricks.as_strided(array, array.shape, (0, *array.strides[1:]))
            with pytest.raises(ValueError, match=f"^{op}: {name} must have an element of its own for each index"):
                call.run(**{name: same})


@pytest.mark.parametrize(("op", "arguments"), CASES)
def test_addresses(op: str, arguments: dict[str, Any]) -> None:
    """Not a multiple of the element size."""
    call = Call(Backend("numpy"), op, arguments)
    for name, array in call.arrays().items():
        if array.itemsize > 1:
            apart = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
            apart[...] = array
            with pytest.raises(ValueError, match=f"^{op}: {name} must start at a multiple of its element size"):
                call.run(**{name: apart})
