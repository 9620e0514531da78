"""Triton kernels of nanococonut, one op per file. Not Hugging Face's package of this name."""
