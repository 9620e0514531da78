"""Imports point one way, scripts are never imported, and `kernels` lives beside transformers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# a module -> what of ours it may import (itself and the packages below it)
ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "cache": set(),
    "device": {"errors"},
    "distributed": {"device", "errors"},
    "data": {"errors", "data"},
    "tokenizer": {"errors"},
    "model": {"cache", "hub"},  # hub inside from_pretrained only
    "hub": {"checkpoint", "errors", "export", "model"},
    "export": {
        "checkpoint",
        "config",
        "curriculum",
        "errors",
        "hub",
        "loader",
        "model",
        "tokenizer",
    },  # fmt: skip
    "muon": set(),
    "build": {"config", "curriculum", "errors", "hub", "model", "muon", "tokenizer"},
    "curriculum": {"data", "tokenizer"},
    "coconut": {"curriculum", "model", "ops"},
    "stepper": {"coconut", "curriculum", "graphs", "model"},
    "ops": {"cache", "errors", "model"},
    "graphs": set(),
    "steps": {"cache", "model", "ops"},
    "engine": {"curriculum", "errors", "graphs", "model", "ops", "steps", "tokenizer"},
    "evaluate": {"curriculum", "data", "engine"},
    "tasks": {"config", "data"},
    "loader": {"config", "curriculum", "data", "errors", "tasks", "tokenizer"},
    "nodes": {"curriculum", "data", "errors", "model", "steps", "tokenizer"},
    "checkpoint": {"errors", "model", "tokenizer"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "nanococonut":
                yield from (f"nanococonut.{alias.name}" for alias in node.names)
            else:
                yield node.module


def test_imports_point_one_way():
    package = ROOT / "nanococonut"
    seen = set()
    for path in package.rglob("*.py"):
        module = path.relative_to(package).parts[0].removesuffix(".py")
        if module == "__init__":
            assert list(imports(path)) == []
            continue
        seen.add(module)
        ours = {name.split(".")[1] for name in imports(path) if name.startswith("nanococonut.")}
        assert ours - {"__version__"} <= ALLOWED[module], path
        tops = {name.split(".")[0] for name in imports(path)}
        assert not tops & {"transformers", "train", "sample", "bench", "tests"}, path
        if module == "data":
            assert "torch" not in tops
    assert seen == set(ALLOWED)


def test_triton_is_imported_by_kernels_only():
    for path in [*ROOT.glob("*.py"), *(ROOT / "nanococonut").rglob("*.py")]:
        assert "triton" not in {name.split(".")[0] for name in imports(path)}, path


def test_kernels_explains_itself():
    import kernels

    with pytest.raises(ImportError, match="nanococonut's own package"):
        kernels.get_kernel  # noqa: B018
    assert not hasattr(kernels, "__wrapped__")


def test_transformers_models_import_from_the_checkout():
    """Hugging Face's `kernels` is an optional import of transformers: ours must not break it."""
    pytest.importorskip("transformers")
    code = "import transformers; transformers.GPT2LMHeadModel; print('ok')"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip().endswith("ok"), run.stderr
