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
from nanococonut.model import GPT, Attend, at_position, causal_attention
from nanococonut.runtime.errors import UserError

KV = tuple[Tensor, Tensor]  # keys and values, (B, nh, T, hs) each


@dataclass
class HiddenStates:
    """What the losses need from a forward pass.

    states   list of n + 1 tensors (B, C): hidden state after 0, 1, ..., n thoughts.
             A sequence with fewer thoughts repeats its last state. A loss may use any of them. In
             C, all parameters get their gradients, but states[i].grad lacks what later states add
    suffix   (B, Ts, C): hidden state j predicts token j of the suffix, up to the last target
    kernels  backend of the pass, which `loss` uses too
    """

    states: list[Tensor]
    suffix: Tensor
    kernels: str


def forward(model: GPT, batch: Batch, kernels: str = "torch") -> HiddenStates:
    """Run prefix, thoughts and suffix. Return their hidden states.

    Except in C, no shape depends on the values in the batch, so a CUDA graph can replay it.

    kernels: "torch", "triton" or "c", see ops.choose_training_backend
    """
    if kernels == "c":
        return forward_in_c(model, batch)
    Tp, n, device = batch.prefix.shape[1], batch.max_thoughts, batch.prefix.device
    cache = TrainingCache(model, batch, use_triton=kernels == "triton")

    # ---- prefix: one causal pass; only its last hidden state is needed
    emb = model.wte(batch.prefix)  # (B, Tp, C)
    pos = torch.arange(Tp, device=device)
    last_pos = batch.length - 1  # (B,)
    h = model.backbone(emb, pos, cache.attend_prefix, last_pos=last_pos)[:, 0]  # (B, C)
    prev_embedding = at_position(emb, last_pos)[:, 0]  # (B, C), for the smear

    # ---- thoughts: the last hidden state is the next input embedding
    states = [h]
    for i in range(n):
        active = (i < batch.n_thoughts)[:, None]  # (B, 1)
        # clamp: only inactive sequences exceed block_size
        pos = (batch.length + i).clamp(max=model.config.block_size - 1)[:, None]  # (B, 1)
        thought = model.thought_embedding(h)  # (B, C)
        attend = cache.thought_attention(i)
        out = model.backbone(thought[:, None], pos, attend, prev_embedding)[:, 0]  # (B, C)
        h = torch.where(active, out, h)
        prev_embedding = torch.where(active, thought, prev_embedding)
        states.append(h)

    # ---- suffix: all tokens in one pass, except the last, which is only a target
    emb = model.wte(batch.suffix[:, :-1])  # (B, T, C)
    T = emb.shape[1]
    pos = (batch.length + batch.n_thoughts)[:, None] + torch.arange(T, device=device)  # (B, T)
    pos = pos.clamp(max=model.config.block_size - 1)  # only padding exceeds block_size
    out = model.backbone(emb, pos, cache.suffix_attention(T), prev_embedding)  # (B, T, C)
    suffix = torch.cat([h[:, None], out], dim=1)  # (B, Ts, C): h predicts the first token
    return HiddenStates(states, suffix, kernels)


class TrainingCache:
    """Keys and values of the prefix and the thoughts so far, and attention to them.

    Like KVCache, but every step appends new tensors: backward needs the old ones unchanged.
    """

    def __init__(self, model: GPT, batch: Batch, use_triton: bool) -> None:
        Tp, n, device = batch.prefix.shape[1], batch.max_thoughts, batch.prefix.device
        self.dropout, self.use_triton = model.attn_dropout, use_triton
        self.length = batch.length  # (B,)
        self.prefix_mask = torch.arange(Tp, device=device) < batch.length[:, None]  # (B, Tp)
        self.thought_mask = torch.arange(n, device=device) < batch.n_thoughts[:, None]  # (B, n)
        self.prefix: list[KV] = []  # per layer
        self.buffers: list[ops.PrefixBuffers] = []  # per layer, Triton only
        self.thoughts: list[list[KV]] = [[] for _ in model.h]  # per layer and thought, T = 1

    def attend_prefix(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attention of the prefix to itself, (B, nh, T, hs)."""
        # make them contiguous once, or the matrix products of every thought would copy them
        self.prefix.append((k.contiguous(), v.contiguous()))
        if self.use_triton:
            self.buffers.append(ops.prefix_buffers(k))
        if q.shape[2] > 1:
            return causal_attention(layer, q, k, v, self.dropout)
        # last layer: the only query is the last token of each sequence
        if self.use_triton:
            _, out = self._prefix_as_single_key(layer, q)
            return out
        mask = self.prefix_mask[:, None, None]  # (B, 1, 1, Tp)
        return F.scaled_dot_product_attention(q, k, v, mask, self.dropout)

    def thought_attention(self, i: int) -> Attend:
        """Return the `attend` of thought i: to the prefix, earlier thoughts and itself."""
        # the Triton kernel returns the whole prefix as one key: its score is the log-sum-exp, its
        # value the attention output. This key is always valid, like the first token of a prefix
        prefix = self.prefix_mask[:, :1] if self.use_triton else self.prefix_mask
        # an inactive sequence still attends to its prefix, so no softmax is empty (NaN)
        mask = torch.cat([prefix, self.thought_mask[:, : i + 1]], dim=1)  # (B, keys)
        return partial(self._attend, attention_bias(mask)[:, None, None], True)

    def suffix_attention(self, T: int) -> Attend:
        """Return the `attend` of T suffix tokens: to prefix, thoughts and, causally, themselves."""
        mask = torch.cat([self.prefix_mask, self.thought_mask], dim=1)  # (B, Tp + n)
        mask = mask[:, None].expand(-1, T, -1)  # (B, T, Tp + n)
        causal = torch.ones(T, T, dtype=torch.bool, device=mask.device).tril()
        mask = torch.cat([mask, causal.expand(len(mask), -1, -1)], dim=2)  # (B, T, Tp + n + T)
        return partial(self._attend, attention_bias(mask)[:, None], False)

    def _attend(
        self, bias: Tensor, is_thought: bool, layer: int, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """Return the attention (B, nh, T, hs) of new positions: one softmax over all keys.

        bias        (B, 1, T or 1, keys)  see attention_bias
        is_thought  keep k and v: later positions attend to them
        """
        if is_thought:
            self.thoughts[layer].append((k, v))
        pieces, pairs = [], []  # (scores, values), (keys, values)
        if is_thought and self.use_triton:
            pieces.append(self._prefix_as_single_key(layer, q))
        else:
            pairs.append(self.prefix[layer])
        if self.thoughts[layer]:
            keys, values = zip(*self.thoughts[layer], strict=True)
            pairs.append((torch.cat(keys, dim=2), torch.cat(values, dim=2)))  # (B, nh, n, hs)
        if not is_thought:
            pairs.append((k, v))
        q = q * q.shape[-1] ** -0.5
        # concatenate the scores, not the keys: a copy of the prefix would be expensive
        pieces += [(q @ keys.transpose(2, 3), values) for keys, values in pairs]
        scores = torch.cat([s for s, _ in pieces], dim=-1) + bias  # (B, nh, T, keys)
        widths = [s.shape[-1] for s, _ in pieces]
        p = F.dropout(scores.softmax(dim=-1).to(q.dtype), self.dropout).split(widths, dim=-1)
        return sum(p_i @ values for p_i, (_, values) in zip(p, pieces, strict=True))

    def _prefix_as_single_key(self, layer: int, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return the score (B, nh, 1, 1) and the value (B, nh, 1, hs) of the whole prefix."""
        k, v = self.prefix[layer]
        out, lse, k, v = ops.prefix_attention(q[:, :, 0], k, v, self.length, self.buffers[layer])
        self.prefix[layer] = k, v  # chained: backward accumulates all gradients in one buffer
        return lse[..., None, None], out[:, :, None]


def attention_bias(mask: Tensor) -> Tensor:
    """Return the fp32 bias to add to the scores: 0 for True, -inf for False."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))


def forward_in_c(model: GPT, batch: Batch) -> HiddenStates:
    """Return the hidden states, computed by kernels/cpu_train.c.

    The C code takes no padding: its N rows are the valid positions, one sequence after another.
    Raise UserError if the model has dropout, other thoughts or forward hooks, which C would ignore.
    """
    ignored = {  # feature of the model: whether it has it
        f"{model.config.thought} thoughts": model.config.thought != "hidden",
        f"dropout ({model.attn_dropout})": model.attn_dropout > 0,
        "forward hooks": any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()),
    }
    if feature := next((name for name, applies in ignored.items() if applies), ""):
        raise UserError(f"kernels/cpu_train.c would ignore {feature}.\nUse --kernels=torch.")
    (B, Tp), n, Ts = batch.prefix.shape, batch.max_thoughts, batch.suffix.shape[1]
    # the inputs are the suffix tokens before the last target, so its index is their number
    n_inputs = (batch.targets != IGNORE).int().cumsum(1).argmax(1)  # (B,)
    counts = (Tp, batch.length), (n, batch.n_thoughts), (Ts, n_inputs)
    mask = torch.cat([torch.arange(T) < count[:, None] for T, count in counts], dim=1)
    tokens = torch.cat([batch.prefix, batch.prefix.new_zeros(B, n), batch.suffix], dim=1)
    first = F.pad(mask.sum(1).cumsum(0), (1, 0))  # (B + 1,), the first row of each sequence, and N
    emb, pos = model.wte(tokens[mask]), model.wpe((mask.cumsum(1) - 1)[mask])  # (N, C)
    h = ops.hidden_states(model, first, batch.length, batch.n_thoughts, emb, pos)  # (N, C)
    # rows of the states after 0, 1, ... thoughts or suffix tokens; the last one is repeated
    last = (first[:-1] + batch.length - 1)[:, None]  # (B, 1), the last row of the prefix
    states = last + torch.arange(n + 1).clamp(max=batch.n_thoughts[:, None])  # (B, n + 1)
    suffix = last + batch.n_thoughts[:, None] + torch.arange(Ts).clamp(max=n_inputs[:, None])
    return HiddenStates([*h[states].unbind(1)], h[suffix], "c")


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def loss(model: GPT, batch: Batch, hidden: HiddenStates) -> tuple[Tensor, Tensor]:
    """Return (cross-entropy summed over the supervised targets, correct).

    correct (B,) bool: the argmax equals every target of the sequence (teacher-forced).
    """
    targets = batch.targets.flatten()  # (B * Ts,)
    # supervised positions first, in order; like nonzero(), but without a GPU sync for the count
    index = (targets == IGNORE).int().argsort(stable=True)[: batch.n_targets]  # (n_targets,)
    # index_select, because the backward of h[index] sorts
    h = hidden.suffix.flatten(0, 1).index_select(0, index)  # (n_targets, C)
    supervised = targets[index]
    if hidden.kernels == "triton":
        # computes the logits in chunks; their gradients are computed in the forward pass, too
        total, is_correct = ops.linear_cross_entropy(h, model.wte.weight, supervised)
    else:
        logits = _at_least_fp32(model.head(h))  # (n_targets, V)
        total = F.cross_entropy(logits, supervised, ignore_index=IGNORE, reduction="sum")
        # a padded batch has a larger n_targets, so some of these are IGNORE
        is_correct = (logits.argmax(-1) == supervised) | (supervised == IGNORE)
    correct = torch.ones_like(targets, dtype=torch.bool)
    correct[index] = is_correct
    return total, correct.view(batch.targets.shape).all(dim=1)


def thought_loss(model: GPT, batch: Batch, hidden: HiddenStates) -> Tensor:
    """Return the summed cross-entropy of the head's predictions from the states fed back.

    The label of a state is the uniform distribution over its thought_targets. The batch must have
    at least one thought.
    """
    h = torch.stack(hidden.states[:-1], dim=1)  # (B, n, C), the last state is not fed back
    logits = _at_least_fp32(model.head(h))  # (B, n, V)
    labels = batch.thought_targets  # (B, n, K)
    mask = labels != IGNORE
    nll = -logits.log_softmax(-1).gather(-1, labels.masked_fill(~mask, 0)) * mask  # (B, n, K)
    return (nll.sum(-1) / mask.sum(-1).clamp(min=1)).sum()


def stop_loss(model: GPT, batch: Batch, hidden: HiddenStates) -> Tensor:
    """Return the binary cross-entropy of the stop classifier, summed over the states.

    The label after k thoughts is whether k thoughts are enough to replace all steps.
    """
    k = torch.arange(batch.max_thoughts + 1, device=batch.length.device)  # (n + 1,)
    is_real = (batch.targets != IGNORE).any(dim=1)  # padding sequences have no labels
    mask = (k <= batch.n_thoughts[:, None]) & is_real[:, None]  # (B, n + 1)
    labels = k >= batch.n_needed[:, None]
    # detached: the classifier observes the model and does not change it
    h = torch.stack(hidden.states, dim=1).detach()  # (B, n + 1, C)
    logits = _at_least_fp32(model.stop_logit(h))  # (B, n + 1)
    losses = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
    return (losses * mask).sum()
