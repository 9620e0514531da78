"""Triton kernels of nanococonut, one op per file; their truths are in kernels/reference.py.

The owner of the project named this package `kernels`. Hugging Face publishes another package of
the same import name; whoever meets this one by accident is told so.
"""


def __getattr__(name: str) -> object:
    if name.startswith("__"):  # dunder look-ups (hasattr, inspect) must see an ordinary module
        raise AttributeError(name)
    raise ImportError(
        f"'kernels.{name}' is not here: this is nanococonut's own package 'kernels', found first "
        "on the import path.\nFor Hugging Face's 'kernels', run from a folder outside this project."
    )
