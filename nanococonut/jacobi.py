"""Parallel thoughts, an experiment: all thoughts of a row in one pass, repeated a few times.

After "Parallel Continuous Chain-of-Thought with Jacobi Iteration" (arXiv 2506.18582). Thoughts one
by one are a recurrence; here every slot starts as the <latent> token's embedding, and each pass
takes the hidden states of the pass before, one slot to the left, as its inputs. The first slot's
input is exact from the start, so pass k makes thought k exact, and n passes make all n: the same
values and the same gradients as coconut.think. Fewer passes make another model. Asked with thoughts
one by one, the only way engine.py has, it answers far worse: prosqa_small, 2,000 steps, 3 passes
for 6 thoughts, 51 % of validation rows against 91 % in 3 passes. So its validation is `right`, in
the passes it was trained with, and checkpoint.load refuses it.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from nanococonut import coconut
from nanococonut.coconut import Thinking
from nanococonut.curriculum import Batch
from nanococonut.model import GPT


def think(model: GPT, batch: Batch, iterations: int, latent: int) -> Thinking:
    """coconut.think by fixed-point iteration. iterations: passes over all slots (0: as many as
    slots, which is exact; more than that are not made). latent: the token every slot starts as."""
    n, device = batch.max_thoughts, batch.prefix.device
    thinking = coconut.think(model, replace(batch, max_thoughts=0))  # the question alone
    if n == 0:
        return thinking
    memory, before, prev = thinking.memory, thinking.states[0], thinking.inputs[0]
    slots = torch.arange(n, device=device)
    pos = (batch.length[:, None] + slots).clamp(max=model.config.block_size - 1)
    # a row's surplus slots come behind its own: none of these sees them, and nothing later does
    causal = (slots <= slots[:, None]).expand(len(pos), n, n)
    seen = torch.cat([memory.prefix_valid[:, None].expand(-1, n, -1), causal], dim=2)
    bias = coconut._bias(seen)[:, None]
    kept: dict[int, tuple[Tensor, Tensor]] = {}  # of the last pass

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kept[layer] = k, v
        return memory.attend_suffix(bias, layer, q, k, v)

    first = model.feed_back(before)[:, None]  # (B, 1, C)
    e = torch.cat([first, model.embed(torch.full((len(pos), n - 1), latent, device=device))], dim=1)
    h = model.trunk(e, pos, attend, prev)
    for _ in range(min(iterations or n, n) - 1):
        e = torch.cat([first, model.feed_back(h[:, :-1])], dim=1)
        h = model.trunk(e, pos, attend, prev)
    for layer, (k, v) in kept.items():
        memory.k[layer].append(k)
        memory.v[layer].append(v)
    for i in range(n):
        active = (i < batch.n_thoughts)[:, None]
        thinking.states.append(torch.where(active, h[:, i], thinking.states[-1]))
        thinking.inputs.append(torch.where(active, e[:, i], thinking.inputs[-1]))
    return thinking


@torch.no_grad()
def right(model: GPT, batches: Iterable[Batch], iterations: int, latent: int) -> int:
    """Rows whose every label is the most probable token after thoughts by `iterations` passes.

    Where no steps are left to write, these are the rows that greedy generation would answer word
    for word as they stand."""
    was_training = model.training
    model.eval()
    count = 0
    for batch in batches:
        logits = coconut.answer(model, batch, think(model, batch, iterations, latent))
        count += int(coconut.right_rows(logits, batch.targets).sum())
    model.train(was_training)
    return count
