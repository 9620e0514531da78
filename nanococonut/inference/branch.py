"""Questions that are read once and answered many times, each time after other thoughts.

evaluation/ exchanges the thoughts of two questions with it, and forces answers to compare them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanococonut.batch import pad_lists
from nanococonut.inference.steps import (
    DecodeState,
    Edit,
    append_step,
    decode_step,
    latent_step,
    prefill,
)
from nanococonut.model import GPT


@dataclass
class Slots:
    """What a batch holds at the positions of its thoughts, and the state after the last of them.

    kv      (B, n, n_layer, 2, n_head, head_dim)  keys and values
    inputs  n of (B, C), what was fed back
    state   after the last slot; prev_embedding is what the smear adds to the next token
    """

    kv: Tensor
    inputs: list[Tensor]
    state: DecodeState

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Slots":
        state = DecodeState(fn(self.state.hidden), fn(self.state.prev_embedding), self.state.span)
        return Slots(fn(self.kv), [fn(x) for x in self.inputs], state)


class Branch:
    """A batch that is read once and answered many times, each time after other thoughts.

    model       the model, in eval mode
    prefixes    tokens of each question
    n_slots     most positions that thoughts take
    forced      tokens between the thoughts and an answer
    candidates  m answers of each question, as tokens
    pause       token that is appended in place of each thought (None: thoughts)
    """

    @torch.no_grad()
    def __init__(
        self, model: GPT, prefixes: Sequence[list[int]], n_slots: int, forced: Sequence[int],
        candidates: Sequence[Sequence[list[int]]], pause: int | None = None,
    ) -> None:  # fmt: skip
        self.model, self.forced, self.candidates, self.pause = model, forced, candidates, pause
        idx = pad_lists(prefixes).to(model.wte.weight.device)  # (B, T)
        longest = max(len(tokens) for row in candidates for tokens in row)
        # the last token of an answer is scored, not appended
        capacity = idx.shape[1] + n_slots + len(forced) + longest - 1
        self.cache = model.new_cache(len(prefixes), capacity)
        self.start = torch.tensor(list(map(len, prefixes))).to(idx)  # (B,), of the first slot
        self._read = self.state = prefill(model, self.cache, idx, self.start)
        self.inputs: list[Tensor] = []  # what was fed back: n of (B, C)
        self.thoughts: list[Tensor] = []  # hidden states before it

    def __len__(self) -> int:
        return len(self.start)

    def restart(self) -> "Branch":
        """Drop everything after the questions."""
        self.inputs, self.thoughts = [], []
        self._crop(self.start, self._read)
        return self

    def _crop(self, lengths: Tensor, state: DecodeState) -> None:
        self.cache.lengths.copy_(lengths)
        self.state = state

    @torch.no_grad()
    def think(self, n: int, edit: Edit | None = None) -> None:
        """Append n more thoughts, or pauses. edit: see Engine.generate."""
        for i in range(len(self.inputs), len(self.inputs) + n):
            self.thoughts.append(self.state.hidden)
            if self.pause is None:
                self.state = latent_step(self.model, self.cache, self.state, None, i, edit)
            else:
                token = torch.full_like(self.start, self.pause)
                self.state = decode_step(self.model, self.cache, token, self.state)
            self.inputs.append(self.state.prev_embedding)

    @torch.no_grad()
    def write(self, tokens: Sequence[list[int]]) -> None:
        """Append other tokens to each sequence, any number of them."""
        for token in pad_lists(tokens, -1).to(self.start).T:  # (B,)
            self._append(token, active=token >= 0)

    def _append(self, token: Tensor, active: Tensor) -> None:
        emb = self.model.embed(token.clamp(min=0))  # (B, C)
        self.state = append_step(self.model, self.cache, emb, self.state, active)

    @torch.no_grad()
    def answer(self) -> Tensor:
        """Return the log-probability of each candidate, (B, m), if an answer is forced now.

        Nothing stays in the cache.
        """
        here = self.cache.lengths.clone(), self.state
        self.write([list(self.forced)] * len(self))
        asked = self.cache.lengths.clone(), self.state
        columns, first = [], self._log_probs()  # of the first token: the same for all candidates
        for candidate in zip(*self.candidates, strict=True):  # B lists of tokens
            self._crop(*asked)
            log_p = self.state.hidden.new_zeros(len(self), dtype=torch.float32)
            tokens = pad_lists(candidate, -1).to(self.start).T  # (longest, B)
            for i, token in enumerate(tokens):
                if i:
                    self._append(tokens[i - 1], active=token >= 0)
                log_all = self._log_probs() if i else first
                log_token = log_all.gather(1, token.clamp(min=0)[:, None])[:, 0]
                log_p += torch.where(token >= 0, log_token, 0.0)
            columns.append(log_p)
        self._crop(*here)
        return torch.stack(columns, 1)

    def _log_probs(self) -> Tensor:
        return self.model.head(self.state.hidden).float().log_softmax(-1)  # (B, V)

    def slots(self, n: int) -> Slots:
        """Return the contents of the first n slots, with the current state."""
        pos = self.start[:, None] + torch.arange(n, device=self.start.device)  # (B, n)
        kv = self.cache.data[:, :, self.cache.batch_index, :, pos]
        return Slots(kv, self.inputs[:n], self.state)

    def put(self, slots: Slots, only: Sequence[int] | None = None) -> None:
        """Replace the slots, or only some of them; the sequence then ends after the last one.

        slots  of questions with the same number of tokens: positions are part of the keys
        only   slots to replace; the sequence must have all of them (None: all)
        """
        n = slots.kv.shape[1]
        index = torch.arange(n) if only is None else torch.tensor(only)
        pos = self.start[:, None] + index.to(self.start)  # (B, n)
        self.cache.data[:, :, self.cache.batch_index, :, pos] = slots.kv[:, index]
        self.cache.lengths.copy_(self.start + n)
        if n - 1 in index:
            state = slots.state
            span = self._read.span + n
            self.state = DecodeState(state.hidden, state.prev_embedding, span)
