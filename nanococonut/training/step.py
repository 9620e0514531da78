"""One micro-batch of a training step: forward, backward, and the totals the loop reports.

On a GPU all of it is one CUDA graph per shape. To keep the shapes few, batches are padded up to
multiples of PREFIX and SUFFIX tokens and LABELS supervised ones, and a short batch is filled up
with empty sequences. Nothing here waits for the device: the loop reads the totals once a step.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nanococonut import coconut
from nanococonut.batch import Batch
from nanococonut.model import GPT
from nanococonut.runtime.graphs import GraphCache, round_up

PREFIX, SUFFIX, LABELS = 64, 16, 512


class MicroBatch(NamedTuple):
    """A batch as TrainStep takes it, on the CPU.

    batch        possibly padded to a graph's shape
    count_mask   (B,) bool: sequences whose correctness counts towards the training accuracy
    scale        (3,) labels of the step, factor of the stop loss, factor of the thought loss
    """

    batch: Batch
    count_mask: Tensor
    scale: Tensor


class TrainStep:
    """Adds the gradient of micro-batches to the parameters' and their counts to `totals`.

    kernels       of coconut.think, "torch" or "triton"
    use_bf16      autocast the forward pass to bfloat16
    graphs        the cache of CUDA graphs (None: no graphs)
    thought_loss  weight of coconut.thought_loss in the gradient (0: the paper's losses alone)
    totals        (3,) on the device: loss, examples all correct, examples counted
    """

    def __init__(
        self,
        model: GPT,
        kernels: str = "torch",
        use_bf16: bool = False,
        graphs: GraphCache | None = None,
        thought_loss: float = 0.0,
    ) -> None:
        self.model, self.kernels, self.use_bf16 = model, kernels, use_bf16
        self.graphs = graphs or GraphCache(0)
        self.thought_loss = thought_loss
        self.device = model.wte.weight.device
        # a sum of many numbers, so float64, which MPS does not have
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self.totals = torch.zeros(3, dtype=dtype, device=self.device)
        self._inputs: dict[tuple, MicroBatch] = {}  # static, on the device, one per graph

    def autocast(self) -> AbstractContextManager:
        on = self.use_bf16
        return torch.autocast(self.device.type, torch.bfloat16) if on else nullcontext()

    def zero_grad(self) -> None:
        """Clear gradients and totals, before the first micro-batch of a step."""
        self.totals.zero_()  # in place: graphs have captured this address too
        # optimizers skip a parameter without a gradient, such as one that no step used so far
        used = [p for p in self.model.parameters() if p.grad is not None]
        if not self.graphs.max_graphs:
            for p in used:
                p.grad = None
        elif used:
            torch._foreach_zero_([p.grad for p in used])  # in place, all in one launch

    def prepare(
        self,
        batch: Batch,
        counted: Sequence[bool],
        counts: tuple[int, int, int],
        n_thoughts: int = 0,
    ) -> MicroBatch:
        """Return the micro-batch, padded for a graph: host work, while the device is busy.

        counted      per example, whether its correctness counts
        counts       labels, examples and thought labels of the whole step, in all processes: each
                     loss is a mean over one of them
        n_thoughts   pad to at least as many, the most that a batch of this stage has
        """
        B, count_mask = len(batch.length), torch.tensor(counted)
        n_labels, n_examples, n_thought_labels = counts
        # a tensor, because a graph would keep the numbers of its capture
        factors = n_labels, B / n_examples, self.thought_loss / max(1, n_thought_labels)
        scale = torch.tensor(factors, dtype=self.model.wte.weight.dtype)
        if self.graphs.max_graphs:
            block_size = self.model.config.block_size
            prefix = min(round_up(batch.prefix.shape[1], PREFIX), block_size)
            suffix = min(round_up(batch.suffix.shape[1], SUFFIX), block_size)
            padded_B = 1 << (B - 1).bit_length()  # the next power of two
            n_labels = min(round_up(batch.n_labels, LABELS), padded_B * suffix)
            n_thoughts = max(n_thoughts, batch.max_thoughts)
            batch = batch.padded(padded_B, prefix, suffix, n_thoughts, n_labels)
            count_mask = F.pad(count_mask, (0, padded_B - B))
        if self.device.type == "cuda":  # copies from pinned memory do not block the host
            pinned = batch.map(Tensor.pin_memory)
            return MicroBatch(pinned, count_mask.pin_memory(), scale.pin_memory())
        return MicroBatch(batch, count_mask, scale)

    def __call__(self, micro_batch: MicroBatch) -> None:
        """Run forward and backward, eagerly or as a graph."""
        batch, count_mask, scale = micro_batch
        shapes = *batch.prefix.shape, batch.suffix.shape[1], *batch.thought_targets.shape[1:]
        key = (*shapes, batch.n_labels)  # graphs differ in their shapes only
        if key in self._inputs:  # inputs are copied to where the capture read them
            inputs = self._inputs[key]
            inputs.batch.copy_(batch)
            inputs.count_mask.copy_(count_mask, non_blocking=True)
            inputs.scale.copy_(scale, non_blocking=True)
        else:
            on_gpu = self.device.type == "cuda"
            mask, scale = (t.to(self.device, non_blocking=on_gpu) for t in (count_mask, scale))
            inputs = MicroBatch(batch.to(self.device), mask, scale)
            if self.graphs.max_graphs:
                self._inputs[key] = inputs
        self.graphs.run(key, lambda: self._forward_backward(*inputs))

    def _forward_backward(self, batch: Batch, count_mask: Tensor, scale: Tensor) -> None:
        n_labels, fraction, thought_scale = scale
        # autocast is entered within the graph, so no rounded weight is kept from another step
        with self.autocast():
            # three blocks: the prefix, the thoughts, the suffix that carries the labels
            # prefill, then the thoughts one by one
            trace = coconut.think(self.model, batch, kernels=self.kernels)
            loss_sum, correct = coconut.loss(self.model, batch, trace)  # (), (B,): the suffix
            loss = objective = loss_sum / n_labels
            if self.model.stop is not None:  # it reads detached states, so it only watches
                objective = loss + coconut.stop_loss(self.model, batch, trace) * fraction
            if self.thought_loss and batch.max_thoughts:
                summed = coconut.thought_loss(self.model, batch, trace)
                objective = objective + summed * thought_scale
        objective.backward()
        self.totals += torch.stack([loss.detach(), (correct & count_mask).sum(), count_mask.sum()])
