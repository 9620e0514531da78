"""Measure questions per second by batch size: six thoughts, a written chain, a direct answer.

    python bench/throughput.py                         ProsQA's lengths, batch 1, 2, 4, ...
    python bench/throughput.py --task=gsm8k

The batch doubles until memory runs out or until two batches in a row are no faster. The three paths
take turns; no sequence ends early. --out appends results after every batch. The last line of the
output is JSON.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs without installation

import nanococonut  # isort: skip  # noqa: F401  # first: sets how OpenMP waits
from bench.common.baselines import EngineProvider
from bench.common.results import OURS, ResultWriter
from bench.common.workload import (
    PATHS,
    TASK_LENGTHS,
    Workload,
    WorkloadOptions,
    model_shape,
    out_of_memory,
)
from bench.latency import Case, time_case
from nanococonut.runtime.cli import option
from nanococonut.runtime.errors import run_main

FASTER = 1.02  # smaller gains count as none


@dataclass(frozen=True)
class ThroughputConfig(WorkloadOptions):
    task: str = option("prosqa", "task whose lengths are used", choices=tuple(TASK_LENGTHS))
    rounds: int = option(3, "rounds per batch size", ge=1)


def main() -> None:
    config = ThroughputConfig.from_cli(__doc__)
    workload, lengths = Workload(config), TASK_LENGTHS[config.task]
    device, dtype = workload.device, workload.dtype
    workload.model.to(dtype)
    provider = EngineProvider(OURS, workload, "auto", "auto")
    engine = provider.engine
    requests = [(provider, path, lengths[path]) for path in PATHS]
    results = ResultWriter("throughput", config, device, dtype, **model_shape(workload.model))
    print(f"kernels: {engine.kernels}, graphs: {'yes' if engine.graph else 'no'}")

    # ---- measure, batch by batch
    batch, ended = 1, "two batches that were no faster"
    rates: list[float] = []  # with thoughts, per batch size
    while len(rates) < 3 or max(rates[-2:]) > FASTER * max(rates[:-2]):
        case = Case(config.task, batch, lengths["question"], requests)
        if out_of_memory(partial(time_case, case, config.rounds, workload)):
            ended = "memory"
            break
        for path in PATHS:
            values = [batch / timing["answer"] for timing in case.timings[OURS, path]]
            own = {"task": config.task, "path": path, "batch": batch}
            row = results.add("throughput", OURS, values, "questions/s", **own)
            if path == "thoughts":
                rates.append(row["value"])
        batch *= 2
    print(f"ended by {ended}")
    results.print_summary(kernels=engine.kernels, graph=engine.graph, ended=ended)


if __name__ == "__main__":
    run_main(main)
