"""Helpers that several test files import."""

import os
import random
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from nanococonut.batch import IGNORE, Batch
from nanococonut.config import TrainConfig
from nanococonut.inference.engine import Engine, Generation
from nanococonut.model import GPT, GPTConfig
from nanococonut.tokenizer import Tokenizer
from nanococonut.weights import checkpoint

ROOT = Path(__file__).parent.parent


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


def assert_three_way(got, in_dtype, truth, floor: float = 4.0) -> None:
    """A kernel may be at most twice as far from the fp64 truth as plain torch in the same dtype is,
    and `floor` roundings of the greatest value more."""
    assert got.shape == truth.shape and got.dtype == in_dtype.dtype, (got.dtype, in_dtype.dtype)
    error, usual = ((x.double() - truth).abs().max().item() for x in (got, in_dtype))
    small = floor * torch.finfo(got.dtype).eps * truth.abs().max().item()
    assert error <= 2 * usual + small, f"error {error:.3g}, torch's {usual:.3g}, floor {small:.3g}"


def transformers_gpt2(shape: tuple[int, int, int, int, int], **extra):
    """Return transformers' GPT-2 with every tensor random: zeros and ones would hide missing terms.

    shape: vocab_size, n_positions, n_layer, n_head, n_embd.
    """
    transformers = pytest.importorskip("transformers")
    names = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
    config = transformers.GPT2Config(
        **dict(zip(names, shape, strict=True)), bos_token_id=0, eos_token_id=0, **extra
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.2)
        if "ln" in name and name.endswith("weight"):
            p.data += 1
    return model


@torch.no_grad()
def logit_error(theirs, ours: GPT) -> float:
    """Return the largest difference of logits over the largest logit, on their vocabulary."""
    n = theirs.config.vocab_size
    idx = torch.randint(n, (3, theirs.config.n_positions))
    a, b = theirs(idx).logits, ours.eval()(idx)[..., :n]
    assert a.shape == b.shape
    return ((a - b).abs().max() / a.abs().max()).item()


def gpt2_tokenizer() -> Tokenizer:
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR is not set: no GPT-2 vocabulary on this machine")
    return Tokenizer.gpt2()


def save_random_run(path, tokenizer, method="coconut", n_thoughts=3, block_size=96, **extra) -> GPT:
    """Write a run's folder with a random model. Return the model."""
    is_words = tokenizer.spec["kind"] == "words"
    config = TrainConfig(
        tokenizer=tokenizer.spec["kind"],
        render="compact" if is_words else "sentences",
        method=method,
        out_dir="/home/somebody/out",
        data="/home/somebody/rows.json",
        max_new_tokens=9,
    )
    model = random_gpt(
        random.randrange(10**6), dtype=torch.float32, vocab_size=tokenizer.vocab_size,
        block_size=block_size, **extra,
    )  # fmt: skip
    manifest = {
        "config": asdict(config),
        "model": checkpoint.describe_model(model),
        "tokenizer": tokenizer.spec,
        "method": method,
        "stage": 3,
        "n_thoughts": n_thoughts,
        "minutes": 0.5,
        "device": "cpu",
        "threads": 1,
    }
    checkpoint.save(path, 7, model, [], manifest)
    return model


def random_batch(seed, n_thoughts, markers=True, vocab=41):
    """Rows of random lengths; returns the batch and the rows it was made of."""
    g = torch.Generator().manual_seed(seed)

    def tokens(low, high):
        n = int(torch.randint(low, high, (1,), generator=g))
        return torch.randint(1, vocab, (n,), generator=g).tolist()

    rows = [(tokens(1, 14), n, tokens(1, 10)) for n in n_thoughts]

    def pad(lists, fill):
        width = max(map(len, lists))
        return torch.tensor([x + [fill] * (width - len(x)) for x in lists])

    skip = 1 if markers else 0
    targets = [[IGNORE] * skip + s[skip:] for _, _, s in rows]
    batch = Batch(
        prefix=pad([p for p, _, _ in rows], 0),
        length=torch.tensor([len(p) for p, _, _ in rows]),
        n_thoughts=torch.tensor(n_thoughts),
        needed=torch.tensor(n_thoughts),
        suffix=pad([s for _, _, s in rows], 0),
        targets=pad(targets, IGNORE),
        max_thoughts=max(n_thoughts),
        n_labels=sum(t != IGNORE for row in targets for t in row),
    )
    return batch, [(p, n, s, t) for (p, n, s), t in zip(rows, targets, strict=True)]
