"""Measure questions per second against batch: six thoughts, the written chain, the answer alone.

    python bench/throughput.py                         ProsQA's lengths, batch 1, 2, 4, ...
    python bench/throughput.py --task=gsm8k

Batches double until memory ends, or until two in a row were no faster. The three paths take turns;
no sequence ends early. --out appends results after every batch; the last line is JSON.
"""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs without installation

import nanococonut  # isort: skip  # noqa: F401  # first: sets OMP_WAIT_POLICY
from bench.common.baselines import EngineProvider
from bench.common.results import ResultWriter
from bench.common.workload import (
    PATHS,
    TASK_LENGTHS,
    THOUGHTS,
    Workload,
    WorkloadOptions,
    catch_oom,
    load_model,
)
from nanococonut.ops import BACKENDS
from nanococonut.runtime.cli import make_config, option, parse_cli
from nanococonut.runtime.errors import UserError, run_main

FASTER = 1.02  # a gain of less than this is none


@dataclass(frozen=True)
class ThroughputConfig(WorkloadOptions):
    task: str = option("prosqa", "whose lengths", choices=tuple(TASK_LENGTHS))
    rounds: int = option(3, "repeats of every batch", ge=1)
    max_batch: int = option(65536, "largest batch", ge=1)
    kernels: str = option("auto", "what runs a step", choices=BACKENDS)
    graph: str = option("auto", "steps by CUDA graphs", choices=("auto", "on", "off"))


def time_batch(
    provider: EngineProvider, workload: Workload, config: ThroughputConfig, batch: int
) -> dict[str, list[float]]:
    """Return the questions per second of every round, by path."""
    lengths = TASK_LENGTHS[config.task]
    requests = {path: workload.request(path, lengths[path]) for path in PATHS}
    # on a GPU, what is captured or compiled at first use is not timed; the second time, because a
    # longer request drops the graphs that a shorter one has captured
    n_warmup = 2 if workload.device.type == "cuda" else 0
    rates: dict[str, list[float]] = {path: [] for path in requests}
    for i in range(-n_warmup, config.rounds):
        prompts = workload.prompts(batch, lengths["question"], max(i, 0))
        for path, request in requests.items():
            rate = batch / provider.generate(prompts, *request)["answer"]
            rates[path] += [rate] if i >= 0 else []
    return rates


def main() -> None:
    given, _ = parse_cli(ThroughputConfig, sys.argv[1:], __doc__)
    config = make_config(ThroughputConfig, given)
    workload, lengths = load_model(config), TASK_LENGTHS[config.task]
    device, dtype = workload.device, workload.dtype
    workload.model.to(dtype)
    provider = EngineProvider("nanococonut", workload, config.kernels, config.graph)
    engine = provider.engine
    block_size = workload.model.config.block_size
    longest = lengths["question"] + max(lengths["chain"], THOUGHTS + 1 + lengths["thoughts"])
    if longest > block_size:
        raise UserError(
            f"{config.task}'s answers take {longest} positions, the model has {block_size}.\n"
            "Give another --task or --checkpoint=random."
        )
    results = ResultWriter("throughput", config, device, dtype, shape=workload.shape())
    print(f"{workload.name}, kernels: {engine.kernels}, graphs: {'yes' if engine.graph else 'no'}")

    # ---- measure, batch by batch
    batch, fastest, n_no_faster, ended = 1, 0.0, 0, "the largest batch"
    while batch <= config.max_batch and n_no_faster < 2:
        with catch_oom(device) as failed:
            rates = time_batch(provider, workload, config, batch)
        if failed:
            ended = "memory"
            break
        for path, values in rates.items():
            labels = {"task": config.task, "path": path}
            results.add(
                "throughput", "nanococonut", values, "questions/s", labels=labels, batch=batch
            )
        rate = statistics.median(rates["thoughts"])
        n_no_faster = 0 if rate > FASTER * fastest else n_no_faster + 1
        fastest = max(fastest, rate)
        batch *= 2
    ended = "two batches that were no faster" if n_no_faster == 2 else ended
    print(f"ended by {ended}")
    about = {"model": workload.name, "kernels": engine.kernels, "graph": engine.graph}
    print(results.summary(**about, ended=ended))


if __name__ == "__main__":
    run_main(main)
