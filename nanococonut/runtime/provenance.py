"""What a result or checkpoint was made with: commit, versions, platform."""

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def provenance() -> dict[str, Any]:
    """Commit, versions and platform: what a figure or a checkpoint was made with."""
    root = Path(__file__).parent.parent
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    versions = {"python": platform.python_version()}
    for package in ("nanococonut", "torch", "numpy", "tiktoken", "safetensors", "triton"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            pass
    return {"commit": commit, "versions": versions, "platform": sys.platform}
