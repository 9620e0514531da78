"""Where it runs: the choice of a device, and what the machine's memory allocator is told."""

import ctypes
import sys

import torch

from nanococonut.runtime.errors import UserError


def select_device(name: str) -> torch.device:
    """auto is a CUDA GPU where there is one, else the CPU. UserError where it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        first = str(e).splitlines()[0]
        raise UserError(f"device={name!r} cannot be used: {first}\nTry --device=cpu.") from None
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)  # streams, graphs and Triton use the current one
        # cuDNN plans attention anew for every length (tens of ms each); flash does not
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def keep_freed_memory() -> None:
    """glibc hands large freed blocks back to the system and faults them in again at every step,
    which a small model on a CPU feels. Tell it to keep them."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 256 << 20)):
                libc.mallopt(parameter, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
