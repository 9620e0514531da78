"""KVCache: the keys and values of sequences while they grow.

One invariant: **the valid keys of sequence b are always [0, lengths[b])**. Positions past the
length are padding, which attention masks and the next token of the sequence overwrites.
"""

import torch
from torch import Tensor


class KVCache:
    """The keys and values of all layers, and the number of valid positions of each sequence.

    data     (n_layer, 2, B, n_head, capacity, head_dim)  keys at [:, 0], values at [:, 1]
    lengths  (B,) int64                                   valid positions

    Both tensors are updated in place. `data` must be finite even past the lengths, because a
    masked NaN still poisons the weighted sum: 0 * NaN is NaN.
    """

    def __init__(self, data: Tensor, lengths: Tensor) -> None:
        self.data, self.lengths = data, lengths
        B = data.shape[2]
        self.batch_index = torch.arange(B, device=data.device)[:, None]  # (B, 1), pairs with pos

    def attention_bias(self, pos: Tensor, span: int) -> Tensor:
        """Return what causal attention adds to the scores: 0, or -inf for later keys.

        The result is (B, 1, T, span), for queries at positions pos (B, T), in the dtype of `data`.
        A boolean mask would be converted again in every layer.

        span: upper bound of pos + 1; a Python integer, so that no step syncs with the GPU
        """
        is_later = torch.arange(span, device=pos.device) > pos[:, None, :, None]
        return self.data.new_zeros(is_later.shape).masked_fill_(is_later, float("-inf"))

    def append(self, layer: int, k: Tensor, v: Tensor, pos: Tensor) -> None:
        """Write the keys and values of one layer. `lengths` does not change.

        The caller advances `lengths` after the last layer, and only for active sequences.

        k, v  (B, n_head, T, head_dim)
        pos   (B, T)                    position of each key
        """
        # the indexed view is (B, T, n_head, head_dim)
        self.data[layer, 0][self.batch_index, :, pos] = k.transpose(1, 2).to(self.data.dtype)
        self.data[layer, 1][self.batch_index, :, pos] = v.transpose(1, 2).to(self.data.dtype)
