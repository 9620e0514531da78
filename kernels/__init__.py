"""Kernels of nanococonut: Triton, one op per file, and C for CPUs. Not Hugging Face's package."""
