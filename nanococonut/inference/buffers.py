"""Static memory for inference, and the steps that run in place over it."""

import torch
from torch import Tensor

from nanococonut.inference.fused import FusedStep
from nanococonut.inference.steps import DecodeState, decode_step, latent_step, prefill
from nanococonut.model import GPT


class StaticBuffers:
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


class BatchView:
    """A batch of a given shape within StaticBuffers, and the steps over it, in place."""

    def __init__(
        self,
        model: GPT,
        memory: StaticBuffers,
        rows: int,
        capacity: int,
        kernels: str,
        span: int | None,
    ) -> None:
        """span: of every step (None: as it grows), since a graph always does the same."""
        self.model, self.rows, self.static = model, rows, span is not None
        m = self.memory = memory
        self.cache = model.new_cache(rows, capacity, m.cache, m.lengths[:rows])
        self.hidden, self.prev, self.had = m.hidden[:rows], m.prev[:rows], m.had[:rows]
        self.active, self.done, self.token = m.active[:rows], m.done[:rows], m.token[:rows]
        self.words, self.noise = m.words[:rows], m.noise[:rows]
        self.triton = FusedStep(model, self.cache) if kernels == "triton" else None
        self.span = span or 0

    def _keep(self, state: DecodeState) -> None:
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
            self.active &= self.model.stop_logit(self.hidden) <= 0
        self.memory.thoughts[i, : self.rows].copy_(self.hidden)
        active = self.active if stop or self.static else None
        if self.triton is not None:
            self.triton.think(self.hidden, active, first=i == 0)
        else:
            state = DecodeState(self.hidden, self.prev, self.span)
            self._keep(latent_step(self.model, self.cache, state, active))
        self.had += self.active

    def take(self) -> None:
        """The last picked token is the next input."""
        if self.triton is not None:
            self.triton.say(self.token, self.hidden)
        else:
            state = DecodeState(self.hidden, self.prev, self.span)
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
