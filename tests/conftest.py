"""What every test shares: small models, and released data if the machine has it."""

import importlib.util
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import; only network tests go there

from helpers import ROOT, random_gpt

from nanococonut.model import GPT
from nanococonut.tokenizer import Tokenizer

# read when a kernel is decorated, so before any module of kernels/ is imported
if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)  # with tiny tensors, threads only get in each other's way


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads its options
def pytest_cmdline_main(config):
    """Run the whole suite on two cores, if pytest-xdist is installed and there is no GPU."""
    is_whole = config.args_source == config.ArgsSource.TESTPATHS
    is_worker = "PYTEST_XDIST_WORKER" in os.environ  # it calls this hook, too
    can = config.pluginmanager.hasplugin("xdist") and not torch.cuda.is_available()
    if is_whole and can and not is_worker and config.option.numprocesses is None:
        config.option.numprocesses = 2


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer.words(["Every", "is", "a", "Tom", "lempus", "wumpus", "###", ".", "?", "or"])


@pytest.fixture
def nan_memory(monkeypatch):
    """Fill new_empty() with NaN, so that whatever a kernel fails to write shows."""
    new_empty = torch.Tensor.new_empty

    def filled(*args, **kwargs):
        fresh = new_empty(*args, **kwargs)
        return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


@pytest.fixture
def script(monkeypatch, capsys, tmp_path):
    """Return script(*argv) -> (exit code, stdout, stderr) of train.py or another script.

    It runs in an empty folder and in this process, because importing torch takes long.
    """
    monkeypatch.chdir(tmp_path)

    def run(*argv, script="train.py"):
        monkeypatch.setattr(sys, "argv", [script, *map(str, argv)])
        code = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(params=[False, True], ids=["gpt2", "smear"])
def gpt(request) -> GPT:
    return random_gpt(smear=request.param)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """Return where kernels run: on the GPU, or in Triton's interpreter if there is no GPU."""
    if (request.param == "cuda") != torch.cuda.is_available():
        pytest.skip("no CUDA GPU" if request.param == "cuda" else "kernels run on the GPU here")
    return request.param


@pytest.fixture
def seed() -> int:
    """Return a new seed in every run. pytest shows it if a test fails."""
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return seed


@pytest.fixture
def released() -> Path:
    """Return the folder of released examples (prosqa_valid.json, ...)."""
    folder = os.environ.get("NANOCOCONUT_DATA")
    if not folder:
        pytest.skip("NANOCOCONUT_DATA is not set: no released examples on this machine")
    return Path(folder)
