"""An editable install imports the package from any folder."""

import shutil
import zipfile
from importlib.machinery import PathFinder

import pytest
from helpers import ROOT


def test_editable_install_imports_from_the_parent(tmp_path, monkeypatch):
    """Guards against an empty namespace package: in the folder above the checkout, Python finds
    the checkout's folder, which has the package's name, before setuptools' import hook."""
    pytest.importorskip("setuptools", minversion="77")  # as in pyproject.toml
    from setuptools import build_meta

    checkout, wheels = tmp_path / "nanococonut", tmp_path / "wheels"
    for path in ("nanococonut/__init__.py", "kernels/__init__.py", "README.md", "setup.py"):
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, checkout / path)
    wheels.mkdir()
    monkeypatch.chdir(checkout)
    wheel = zipfile.ZipFile(wheels / build_meta.build_editable(str(wheels)))
    [pth] = [wheel.read(name).decode() for name in wheel.namelist() if name.endswith(".pth")]
    spec = PathFinder.find_spec("nanococonut", [str(tmp_path), *pth.splitlines()])
    assert spec.origin == str(checkout / "nanococonut/__init__.py")
