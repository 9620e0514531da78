"""Time thoughts against a written chain of thought, and against other implementations.

    python bench/latency.py                    anywhere: a GPU or a CPU
    python bench/latency.py --released CLONE --released_python VENV/bin/python

Measured are a latent step, a token step, the first token after 6 thoughts, and whole answers with
the paper's lengths; no sequence ends early. The model is a random GPT-2 124M, which is as fast as a
trained one, or --checkpoint. Providers take turns, and are timed only if they generate the same
greedy tokens in float32. The roofline of a step is the bytes it must read, at the bandwidth
measured in the same rounds. --out appends results after every case; the last line is JSON.
"""

import math
import os
import statistics
import sys
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs without installation

import nanococonut  # isort: skip  # noqa: F401  # first: sets OMP_WAIT_POLICY

from bench.common import baselines, tables
from bench.common.baselines import OURS, Provider, Timing
from bench.common.results import ResultWriter
from bench.common.roofline import Bandwidth
from bench.common.worker import check_released
from bench.common.workload import (
    PATHS,
    TASK_LENGTHS,
    THOUGHTS,
    Workload,
    WorkloadOptions,
    catch_oom,
    load_model,
    parse_ints,
)
from nanococonut.runtime.cli import make_config, option, parse_cli
from nanococonut.runtime.errors import UserError, run_main

STEP_TOKENS = 9  # generated where single steps are measured: 8 token steps
BATCHES = {"cpu": "1,8", "cuda": "1,8,64,256"}
METRICS = ("latent_step", "token_step", "first_token")


@dataclass(frozen=True)
class LatencyConfig(WorkloadOptions):
    rounds: int = option(5, "repeats of each comparison", ge=1)
    batches: str | None = option(None, "batch sizes, with commas (None: 1,8,64,256; on a CPU 1,8)")
    contexts: str = option("100,400,1000", "tokens before the thoughts, with commas")
    tasks: str = option(",".join(TASK_LENGTHS), "tasks whose whole answers are timed, with commas")
    peers: bool = option(True, "other implementations too, if they are installed")
    released: str | None = option(None, "a clone of facebookresearch/coconut to compare with")
    released_python: str | None = option(None, "a Python that has torch and transformers 4.46.2")
    transformers_python: str | None = option(
        None, "a Python that has transformers 5 (None: this one, if it has)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_released(self.released, self.released_python)
        parse_ints("--batches", self.batches or BATCHES["cpu"])
        parse_ints("--contexts", self.contexts)
        for task in filter(None, self.tasks.split(",")):
            if task not in TASK_LENGTHS:
                raise UserError(f"--tasks names {task!r}.\nThere are {', '.join(TASK_LENGTHS)}.")


@dataclass
class Case:
    """Requests that are compared, at one batch and context. task: "" for single steps."""

    task: str
    batch: int
    context: int
    requests: list[tuple[Provider, str, int]]  # provider, path of PATHS, tokens to generate
    bandwidth: list[float] = field(default_factory=list)  # GB/s of each round
    timings: dict[tuple[str, str], list[Timing]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        what = f"{self.task} answers" if self.task else "steps"
        return f"{what}, batch {self.batch}, context {self.context}"

    @property
    def shape(self) -> dict[str, int]:
        return {"batch": self.batch, "context": self.context}

    def ms(self, provider: str, path: str, metric: str) -> list[float]:
        """Return the milliseconds of every round."""
        return [1e3 * timing[metric] for timing in self.timings[provider, path]]


def cases(config: LatencyConfig, providers: list[Provider], on_gpu: bool) -> list[Case]:
    """Return everything to measure."""
    batches = parse_ints("--batches", config.batches or BATCHES["cuda" if on_gpu else "cpu"])
    contexts = parse_ints("--contexts", config.contexts)
    whole, steps = [], []
    for task in (t for t in TASK_LENGTHS if t in config.tasks.split(",")):
        lengths, others = TASK_LENGTHS[task], [] if whole else providers[1:]
        requests = [(providers[0], path, lengths[path]) for path in PATHS]
        requests += [(p, "thoughts", lengths["thoughts"]) for p in others]
        whole.append(Case(task, 1, lengths["question"], requests))
    for batch, context in sorted(product(batches, contexts), key=math.prod):
        able = [p for p in providers if batch <= (p.max_batch or batch)]
        steps.append(Case("", batch, context, [(p, "thoughts", STEP_TOKENS) for p in able]))
    return [*whole[:1], *steps, *whole[1:]]


def unfit(case: Case, workload: Workload) -> str | None:
    """Return why a case cannot be measured: too many positions, or too little memory."""
    block_size = workload.model.config.block_size
    n_new = [n + (THOUGHTS + 1) * (path == "thoughts") for _, path, n in case.requests]
    n_positions = case.context + max(n_new)
    if n_positions > block_size:
        return f"{case.name}: {n_positions} positions, the model has {block_size}"
    # Linux ends a process that fills the memory; a GPU's, and other systems, raise an error
    if workload.device.type == "cpu" and "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", ()):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if workload.cache_bytes(case.batch, n_positions) > 0.6 * free:
            return f"{case.name}: memory"
    return None


def time_case(
    case: Case, rounds: int, workload: Workload, bandwidth: Bandwidth | None = None
) -> None:
    """Fill in the timings of a case: every request once in each round, in an order that rotates."""
    requests = [(p, path, workload.request(path, n)) for p, path, n in case.requests]
    if workload.device.type == "cuda":  # what is captured or compiled at first use is not timed
        prompts = workload.prompts(case.batch, case.context, 0)
        for _ in range(2):  # a longer request drops the graphs that a shorter one has captured
            for provider, _, request in requests:
                provider.generate(prompts, *request)
    for i in range(rounds):
        case.bandwidth += [bandwidth.measure()] if bandwidth else []
        prompts = workload.prompts(case.batch, case.context, i)
        start = i % len(requests)
        for provider, path, request in requests[start:] + requests[:start]:
            timing = provider.generate(prompts, *request)
            timing["answer_after_prefill"] = timing["answer"] - timing["prefill"]
            case.timings.setdefault((provider.name, path), []).append(timing)


def write_answers(results: ResultWriter, case: Case) -> None:
    """Append the whole answers of a case, and what they are relative to ours with thoughts."""
    for provider, path, n_tokens in case.requests:
        extra = {"labels": {"task": case.task, "path": path}, "versions": provider.versions}
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
    """Append the single steps of a case, their rooflines, and others relative to ours."""
    gb_per_s = statistics.median(case.bandwidth)
    for metric in METRICS:
        ours = case.ms(OURS, "thoughts", metric)
        for provider in (provider for provider, path, _ in case.requests if path == "thoughts"):
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
    """Time every case and append its results. Return what was left out, and why."""
    left_out, gb_per_s, bandwidth = [], [], Bandwidth(workload.device)
    for case in all_cases:
        if why := unfit(case, workload):
            left_out.append(why)
            continue
        with catch_oom(workload.device) as failed:
            time_case(case, rounds, workload, bandwidth)
        if failed:
            left_out.append(f"{case.name}: out of memory")
            continue
        if case.task:
            write_answers(results, case)
        if not case.task or len(case.timings) > len(PATHS):  # steps, or answers of others
            write_steps(results, case, workload)
        gb_per_s += case.bandwidth
    if not gb_per_s:
        raise UserError(f"nothing fits: {left_out[0]}.\nGive smaller --contexts and --batches.")
    results.add("memory_bandwidth", "torch", gb_per_s, "GB/s")
    return left_out


def main() -> None:
    given, _ = parse_cli(LatencyConfig, sys.argv[1:], __doc__)
    config = make_config(LatencyConfig, given)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan  # not on Windows
    workload = load_model(config)
    device, dtype = workload.device, workload.dtype
    results = ResultWriter("latency", config, device, dtype, shape=workload.shape())
    print(f"{workload.name}, {workload.model.n_params():,} parameters")

    # ---- providers that compute the same, in turns
    providers, missing = baselines.start(workload, config)
    try:
        length = min(48, workload.model.config.block_size // 2)
        baselines.drop_wrong(providers, workload, missing, length)
        engine = providers[0].engine
        print(
            f"{results.common['device']}, {results.common['dtype']}, kernels: {engine.kernels} "
            f"({engine.reason}), CUDA graphs: {'yes' if engine.graph else 'no'}, load {load:.1f}"
        )
        for name, why in missing.items():
            print(f"without {name}: {why}")
        for provider in providers:
            provider.cast(dtype)
        all_cases = cases(config, providers, device.type == "cuda")
        left_out = measure(all_cases, config.rounds, workload, results)
    finally:
        for provider in providers:
            provider.close()

    # ---- report
    print("\n".join(["", tables.latency(results.rows), "", *(f"left out: {w}" for w in left_out)]))
    about = {"model": workload.name, "load_at_start": round(load, 2), "graph": engine.graph}
    about |= {"kernels": engine.kernels, "missing": missing, "left_out": left_out}
    print(results.summary(**about))


if __name__ == "__main__":
    run_main(main)
