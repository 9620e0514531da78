"""A large model's weights, gradients and moments in shares, one a process: FSDP2's fully_shard.

Every layer and the model around them is a unit. FSDP gathers a unit when its forward() is called
and reduces its gradient in every backward pass through it. A step of ours passes each layer once
for each thought, rows on one process may have more thoughts than on another, and a process may have
no rows at all: with collectives within the passes the processes would wait for each other forever.
So here are two fixed points a step: all weights are gathered before the micro-batches (`gather`),
all gradients are summed behind them (`reduce`), and between lies no communication. Only optimizer
state, gradients and weights at rest are in shares; during a step whole weights and this process's
whole gradient are there too (bytes: docs/SCALING.md).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from nanococonut.model import GPT

# torch.distributed.fsdp and .tensor take over a second to import: only runs that use them pay


def shard(model: GPT) -> None:
    """Keep this process's share of every parameter, which become DTensors. All processes call it,
    with equal weights, before optimizers are made."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(model.wte.weight.device.type, (torch.distributed.get_world_size(),))
    for unit in (*model.h, model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=False)
    for unit in _units(model):
        # a sum, since the loss is over all processes' labels; plain, or gloo cannot do it
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    with torch.no_grad():
        _touch(model)  # FSDP finds out here which unit holds the others
    _release(model)


def gather(model: GPT) -> None:
    """Whole weights on every process, and gradients that stay where they are."""
    model.set_requires_gradient_sync(False)
    model.set_reshard_after_backward(False)
    for unit in _units(model):
        unit.unshard()


def reduce(model: GPT) -> None:
    """Sum the gradients since `gather` over all processes; each keeps its share of them and of the
    weights. By FSDP's own hooks, in one backward pass of a single token that adds nothing, so that
    every parameter has a gradient to reduce; what had one nowhere is left without (optimizers pass
    it over, as in one process)."""
    used = torch.tensor([float(p.grad is not None) for p in model.parameters()])
    torch.distributed.all_reduce(used)
    model.set_requires_gradient_sync(True)
    model.set_reshard_after_backward(True)
    (_touch(model) * 0).backward()
    for p, users in zip(model.parameters(), used.tolist(), strict=True):
        if not users:
            p.grad = None


@contextmanager
def whole(model: GPT) -> Iterator[None]:
    """Whole weights on every process, for passes that need no gradient."""
    for unit in _units(model):
        unit.unshard()
    yield
    _release(model)


def _units(model: GPT) -> list[nn.Module]:
    return [model, *model.h]


def _release(model: GPT) -> None:
    for unit in _units(model):
        unit.reshard()


def _touch(model: GPT) -> torch.Tensor:
    """A number that every parameter is part of."""
    logits = model(torch.zeros(1, 1, dtype=torch.long, device=model.wte.weight.device))
    beside = [part for part in (model.smear, model.project, model.stop) if part is not None]
    return logits.sum() + sum(p.sum() for part in beside for p in part.parameters())
