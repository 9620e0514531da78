"""Time thoughts against written chains of thought, and against other implementations.

    python bench/latency.py                    any machine, with or without a GPU
    python bench/latency.py --released CLONE --released_python VENV/bin/python

It times a latent step, a token step, the first token after 6 thoughts, and whole answers with the
paper's lengths; no sequence ends early. The model is GPT-2 124M with random weights, which is as
fast as a trained one. Providers take turns, and only those with the same greedy tokens in float32
are timed. A step's roofline is the bytes it must read, at the bandwidth measured in the same
rounds. --out appends the results of each case once it is done; the last line of the output is JSON.
"""

import math
import signal
import statistics
import sys
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs without installation

import nanococonut  # isort: skip  # noqa: F401  # first: sets how OpenMP waits

from bench.common import baselines, tables
from bench.common.baselines import Provider, Timing
from bench.common.results import OURS, ResultWriter, load_average
from bench.common.workload import (
    GPT2,
    PATHS,
    TASK_LENGTHS,
    THOUGHTS,
    Bandwidth,
    Workload,
    WorkloadOptions,
    model_shape,
    out_of_memory,
    parse_ints,
)
from nanococonut.runtime.cli import option
from nanococonut.runtime.errors import UserError, run_main

STEP_TOKENS = 9  # tokens generated to time single steps: 8 token steps


@dataclass(frozen=True)
class LatencyConfig(WorkloadOptions):
    rounds: int = option(5, "repeats of each comparison", ge=1)
    batches: str | None = option(None, "batch sizes, with commas (None: 1,8,64,256; 1,8 on a CPU)")
    contexts: str = option("100,400,1000", "tokens before the thoughts, with commas")
    tasks: str = option(",".join(TASK_LENGTHS), "tasks whose whole answers are timed, with commas")
    peers: bool = option(True, "also time other implementations, if installed")
    released: str | None = option(None, "a clone of facebookresearch/coconut to compare with")
    released_python: str | None = option(None, "a Python with torch and transformers 4.46.2")

    def validate(self) -> None:
        baselines.check_released(self.released, self.released_python)
        parse_ints("--batches", self.batches or "1")
        longest = GPT2.block_size - THOUGHTS - 1 - STEP_TOKENS
        if max(parse_ints("--contexts", self.contexts)) > longest:
            raise UserError(f"--contexts={self.contexts} is too long.\nUse at most {longest}.")
        for task in filter(None, self.tasks.split(",")):
            if task not in TASK_LENGTHS:
                raise UserError(f"--tasks: {task!r} is unknown.\nUse {', '.join(TASK_LENGTHS)}.")


@dataclass
class Case:
    """Requests of one batch size and context that are timed in turns."""

    task: str  # "" for single steps
    batch: int
    context: int
    requests: list[tuple[Provider, str, int]]  # provider, path in PATHS, tokens to generate
    bandwidth: list[float] = field(default_factory=list)  # GB/s per round
    timings: dict[tuple[str, str], list[Timing]] = field(default_factory=dict)

    @property
    def shape(self) -> dict[str, int]:
        return {"batch": self.batch, "context": self.context}

    def ms(self, provider: str, path: str, metric: str) -> list[float]:
        """Return the milliseconds of each round."""
        return [1e3 * timing[metric] for timing in self.timings[provider, path]]


def cases(config: LatencyConfig, providers: list[Provider], on_gpu: bool) -> list[Case]:
    """Return everything to measure, starting with the answers of the first task."""
    batches = parse_ints("--batches", config.batches or ("1,8,64,256" if on_gpu else "1,8"))
    contexts = parse_ints("--contexts", config.contexts)
    whole, steps = [], []
    for task in (t for t in TASK_LENGTHS if t in config.tasks.split(",")):
        lengths = TASK_LENGTHS[task]
        requests = [(providers[0], path, lengths[path]) for path in PATHS]
        if not whole:  # the other providers generate answers of the first task only
            requests += [(p, "thoughts", lengths["thoughts"]) for p in providers[1:]]
        whole.append(Case(task, 1, lengths["question"], requests))
    for batch, context in sorted(product(batches, contexts), key=math.prod):
        # the released generate() takes a single question
        able = [p for p in providers if batch == 1 or p.name != "released"]
        steps.append(Case("", batch, context, [(p, "thoughts", STEP_TOKENS) for p in able]))
    return [*whole[:1], *steps, *whole[1:]]


def warm_up(case: Case, workload: Workload) -> None:
    """Compile the kernels and capture the graphs of a case."""
    prompts = workload.prompts(case.batch, case.context, 0)
    for provider, path, n in 2 * case.requests:  # twice: longer requests drop earlier graphs
        provider.generate(workload.request(prompts, path, n))


def time_case(
    case: Case, rounds: int, workload: Workload, bandwidth: Bandwidth | None = None
) -> None:
    """Fill in the timings of a case: every request once per round, in rotating order."""
    if workload.device.type == "cuda":
        warm_up(case, workload)
    for i in range(rounds):
        if bandwidth:
            case.bandwidth.append(bandwidth.measure())
        prompts = workload.prompts(case.batch, case.context, i)
        start = i % len(case.requests)
        for provider, path, n in case.requests[start:] + case.requests[:start]:
            timing = provider.generate(workload.request(prompts, path, n))
            timing["answer_after_prefill"] = timing["answer"] - timing["prefill"]
            case.timings.setdefault((provider.name, path), []).append(timing)


def write_answers(results: ResultWriter, case: Case) -> None:
    """Append the times of a case's whole answers, and their ratios to ours with thoughts."""
    for provider, path, n_tokens in case.requests:
        extra = {"task": case.task, "path": path, "versions": provider.versions}
        extra |= {"thoughts": THOUGHTS * (path == "thoughts"), "tokens": n_tokens} | case.shape
        for metric in ("answer", "answer_after_prefill"):
            times = case.ms(provider.name, path, metric)
            ours = case.ms(OURS, "thoughts", metric)
            results.add(metric, provider.name, times, "ms", **extra)
            if provider.name != OURS and metric == "answer":
                results.add_ratio(metric, provider.name, times, ours, OURS, **extra)
            elif path == "chain":
                results.add_ratio(metric, OURS, times, ours, "thoughts", **extra)


def write_steps(results: ResultWriter, case: Case, workload: Workload) -> None:
    """Append the times of a case's single steps, their rooflines, and ratios to ours."""
    gb_per_s = statistics.median(case.bandwidth)
    providers = [provider for provider, path, _ in case.requests if path == "thoughts"]
    for metric in ("latent_step", "token_step", "first_token"):
        ours = case.ms(OURS, "thoughts", metric)
        for provider in providers:
            times = case.ms(provider.name, "thoughts", metric)
            extra = {"versions": provider.versions} | case.shape
            results.add(metric, provider.name, times, "ms", **extra)
            if provider.name != OURS:
                results.add_ratio(metric, provider.name, times, ours, OURS, **extra)
        if metric != "first_token":
            n_bytes = workload.step_bytes(case.batch, case.context, metric == "token_step")
            ms = n_bytes / gb_per_s / 1e6
            results.add(metric, "roofline", [ms], "ms", spread={}, **case.shape)
    token, latent = (case.ms(OURS, "thoughts", m) for m in ("token_step", "latent_step"))
    results.add_ratio("token_step", OURS, token, latent, "latent_step", **case.shape)


def measure(
    all_cases: list[Case], rounds: int, workload: Workload, results: ResultWriter
) -> list[str]:
    """Time every case and append its results. Return the cases that ran out of memory."""
    left_out, gb_per_s, bandwidth = [], [], Bandwidth(workload.device)
    for case in all_cases:
        if out_of_memory(partial(time_case, case, rounds, workload, bandwidth)):
            left_out.append(f"batch {case.batch}, context {case.context}: out of memory")
            continue
        if case.task:
            write_answers(results, case)
        if not case.task or len(case.timings) > len(PATHS):  # single steps, or several providers
            write_steps(results, case, workload)
        gb_per_s += case.bandwidth
    if gb_per_s:
        results.add("memory_bandwidth", "torch", gb_per_s, "GB/s")
    return left_out


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # runs atexit, which ends workers
    config = LatencyConfig.from_cli(__doc__)
    load = load_average()
    workload = Workload(config)
    device, dtype = workload.device, workload.dtype
    results = ResultWriter("latency", config, device, dtype, **model_shape(workload.model))
    print(f"random weights, GPT-2 124M, {workload.model.n_params():,} parameters")

    # ---- start the providers, then time them in turns
    providers, missing = baselines.start(workload, config)
    engine = providers[0].engine
    print(
        f"{results.common['device']}, {results.common['dtype']}, kernels: {engine.kernels} "
        f"({engine.reason}), CUDA graphs: {'yes' if engine.graph else 'no'}, load {load:.1f}"
    )
    for name, why in missing.items():
        print(f"without {name}: {why}")
    workload.model.to(dtype)  # they were compared in float32
    all_cases = cases(config, providers, device.type == "cuda")
    left_out = measure(all_cases, config.rounds, workload, results)

    # ---- report
    print(f"\n{tables.latency(results.rows)}\n")
    for case in left_out:
        print(f"left out: {case}")
    about = {"load_at_start": round(load, 2), "graph": engine.graph, "kernels": engine.kernels}
    results.print_summary(**about, missing=missing, left_out=left_out)


if __name__ == "__main__":
    run_main(main)
