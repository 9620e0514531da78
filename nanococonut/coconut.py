"""Coconut's forward pass in training: prefill -> thoughts -> suffix, differentiable end to end.

    [ prefix: question <bot> ]  [ thoughts ]  [ suffix: <eot> remaining steps ### answer eos ]
      right-padded to Tp          n positions   right-padded to Ts

A thought is the last hidden state, after the final LayerNorm, fed back as the next input embedding
(paper, section 3). It is not detached, so the loss on the suffix trains every thought. Sequence b
has n_thoughts[b] <= n thoughts. After these it is inactive: later thoughts are masked, and its
suffix starts right after its last thought.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from nanococonut import ops
from nanococonut.batch import IGNORE, Batch
from nanococonut.model import GPT, causal_attention

KV = tuple[Tensor, Tensor]  # keys and values, (B, nh, T, hs) each


class ThoughtTrace:
    """The keys and values of all blocks so far, and the attention of a new block to them.

    hidden          list of (B, C): hidden states after 0, 1, ... thoughts; an inactive sequence
                    repeats its last one
    prev_embedding  (B, C): input embedding that produced the last hidden state, for the smear

    Every block has its own tensors, so nothing that backward needs is overwritten.
    """

    def __init__(self, model: GPT, batch: Batch, kernels: str) -> None:
        Tp, device = batch.prefix.shape[1], batch.prefix.device
        self.dropout, self.triton = model.attn_dropout, kernels == "triton"
        self.length, self.n_thoughts = batch.length, batch.n_thoughts  # (B,) each
        self.prefix_mask = torch.arange(Tp, device=device) < batch.length[:, None]  # (B, Tp)
        self.prefix: list[KV] = []  # per layer
        self.buffers: list[ops.PrefixBuffers] = []  # per layer, Triton only
        self.thoughts: list[list[KV]] = [[] for _ in model.h]  # per layer and thought, T = 1
        self.hidden: list[Tensor] = []
        self.prev_embedding: Tensor | None = None

    def key_mask(self, n: int, prefix_as_single_key: bool = False) -> Tensor:
        """Return the valid keys of the prefix and n thoughts, (B, Tp + n) or (B, 1 + n) bool."""
        thoughts = torch.arange(n, device=self.length.device) < self.n_thoughts[:, None]  # (B, n)
        prefix = self.prefix_mask[:, :1] if prefix_as_single_key else self.prefix_mask
        return torch.cat([prefix, thoughts], dim=1)

    def attend_prefix(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attention of the prefix to itself, (B, nh, T, hs)."""
        # make them contiguous once, or the matrix products of every thought would copy them
        self.prefix.append((k.contiguous(), v.contiguous()))
        if self.triton:
            self.buffers.append(ops.prefix_buffers(k))
        if q.shape[2] > 1:
            return causal_attention(layer, q, k, v, self.dropout)
        # last layer: the only query is the last token of each sequence
        if self.triton:
            return self._prefix_as_single_key(layer, q)[1]
        mask = self.prefix_mask[:, None, None]  # (B, 1, 1, Tp)
        return F.scaled_dot_product_attention(q, k, v, mask, self.dropout)

    def attend(
        self, bias: Tensor, is_thought: bool, layer: int, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """Return the attention (B, nh, T, hs) of a new block to all blocks and itself.

        bias        (B, 1, T or 1, keys)  see attention_bias
        is_thought  the block is a thought, which later blocks attend to; otherwise the suffix
        """
        if is_thought:
            self.thoughts[layer].append((k, v))
        use_kernel = is_thought and self.triton  # the kernel attends to the prefix
        scored = [self._prefix_as_single_key(layer, q)] if use_kernel else []  # (scores, values)
        blocks = [] if use_kernel else [self.prefix[layer]]
        if self.thoughts[layer]:
            keys, values = zip(*self.thoughts[layer], strict=True)
            blocks.append((torch.cat(keys, dim=2), torch.cat(values, dim=2)))  # (B, nh, n, hs)
        if not is_thought:
            blocks.append((k, v))
        q = q * q.shape[-1] ** -0.5
        # concatenate the scores, not the keys: a copy of the prefix would be expensive
        scored += [(q @ keys.transpose(2, 3), values) for keys, values in blocks]
        scores = torch.cat([s for s, _ in scored], dim=-1) + bias  # (B, nh, T, keys)
        p = F.dropout(scores.softmax(dim=-1).to(q.dtype), self.dropout)
        pieces = p.split([s.shape[-1] for s, _ in scored], dim=-1)
        return sum(piece @ values for piece, (_, values) in zip(pieces, scored, strict=True))

    def _prefix_as_single_key(self, layer: int, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return the score (B, nh, 1, 1) and the value (B, nh, 1, hs) of the whole prefix."""
        k, v = self.prefix[layer]
        out, lse, k, v = ops.prefix_attention(q[:, :, 0], k, v, self.length, self.buffers[layer])
        self.prefix[layer] = k, v  # chained: backward accumulates all gradients in one buffer
        return lse[..., None, None], out[:, :, None]


def attention_bias(mask: Tensor) -> Tensor:
    """Return the fp32 bias to add to the scores: 0 for True, -inf for False."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))


@dataclass
class CpuTrace:
    """The hidden states of a batch from kernels/cpu_train.c, which runs the suffix, too."""

    hidden: list[Tensor]  # as in ThoughtTrace
    suffix: Tensor  # (B, Ts, C), see suffix_hidden
    triton = False


Trace = ThoughtTrace | CpuTrace


def run_in_c(model: GPT, batch: Batch) -> CpuTrace:
    """Run prefix, thoughts and suffix in C, without padding: N rows of valid positions."""
    (B, Tp), n, Ts = batch.prefix.shape, batch.max_thoughts, batch.suffix.shape[1]
    # the last target of a sequence is no input (the first maximum is its index)
    n_suffix = (batch.targets != IGNORE).int().cumsum(1).argmax(1)
    counts = (Tp, batch.length), (n, batch.n_thoughts), (Ts, n_suffix)
    mask = torch.cat([torch.arange(T) < count[:, None] for T, count in counts], dim=1)
    tokens = torch.cat([batch.prefix, batch.prefix.new_zeros(B, n), batch.suffix], dim=1)
    first = F.pad(mask.sum(1).cumsum(0), (1, 0))  # (B + 1,), the first row of each sequence, and N
    emb, pos = model.embed(tokens[mask]), model.wpe((mask.cumsum(1) - 1)[mask])  # (N, C)
    h = ops.hidden_states(model, first, batch.length, batch.n_thoughts, emb, pos)  # (N, C)
    last = (first[:-1] + batch.length - 1)[:, None]  # (B, 1), the last row of the prefix
    thought = last + torch.arange(n + 1).clamp(max=batch.n_thoughts[:, None])  # (B, n + 1)
    suffix = last + batch.n_thoughts[:, None] + torch.arange(Ts).clamp(max=n_suffix[:, None])
    return CpuTrace([*h[thought].unbind(1)], h[suffix])


def think(model: GPT, batch: Batch, kernels: str = "torch") -> Trace:
    """Run the prefill and all latent steps. Shapes depend only on those of the batch.

    kernels: "torch", "triton" or "c", see ops.choose_training_backend. C runs the suffix, too.
    """
    if kernels == "c":
        return run_in_c(model, batch)
    (B, Tp), device = batch.prefix.shape, batch.prefix.device
    trace = ThoughtTrace(model, batch, kernels)
    emb = model.embed(batch.prefix)  # (B, Tp, C)
    pos = torch.arange(Tp, device=device)
    last_pos = batch.length - 1  # (B,)
    h = model.backbone(emb, pos, trace.attend_prefix, last_pos=last_pos)[:, 0]  # (B, C)
    trace.hidden.append(h)
    trace.prev_embedding = emb[torch.arange(B, device=device), last_pos]  # (B, C)
    for i in range(batch.max_thoughts):
        active = (i < batch.n_thoughts)[:, None]  # (B, 1)
        # an inactive sequence still attends to its prefix, so no softmax is empty (NaN)
        mask = trace.key_mask(i + 1, prefix_as_single_key=trace.triton)  # (B, keys)
        # only inactive sequences can exceed block_size
        pos = (batch.length + i).clamp(max=model.config.block_size - 1)[:, None]  # (B, 1)
        attend = partial(trace.attend, attention_bias(mask)[:, None, None], True)
        thought = model.thought_embedding(trace.hidden[-1])  # (B, C)
        h = model.backbone(thought[:, None], pos, attend, trace.prev_embedding)[:, 0]  # (B, C)
        trace.hidden.append(torch.where(active, h, trace.hidden[-1]))
        trace.prev_embedding = torch.where(active, thought, trace.prev_embedding)
    return trace


def suffix_hidden(model: GPT, batch: Batch, trace: Trace) -> Tensor:
    """Return the hidden states (B, Ts, C) that predict batch.suffix: state j predicts token j."""
    if isinstance(trace, CpuTrace):
        return trace.suffix
    T, device = batch.suffix.shape[1] - 1, batch.prefix.device  # the last token is not an input
    h = trace.hidden[-1][:, None]  # (B, 1, C), predicts the first token
    if T == 0:
        return h
    causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    mask = trace.key_mask(batch.max_thoughts)[:, None].expand(-1, T, -1)  # (B, T, Tp + n)
    mask = torch.cat([mask, causal.expand(len(mask), -1, -1)], dim=2)  # (B, T, Tp + n + T)
    pos = (batch.length + batch.n_thoughts)[:, None] + torch.arange(T, device=device)  # (B, T)
    pos = pos.clamp(max=model.config.block_size - 1)  # only padding exceeds block_size
    attend = partial(trace.attend, attention_bias(mask)[:, None], False)
    out = model.backbone(model.embed(batch.suffix[:, :-1]), pos, attend, trace.prev_embedding)
    return torch.cat([h, out], dim=1)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of logits (..., V), summed over the supervised targets (...)."""
    logits = _at_least_fp32(logits).flatten(0, -2)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum")


def loss(model: GPT, batch: Batch, trace: Trace) -> tuple[Tensor, Tensor]:
    """Return (cross-entropy summed over the supervised targets, correct).

    correct (B,) bool: the argmax equals every target of the sequence (teacher-forced).
    """
    h = suffix_hidden(model, batch, trace).flatten(0, 1)  # (B * Ts, C)
    targets = batch.targets.flatten()  # (B * Ts,)
    # supervised positions first, in order; n_targets is known without a GPU sync
    index = (targets == IGNORE).int().argsort(stable=True)[: batch.n_targets]  # (n_targets,)
    h, supervised = h[index], targets[index]
    if trace.triton:
        # computes the logits in chunks, and their gradients already in the forward pass
        total, is_correct = ops.linear_cross_entropy(h, model.wte.weight, supervised)
    else:
        logits = model.head(h)
        total = loss_sum(logits, supervised)
        # a padded batch has a larger n_targets, so some of these are IGNORE
        is_correct = (logits.argmax(-1) == supervised) | (supervised == IGNORE)
    correct = torch.ones_like(targets, dtype=torch.bool)
    correct[index] = is_correct
    return total, correct.view(batch.targets.shape).all(dim=1)


def thought_loss(model: GPT, batch: Batch, trace: Trace) -> Tensor:
    """Return the summed cross-entropy of the head's predictions from the states fed back.

    The label of a state is the uniform distribution over its thought_targets. At least one thought.
    """
    h = torch.stack(trace.hidden[:-1], dim=1)  # (B, n, C), all but the last state are fed back
    logits = _at_least_fp32(model.head(h))  # (B, n, V)
    labels = batch.thought_targets  # (B, n, K)
    mask = labels != IGNORE
    nll = -logits.log_softmax(-1).gather(-1, labels.masked_fill(~mask, 0)) * mask  # (B, n, K)
    return (nll.sum(-1) / mask.sum(-1).clamp(min=1)).sum()


def stop_loss(model: GPT, batch: Batch, trace: Trace) -> Tensor:
    """Return the mean binary cross-entropy of the stop classifier.

    The label after k thoughts is whether k thoughts are enough to replace all steps.
    """
    k = torch.arange(batch.max_thoughts + 1, device=batch.length.device)  # (n + 1,)
    is_real = (batch.targets != IGNORE).any(dim=1)  # padding sequences have no labels
    mask = (k <= batch.n_thoughts[:, None]) & is_real[:, None]  # (B, n + 1)
    labels = k >= batch.n_needed[:, None]
    # detached: the classifier observes the model and does not change it
    logits = model.stop_logit(torch.stack(trace.hidden, dim=1).detach())  # (B, n + 1)
    logits = _at_least_fp32(logits)
    losses = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
    return (losses * mask).sum() / mask.sum()
