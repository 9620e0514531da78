"""What every test shares: small models, and released data where the machine has it."""

import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import; only network tests go there

from nanococonut.model import GPT, GPTConfig
from nanococonut.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
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


@pytest.fixture
def released() -> Path:
    """The folder of released rows (prosqa_valid.json, ...)."""
    folder = os.environ.get("NANOCOCONUT_DATA")
    if not folder:
        pytest.skip("NANOCOCONUT_DATA is not set: no released rows on this machine")
    return Path(folder)
