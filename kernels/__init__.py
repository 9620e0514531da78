"""Triton kernels of nanococonut, one op per file; kernels/reference.py has plain torch versions.

The owner of the project named this package `kernels`. Hugging Face publishes another package of
the same import name; an import meant for that one gets an error that explains it.
"""


def __getattr__(name: str) -> object:
    if name.startswith("__"):  # dunder look-ups (hasattr, inspect) must see an ordinary module
        raise AttributeError(name)
    raise ImportError(
        f"'kernels.{name}' is not here: this is nanococonut's own package 'kernels', found first "
        "on the import path.\nFor Hugging Face's 'kernels', run from a folder outside this project."
    )
