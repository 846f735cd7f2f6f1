"""Attention. Everything stands in `kestrel_kernels.flash_attn.cute`."""
