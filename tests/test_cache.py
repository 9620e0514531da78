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


def test_rows_that_are_kept_stay_as_they_were():
    cache = KVCache(2, 4, 1, 5, 3)
    cache.data.copy_(torch.randn(cache.data.shape))
    cache.lengths.copy_(torch.tensor([1, 2, 3, 4]))
    before = cache.data.clone()
    cache.keep(torch.tensor([3, 1]))
    assert torch.equal(cache.data, before[:, :, [3, 1]]) and cache.lengths.tolist() == [4, 2]
    k, v = torch.randn(2, 2, 1, 1, 3)
    cache.append(0, k, v, cache.lengths[:, None])
    assert torch.equal(cache.data[0, 0, :, 0][[0, 1], [4, 2]], k[:, 0, 0])
