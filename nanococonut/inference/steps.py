"""The three steps of inference: prefill a prompt, append a thought, append a token.

These are functions of a model, its KV cache and a DecodeState. The next position of sequence b is
cache.lengths[b], so a batch of sequences of different lengths gives the same results as each
sequence alone, up to rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nanococonut.cache import KVCache
from nanococonut.model import GPT, at_position, causal_attention
from nanococonut.runtime.errors import UserError

Edit = Callable[[int, Tensor], Tensor]  # (i, (B, C) inputs of thought i) -> their replacement


def without_grad(fn: Callable) -> Callable:
    """Return fn without gradients, and outside of torch.inference_mode.

    The engine keeps its buffers, and a tensor made in that mode cannot be updated outside of it.
    """
    return torch.inference_mode(False)(torch.no_grad()(fn))


@dataclass
class DecodeState:
    """The state that one step passes to the next, in addition to the cache.

    hidden          (B, C)  last hidden state, from which the next thought or token is made
    prev_embedding  (B, C)  last input embedding, which the smear adds to the next one
    span            int     upper bound of the cache's lengths, known without a device sync
    """

    hidden: Tensor
    prev_embedding: Tensor
    span: int


def prefill(model: GPT, cache: KVCache, idx: Tensor, lengths: Tensor) -> DecodeState:
    """Fill an empty cache with the prompts. Return the state after their last tokens.

    idx      (B, T)  right-padded token ids
    lengths  (B,)    number of tokens of each prompt
    """
    T, device = idx.shape[1], idx.device

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.data[layer, 0, :, :, :T] = k
        cache.data[layer, 1, :, :, :T] = v
        if q.shape[2] > 1:
            return causal_attention(layer, q, k, v)  # right-padding needs no mask
        # the last layer has one query per sequence, at its last token
        mask = torch.arange(T, device=device) < lengths[:, None]  # (B, T)
        return F.scaled_dot_product_attention(q, k, v, mask[:, None, None])

    cache.data[..., T:, :] = 0  # a NaN left by an earlier request would survive the mask
    cache.lengths.copy_(lengths)
    emb = model.wte(idx)  # (B, T, C)
    pos = torch.arange(T, device=device)
    last_pos = lengths - 1  # (B,)
    hidden = model.backbone(emb, pos, attend, last_pos=last_pos)[:, 0]  # (B, C)
    return DecodeState(hidden, at_position(emb, last_pos)[:, 0], T)


def append_step(
    model: GPT, cache: KVCache, emb: Tensor, state: DecodeState, active: Tensor | None = None
) -> DecodeState:
    """Append one input embedding (B, C) to each sequence. Return the state after it.

    active  (B,) bool  sequences to advance; the others keep their state and length (None: all)
    """
    span = state.span + 1
    hidden = model.append(cache, emb, state.prev_embedding, span)
    if active is None:
        cache.lengths += 1
        return DecodeState(hidden, emb, span)
    # an inactive sequence wrote a key past its length; its next token overwrites it
    cache.lengths += active
    hidden = torch.where(active[:, None], hidden, state.hidden)
    return DecodeState(hidden, torch.where(active[:, None], emb, state.prev_embedding), span)


def latent_step(
    model: GPT,
    cache: KVCache,
    state: DecodeState,
    active: Tensor | None = None,
    i: int = 0,
    edit: Edit | None = None,
) -> DecodeState:
    """Append one thought, made from the last hidden state, without choosing a token.

    i, edit  index of the thought, and a function that replaces its input
    """
    thought = model.thought_embedding(state.hidden)
    if edit is not None:
        thought = apply_edit(edit, i, thought)
    return append_step(model, cache, thought, state, active)


def apply_edit(edit: Edit, i: int, thought: Tensor) -> Tensor:
    """Return edit(i, thought). Raise UserError unless it is a finite tensor like thought."""
    new = edit(i, thought.clone())  # a copy, because the engine overwrites its memory
    expected = f"{tuple(thought.shape)} {thought.dtype} on {thought.device}"
    actual = type(new).__name__
    if isinstance(new, Tensor):
        actual = f"{tuple(new.shape)} {new.dtype} on {new.device}"
        if actual == expected and not new.isfinite().all():
            actual = "NaN or infinite values"
    if actual != expected:
        raise UserError(
            f"edit({i}, fed) returned {actual}.\nReturn a finite tensor like fed: {expected}."
        )
    return new.clone()  # a copy, because the next call of `edit` may overwrite its memory


def decode_step(model: GPT, cache: KVCache, token: Tensor, state: DecodeState) -> DecodeState:
    """Append one token (B,) to each sequence. Return the state after it."""
    return append_step(model, cache, model.wte(token), state)
