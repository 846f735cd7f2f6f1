"""What a call says of an argument that is of another type than its own, or too large a number: one line, for arrays of
every framework."""

from __future__ import annotations

from typing import Any

import pytest
from kestrel_kernels.activation import silu_and_mul, silu_and_mul_into
from kestrel_kernels.cute_moe import fused_moe
from kestrel_kernels.flash_attn.cute import flash_attn_func
from kestrel_kernels.fused_linear_residual_ops import linear
from kestrel_kernels.norm import layernorm, rmsnorm
from kestrel_kernels.topk import sample_top_k
from support import Backend, random

SHAPES = {"row": (64,), "rows": (4, 64), "heads": (1, 4, 2, 64)}
ATTENTION = ["heads"] * 3
# function, arrays, further arguments, message
CASES: list[tuple[Any, list[str], dict[str, Any], str]] = [
    (layernorm, ["rows", "row"], {"bias": None}, "layernorm: bias must be an array.*, got None"),
    (rmsnorm, ["rows", "row"], {"eps": None}, "rmsnorm: eps must be a number, got None"),
    (linear, ["rows", "rows"], {"activation": 3}, "linear: activation must be a string, got int"),
    (sample_top_k, ["rows"], {"k": 2, "temperature": 1.0, "seed": 0.5, "offset": 0},
     "sample_top_k: seed must be an integer, got float"),
    (flash_attn_func, ATTENTION, {"causal": None}, "flash_attn_func: causal must be a bool, got None"),
    (flash_attn_func, ATTENTION, {"prefix_len": 2.5}, "flash_attn_func: prefix_len must be an integer, got float"),
    (flash_attn_func, ATTENTION, {"softmax_scale": "1"}, "flash_attn_func: softmax_scale must be a number, got str"),
    (flash_attn_func, ATTENTION[:1], {"k": None, "v": None}, "flash_attn_func: [kv] must be an array.*, got None"),
    (fused_moe, ["rows", "heads", "heads", "rows", "rows"], {"config": "16"},
     "CuteMoeConfig: config must be one, a block size or None, got str"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(CASES)))
def test_another_type(backend: Backend, case: int) -> None:
    function, arrays, more, message = CASES[case]
    with pytest.raises(TypeError, match=f"^{message}") as raised:
        function(*(backend.array(random(SHAPES[name]), "bfloat16") for name in arrays), **more)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_past_64_bits(backend: Backend, seed: int) -> None:
    with pytest.raises(ValueError, match=f"^sample_top_k: seed must fit in 64 bits, got {seed}$"):
        sample_top_k(backend.array(random((4, 64)), "bfloat16"), 2, 1.0, seed, 0)


def test_subclass_of_a_tensor() -> None:
    torch = pytest.importorskip("torch")

    class Mine(torch.Tensor):  # type: ignore[misc, name-defined]
        pass

    x = torch.randn(2, 8)
    out = torch.empty(2, 4)
    silu_and_mul_into(out, x.as_subclass(Mine))
    assert torch.equal(out, silu_and_mul(x))
