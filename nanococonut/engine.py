"""Inference: a question is read once, n thoughts are appended to its cache, words come out.

Free functions over plain tensors. The engine knows tokens, never text or files. All rows are kept
in one right-padded batch; row b's next token goes to its own length, so rows of any length run side
by side and give what each would give alone.
"""

import time
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nanococonut.cache import KVCache
from nanococonut.model import GPT, cached_attention
from nanococonut.ops import Step, triton_step


@dataclass
class State:
    """What one step hands to the next, beside the cache.

    hidden  (B, C)  last hidden state, after the final LayerNorm: the next thought, or the head's
    prev    (B, C)  last input embedding: what the smear adds to the next one
    span    int     positions written so far at most, over all rows
    """

    hidden: Tensor
    prev: Tensor
    span: int


@dataclass
class Generation:
    """tokens: of each row, without eos. thoughts: (B, n, C), the hidden states that were fed back;
    n_thoughts: how many of them each row had (all n, or until its classifier said enough). Times in
    seconds; seconds_first: from the start to the first word."""

    tokens: list[list[int]]
    thoughts: Tensor
    n_thoughts: list[int]
    seconds_prefill: float
    seconds_thoughts: float
    seconds_first: float
    seconds_decode: float


def prefill(model: GPT, cache: KVCache, idx: Tensor, lengths: Tensor) -> State:
    """Read right-padded ids (B, T) with lengths (B,) into an empty cache."""
    B, T = idx.shape
    pos = torch.arange(T, device=idx.device).expand(B, T)
    e = model.embed(idx)
    cache.lengths.copy_(lengths)
    h = model.trunk(e, pos, partial(cached_attention, cache, pos, T), only=lengths - 1)
    return State(h[:, 0], e[torch.arange(B, device=idx.device), lengths - 1], T)


def step(
    model: GPT,
    cache: KVCache,
    e: Tensor,
    state: State,
    active: Tensor | None = None,
    kernels: Step | None = None,
) -> State:
    """Append one input embedding e (B, C) to every row and move on. A row that is not active (B,)
    stays where it is: what was written behind its end is overwritten by its next token. kernels:
    what does it in place of plain PyTorch (ops.py)."""
    if kernels is not None:
        return State(kernels(e, state.hidden, active), e, state.span + 1)
    pos, span = cache.lengths[:, None], state.span + 1
    attend = partial(cached_attention, cache, pos, span)
    h = model.trunk(e[:, None], pos, attend, state.prev)[:, 0]
    if active is None:
        cache.lengths += 1
        return State(h, e, span)
    cache.lengths += active
    active = active[:, None]
    return State(torch.where(active, h, state.hidden), torch.where(active, e, state.prev), span)


def latent_step(
    model: GPT,
    cache: KVCache,
    state: State,
    active: Tensor | None = None,
    kernels: Step | None = None,
) -> State:
    """One thought: the last hidden state (or what the model makes of it) is the next input."""
    return step(model, cache, model.feed_back(state.hidden), state, active, kernels)


def decode_step(
    model: GPT, cache: KVCache, token: Tensor, state: State, kernels: Step | None = None
) -> State:
    """One word: tokens (B,) are the next input."""
    return step(model, cache, model.embed(token), state, None, kernels)


def pick(logits: Tensor, temperature: float, draw: torch.Generator) -> Tensor:
    """Logits (B, V) -> the next token (B,): the most probable, or one drawn."""
    if not temperature:
        return logits.argmax(-1)
    p = (logits.float() / temperature).softmax(-1)
    return torch.multinomial(p, 1, generator=draw)[:, 0]


@torch.no_grad()
def generate(
    model: GPT,
    prefixes: list[list[int]],
    n_thoughts: int,
    opening: list[int],
    eos: int,
    max_new_tokens: int,
    stop: bool = False,
    temperature: float = 0.0,
    seed: int = 0,
    kernels: str = "torch",
) -> Generation:
    """Answers to a batch of token prefixes, greedy or (temperature > 0) sampled.

    stop: a row has no further thought once the model's classifier says enough (n_thoughts at most).
    seed: of a generator of this call's own. kernels: "torch" or "triton", as ops.choose says.
    Rows that have said eos leave the batch once they are half of it, so they cost nothing more.
    opening: tokens put behind the thoughts before the first word is asked for ([<eot>] or []).
    Raises ValueError, before any work, where a row would not fit into block_size.
    """
    device = model.wte.weight.device
    longest = max(map(len, prefixes))
    capacity = longest + n_thoughts + len(opening) + max_new_tokens
    if min(map(len, prefixes)) == 0 or n_thoughts < 0 or max_new_tokens < 1:
        raise ValueError("prefixes must not be empty, n_thoughts >= 0, max_new_tokens >= 1")
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature} has to be 0 (greedy) or more")
    if capacity > model.config.block_size:
        raise ValueError(
            f"{longest} tokens + {n_thoughts} thoughts + {len(opening)} + {max_new_tokens} new "
            f"tokens do not fit into block_size={model.config.block_size}"
        )

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    start = now()
    cache = model.new_cache(len(prefixes), capacity)
    lengths = torch.tensor([len(p) for p in prefixes], device=device)
    idx = torch.tensor([p + [0] * (longest - len(p)) for p in prefixes], device=device)
    state = prefill(model, cache, idx, lengths)

    prefilled = now()
    run = triton_step(model, cache) if kernels == "triton" else None
    thoughts = []
    active = torch.ones_like(lengths, dtype=torch.bool) if stop else None
    had = torch.zeros_like(lengths)
    for _ in range(n_thoughts):
        if active is not None:
            active = active & (model.enough(state.hidden) <= 0)
            if not active.any():
                break
        thoughts.append(state.hidden)
        state = latent_step(model, cache, state, active, run)
        had += 1 if active is None else active

    thought = now()
    for token in opening:
        state = decode_step(model, cache, torch.full_like(lengths, token), state, run)
    words = torch.full((len(prefixes), max_new_tokens), eos, device=device)
    left = torch.arange(len(prefixes), device=device)  # of each row in the batch, which it is
    done = torch.zeros_like(left, dtype=torch.bool)
    draw = torch.Generator(device).manual_seed(seed)
    every = 4 if device.type == "cuda" else 1  # tokens between two looks at who is done
    first = thought
    for i in range(max_new_tokens):
        token = pick(model.head(state.hidden), temperature, draw)
        token = torch.where(done, eos, token)
        words[left, i] = token
        done |= token == eos  # the first token may be eos already
        if i == 0:
            first = now()
        if i == max_new_tokens - 1:
            break
        if i % every == 0:
            alive = (~done).nonzero()[:, 0]
            if not len(alive):
                break
            if 2 * len(alive) <= len(left):
                cache.keep(alive)
                state = State(state.hidden[alive], state.prev[alive], state.span)
                left, token, done = left[alive], token[alive], done[alive]
                run = triton_step(model, cache) if run is not None else None
        state = decode_step(model, cache, token, state, run)
    end = now()

    tokens = [row[: row.index(eos)] if eos in row else row for row in words.tolist()]
    kept = torch.stack(thoughts, 1) if thoughts else state.hidden.new_zeros(len(prefixes), 0, 1)
    return Generation(
        tokens,
        kept,
        had.tolist(),
        prefilled - start,
        thought - prefilled,
        first - start,
        end - first,
    )
