"""The name under which older callers know `fp8_quant.fp8_e4m3fn_rowwise_quant_cuda`."""

from kestrel_kernels.fp8_quant import fp8_e4m3fn_rowwise_quant_cuda as fp8_quant_cute

__all__ = ["fp8_quant_cute"]
