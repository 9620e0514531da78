"""What every test shares: small models, and released data where the machine has it."""

import importlib.util
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

# bench/'s modules import each other as in a script of it; `kernels` has to stay the package
sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import; only network tests go there

from nanococonut.engine import Engine, Generation
from nanococonut.model import GPT, GPTConfig
from nanococonut.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
# read when a kernel is decorated, so before any module of kernels/ is imported
if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)  # tiny tensors: threads only get in each other's way


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer.words(["Every", "is", "a", "Tom", "lempus", "wumpus", "###", ".", "?", "or"])


def random_gpt(seed: int = 0, smear: bool = False, dtype=torch.float64, **shape) -> GPT:
    """A small GPT whose every tensor is random: zeros and ones would hide missing terms."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=41, block_size=48, n_layer=2, n_head=3, n_embd=24) | shape
    model = GPT(GPTConfig(smear=smear, **shape))
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.3)
        if "ln" in name and name.endswith("weight"):
            p.data += 1
    return model.to(dtype).eval()


def generate(model: GPT, *asked, kernels="torch", graph="off", **given) -> Generation:
    """One batch by an engine of its own."""
    return Engine(model, kernels=kernels, graph=graph).run(*asked, **given)


@pytest.fixture
def nan_memory(monkeypatch):
    """new_empty() gives NaN: what a kernel fails to write shows."""
    new_empty = torch.Tensor.new_empty

    def filled(*args, **kwargs):
        fresh = new_empty(*args, **kwargs)
        return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


@pytest.fixture
def script(monkeypatch, capsys, tmp_path):
    """script(*argv) -> (exit code, stdout, stderr) of train.py or another script, in an empty
    folder and in this process: importing torch takes long."""
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
    """Where kernels run: Triton's interpreter where there is no GPU, else the GPU."""
    if (request.param == "cuda") != torch.cuda.is_available():
        pytest.skip("no CUDA GPU" if request.param == "cuda" else "kernels run on the GPU here")
    return request.param


@pytest.fixture
def seed() -> int:
    """Another one in every run; pytest shows it where a test fails."""
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return seed


def assert_three_way(got, in_dtype, truth, floor: float = 4.0) -> None:
    """A kernel may be at most twice as far from the fp64 truth as plain torch in the same dtype is,
    and `floor` roundings of the greatest value more."""
    assert got.shape == truth.shape and got.dtype == in_dtype.dtype, (got.dtype, in_dtype.dtype)
    error, usual = ((x.double() - truth).abs().max().item() for x in (got, in_dtype))
    small = floor * torch.finfo(got.dtype).eps * truth.abs().max().item()
    assert error <= 2 * usual + small, f"error {error:.3g}, torch's {usual:.3g}, floor {small:.3g}"


@pytest.fixture
def released() -> Path:
    """The folder of released rows (prosqa_valid.json, ...)."""
    folder = os.environ.get("NANOCOCONUT_DATA")
    if not folder:
        pytest.skip("NANOCOCONUT_DATA is not set: no released rows on this machine")
    return Path(folder)
