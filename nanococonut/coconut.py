"""Coconut's forward pass in training: prefill -> thoughts -> suffix, differentiable end to end.

A thought is the hidden state after the final LayerNorm at the position before it, taken as the next
input embedding in place of a token's (paper, section 3). It is not detached: the loss on the words
after the thoughts reaches every thought. model.thought_embedding has the other kinds of thought.

    [ prefix: question <bot> ]  [ thoughts ]  [ suffix: <eot> remaining steps ### answer eos ]
      right-padded to Tp          n slots       right-padded to Ts

Each block keeps its own keys and values, so nothing saved for backward is overwritten. Sequence b
has n_thoughts[b] <= n thoughts; after them it is inactive: its slots are masked for whatever comes
later, and its suffix follows its last real token directly.

With kernels="triton" a thought's attention over the prefix is one kernel. The prefix then counts as
a single key among the thoughts': its score is the log-sum-exp, its value the output.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from nanococonut import ops
from nanococonut.batch import IGNORE, Batch
from nanococonut.model import GPT, causal_attention


class BlockKV:
    """Keys and values of the blocks so far, and attention of a new block to them and itself.

    Scores are concatenated, never the keys: the prefix's are the bulk and stay where they are.
    Raises ValueError for kernels="triton" with dropout, which the kernel has not.
    """

    def __init__(
        self, n_layer: int, length: Tensor, prefix_valid: Tensor, dropout: float, kernels: str
    ) -> None:
        if kernels == "triton" and dropout:
            raise ValueError(f"dropout={dropout} in attention is for kernels='torch'")
        self.prefix: list[tuple[Tensor, Tensor]] = []  # per layer (B, nh, Tp, hs)
        self.k: list[list[Tensor]] = [[] for _ in range(n_layer)]  # thoughts: (B, nh, 1, hs)
        self.v: list[list[Tensor]] = [[] for _ in range(n_layer)]
        self.length, self.prefix_valid = length, prefix_valid  # (B,), (B, Tp) bool
        self.dropout = dropout
        self.triton = kernels == "triton"
        self.buffers: list[ops.PrefixBuffers] = []  # per layer, with kernels="triton"

    def valid(self, thoughts: int, taken: Tensor, as_one: bool = False) -> Tensor:
        """(B, Tp + thoughts) bool: the prefix's keys, and of `thoughts` columns the first taken.
        as_one: the whole prefix is a single key, always seen."""
        column = torch.arange(thoughts, device=taken.device)
        prefix = self.prefix_valid[:, :1] if as_one else self.prefix_valid
        return torch.cat([prefix, column < taken[:, None]], dim=1)

    def attend_prefix(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # contiguous once here, or every thought's matrix products would each copy them
        self.prefix.append((k.contiguous(), v.contiguous()))
        if self.triton:
            self.buffers.append(ops.prefix_buffers(*k.shape, k.device))
        if q.shape[2] == 1:  # the last layer: only the last token of each row asks
            if self.triton:
                return self._ask_prefix(layer, q)[1]
            seen = self.prefix_valid[:, None, None]
            return F.scaled_dot_product_attention(q, k, v, seen, self.dropout)
        return causal_attention(layer, q, k, v, self.dropout)

    def attend_thought(self, bias: Tensor, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.k[layer].append(k)
        self.v[layer].append(v)
        if self.triton:
            return self._attend(bias, q, [self._thoughts(layer)], self._ask_prefix(layer, q))
        return self._attend(bias, q, [self.prefix[layer], self._thoughts(layer)])

    def attend_suffix(self, bias: Tensor, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        thoughts = [self._thoughts(layer)] if self.k[layer] else []
        return self._attend(bias, q, [self.prefix[layer], *thoughts, (k, v)])

    def _thoughts(self, layer: int) -> tuple[Tensor, Tensor]:
        return torch.cat(self.k[layer], dim=2), torch.cat(self.v[layer], dim=2)

    def _ask_prefix(self, layer: int, q: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, nh, 1, hs) -> the prefix as one key: score (B, nh, 1, 1), value (B, nh, 1, hs)."""
        out, lse, k, v = ops.prefix_attention(
            q[:, :, 0], *self.prefix[layer], self.length, self.buffers[layer]
        )
        self.prefix[layer] = k, v  # backward goes through them to add to this pass's gradients
        return lse[..., None, None], out[:, :, None]

    def _attend(
        self,
        bias: Tensor,
        q: Tensor,
        blocks: list[tuple[Tensor, Tensor]],
        first: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """q (B, nh, T, hs) against blocks of keys and values; bias (B, 1, T or 1, all keys). first:
        a block before them that has its scores already."""
        q = q * q.shape[-1] ** -0.5
        scored = [(q @ k.transpose(2, 3), v) for k, v in blocks]
        scored = scored if first is None else [first, *scored]
        scores = torch.cat([s for s, _ in scored], dim=-1) + bias
        p = F.dropout(scores.softmax(dim=-1).to(q.dtype), self.dropout)
        parts = p.split([s.shape[-1] for s, _ in scored], dim=-1)
        return sum(part @ v for part, (_, v) in zip(parts, scored, strict=True))


def _bias(seen: Tensor) -> Tensor:
    """Which keys may be seen, bool -> what is added to the scores, fp32."""
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, float("-inf"))


@dataclass
class ThoughtTrace:
    """A batch with its question read and its thoughts had.

    hidden   n + 1 of (B, C): the hidden state after 0, 1, ... thoughts (a row that has had all its
             own keeps its last)
    inputs   n + 1 of (B, C): the input embedding that led to each, the smear's memory
    """

    kv: BlockKV
    hidden: list[Tensor]
    inputs: list[Tensor]


def think(model: GPT, batch: Batch, kernels: str = "torch") -> ThoughtTrace:
    """Prefill and thoughts. Differentiable; shapes depend on the batch's only. kernels: "torch" or
    "triton", as ops.choose_training says."""
    B, Tp = batch.prefix.shape
    device = batch.prefix.device
    rows, last = torch.arange(B, device=device), batch.length - 1

    valid = torch.arange(Tp, device=device) < batch.length[:, None]
    memory = BlockKV(model.config.n_layer, batch.length, valid, model.attn_dropout, kernels)
    e = model.embed(batch.prefix)
    h = model.backbone(e, torch.arange(Tp, device=device), memory.attend_prefix, only=last)[:, 0]
    states, inputs = [h], [e[rows, last]]

    for i in range(batch.max_thoughts):
        active = i < batch.n_thoughts  # (B,)
        # an inactive row has no valid key of its own here; it still sees its prefix, so no NaN
        bias = _bias(memory.valid(i + 1, batch.n_thoughts, memory.triton))[:, None, None]
        thought = model.thought_embedding(states[-1])
        pos = (batch.length + i).clamp(max=model.config.block_size - 1)
        attend = partial(memory.attend_thought, bias)
        h = model.backbone(thought[:, None], pos[:, None], attend, inputs[-1])[:, 0]
        states.append(torch.where(active[:, None], h, states[-1]))
        inputs.append(torch.where(active[:, None], thought, inputs[-1]))
    return ThoughtTrace(memory, states, inputs)


def suffix_hidden(model: GPT, batch: Batch, trace: ThoughtTrace, taken: Tensor, n: int) -> Tensor:
    """Hidden states (B, Ts, C) that predict batch.suffix: column j stands before suffix token j.

    taken (B,): how many of its thoughts each row answers after; trace.hidden[n] is the state
    after them. Column 0 comes from the last prefix position or thought, so that methods without
    <eot> are scored on their first word too.
    """
    Ts, device = batch.suffix.shape[1], batch.prefix.device
    h, prev, memory = trace.hidden[n], trace.inputs[n], trace.kv
    if Ts == 1:  # a lone label: nothing is read behind it
        return h[:, None]
    causal = torch.ones(Ts - 1, Ts - 1, dtype=torch.bool, device=device).tril()
    valid = memory.valid(batch.max_thoughts, taken)[:, None].expand(-1, Ts - 1, -1)
    seen = torch.cat([valid, causal.expand(len(taken), -1, -1)], dim=2)
    pos = (batch.length + taken)[:, None] + torch.arange(Ts - 1, device=device)
    pos = pos.clamp(max=model.config.block_size - 1)  # only padding is ever clamped
    attend = partial(memory.attend_suffix, _bias(seen)[:, None])
    out = model.backbone(model.embed(batch.suffix[:, :-1]), pos, attend, prev)
    return torch.cat([h[:, None], out], dim=1)


def suffix_logits(model: GPT, batch: Batch, trace: ThoughtTrace, taken: Tensor, n: int) -> Tensor:
    """Logits (B, Ts, V) that predict batch.suffix (see suffix_hidden)."""
    return model.head(suffix_hidden(model, batch, trace, taken, n))


def loss(model: GPT, batch: Batch, trace: ThoughtTrace) -> tuple[Tensor, Tensor]:
    """What training wants of the suffix, each row after all of its thoughts: the cross-entropy
    summed over the supervised labels (), and (B,) bool: rows whose every label is the most probable
    token. As loss_sum and right_rows of `answer`, but only supervised positions have logits (and
    others where batch.n_labels is more than there are); with Triton some at a time, and their
    gradient is made in this call, unless grad mode is off.
    """
    h = suffix_hidden(model, batch, trace, batch.n_thoughts, batch.max_thoughts)
    h, targets = h.flatten(0, 1), batch.targets.flatten()  # (B * Ts, C), (B * Ts,)
    if trace.kv.triton:
        total, right = ops.head_cross_entropy(h, model.wte.weight, targets, batch.n_labels)
    else:
        # those with a label, in order; how many is known, so that no device is asked
        at = (targets == IGNORE).int().argsort(stable=True)[: batch.n_labels]
        logits = model.head(h[at])  # (n_labels, V)
        total = loss_sum(logits, targets[at])
        right = torch.ones_like(targets, dtype=torch.bool)
        right[at] = (logits.argmax(-1) == targets[at]) | (targets[at] == IGNORE)
    return total, right.view(batch.targets.shape).all(dim=1)


def answer(model: GPT, batch: Batch, trace: ThoughtTrace) -> Tensor:
    """Logits (B, Ts, V) that predict batch.suffix, each row after all of its thoughts."""
    return suffix_logits(model, batch, trace, batch.n_thoughts, batch.max_thoughts)


def forward(model: GPT, batch: Batch) -> Tensor:
    """Prefill -> thoughts -> suffix: `answer` after `think`."""
    return answer(model, batch, think(model, batch))


def stop_loss(model: GPT, batch: Batch, trace: ThoughtTrace) -> Tensor:
    """Mean binary cross-entropy of the classifier that says when thoughts are enough.

    It reads the hidden states detached: it watches the model and does not change it. Enough are
    as many thoughts as replace all of the row's steps.
    """
    n = batch.max_thoughts + 1
    after = torch.arange(n, device=batch.length.device)
    real = (batch.targets != IGNORE).any(dim=1)  # a row that fills up a batch has no label
    reached = (after <= batch.n_thoughts[:, None]) & real[:, None]  # (B, n)
    labels = after >= batch.needed[:, None]
    logits = model.stop_logit(torch.stack(trace.hidden, dim=1).detach())
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    each = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
    return (each * reached).sum() / reached.sum()


def loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy summed over the supervised labels: logits (..., V), targets (...)."""
    logits = logits.flatten(0, -2)
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")


def right_rows(logits: Tensor, targets: Tensor) -> Tensor:
    """(B,) bool: rows whose every label is the most probable token (teacher-forced)."""
    return ((logits.argmax(-1) == targets) | (targets == -100)).all(dim=1)
