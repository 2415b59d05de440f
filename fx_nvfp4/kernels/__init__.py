"""Triton kernels, each beside its launcher. Nothing here imports another part of the package."""
