"""Steps of inference: read a question, append a thought or a word to its cache.

As plain functions over a State, and in place over memory that never moves, which is what CUDA
graphs need: `Memory` is allocated once, `Slots` are a batch within it. Row b's next token goes to
its own length, so rows of any length run side by side and give what each would give alone.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from nanococonut.cache import KVCache
from nanococonut.model import GPT, cached_attention, causal_attention
from nanococonut.ops import TritonStep


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


def prefill(model: GPT, cache: KVCache, idx: Tensor, lengths: Tensor) -> State:
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
    h = model.trunk(e, torch.arange(T, device=device), attend, only=lengths - 1)
    return State(h[:, 0], e[torch.arange(B, device=device), lengths - 1], T)


def step(
    model: GPT, cache: KVCache, e: Tensor, state: State, active: Tensor | None = None
) -> State:
    """Append one input embedding e (B, C) to every row and move on. A row that is not active (B,)
    stays where it is: what was written behind its end is overwritten by its next token."""
    pos, span = cache.lengths[:, None], state.span + 1
    attend = partial(cached_attention, cache, pos, span)
    h = model.trunk(e[:, None], pos, attend, state.prev)[:, 0]
    if active is None:
        cache.lengths += 1
        return State(h, e, span)
    cache.lengths += active
    active = active[:, None]
    return State(torch.where(active, h, state.hidden), torch.where(active, e, state.prev), span)


def latent_step(model: GPT, cache: KVCache, state: State, active: Tensor | None = None) -> State:
    """One thought: the last hidden state (or what the model makes of it) is the next input."""
    return step(model, cache, model.feed_back(state.hidden), state, active)


def decode_step(model: GPT, cache: KVCache, token: Tensor, state: State) -> State:
    """One word: tokens (B,) are the next input."""
    return step(model, cache, model.embed(token), state)


class Memory:
    """Tensors that steps read and write, allocated once for up to so many rows; never moved."""

    def __init__(self, model: GPT, rows: int, cache: int, idx: int, thoughts: int) -> None:
        config, w = model.config, model.wte.weight
        self.size = (rows, cache, idx, thoughts)

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=w.device)

        self.cache = w.new_zeros(cache)  # flat: batches of any shape lie in it
        self.idx = ints(idx)
        self.lengths, self.had, self.token = ints(rows), ints(rows), ints(rows)
        self.words, self.column = ints(rows, config.block_size), ints()
        self.hidden, self.prev = w.new_zeros(2, rows, config.n_embd)
        self.thoughts = w.new_zeros(thoughts, rows, config.n_embd)
        self.active, self.done = torch.zeros(2, rows, dtype=torch.bool, device=w.device)
        # sampling: Exp(1) noise, drawn outside of a graph
        self.noise = torch.ones(rows, config.vocab_size, device=w.device)
        self.temperature = torch.ones((), device=w.device)

    def small(self) -> list[Tensor]:
        """What a step changes beside the cache, where it writes behind every row's end only."""
        return [v for k, v in vars(self).items() if isinstance(v, Tensor) and k != "cache"]

    @property
    def bytes(self) -> int:
        return sum(v.nbytes for v in vars(self).values() if isinstance(v, Tensor))


class Slots:
    """A batch of so many rows and positions within Memory, and the steps over it, in place."""

    def __init__(
        self, model: GPT, memory: Memory, rows: int, capacity: int, kernels: str, span: int | None
    ) -> None:
        """span: of every step (None: as it grows), since a graph always does the same."""
        self.model, self.rows, self.static = model, rows, span is not None
        m = self.memory = memory
        self.cache = model.new_cache(rows, capacity, m.cache, m.lengths[:rows])
        self.hidden, self.prev, self.had = m.hidden[:rows], m.prev[:rows], m.had[:rows]
        self.active, self.done, self.token = m.active[:rows], m.done[:rows], m.token[:rows]
        self.words, self.noise = m.words[:rows], m.noise[:rows]
        self.triton = TritonStep(model, self.cache) if kernels == "triton" else None
        self.span = span or 0

    def _keep(self, state: State) -> None:
        self.prev.copy_(state.prev)  # first: a thought is the last hidden state itself
        self.hidden.copy_(state.hidden)
        self.span = self.span if self.static else state.span

    def read(self, idx: Tensor) -> None:
        """Prefill of ids (B, T); lengths stand in the cache."""
        self._keep(prefill(self.model, self.cache, idx, self.cache.lengths.clone()))

    def think(self, i: int, stop: bool) -> None:
        """Thought i of every active row. stop: ask the classifier first. Only then, or where rows
        fill up a graph's batch, are there rows that are not active."""
        if stop:
            self.active &= self.model.enough(self.hidden) <= 0
        self.memory.thoughts[i, : self.rows].copy_(self.hidden)
        active = self.active if stop or self.static else None
        if self.triton is not None:
            self.triton.think(self.hidden, active, first=i == 0)
        else:
            state = State(self.hidden, self.prev, self.span)
            self._keep(latent_step(self.model, self.cache, state, active))
        self.had += self.active

    def take(self) -> None:
        """The last picked token is the next input."""
        if self.triton is not None:
            self.triton.say(self.token, self.hidden)
        else:
            state = State(self.hidden, self.prev, self.span)
            self._keep(decode_step(self.model, self.cache, self.token, state))

    def pick(self, eos: int, sampled: bool) -> None:
        """The most probable token of each row, or one drawn from the softmax: with noise q ~ Exp(1)
        p / q is greatest at token t with probability p_t."""
        logits = self.model.head(self.hidden)
        if sampled:
            p = (logits.float() / self.memory.temperature).softmax(-1)
            logits = p / self.noise
        self.token.copy_(logits.argmax(-1).masked_fill(self.done, eos))
        column = self.memory.column.expand(self.rows, 1)
        self.words.scatter_(1, column, self.token[:, None])
        self.memory.column += 1
        self.done |= self.token == eos  # the first token may be eos already
