"""Kernels of nanococonut: Triton, one op per file, and a step in C. Not Hugging Face's package."""
