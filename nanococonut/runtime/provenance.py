"""Where a result or checkpoint comes from."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def provenance() -> dict[str, Any]:
    """Return the commit, the package versions and the platform that produced this result."""
    root = Path(__file__).parent.parent
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    commit = os.environ.get("NANOCOCONUT_COMMIT", commit)  # for a copy without a git repository
    versions = {"python": platform.python_version()}
    for package in ("nanococonut", "torch", "numpy", "tiktoken", "safetensors", "triton"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # such as triton on a CPU
            pass
    return {"commit": commit, "versions": versions, "platform": sys.platform}
