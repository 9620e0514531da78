"""KVCache keeps what was appended where it was appended, and nothing moves but by its caller."""

import torch

from nanococonut.cache import KVCache


def test_append_writes_each_row_at_its_own_positions():
    cache = KVCache(n_layer=2, batch=3, n_head=2, capacity=9, head_dim=4)
    expected = torch.zeros(2, 2, 3, 2, 9, 4)
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


def test_crop_only_shortens_and_reset_empties():
    cache = KVCache(1, 3, 1, 8, 2)
    cache.lengths.copy_(torch.tensor([2, 5, 8]))
    cache.crop(torch.tensor([4, 4, 4]))
    assert cache.lengths.tolist() == [2, 4, 4]
    cache.reset()
    assert cache.lengths.tolist() == [0, 0, 0]
    assert cache.capacity == 8


def test_caches_of_other_shapes_share_given_memory():
    memory, lengths = torch.zeros(2 * 2 * 4 * 1 * 5 * 3), torch.tensor([1, 2, 3, 4])
    wide = KVCache(2, 4, 1, 5, 3, memory=memory, lengths=lengths)
    small = KVCache(2, 2, 1, 4, 3, memory=memory, lengths=lengths[:2])
    small.append(1, *torch.ones(2, 2, 1, 1, 3), small.lengths[:, None])
    assert memory.sum() == wide.data.sum() == small.data.sum() == 2 * 2 * 3
    small.lengths += 1
    assert wide.lengths.tolist() == [2, 3, 3, 4]
