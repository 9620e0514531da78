"""KVCache: where the keys and values of a sequence are kept while it is being written.

One invariant: **row b's valid keys are always [0, lengths[b])**. Whatever stands behind is padding
that nothing attends to and that the row's next token overwrites.
"""

import math

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer, and how many of each row are valid.

    data     (n_layer, 2, B, n_head, T, head_dim), keys at [:, 0], values at [:, 1]
    lengths  (B,) int64
    """

    def __init__(
        self,
        n_layer: int,
        batch: int,
        n_head: int,
        capacity: int,
        head_dim: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        memory: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> None:
        """memory: where data is put, a flat tensor that is long enough, of finite numbers; lengths:
        (batch,) int64, used as they are. None: new ones, all zero."""
        shape = (n_layer, 2, batch, n_head, capacity, head_dim)
        if memory is None:
            # not empty: a NaN in a masked slot would still poison 0 * NaN in the weighted sum
            memory = torch.zeros(math.prod(shape), device=device, dtype=dtype)
        if lengths is None:
            lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.data = memory[: math.prod(shape)].view(shape)
        self.lengths = lengths
        self.rows = torch.arange(batch, device=device)[:, None]  # (B, 1), to index with pos

    @property
    def capacity(self) -> int:
        return self.data.shape[4]

    def append(self, layer: int, k: Tensor, v: Tensor, pos: Tensor) -> None:
        """Write k, v (B, n_head, T, head_dim) at positions pos (B, T). Lengths stay: the caller
        moves them once all layers are written, and only for the rows that count."""
        self.data[layer, 0][self.rows, :, pos] = k.transpose(1, 2).to(self.data.dtype)
        self.data[layer, 1][self.rows, :, pos] = v.transpose(1, 2).to(self.data.dtype)

    def crop(self, lengths: Tensor) -> None:
        """Forget what stands at or behind lengths (B,)."""
        self.lengths = torch.minimum(self.lengths, lengths)

    def reset(self) -> None:
        self.lengths.zero_()
