"""Fused kernels, one folder each: the reference (the truth), the Triton code, the op."""
