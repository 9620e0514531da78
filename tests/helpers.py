"""Shared helpers of the tests: small random models, random batches, comparisons."""

import os
import random
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from nanococonut import coconut
from nanococonut.batch import IGNORE, Batch, TokenSequence, collate
from nanococonut.config import TrainConfig
from nanococonut.curriculum import METHODS
from nanococonut.inference.engine import Engine, Generation, Request
from nanococonut.model import GPT, GPTConfig
from nanococonut.tokenizer import Tokenizer
from nanococonut.training.setup import count_tokens
from nanococonut.weights import checkpoint

ROOT = Path(__file__).parent.parent
THOUGHTS = sorted({m.thought_type for m in METHODS.values() if m.feeds_back})  # GPTConfig.thought
# compile an empty file, so that an error in a C file of kernels/ does not skip its tests
EMPTY_C = f"{os.environ.get('CC') or 'cc'} -march=native -fopenmp -x c -c -o /dev/null /dev/null"
needs_c = pytest.mark.skipif(
    subprocess.run(EMPTY_C, shell=True, capture_output=True).returncode != 0,
    reason="no C compiler with OpenMP",
)


def random_gpt(seed: int = 0, smear: bool = False, dtype=torch.float64, **shape) -> GPT:
    """Return a small GPT with every tensor random: zeros and ones would hide missing terms."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=41, block_size=48, n_layer=2, n_head=3, n_embd=24) | shape
    model = GPT(GPTConfig(smear=smear, **shape))
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.3)
        if "ln" in name and name.endswith("weight"):
            p.data += 1
    return model.to(dtype).eval()


def generate(model: GPT, *args, kernels="torch", graph="off", **kwargs) -> Generation:
    """Return Engine.run(Request(*args, **kwargs)) of a new engine."""
    return Engine(model, kernels=kernels, graph=graph).run(Request(*args, **kwargs))


def exact_match(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return (B,) bool: every supervised label of the sequence is the argmax."""
    return ((logits.argmax(-1) == targets) | (targets == IGNORE)).all(dim=1)


def impls_and_dtypes() -> list:
    """Return the implementations of kernels/_linear.py, each with the dtypes that it takes."""
    pairs = [(impl, torch.float16) for impl in ("gemv", "gemm_tile", "gemm", "library")]
    pairs += [(impl, torch.bfloat16) for impl, _ in pairs]
    pairs += [(impl, torch.float32) for impl in ("gemv", "gemm_tile", "library")]
    return [
        pytest.param(
            impl, dtype, id=f"{impl}-{str(dtype).removeprefix('torch.')}",
            marks=[pytest.mark.gpu] if dtype == torch.bfloat16 else [],
        )
        for impl, dtype in pairs
    ]  # fmt: skip


def assert_three_way(got, in_dtype, truth, floor: float = 4.0) -> None:
    """Assert that a kernel's error is at most twice that of torch, plus `floor` roundings.

    got       the kernel's result
    in_dtype  the result of plain torch in the same dtype
    truth     the result in fp64; one rounding is eps times its largest value
    """
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
    """Return the largest difference of the logits, relative to the largest, on their vocabulary."""
    n = theirs.config.vocab_size
    idx = torch.randint(n, (3, theirs.config.n_positions))
    a, b = theirs(idx).logits, ours.eval()(idx)[..., :n]
    assert a.shape == b.shape
    return ((a - b).abs().max() / a.abs().max()).item()


def gpt2_tokenizer() -> Tokenizer:
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR is not set: no GPT-2 vocabulary on this machine")
    return Tokenizer.gpt2()


def save_random_run(
    path, tokenizer, method="coconut", n_thoughts=3, block_size=96, render=None,
    data="/home/somebody/rows.json", valid_data=None, **extra,
) -> GPT:  # fmt: skip
    """Write a run's folder with a random model. Return the model."""
    is_words = tokenizer.spec["kind"] == "words"
    config = TrainConfig(
        tokenizer=tokenizer.spec["kind"],
        render=render or ("compact" if is_words else "sentences"),
        method=method,
        out_dir="/home/somebody/out",
        data=data,
        valid_data=valid_data,
        max_new_tokens=9,
    )
    model = random_gpt(
        random.randrange(10**6), dtype=torch.float32,
        vocab_size=count_tokens(config, tokenizer), block_size=block_size, **extra,
    )  # fmt: skip
    manifest = {
        "config": asdict(config),
        "model": asdict(model.config),
        "tokenizer": tokenizer.spec,
        "method": method,
        "stage": 3,
        "n_thoughts": n_thoughts,
        "minutes": 0.5,
        "device": "cpu",
        "threads": 1,
    }
    checkpoint.save(path, 7, checkpoint.gather_tensors(model), manifest)
    return model


def forward(model: GPT, batch: Batch) -> torch.Tensor:
    """Return the logits (B, Ts, V) that predict batch.suffix."""
    hidden = coconut.forward(model, batch)
    return model.head(hidden.suffix)


def loss_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of logits (..., V), summed over the supervised targets (...)."""
    flat = logits.flatten(0, -2), targets.flatten()
    return F.cross_entropy(*flat, ignore_index=IGNORE, reduction="sum")


def random_sequences(seed, n_thoughts, markers=True, vocab=41):
    """Return sequences of random lengths.

    n_thoughts  number of thoughts of each sequence
    markers     the first suffix token is not supervised, like <eot>
    """
    g = torch.Generator().manual_seed(seed)

    def tokens(low, high):
        n = int(torch.randint(low, high, (1,), generator=g))
        return torch.randint(1, vocab, (n,), generator=g).tolist()

    blocks = [(tokens(1, 14), n, tokens(1, 10)) for n in n_thoughts]
    # thought i has i labels; the last thought of a sequence replaces no step, so it has none
    labels = [
        [torch.randint(1, vocab, ((i + 1) % n,), generator=g).tolist() for i in range(n)]
        for n in n_thoughts
    ]
    return [
        TokenSequence(*block, n_forced=int(markers), n_needed=block[1], thought_labels=ids)
        for block, ids in zip(blocks, labels, strict=True)
    ]


def random_batch(*args, **kwargs):
    """Return a batch of random_sequences, and (prefix, thoughts, suffix, targets) of each."""
    sequences = random_sequences(*args, **kwargs)
    blocks = [
        (s.prefix, s.n_thoughts, s.suffix, [IGNORE] * s.n_forced + s.suffix[s.n_forced :])
        for s in sequences
    ]
    return collate(sequences), blocks
