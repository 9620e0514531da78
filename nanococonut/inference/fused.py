"""The inference steps on the Triton kernels. Imported only on use, because it needs triton."""

import torch
from torch import Tensor

from kernels.append import append
from kernels.feedback import embed, feedback
from kernels.latent_attention import SplitWorkspace, latent_attention
from kernels.linear_residual import linear_residual
from kernels.ln_linear_gelu import ln_linear_gelu
from nanococonut.cache import KVCache
from nanococonut.model import GPT


class FusedStep:
    """latent_step and decode_step of a plain GPT-2 on one cache, in place, without a device sync.

    Both append to the cache, advance its lengths and overwrite `hidden` (B, C), the last hidden
    states. Inactive sequences keep their length and hidden state.
    """

    def __init__(self, model: GPT, cache: KVCache) -> None:
        _, _, B, nh, T, hs = cache.data.shape
        self.model, self.cache = model, cache
        self.workspace = SplitWorkspace(B, nh, T, hs, cache.data.device)
        self.batch_index = torch.arange(B, device=cache.data.device)
        # (B, C) residual stream; `feedback` writes the input of the next thought to it
        self.x = cache.data.new_empty(B, nh * hs, dtype=torch.float32)

    def latent_step(
        self,
        hidden: Tensor,
        active: Tensor | None,
        is_first: bool,
        thought: Tensor | None = None,
    ) -> None:
        """Append one thought.

        is_first  the previous step was not a latent step of this object
        thought   see kernels/feedback.py
        """
        if is_first:  # the thought plus its position, with `hidden` as the embedding table
            embed(hidden, self.batch_index, self.model.wpe.weight, self.cache.lengths, self.x)
        self._blocks(hidden, active, thought)

    def decode_step(self, token: Tensor, hidden: Tensor) -> None:
        """Append one token (B,), int64, to each sequence."""
        wte, wpe = self.model.wte.weight, self.model.wpe.weight
        embed(wte, token, wpe, self.cache.lengths, self.x)
        self._blocks(hidden)

    @torch.no_grad()
    def _blocks(
        self,
        hidden: Tensor,
        active: Tensor | None = None,
        thought: Tensor | None = None,
    ) -> None:
        """Run all layers on x, then `feedback`. A layer takes 5 launches, or 7 if B >= 5."""
        x, lengths = self.x, self.cache.lengths
        for layer, block in enumerate(self.model.h):
            cache, ln, qkv = self.cache.data[layer], block.ln_1, block.attn.c_attn
            q = append(x, ln.weight, ln.bias, qkv.weight, qkv.bias, cache, lengths)
            y = latent_attention(q, *cache, lengths, self.workspace, n_new=1)
            out = block.attn.c_proj
            linear_residual(y.flatten(1), out.weight, out.bias, x)
            ln, up, down = block.ln_2, block.mlp.c_fc, block.mlp.c_proj
            h = ln_linear_gelu(x, ln.weight, ln.bias, up.weight, up.bias)
            linear_residual(h, down.weight, down.bias, x)
        ln, wpe = self.model.ln_f, self.model.wpe.weight
        feedback(x, ln.weight, ln.bias, wpe, lengths, hidden, active, thought)
