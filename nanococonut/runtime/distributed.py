"""Data-parallel training: torchrun starts the processes, one all-reduce sums their gradients.

Every process samples the same batches and stages from the seed, and computes every n-th example of
a batch. Since all get the same summed gradients, weights and optimizer states stay equal without
being sent. docs/SCALING.md explains why this is not DistributedDataParallel.
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
from nanococonut.runtime.errors import UserError, run_main, user_message

# between the seeds of two ranks; odd, so that the 32 bits that torch's CPU generator reads differ
SEED_STRIDE = 0x9E3779B1
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# set by srun, mpirun, mpiexec (not SLURM_NTASKS, which sbatch sets even for one process)
TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def _launched() -> bool:
    """Return whether torchrun, or a launcher that sets its variables, started several processes."""
    env = {name: os.environ.get(name, "") for name in TORCHRUN}
    return all(env.values()) and env["WORLD_SIZE"].isdecimal() and int(env["WORLD_SIZE"]) > 1


def _refuse_half_launched() -> None:
    """Raise UserError if there are several processes without all of torchrun's variables.

    Otherwise each of them would train the whole run.
    """
    env = {name: value for name, value in os.environ.items() if value}
    names = [name for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK") if name in env]
    if env.get("WORLD_SIZE") == "1":
        names = []
    elif not names:
        names = [name for name in TASK_COUNTS if env.get(name, "1") != "1"]
    if names:
        raise UserError(
            f"{', '.join(f'{name}={env[name]}' for name in names)} is set, but training in several "
            f"processes needs all of {', '.join(TORCHRUN)}.\n"
            f"Start them with torchrun. To train in one process, run: unset {' '.join(names)}"
        )


@dataclass(frozen=True)
class Distributed:
    """The rank of this process and the number of processes. Only rank 0 prints, logs and saves."""

    rank: int = 0
    world: int = 1

    @classmethod
    def from_env(cls) -> "Distributed":
        """Return the rank in the process group that run_distributed joined, or rank 0 of 1.

        Raise UserError in the cases of _refuse_half_launched.
        """
        if dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        _refuse_half_launched()
        return cls()

    @property
    def is_master(self) -> bool:
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """Return the device of this process. If there are several, each has its own GPU.

        Raise UserError if the device cannot be used, or if several processes would share it.
        """
        if self.world == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return select_device(name)
        if name not in ("auto", "cuda"):
            raise UserError(
                f"--device={name} is one device, but {self.world} processes were started.\n"
                "Use auto, cuda or cpu: each process takes its own GPU."
            )
        return select_device(f"cuda:{os.environ['LOCAL_RANK']}")

    def seed(self, seed: int) -> int:
        """Return the dropout seed of this process."""
        return seed + self.rank * SEED_STRIDE

    def shard(self, items: Sequence) -> Sequence:
        """Return every n-th item. If items are sorted by length, shards have similar lengths."""
        return items[self.rank :: self.world]

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all processes, in float64 on the CPU."""
        if self.world == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        self._sum(sums)
        return sums.tolist()

    def all_reduce_gradients(
        self, parameters: Iterable[Tensor], totals: Tensor, flag: bool
    ) -> tuple[Tensor, bool]:
        """Sum every gradient over all processes, in place.

        Return (the sum of totals, whether any process set its flag); both are sent with the
        gradients, in float32. A parameter that has no gradient in any process keeps None, so that
        optimizers skip it as in a single process.
        """
        if self.world == 1:
            return totals, flag
        parameters = list(parameters)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        extras = [*(p.grad is not None for p in parameters), *totals.tolist(), flag]
        tensors = [*grads, grads[0].new_tensor(extras)]  # float32, even if totals are float64
        flat = torch.cat([x.flatten() for x in tensors])
        self._sum(flat)
        *sums, extras = flat.split([x.numel() for x in tensors])
        n_with_grad = extras[: len(grads)].tolist()  # processes with a gradient, per parameter
        for p, grad, total, n in zip(parameters, grads, sums, n_with_grad, strict=True):
            p.grad = grad.copy_(total.view_as(grad)) if n else None  # in place, for CUDA graphs
        return extras[len(grads) : -1], bool(extras[-1])

    def _sum(self, tensor: Tensor) -> None:
        try:
            dist.all_reduce(tensor)
        except RuntimeError as e:
            raise UserError(
                f"process {self.rank} of {self.world} lost its connection to the others: "
                f"{str(e).splitlines()[0]}\n"
                "Continue from the last checkpoint, if there is one, with --resume."
            ) from None


def run_distributed(main: Callable[[], None]) -> None:
    """Run main() like errors.run_main, in a script that may run as several processes.

    The processes form a group first. If main() fails, the first process to fail prints the reason;
    the others exit silently instead of waiting for it. A closed stdout does not end a run.
    """
    if not _launched():
        return run_main(main, goes_on=True)
    store, rank, world = next(iter(dist.rendezvous("env://")))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    if rank:
        sys.stdout = open(os.devnull, "w")

    def report_once() -> None:
        try:
            main()
        except Exception as e:
            is_users = bool(user_message(e))
            if store.add("failed", 1) > 1:  # not the first to fail
                # wait until the first has printed, because torchrun kills all when one exits
                with suppress(RuntimeError):
                    store.wait(["reported"], timedelta(seconds=10))
                sys.exit(2 if is_users else 1)
            if is_users:
                raise  # run_main prints it
            traceback.print_exc()
            sys.exit(1)

    try:
        run_main(report_once, goes_on=True)
        dist.destroy_process_group()
    except SystemExit as e:
        with suppress(RuntimeError):
            store.set("reported", "")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(e.code)  # without the other processes, the group may never shut down
