"""A micro-batch's part of a training step: forward, backward, and what the loop counts of it.

On a GPU all of that is one CUDA graph for each shape. So that there are few, batches are padded up
to multiples of PREFIX and SUFFIX tokens and LABELS supervised ones, and a short batch is filled up
with rows that do nothing. Nothing here asks the device: what was counted is read once a step.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nanococonut import coconut
from nanococonut.batch import Batch
from nanococonut.model import GPT
from nanococonut.runtime.graphs import GraphCache, round_up

PREFIX, SUFFIX, LABELS = 64, 16, 256


@dataclass(frozen=True)
class MicroBatch:
    """A batch as TrainStep takes it, on the CPU. counts (B,) bool: rows that are counted; rows: how
    many there are, without those that fill it up."""

    batch: Batch
    counts: Tensor
    rows: int


class TrainStep:
    """Adds a micro-batch's gradient to the parameters', and what is counted to `sums`:

    sums  (3,) on the device, in float64: the loss, rows all right, rows counted

    think: coconut.think or what stands for it. use_bf16: forward in bfloat16 (autocast).
    graphs: None, or where the passes are captured; then gradients are kept
    from step to step and zeroed in place, never None.
    """

    def __init__(
        self,
        model: GPT,
        think: Callable[[GPT, Batch], coconut.ThoughtTrace] = coconut.think,
        use_bf16: bool = False,
        graphs: GraphCache | None = None,
    ) -> None:
        self.model, self.think, self.use_bf16 = model, think, use_bf16
        self.graphs = graphs
        self.device = model.wte.weight.device
        # wide, since it is a sum of many; MPS has no float64
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        self.totals = torch.zeros(3, dtype=wide, device=self.device)
        self._inputs: dict[tuple, tuple[Batch, Tensor, Tensor]] = {}

    def zero_grad(self) -> None:
        """Before a step's first micro-batch: no gradient, nothing counted."""
        self.totals.zero_()
        for p in self.model.parameters():
            if self.graphs is None:
                p.grad = None
            elif p.grad is None:
                p.grad = torch.zeros_like(p)
            else:
                p.grad.zero_()

    def prepare(self, batch: Batch, counts: Sequence[bool], thoughts: int = 0) -> MicroBatch:
        """What can be done for a batch while the device is busy with others. counts: of each row,
        whether it is counted. thoughts: the most that any batch of the stage has, if more."""
        rows, counted = len(batch.length), torch.tensor(counts)
        if self.graphs is not None:
            block = self.model.config.block_size
            prefix = min(round_up(batch.prefix.shape[1], PREFIX), block)
            suffix = min(round_up(batch.suffix.shape[1], SUFFIX), block)
            more = 1 << (rows - 1).bit_length()
            labels = min(round_up(batch.n_labels, LABELS), more * suffix)
            batch = batch.padded(more, prefix, suffix, max(thoughts, batch.max_thoughts), labels)
            counted = F.pad(counted, (0, more - rows))
        if self.device.type == "cuda":  # from there it is copied without anybody waiting
            batch, counted = batch.pinned(), counted.pin_memory()
        return MicroBatch(batch, counted, rows)

    def __call__(self, micro: MicroBatch, labels: int, rows: int) -> None:
        """Forward and backward. labels, rows: of the whole step, over which the loss is a mean."""
        shares = torch.tensor([labels, micro.rows / rows], dtype=self.model.wte.weight.dtype)
        if self.device.type == "cuda":
            shares = shares.pin_memory()
        if self.graphs is None:
            device, later = self.device, self.device.type == "cuda"
            counts, shares = (t.to(device, non_blocking=later) for t in (micro.counts, shares))
            self._pass(micro.batch.to(device), counts, shares)
            return
        batch = micro.batch
        key = (*batch.prefix.shape, batch.suffix.shape[1], batch.max_thoughts, batch.n_labels)
        if key not in self._inputs:
            new = (batch.to(self.device), micro.counts.to(self.device), shares.to(self.device))
            self._inputs[key] = new
        static, counts, static_shares = self._inputs[key]
        static.copy_(batch)
        counts.copy_(micro.counts, non_blocking=True)
        static_shares.copy_(shares, non_blocking=True)
        mutated = [self.totals, *(p.grad for p in self.model.parameters())]
        self.graphs.run(key, lambda: self._pass(static, counts, static_shares), mutated)

    def _pass(self, batch: Batch, counts: Tensor, shares: Tensor) -> None:
        labels, share = shares
        # entered here, within the graph: no rounded weight is kept from another step
        precision = (
            torch.autocast(self.device.type, torch.bfloat16) if self.use_bf16 else nullcontext()
        )
        with precision:
            trace = self.think(self.model, batch)
            summed, right = coconut.loss(self.model, batch, trace)
            loss = whole = summed / labels
            if self.model.stop is not None:
                watcher = coconut.stop_loss(self.model, batch, trace)
                whole = loss + watcher * share
        whole.backward()
        self.totals += torch.stack([loss.detach(), (right & counts).sum(), counts.sum()])
