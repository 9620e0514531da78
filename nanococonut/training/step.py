"""One micro-batch of a training step: forward, backward, and the totals that the loop logs.

On a GPU this is one CUDA graph per shape; batch.collate pads batches to a few shapes.
Nothing here syncs with the device; the loop reads the totals once per step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanococonut import coconut
from nanococonut.batch import Batch, TokenSequence, collate
from nanococonut.model import GPT
from nanococonut.runtime.graphs import GraphCache


@dataclass(frozen=True)
class MicroBatch(Batch):
    """The input of a TrainStep: a batch, possibly padded to the shape of a graph."""

    count_mask: Tensor  # (B,) bool, sequences that count towards the training accuracy
    # (3,), over the whole step: number of targets, number of states of the stop loss (see prepare),
    # and the factor of the thought loss
    scale: Tensor


class TrainStep:
    """Forward and backward of a micro-batch; gradients and `totals` accumulate.

    kernels       backend of coconut.forward: "torch", "triton" or "c"
    use_bf16      autocast the forward pass to bfloat16
    graphs        cache of CUDA graphs (None: no graphs)
    thought_loss  weight of coconut.thought_loss in the objective (0: as in the paper)
    totals        (3,) on the device: loss, correct examples, counted examples
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
        # float64, since it sums many numbers; MPS has only float32
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self.totals = torch.zeros(3, dtype=dtype, device=self.device)
        self._inputs: dict[tuple, MicroBatch] = {}  # static inputs of each graph, on the device

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.use_bf16)

    def zero_grad(self) -> None:
        """Clear gradients and totals before the first micro-batch of a step."""
        self.totals.zero_()  # in place, because graphs have captured its address
        if not self.graphs.max_graphs:
            self.model.zero_grad()
        elif grads := [p.grad for p in self.model.parameters() if p.grad is not None]:
            # also in place; an unused parameter still has no gradient, so that optimizers skip it
            torch._foreach_zero_(grads)

    def prepare(
        self,
        sequences: Sequence[TokenSequence],
        counted: Sequence[bool],
        counts: tuple[int, int, int],
        n_thoughts: int = 0,
    ) -> MicroBatch:
        """Return the micro-batch of the sequences, padded if graphs are used. Runs on the host.

        counted     whether each sequence counts towards the training accuracy
        counts      numbers of targets, states and thought labels in the whole step, over all
                    processes; the three losses are means over these
        n_thoughts  if graphs are used, pad to at least this many thoughts
        """
        block_size = self.model.config.block_size if self.graphs.max_graphs else 0
        batch = collate(sequences, block_size, n_thoughts)
        n_padding = len(batch.length) - len(sequences)
        count_mask = torch.tensor([*counted, *[False] * n_padding])
        n_targets, n_states, n_thought_labels = counts
        # a tensor, because a graph would always replay the Python numbers of its capture
        factors = n_targets, n_states, self.thought_loss / max(1, n_thought_labels)
        scale = torch.tensor(factors, dtype=self.model.wte.weight.dtype)
        micro_batch = MicroBatch(**vars(batch), count_mask=count_mask, scale=scale)
        # copies from pinned memory do not block the host
        return micro_batch.map(Tensor.pin_memory) if self.device.type == "cuda" else micro_batch

    def __call__(self, batch: MicroBatch) -> None:
        """Run forward and backward, eagerly or by replaying a graph."""
        shapes = *batch.prefix.shape, batch.suffix.shape[1], *batch.thought_targets.shape[1:]
        key, unused = (*shapes, batch.n_targets), []  # unused: parameters without a gradient
        if key in self._inputs:
            inputs = self._inputs[key]  # the tensors that the graph reads
            for static, new in zip(inputs.tensors, batch.tensors, strict=True):
                static.copy_(new, non_blocking=True)
        else:
            # only CUDA keeps the source alive until the copy is done; MPS might read freed memory
            is_cuda = self.device.type == "cuda"
            inputs = batch.map(lambda t: t.to(self.device, non_blocking=is_cuda))
            if self.graphs.max_graphs:  # drop the inputs of graphs that were dropped
                kept = {k: x for k, x in self._inputs.items() if k in self.graphs.graphs}
                self._inputs = kept | {key: inputs}
                unused = [p for p in self.model.parameters() if p.grad is None]
        self.graphs.run(key, lambda: self._forward_backward(inputs))
        if any(p.grad is not None for p in unused):  # earlier graphs would overwrite the gradients
            self.graphs.keep_only(key)

    def _forward_backward(self, batch: MicroBatch) -> None:
        n_targets, n_states, thought_scale = batch.scale
        # autocast inside the graph, so that it caches no cast weights of an earlier step
        with self.autocast():
            hidden = coconut.forward(self.model, batch, self.kernels)
            total, correct = coconut.loss(self.model, batch, hidden)  # (), (B,)
            loss = objective = total / n_targets
            if self.model.stop is not None:  # its inputs are detached, so it only observes
                objective = loss + coconut.stop_loss(self.model, batch, hidden) / n_states
            if self.thought_loss and batch.max_thoughts:
                total = coconut.thought_loss(self.model, batch, hidden)
                objective = objective + total * thought_scale
        objective.backward()
        n_correct = (correct & batch.count_mask).sum()
        self.totals += torch.stack([loss.detach(), n_correct, batch.count_mask.sum()])
