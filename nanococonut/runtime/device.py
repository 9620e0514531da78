"""The device a script runs on, the precision it computes in, and the signals that end it."""

import ctypes
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

import torch

from nanococonut.runtime.errors import UserError


def select_device(name: str) -> torch.device:
    """Return the device; "auto" is a CUDA GPU if there is one, else the CPU.

    Raise UserError if the device cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        choices = "auto, cpu, cuda, cuda:1 or mps"
        raise UserError(f"device={name!r} is unknown.\nUse {choices}.") from None
    try:
        torch.zeros(1, device=device).item()  # fails on "meta", which holds no data
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        first = str(e).splitlines()[0]
        raise UserError(f"device={name!r} cannot be used: {first}\nTry --device=cpu.") from None
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)  # streams, graphs and Triton use the current device
        # cuDNN builds a new attention plan per sequence length (tens of ms each); flash does not
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def select_precision(dtype: str, device: torch.device) -> bool:
    """Set the precision of float32 matrix products. Return whether to autocast to bfloat16."""
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return dtype == "bfloat16" or (dtype == "auto" and on_gpu)


def now(device: torch.device) -> float:
    """Return the time in seconds after all work on the device has ended."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks of memory.

    By default it returns them to the system, so every step causes the same page faults again. On a
    CPU, these take much of the time of a small model's step.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 256 << 20)):
                libc.mallopt(parameter, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD


# a closed terminal sends SIGHUP, which Windows lacks
HANGUP = getattr(signal, "SIGHUP", None)


class Interrupt:
    """Turn Ctrl-C, SIGTERM and SIGHUP into a request that the loop reads after each step.

    In a single process, a second signal exits at once. Two cases do not count as a second signal:
    torchrun sends a signal after the terminal's, and a shell may send SIGHUP twice.
    """

    def __init__(self, n_processes: int = 1) -> None:
        self.n_processes = n_processes
        self.signal = 0  # the first one received; any other replaces a SIGHUP
        self._before: dict[int, Any] = {}  # signal -> previous handler
        if threading.current_thread() is not threading.main_thread():
            return  # in a notebook or web app; Python sets handlers in the main thread only
        numbers = [signal.SIGINT, signal.SIGTERM]
        if HANGUP and signal.getsignal(HANGUP) != signal.SIG_IGN:  # ignored under nohup
            numbers.append(HANGUP)
        self._before = {number: signal.signal(number, self._receive) for number in numbers}

    def close(self) -> None:
        """Restore the previous handlers, since a notebook that ran the loop needs its Ctrl-C."""
        if self.n_processes == 1:  # torchrun's own signal may come after the last save
            for number, handler in self._before.items():
                signal.signal(number, handler)

    @property
    def received(self) -> bool:
        return self.signal != 0

    @property
    def exit_code(self) -> int:
        """Return the exit code that shells use for a process ended by this signal."""
        return 128 + (self.signal or signal.SIGTERM)  # 0 if only another process received it

    def _receive(self, number: int, frame: FrameType | None) -> None:
        alone = self.n_processes == 1
        if self.signal not in (0, HANGUP) and number != HANGUP and alone:
            sys.exit(128 + number)
        is_first = not self.received
        if self.signal in (0, HANGUP):
            self.signal = number
        if is_first:
            hint = "; interrupt again to exit at once" if alone else ""
            with suppress(RuntimeError, OSError):  # the signal may have interrupted another print
                print(f"stopping after this step{hint}", flush=True)
