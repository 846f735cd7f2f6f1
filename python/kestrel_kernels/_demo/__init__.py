"""`kestrel-kernels demo`: a language model whose every operation is an op of this package."""
