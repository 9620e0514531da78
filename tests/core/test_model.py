"""The logits of model.py equal those of transformers, with and without a cache."""

from functools import partial

import pytest
import torch
from helpers import random_gpt

from nanococonut.model import GPT, GPTConfig, cached_attention
from nanococonut.runtime.errors import UserError
from nanococonut.weights.pretrained import load_gpt2


@pytest.mark.parametrize("config", [None, "{}", "[]", '{"n_positions": 8, "n_layer": "x"}'])
def test_folder_without_gpt2_is_refused(tmp_path, config):
    """Guards against a traceback from an incomplete or foreign folder."""
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    if config:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match="holds no GPT-2"):
        load_gpt2(tmp_path, 100, 0.0)


def test_attention_is_causal(gpt):
    """Guards against a missing mask, and a mask that hides the past, too."""
    idx = torch.randint(41, (2, 12))
    changed = idx.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 41
    a, b = gpt(idx), gpt(changed)
    assert torch.equal(a[:, :7], b[:, :7])
    assert (a[:, 7:] - b[:, 7:]).abs().amax(dim=(0, 2)).min() > 1e-6  # all later logits change


def test_cached_equals_uncached(gpt):
    """Guards against wrong positions or smear at chunk boundaries."""
    idx = torch.randint(41, (3, 20))
    expected = gpt(idx)
    cache, logits, start, prev_embedding = gpt.new_cache(3, 25), [], 0, None
    for n in (7, 1, 1, 5, 6):
        pos = torch.arange(start, start + n).expand(3, n)
        emb = gpt.wte(idx[:, start : start + n])
        attend = partial(cached_attention, cache, pos, cache.attention_bias(pos, start + n))
        logits.append(gpt.head(gpt.backbone(emb, pos, attend, prev_embedding)))
        prev_embedding, start = emb[:, -1], start + n
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-10, atol=1e-10)


def test_smear_starts_as_plain_gpt2():
    """Guards against a smear with random initial weights."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=8, smear=True))
    idx = torch.randint(11, (2, 8))
    before = model(idx)
    model.smear = None
    torch.testing.assert_close(before, model(idx))


def test_heads_must_divide_n_embd():
    """Guards against a model that silently drops dimensions."""
    with pytest.raises(ValueError, match="heads"):
        random_gpt(n_head=5)
