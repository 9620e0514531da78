"""A step of inference by the Triton kernels."""

import torch
from torch import Tensor

from nanococonut.cache import KVCache
from nanococonut.model import GPT


class FusedStep:
    """One step of a plain GPT-2 by the kernels, in place, for one cache. Nothing asks the device.

    Both kinds of step append to the cache, move its lengths and write hidden (B, C), the hidden
    states that the step starts from and ends in. A row that is not active (B,) keeps everything.
    """

    def __init__(self, model: GPT, cache: KVCache) -> None:
        from kernels.latent_attention import SplitWorkspace

        _, _, B, nh, T, hs = cache.data.shape
        self.model, self.cache = model, cache
        self.workspace = SplitWorkspace.allocate(B, nh, T, hs, cache.data.device)
        self.rows = torch.arange(B, device=cache.data.device)
        # the residual stream; between two steps, the next thought's input
        self.x = cache.data.new_empty(B, nh * hs)

    def think(self, hidden: Tensor, active: Tensor | None, first: bool) -> None:
        """One thought. first: the step before was not one of this object's own."""
        from kernels.feedback import embed

        if first:
            embed(hidden, self.rows, self.model.wpe.weight, self.cache.lengths, self.x)
        self._blocks(hidden, active)

    def say(self, token: Tensor, hidden: Tensor) -> None:
        """One word: tokens (B,) int64."""
        from kernels.feedback import embed

        wte, wpe = self.model.wte.weight, self.model.wpe.weight
        embed(wte, token, wpe, self.cache.lengths, self.x)
        self._blocks(hidden, None)

    @torch.no_grad()
    def _blocks(self, hidden: Tensor, active: Tensor | None) -> None:
        from kernels.append import append
        from kernels.feedback import feedback
        from kernels.latent_attention import latent_attention
        from kernels.linear_residual import linear_residual
        from kernels.ln_linear_gelu import ln_linear_gelu

        x, lengths = self.x, self.cache.lengths
        for layer, block in enumerate(self.model.h):
            k, v = self.cache.data[layer]
            ln, qkv = block.ln_1, block.attn.c_attn
            q = append(x, ln.weight, ln.bias, qkv.weight, qkv.bias, k, v, lengths, active, ln.eps)
            y = latent_attention(q, k, v, lengths, self.workspace, n_new=1)
            out = block.attn.c_proj
            linear_residual(y.flatten(1), out.weight, out.bias, x)
            ln, up, down = block.ln_2, block.mlp.c_fc, block.mlp.c_proj
            h = ln_linear_gelu(x, ln.weight, ln.bias, up.weight, up.bias, ln.eps)
            linear_residual(h, down.weight, down.bias, x)
        ln = self.model.ln_f
        wpe = self.model.wpe.weight
        feedback(x, ln.weight, ln.bias, wpe, lengths, hidden, active, ln.eps)
