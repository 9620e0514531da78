"""Imports are acyclic, no script is imported, and `kernels` does not break transformers."""

import ast
import subprocess
import sys

import pytest
from helpers import ROOT

# a module may import modules of the lines above it
LAYERS = """
runtime cache curriculum
tokenizer config model
data packed
plain_gpt2
ops
batch weights
coconut inference
evaluation training
"""


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
    """Guards against import cycles, and against imports that are not dependencies."""
    package, level = ROOT / "nanococonut", {}
    for i, line in enumerate(LAYERS.split("\n")):
        level |= dict.fromkeys(line.split(), i)
    for path in package.rglob("*.py"):
        module = path.relative_to(package).parts[0].removesuffix(".py")
        if module == "__init__":
            continue
        names = set(imports(path))
        assert not {n.split(".")[0] for n in names} & {"transformers", "train", "sample", "bench"}
        for name in names:
            if name.startswith("nanococonut."):
                other = name.split(".")[1]
                assert other == module or level[other] < level[module], f"{path} imports {name}"
        if module == "data":
            assert not {n.split(".")[0] for n in names} & {"torch", "triton"}, path


def test_only_kernels_imports_triton():
    """Guards against an ImportError on machines without triton."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "nanococonut").rglob("*.py")]:
        assert "triton" not in {name.split(".")[0] for name in imports(path)}, path


def test_openmp_is_set_before_torch_loads():
    """Guards against training 20 times slower next to a busy process, as idle threads spin. OpenMP
    reads the policy when torch is loaded, so scripts must import nanococonut first."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "bench").glob("*.py")]:
        names = [name.split(".")[0] for name in imports(path)]
        others = [name for name in names if name not in sys.stdlib_module_names]
        assert path.stem in ("setup", "__init__") or others[0] == "nanococonut", path
    body = ast.parse((ROOT / "nanococonut/__init__.py").read_text()).body
    assert [ast.unparse(node) for node in body[1:4]] == [
        "import os",
        "os.environ.setdefault('OMP_WAIT_POLICY', 'passive')",
        "os.environ.setdefault('GOMP_SPINCOUNT', '2000')",
    ]


def test_transformers_import_from_the_repo_root():
    """Guards against a name clash: transformers optionally imports Hugging Face's `kernels`."""
    pytest.importorskip("transformers")
    code = "import transformers; transformers.GPT2LMHeadModel; print('ok')"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip().endswith("ok"), run.stderr
