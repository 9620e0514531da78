"""Compile a C file of this folder when it is first used."""

import ctypes
import functools
import os
import subprocess
import tempfile
from pathlib import Path

# not -ffast-math: GCC would then make the whole process flush denormals to zero
FLAGS = "-std=gnu11 -O3 -march=native -fopenmp -fno-math-errno -fno-trapping-math -shared -fPIC"


@functools.cache
def compile_c(name: str, *options: str) -> ctypes.CDLL:
    """Return `name`, a C file of this folder, compiled with the options and loaded.

    Raise OSError if the compiler ($CC, or cc) is missing or fails, or if the library cannot be
    loaded, such as from a folder mounted with noexec.
    """
    # split at spaces, so $CC may have options, but no path with spaces
    command = [*(os.environ.get("CC", "").split() or ["cc"]), *FLAGS.split(), *options]
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/{Path(name).stem}.so"
        out = subprocess.run(
            [*command, str(Path(__file__).with_name(name)), "-o", library, "-lm"],
            capture_output=True, text=True, errors="replace",
        )  # fmt: skip
        if out.returncode:
            lines = out.stderr.strip().splitlines() or ["failed"]
            error = next((line for line in lines if "error" in line), lines[0])
            raise OSError(f"{command[0]}: {error}")
        return ctypes.CDLL(library)  # stays loaded without its file
