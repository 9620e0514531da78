"""Static memory for inference, and the steps of steps.py run in place over it.

CUDA graphs replay on fixed addresses, so each step reads and writes the same tensors every time.
"""

import torch
from torch import Tensor

from nanococonut.inference import steps
from nanococonut.model import GPT


class StaticBuffers:
    """Every tensor that a step reads or writes, allocated once and never moved.

    batch       sequences
    cache_size  numbers in the KV cache
    idx_size    tokens in the padded prompts
    n_thoughts  thoughts per sequence
    """

    def __init__(
        self, model: GPT, batch: int, cache_size: int, idx_size: int, n_thoughts: int
    ) -> None:
        config, w = model.config, model.wte.weight
        self.size = (batch, cache_size, idx_size, n_thoughts)

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=w.device)

        # flat, so that any shape fits in
        self.cache, self.idx = w.new_zeros(cache_size, dtype=model.cache_dtype), ints(idx_size)
        self.lengths, self.n_taken, self.token = ints(batch), ints(batch), ints(batch)
        self.tokens, self.n_tokens = ints(batch, config.block_size), ints()
        self.place = ints(batch)  # row of `tokens` for each sequence
        self.hidden, self.prev_embedding = w.new_zeros(2, batch, config.n_embd)
        self.thoughts = w.new_zeros(n_thoughts, batch, config.n_embd)
        self.active, self.done = torch.zeros(2, batch, dtype=torch.bool, device=w.device)
        # of sampling: Exp(1) numbers, drawn outside of a graph
        self.noise = torch.ones(batch, config.vocab_size, device=w.device)
        self.temperature = torch.ones((), device=w.device)

    @property
    def bytes(self) -> int:
        return sum(v.nbytes for v in vars(self).values() if isinstance(v, Tensor))


class BatchView:
    """A batch of one shape inside StaticBuffers, and the steps over it, in place."""

    def __init__(
        self, model: GPT, buffers: StaticBuffers, shape: tuple[int, int], kernels: str, static: bool
    ) -> None:
        """shape: (batch, capacity). static: each step spans the whole capacity, as graphs need."""
        self.model, self.buffers, self.static = model, buffers, static
        self.batch, self.capacity = shape
        n, b = self.batch, buffers
        self.cache = model.new_cache(n, self.capacity, b.cache, b.lengths[:n])
        self.hidden, self.prev_embedding = b.hidden[:n], b.prev_embedding[:n]
        self.active, self.done, self.n_taken = b.active[:n], b.done[:n], b.n_taken[:n]
        self.token, self.place, self.noise = b.token[:n], b.place[:n], b.noise[:n]
        self.fused = None
        if kernels == "triton":
            from nanococonut.inference.fused import FusedStep  # needs triton

            self.fused = FusedStep(model, self.cache)
        self.span = self.capacity - 1 if static else 0

    def _state(self) -> steps.DecodeState:
        return steps.DecodeState(self.hidden, self.prev_embedding, self.span)

    def _store(self, state: steps.DecodeState) -> None:
        self.prev_embedding.copy_(state.prev_embedding)  # first: it may be self.hidden, a thought
        self.hidden.copy_(state.hidden)
        self.span = self.span if self.static else state.span

    def prefill(self, idx: Tensor) -> None:
        """Process prompts (B, T), whose lengths are in the cache already."""
        self._store(steps.prefill(self.model, self.cache, idx, self.cache.lengths.clone()))

    def latent_step(self, i: int, stop: bool, edit: steps.Edit | None = None) -> None:
        """Append thought i to every active sequence.

        stop  ask the stop classifier first
        edit  changes what is fed back; not with kernels
        """
        if stop:
            self.active &= self.model.stop_logit(self.hidden) <= 0
        active = self.active if stop or self.static else None  # None: all are
        thoughts = self.buffers.thoughts[:, : self.batch]
        if self.fused is not None:
            if i == 0:
                thoughts[0].copy_(self.hidden)
            # the kernel that makes the next thought also counts and keeps it
            following = thoughts[i + 1] if i + 1 < len(thoughts) else None
            self.fused.latent_step(self.hidden, active, i == 0, self.n_taken, following)
        else:
            thoughts[i].copy_(self.hidden)
            state = self._state()
            self._store(steps.latent_step(self.model, self.cache, state, active, i, edit))
            self.n_taken += self.active

    def decode_step(self) -> None:
        """Append the last token."""
        if self.fused is not None:
            self.fused.decode_step(self.token, self.hidden)
        else:
            self._store(steps.decode_step(self.model, self.cache, self.token, self._state()))

    def sample(self, eos: int, greedy: bool) -> None:
        """Choose the next token: the most probable one, or one drawn from the softmax."""
        logits = self.model.head(self.hidden)  # (B, V)
        if not greedy:  # with q ~ Exp(1), p / q is largest at token t with probability p[t]
            logits = (logits.float() / self.buffers.temperature).softmax(-1) / self.noise
        self.token.copy_(logits.argmax(-1).masked_fill(self.done, eos))
        column = self.buffers.n_tokens.expand(self.batch)
        self.buffers.tokens[self.place, column] = self.token
        self.buffers.n_tokens += 1
        self.done |= self.token == eos  # the first token may already be eos
