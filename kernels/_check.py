"""Checks of the tensors that are passed to kernels, in Triton and in C."""

from torch import Tensor


def check_tensors(**expected: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Raise ValueError unless each tensor is None, or contiguous and of the expected shape.

    Kernels compute addresses from the sizes alone, so another shape would be read out of bounds.
    """
    for name, (t, shape) in expected.items():
        if t is not None and (t.shape != shape or not t.is_contiguous()):
            actual = f"{tuple(t.shape)}, strides {t.stride()}"
            raise ValueError(f"{name}: expected contiguous {shape}, got {actual}")
