"""Kernels in Triton: one source for NVIDIA's GPUs, AMD's, and Triton's interpreter, which tests use without a GPU."""
