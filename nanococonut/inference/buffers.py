"""Static buffers for inference, and the steps of steps.py run in place on them.

CUDA graphs replay on fixed addresses, so every step reads and writes the same tensors.
"""

import math

import torch
from torch import Tensor

from nanococonut.cache import KVCache
from nanococonut.inference import steps
from nanococonut.model import GPT


class StaticBuffers:
    """The tensors that a step reads or writes, allocated once. Each size is a maximum.

    batch       sequences
    cache_size  elements of the KV cache
    idx_size    tokens of the padded prompts
    n_thoughts  thoughts per sequence
    """

    def __init__(
        self, model: GPT, batch: int, cache_size: int, idx_size: int, n_thoughts: int
    ) -> None:
        config, w = model.config, model.wte.weight
        self.size = (batch, cache_size, idx_size, n_thoughts)

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=w.device)

        # flat, so that it can be viewed as any shape
        self.cache, self.idx = w.new_zeros(cache_size, dtype=model.cache_dtype), ints(idx_size)
        self.lengths, self.token = ints(batch), ints(batch)
        self.tokens, self.n_tokens = ints(batch, config.block_size), ints()
        self.token_row = ints(batch)  # row of `tokens` that a sequence writes to
        self.hidden, self.prev_embedding = w.new_zeros(2, batch, config.n_embd)
        self.thoughts = w.new_zeros(n_thoughts, batch, config.n_embd)
        self.active, self.done = torch.zeros(2, batch, dtype=torch.bool, device=w.device)
        # for sampling: Exp(1) noise, drawn outside of the graphs
        self.noise = torch.ones(batch, config.vocab_size, device=w.device)
        self.temperature = torch.ones((), device=w.device)

    @property
    def nbytes(self) -> int:
        return sum(v.nbytes for v in vars(self).values() if isinstance(v, Tensor))


class BatchView:
    """A batch of one shape inside StaticBuffers, and the steps that update it in place."""

    def __init__(
        self, model: GPT, buffers: StaticBuffers, shape: tuple[int, int], kernels: str, static: bool
    ) -> None:
        """Create the view of a batch.

        shape   (batch, capacity)
        static  every step attends to the whole capacity, as graphs need (otherwise to the shortest
                span that holds all sequences)
        """
        self.model, self.buffers, self.static = model, buffers, static
        self.batch, self.capacity = shape
        n, b = self.batch, buffers
        cache_shape = model.cache_shape(*shape)
        self.cache = KVCache(b.cache[: math.prod(cache_shape)].view(cache_shape), b.lengths[:n])
        self.hidden, self.prev_embedding = b.hidden[:n], b.prev_embedding[:n]
        self.active, self.done = b.active[:n], b.done[:n]
        self.token, self.token_row, self.noise = b.token[:n], b.token_row[:n], b.noise[:n]
        self.thoughts = b.thoughts[:, :n]
        self.fused = None
        if kernels == "triton":
            from nanococonut.inference.fused import FusedStep  # needs triton

            self.fused = FusedStep(model, self.cache)
        self.span = self.capacity - 1 if static else 0

    def _state(self) -> steps.DecodeState:
        return steps.DecodeState(self.hidden, self.prev_embedding, self.span)

    def _store(self, state: steps.DecodeState) -> None:
        # copied first, because the input of a latent step may be self.hidden itself
        self.prev_embedding.copy_(state.prev_embedding)
        self.hidden.copy_(state.hidden)
        self.span = self.span if self.static else state.span

    def prefill(self, idx: Tensor) -> None:
        """Prefill prompts (B, T). The caller has written their lengths to the cache."""
        self._store(steps.prefill(self.model, self.cache, idx, self.cache.lengths))

    def latent_step(self, i: int, stop: bool, edit: steps.Edit | None = None) -> None:
        """Append thought i to every active sequence.

        stop  first deactivate the sequences that the stop classifier ends
        edit  replaces the input of the thought; the step then runs without Triton kernels
        """
        if stop:
            self.active &= self.model.stop_logit(self.hidden) <= 0
        active = self.active if stop or self.static else None  # None: all of them
        if self.fused is not None and edit is None:
            if i == 0:
                self.thoughts[0].copy_(self.hidden)
            # the last kernel of the step also stores the next thought
            next_thought = self.thoughts[i + 1] if i + 1 < len(self.thoughts) else None
            self.fused.latent_step(self.hidden, active, i == 0, next_thought)
        else:
            self.thoughts[i].copy_(self.hidden)
            state = self._state()
            self._store(steps.latent_step(self.model, self.cache, state, active, i, edit))

    def decode_step(self) -> None:
        """Append the last token of every sequence."""
        if self.fused is not None:
            self.fused.decode_step(self.token, self.hidden)
        else:
            self._store(steps.decode_step(self.model, self.cache, self.token, self._state()))

    def sample(self, eos: int, greedy: bool) -> None:
        """Choose the next token of every sequence: the most probable one, or a sample."""
        logits = self.model.head(self.hidden)  # (B, V)
        if not greedy:  # the argmax of p / noise is a sample from p, since noise ~ Exp(1)
            logits = (logits.float() / self.buffers.temperature).softmax(-1) / self.noise
        # finished sequences repeat eos, or token 0 if there is no eos
        self.token.copy_(logits.argmax(-1).masked_fill(self.done, max(eos, 0)))
        column = self.buffers.n_tokens.expand(self.batch)
        self.buffers.tokens[self.token_row, column] = self.token
        self.buffers.n_tokens += 1
        self.done |= self.token == eos  # the first token may already be eos
