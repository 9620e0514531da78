"""KVCache writes only at the given positions, and never changes the lengths."""

import math
from functools import partial

import torch
from helpers import random_gpt

from nanococonut.cache import KVCache
from nanococonut.inference.buffers import BatchView, StaticBuffers
from nanococonut.model import cached_attention


def test_append_writes_each_sequence_at_its_positions():
    """Guards against a write at another sequence's positions, and against changed lengths."""
    data = torch.zeros(2, 2, 3, 2, 9, 4)  # (n_layer, 2, B, n_head, capacity, head_dim)
    cache = KVCache(data, torch.zeros(3, dtype=torch.int64))
    expected = torch.zeros_like(data)
    starts = [0, 3, 6]
    for layer in range(2):
        k, v = torch.randn(2, 3, 2, 2, 4)
        pos = torch.tensor([[s, s + 1] for s in starts])
        cache.append(layer, k, v, pos)
        for b, s in enumerate(starts):
            expected[layer, 0, b, :, s : s + 2] = k[b]
            expected[layer, 1, b, :, s : s + 2] = v[b]
    assert torch.equal(cache.data, expected)
    assert cache.lengths.tolist() == [0, 0, 0]


def test_new_cache_is_empty_and_finite():
    """Guards against uninitialized memory: a NaN in a masked position poisons attention."""
    cache = random_gpt(n_layer=1, n_head=1, n_embd=2).new_cache(3, 8)
    assert cache.data.shape == (1, 2, 3, 1, 8, 2) and not cache.data.any()
    assert cache.data.dtype == torch.float64 and cache.lengths.tolist() == [0, 0, 0]


def test_a_bfloat16_cache_is_float32_on_a_cpu():
    """Guards against a bfloat16 cache, with which attention on a CPU takes twice as long."""
    model = random_gpt(dtype=torch.bfloat16, n_layer=2, n_head=2, n_embd=8)
    cache, pos = model.new_cache(1, 3), torch.tensor([[0]])
    attend = partial(cached_attention, cache, pos, cache.attention_bias(pos, 1))
    hidden = model.backbone(model.wte(torch.tensor([[1]])), pos, attend)
    assert cache.data.dtype == torch.float32 and hidden.dtype == torch.bfloat16


def test_caches_of_other_shapes_share_memory():
    """Guards against a copy: all batches of the engine share one flat buffer."""
    model = random_gpt(dtype=torch.float32, n_layer=2, n_head=1, n_embd=3)
    buffers = StaticBuffers(model, 4, math.prod(model.cache_shape(4, 5)), 1, 1)
    buffers.lengths.copy_(torch.tensor([1, 2, 3, 4]))
    large, small = (
        BatchView(model, buffers, shape, "torch", static=False).cache for shape in ((4, 5), (2, 4))
    )
    small.append(1, *torch.ones(2, 2, 1, 1, 3), small.lengths[:, None])
    assert buffers.cache.sum() == large.data.sum() == small.data.sum() == 2 * 2 * 3
    small.lengths += 1
    assert large.lengths.tolist() == [2, 3, 3, 4]
