"""Several processes, one training run: torchrun starts them, their gradients are summed.

Every process draws the same rows and stages from the seed, computes every world-th row of the batch
and adds its gradient to the others' in a single all-reduce; weights and moments stay the same
everywhere without being sent. Why not DistributedDataParallel: it averages where the loss wants a
sum over the whole batch's labels, it wants one forward() where a step here is embed, backbone (once
for each thought) and head, and it fails where a parameter is unused in some stage or on some rank,
unless it searches for it every time. What it would give, overlap with the backward pass, is worth
the time of one all-reduce (docs/SCALING.md).
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from nanococonut.runtime.device import select_device
from nanococonut.runtime.errors import UserError, run_main

SEED_STRIDE = (
    0x9E3779B1  # between two processes' seeds; odd, and torch's CPU generator reads 32 bits
)


def _launched() -> bool:
    """By torchrun, or anything that sets the same variables, and not alone. Cluster nodes may have
    the others set without it."""
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


@dataclass(frozen=True)
class Distributed:
    """This process among those of the run. rank 0 alone prints, logs and saves."""

    rank: int = 0
    world: int = 1

    @classmethod
    def from_env(cls) -> "Distributed":
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def device(self, name: str) -> torch.device:
        """--device for this process: of several on a machine, each has a GPU of its own, by
        LOCAL_RANK. UserError where the device cannot be used or is a single one."""
        if self.world == 1 or name == "cpu":
            return select_device(name)
        if name not in ("auto", "cuda"):
            raise UserError(
                f"--device={name} is one device, and {self.world} processes were started.\n"
                "Give auto, cuda or cpu: each process takes a GPU of its own."
            )
        if name == "auto" and not torch.cuda.is_available():
            return select_device("cpu")
        where = select_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(where)
        return where

    def seed(self, seed: int) -> int:
        """The seed of this process's dropout."""
        return seed + self.rank * SEED_STRIDE

    def shard(self, items: Sequence) -> Sequence:
        """Every world-th of them. Of sorted ones, all processes have equally long ones."""
        return items[self.rank :: self.world]

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Their sums over all processes, in float64 on the CPU."""
        if self.world == 1:
            return list(values)
        together = torch.tensor(values, dtype=torch.float64)
        self._sum(together)
        return together.tolist()

    def all_reduce_gradients(
        self, parameters: Iterable[Tensor], values: Sequence[float]
    ) -> Sequence[float]:
        """Add up every gradient over all processes, in place; returns the sums of values, which
        travel along (float32). What has a gradient nowhere is left without one: optimizers pass it
        over as in one process."""
        if self.world == 1:
            return values
        parameters = list(parameters)
        if not parameters:
            return self.all_reduce_sum(values)
        sizes = [p.numel() for p in parameters]
        riders = [float(p.grad is not None) for p in parameters] + list(values)
        flat = torch.cat(
            [
                p.new_zeros(n) if p.grad is None else p.grad.flatten()
                for p, n in zip(parameters, sizes, strict=True)
            ]
            + [torch.tensor(riders, device=parameters[0].device)]
        )
        self._sum(flat)
        *gradients, riders = flat.split([*sizes, len(riders)])
        riders = riders.tolist()
        for p, summed, users in zip(parameters, gradients, riders, strict=False):
            if p.grad is not None:
                p.grad.copy_(summed.view_as(p))
            elif users:
                p.grad = summed.view_as(p).clone()
        return riders[len(parameters) :]

    def _sum(self, tensor: Tensor) -> None:
        try:
            dist.all_reduce(tensor)
        except RuntimeError as e:
            raise UserError(
                f"process {self.rank} of {self.world} lost the others: {str(e).splitlines()[0]}\n"
                "Go on from the last checkpoint with --resume."
            ) from None


def run_distributed(main: Callable[[], None]) -> None:
    """errors.run_main for a script that may run as several processes: joined before main(), and
    the first to fail says why, once; the others follow it silently instead of waiting for it."""
    if not _launched():
        return run_main(main)
    store, rank, world = next(iter(dist.rendezvous("env://")))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    if rank:
        sys.stdout = open(os.devnull, "w")

    def once() -> None:
        try:
            main()
        except Exception as e:
            if store.add("failed", 1) > 1:  # torchrun ends all once one is gone: let it be heard
                with suppress(RuntimeError):
                    store.wait(["told"], timedelta(seconds=10))
                sys.exit(2 if isinstance(e, UserError) else 1)
            if isinstance(e, UserError):
                raise
            traceback.print_exc()
            sys.exit(1)

    try:
        run_main(once)
        dist.destroy_process_group()
    except SystemExit as e:
        with suppress(RuntimeError):
            store.set("told", "")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(e.code)  # a communicator that has lost the others may never come to its end
