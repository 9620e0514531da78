"""Steps of inference: read a question, append a thought or a word to its cache.

As plain functions over a DecodeState, and in place over memory that never moves, which is what CUDA
graphs need: `StaticBuffers` is allocated once, a `BatchView` is a batch within it. Sequence
b's next token goes to its own length, so sequences of any length run side by side, each with the
result it has alone.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from nanococonut.cache import KVCache
from nanococonut.model import GPT, cached_attention, causal_attention


@dataclass
class DecodeState:
    """What one step hands to the next, beside the cache.

    hidden  (B, C)  last hidden state, after the final LayerNorm: the next thought, or the head's
    prev    (B, C)  last input embedding: what the smear adds to the next one
    span    int     positions written so far at most, over all rows
    """

    hidden: Tensor
    prev: Tensor
    span: int


def prefill(model: GPT, cache: KVCache, idx: Tensor, lengths: Tensor) -> DecodeState:
    """Read right-padded ids (B, T) with lengths (B,) into an empty cache."""
    (B, T), device = idx.shape, idx.device

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.data[layer, 0, :, :, :T] = k
        cache.data[layer, 1, :, :, :T] = v
        if q.shape[2] == T > 1:
            return causal_attention(layer, q, k, v)
        seen = torch.arange(T, device=device) < lengths[:, None]  # only each row's last token asks
        return F.scaled_dot_product_attention(q, k, v, seen[:, None, None])

    e = model.embed(idx)
    cache.lengths.copy_(lengths)
    h = model.backbone(e, torch.arange(T, device=device), attend, only=lengths - 1)
    return DecodeState(h[:, 0], e[torch.arange(B, device=device), lengths - 1], T)


def step(
    model: GPT, cache: KVCache, e: Tensor, state: DecodeState, active: Tensor | None = None
) -> DecodeState:
    """Append one input embedding e (B, C) to every row and move on. A row that is not active (B,)
    stays where it is: what was written behind its end is overwritten by its next token."""
    pos, span = cache.lengths[:, None], state.span + 1
    attend = partial(cached_attention, cache, pos, span)
    h = model.backbone(e[:, None], pos, attend, state.prev)[:, 0]
    if active is None:
        cache.lengths += 1
        return DecodeState(h, e, span)
    cache.lengths += active
    active = active[:, None]
    return DecodeState(
        torch.where(active, h, state.hidden), torch.where(active, e, state.prev), span
    )


def latent_step(
    model: GPT, cache: KVCache, state: DecodeState, active: Tensor | None = None
) -> DecodeState:
    """One thought: the last hidden state (or what the model makes of it) is the next input."""
    return step(model, cache, model.thought_embedding(state.hidden), state, active)


def decode_step(model: GPT, cache: KVCache, token: Tensor, state: DecodeState) -> DecodeState:
    """One word: tokens (B,) are the next input."""
    return step(model, cache, model.embed(token), state)
