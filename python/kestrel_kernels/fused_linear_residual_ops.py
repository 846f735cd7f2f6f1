"""Linear layers with bias, activation and residual in one pass: `activation(x @ w.T + b) + residual`.

Arrays are bf16, fp16 or fp32, all of one dtype; any M, N, K, zero too; rows of any stride, the last dimension
contiguous. Sums, bias, activation and residual are fp32, rounded once. A row's result does not depend on what the other
rows hold; on CUDA its last bits may depend on how many rows there are: up to 16 a kernel streams the weights, above the
products are cuBLASLt's. `out` may be `residual` and must share no memory with the other arguments.

w and b are weights. On CUDA a call may read them while the op before it on the stream still runs, so they must not be
what that op writes; x and residual may.
"""

from __future__ import annotations

from typing import Any

from kestrel_kernels._op import Array, ArrayT, Op, new_array, result, scratch, shape_of

__all__ = ["fused_linear_bias_residual_into", "linear", "linear_into"]

_linear = Op("linear", "out workspace x w b residual activation", writes="out workspace")

_GATES = frozenset({"gelu_residual", "silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul"})


WORKSPACE_BYTES = 32 << 20  # kestrel::linear_workspace_bytes(), a constant: torch.compile cannot ask the library


def _workspace(out: Any) -> Any:
    """A call's own, from its framework's allocator: a kept one would be shared by graphs that are replayed at once."""
    return scratch(out, WORKSPACE_BYTES)


def linear_into(
    out: Array,
    x: Array,
    w: Array,
    b: Array | None = None,
    residual: Array | None = None,
    activation: str | None = None,
    *,
    workspace: Array | None = None,
) -> None:
    """out = activation(x @ w.T + b) + residual.

    Args:
        out: `[..., N]`, dtype of x; written. May be `residual`.
        x: `[..., K]`, bf16, fp16 or fp32.
        w: `[N, K]`, dtype of x.
        b: `[N]`, dtype of x, or None.
        residual: as out, or None.
        activation: None, `gelu` (erf), `gelu_tanh` (Hendrycks and Gimpel 2016), `silu`; or a gate of
            `kestrel_kernels.activation` by name (`gelu_residual`, `silu_and_mul`, `gelu_and_mul`, `gelu_tanh_and_mul`):
            then w is `[2I, K]`, b `[2I]`, out `[..., I]`, and the first I rows of w give the half that the activation
            function is applied to (GLU variants: Shazeer 2020).
        workspace: uint8 `[WORKSPACE_BYTES]` on the GPU, for a CUDA graph captured without torch: it must live as long
            as the graph, and calls that run at once must not share it. None takes it from the framework's allocator.

    Raises:
        TypeError: a dtype that is not taken, or an immutable `out`.
        ValueError: a shape, stride, alignment, device or activation that does not fit.
    """
    _linear.call(out, _workspace(out) if workspace is None else workspace, x, w, b, residual, activation or "")


def linear(
    x: ArrayT,
    w: Array,
    b: Array | None = None,
    residual: Array | None = None,
    activation: str | None = None,
) -> ArrayT:
    """activation(x @ w.T + b) + residual: x `[..., K]`, w `[N, K]` -> `[..., N]`. See `linear_into`."""
    *leading, _ = shape_of("linear: x", x)
    columns = shape_of("linear: w", w)[0]
    out = new_array(x, (*leading, columns // 2 if activation in _GATES else columns))
    _linear.call(out, _workspace(out), x, w, b, residual, activation or "")
    return result(out, x)


def fused_linear_bias_residual_into(x: Array, w: Array, b: Array, residual: Array, out: Array) -> None:
    """out = x @ w.T + b + residual: x `[..., K]`, w `[N, K]`, b `[N]`, residual and out `[..., N]`.

    `out` is written and may be `residual`. Errors of `linear_into`.
    """
    _linear.call(out, _workspace(out), x, w, b, residual, "")
