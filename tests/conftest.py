"""What every test shares: small models, and released data where the machine has it."""

import os
from pathlib import Path

import pytest
import torch

from nanococonut.model import GPT, GPTConfig
from nanococonut.tokenizer import Tokenizer

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
