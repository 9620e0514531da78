"""A prefilled batch whose thoughts can be replaced and whose candidate answers can be scored.

evaluation/ uses it to swap the thoughts of two questions and to compare the forced answers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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
    without_grad,
)
from nanococonut.model import GPT


@dataclass
class Slots:
    """The contents of n thought positions of a batch, and the state after the last one.

    kv      (B, n, n_layer, 2, n_head, head_dim)  keys and values
    inputs  list of n (B, C), the embeddings that were fed back
    state   state after the last slot
    """

    kv: Tensor
    inputs: list[Tensor]
    state: DecodeState

    def map(self, fn: Callable[..., Tensor], *others: "Slots") -> "Slots":
        """Return the slots with fn applied to each tensor, together with those of `others`."""
        slots = (self, *others)
        states = [x.state for x in slots]
        hidden = fn(*(state.hidden for state in states))
        prev_embedding = fn(*(state.prev_embedding for state in states))
        inputs = [fn(*tensors) for tensors in zip(*(x.inputs for x in slots), strict=True)]
        state = DecodeState(hidden, prev_embedding, self.state.span)
        return Slots(fn(*(x.kv for x in slots)), inputs, state)


class Branch:
    """B questions, prefilled once, then answered after any number of different thoughts.

    model       the model, in eval mode
    prefixes    tokens of each question
    n_slots     maximum number of thought positions
    forced      tokens between the thoughts and the answer
    candidates  m answers of each question, as tokens
    pause       token that is appended in place of each thought (None: append thoughts)
    """

    @without_grad
    def __init__(
        self, model: GPT, prefixes: Sequence[list[int]], n_slots: int, forced: Sequence[int],
        candidates: Sequence[Sequence[list[int]]], pause: int | None = None,
    ) -> None:  # fmt: skip
        self.model, self.forced, self.candidates, self.pause = model, forced, candidates, pause
        idx = pad_lists(prefixes).to(model.wte.weight.device)  # (B, T)
        longest = max(len(tokens) for answers in candidates for tokens in answers)
        # the last token of an answer is scored, not appended
        capacity = idx.shape[1] + n_slots + len(forced) + longest - 1
        self.cache = model.new_cache(len(prefixes), capacity)
        self.start = torch.tensor(list(map(len, prefixes))).to(idx)  # (B,), position of slot 0
        self._prefilled = self.state = prefill(model, self.cache, idx, self.start)
        self.inputs: list[Tensor] = []  # one (B, C) per thought: the embedding fed back
        self.thoughts: list[Tensor] = []  # one (B, C) per thought: the hidden state before it

    def __len__(self) -> int:
        return len(self.start)

    def restart(self) -> "Branch":
        """Drop everything after the questions. Return self."""
        self.inputs, self.thoughts = [], []
        self._rewind(self.start, self._prefilled)
        return self

    def _rewind(self, lengths: Tensor, state: DecodeState) -> None:
        self.cache.lengths.copy_(lengths)
        self.state = state

    @without_grad
    def think(self, n: int, edit: Edit | None = None) -> None:
        """Append n more thoughts or pauses. edit: see Engine.generate."""
        for i in range(len(self.inputs), len(self.inputs) + n):
            self.thoughts.append(self.state.hidden)
            if self.pause is None:
                self.state = latent_step(self.model, self.cache, self.state, None, i, edit)
            else:
                token = torch.full_like(self.start, self.pause)
                self.state = decode_step(self.model, self.cache, token, self.state)
            self.inputs.append(self.state.prev_embedding)

    @without_grad
    def write(self, tokens: Sequence[list[int]]) -> None:
        """Append a list of tokens, of any length, to each sequence."""
        for token in pad_lists(tokens, -1).to(self.start).T:  # (B,)
            self._append(token, active=token >= 0)

    def _append(self, token: Tensor, active: Tensor) -> None:
        emb = self.model.wte(token.clamp(min=0))  # (B, C)
        self.state = append_step(self.model, self.cache, emb, self.state, active)

    @without_grad
    def answer(self) -> Tensor:
        """Return the log-probability (B, m) of each candidate if the answer is forced now.

        The state is restored afterwards.
        """
        before = self.cache.lengths.clone(), self.state
        self.write([list(self.forced)] * len(self))
        after_forced = self.cache.lengths.clone(), self.state
        first = self._log_probs()  # (B, V), the same for all candidates
        columns = []
        for candidate in zip(*self.candidates, strict=True):  # B lists of tokens
            self._rewind(*after_forced)
            log_probs = first
            total = torch.zeros_like(first[:, 0])  # (B,)
            tokens = pad_lists(candidate, -1).to(self.start).T  # (longest, B)
            for i, token in enumerate(tokens):
                active = token >= 0  # (B,), False after the end of a shorter candidate
                if i:
                    self._append(tokens[i - 1], active)
                    log_probs = self._log_probs()
                log_p = log_probs.gather(1, token.clamp(min=0)[:, None])[:, 0]
                total += torch.where(active, log_p, 0.0)
            columns.append(total)
        self._rewind(*before)
        return torch.stack(columns, dim=1)

    def _log_probs(self) -> Tensor:
        return self.model.head(self.state.hidden).float().log_softmax(-1)  # (B, V)

    def _check_end(self, n: int) -> None:
        """Raise ValueError unless every sequence ends after n slots."""
        if not torch.equal(self.cache.lengths, self.start + n):
            ends = sorted(set((self.cache.lengths - self.start).tolist()))
            raise ValueError(f"slots: expected every sequence to end after {n}, got {ends}")

    def slots(self, n: int) -> Slots:
        """Return the contents of the n slots and the state after the last one.

        Raise ValueError unless every sequence ends there.
        """
        self._check_end(n)
        pos = self.start[:, None] + torch.arange(n, device=self.start.device)  # (B, n)
        kv = self.cache.data[:, :, self.cache.batch_index, :, pos]
        return Slots(kv, self.inputs[:n], self.state)

    def put(self, slots: Slots, only: Sequence[int] | None = None) -> None:
        """Replace the contents of the slots and end every sequence after the last one.

        slots  must come from questions with the same numbers of tokens, since keys depend on
               positions
        only   replace only these slots (None: all). Raise ValueError unless every sequence ends
               after all slots: the state would be that of a later token or thought.

        `inputs` are replaced too, but `thoughts` keeps only what `think` appended.
        """
        n = slots.kv.shape[1]
        if only is not None:
            self._check_end(n)
        index = torch.arange(n) if only is None else torch.tensor(only)
        replaced = index.tolist()
        self.inputs = [slots.inputs[i] if i in replaced else self.inputs[i] for i in range(n)]
        pos = self.start[:, None] + index.to(self.start)  # (B, number of replaced slots)
        self.cache.data[:, :, self.cache.batch_index, :, pos] = slots.kv[:, index]
        self.cache.lengths.copy_(self.start + n)
        if n - 1 in index:
            self.state = replace(slots.state, span=self._prefilled.span + n)
