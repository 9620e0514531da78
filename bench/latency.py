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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs without installation

import nanococonut  # isort: skip  # noqa: F401  # first: sets OMP_WAIT_POLICY
import torch

from bench.common import baselines, tables
from bench.common.baselines import Provider, Timing
from bench.common.results import ResultWriter
from bench.common.roofline import Bandwidth, best
from bench.common.worker import check_released
from bench.common.workload import (
    TASK_LENGTHS,
    THOUGHTS,
    Workload,
    WorkloadOptions,
    catch_oom,
    load_model,
    resolve_dtype,
)
from nanococonut.runtime.cli import make_config, option, parse_cli
from nanococonut.runtime.device import select_device
from nanococonut.runtime.errors import UserError, run_main

STEP_TOKENS = 9  # generated where single steps are measured: 8 token steps
BATCHES = {"cpu": "1,8", "cuda": "1,8,64,256"}
OURS = "nanococonut"


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
    seed: int = option(0, "of the prompts", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_released(self.released, self.released_python)
        self.numbers("batches", BATCHES["cuda"])
        self.numbers("contexts")
        for task in filter(None, self.tasks.split(",")):
            if task not in TASK_LENGTHS:
                raise UserError(f"--tasks names {task!r}.\nThere are {', '.join(TASK_LENGTHS)}.")

    def numbers(self, name: str, default: str = "") -> list[int]:
        pieces = (getattr(self, name) or default).split(",")
        if not all(p.strip().isdigit() and int(p) for p in pieces):
            raise UserError(f"--{name}={getattr(self, name)} is no list of numbers, as in 1,8,64.")
        return sorted({int(p) for p in pieces})


@dataclass
class Request:
    """One batch that one provider generates."""

    provider: Provider
    path: str  # thoughts, chain or direct
    n_tokens: int

    @property
    def n_thoughts(self) -> int:
        return THOUGHTS if self.path == "thoughts" else 0

    def run(self, workload: Workload, prompts: list[list[int]]) -> Timing:
        forced_tokens = [workload.eot] if self.n_thoughts else []
        return self.provider.generate(prompts, self.n_thoughts, forced_tokens, self.n_tokens)


@dataclass
class Case:
    """Requests that are compared, at one batch and context. task: "" for single steps."""

    task: str
    batch: int
    context: int
    requests: list[Request]
    bandwidth: list[dict[str, float]] = field(default_factory=list)  # of each round
    timings: dict[tuple[str, str], list[Timing]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        what = f"{self.task} answers" if self.task else "steps"
        return f"{what}, batch {self.batch}, context {self.context}"

    @property
    def n_positions(self) -> int:
        return self.context + max(r.n_thoughts + 1 + r.n_tokens for r in self.requests)

    @property
    def shape(self) -> dict[str, int]:
        return {"batch": self.batch, "context": self.context}

    def ms(self, provider: str, path: str, metric: str) -> list[float]:
        """Return the milliseconds of every round."""
        timings = self.timings[provider, path]
        if metric == "answer_after_prefill":
            return [1e3 * (t["answer"] - t["prefill"]) for t in timings]
        return [1e3 * t[metric] for t in timings]


def cases(config: LatencyConfig, providers: list[Provider], on_gpu: bool) -> list[Case]:
    """Return everything to measure."""
    tasks = [t for t in TASK_LENGTHS if t in config.tasks.split(",")]
    batches = config.numbers("batches", BATCHES["cuda" if on_gpu else "cpu"])
    contexts = config.numbers("contexts")

    def answers(task: str, compared: list[Provider]) -> Case:
        lengths = TASK_LENGTHS[task]
        n_tokens = {"thoughts": lengths.answer, "chain": lengths.chain, "direct": lengths.answer}
        requests = [Request(compared[0], path, n) for path, n in n_tokens.items()]
        requests += [Request(p, "thoughts", lengths.answer) for p in compared[1:]]
        return Case(task, 1, lengths.question, requests)

    def steps(batch: int, context: int) -> Case:
        others = [p for p in providers[1:] if batch <= (p.max_batch or batch)]
        requests = [Request(p, "thoughts", STEP_TOKENS) for p in (providers[0], *others)]
        return Case("", batch, context, requests)

    shapes = sorted((b * c, b, c) for b in batches for c in contexts)
    others = [answers(task, providers[:1]) for task in tasks[1:]]
    return [answers(t, providers) for t in tasks[:1]] + [steps(b, c) for _, b, c in shapes] + others


def unfit(case: Case, workload: Workload) -> str | None:
    """Return why a case cannot be measured: too many positions, or too little memory."""
    block_size, free = workload.model.config.block_size, math.inf
    if case.n_positions > block_size:
        return f"{case.name}: {case.n_positions} positions, the model has {block_size}"
    if workload.device.type == "cuda":
        free = torch.cuda.mem_get_info(workload.device)[0]
    elif "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    is_large = workload.cache_bytes(case.batch, case.n_positions) > 0.6 * free
    return f"{case.name}: memory" if is_large else None


def time_case(case: Case, config: LatencyConfig, workload: Workload, bandwidth: Bandwidth) -> None:
    """Fill in the timings of a case: every request once in each round, in an order that rotates."""
    if workload.device.type == "cuda":  # what is captured or compiled at first use is not timed
        prompts = workload.prompts(case.batch, case.context, config.seed)
        for _ in range(2):  # a longer request drops the graphs that a shorter one has captured
            for request in case.requests:
                request.run(workload, prompts)
    for i in range(config.rounds):
        case.bandwidth.append(bandwidth.measure())
        prompts = workload.prompts(case.batch, case.context, config.seed + i)
        start = i % len(case.requests)
        for request in case.requests[start:] + case.requests[:start]:
            key = request.provider.name, request.path
            case.timings.setdefault(key, []).append(request.run(workload, prompts))


def write_answers(results: ResultWriter, case: Case) -> None:
    """Append the whole answers of a case, and what they are relative to ours with thoughts."""
    ours = {path: case.ms(OURS, path, "answer") for path in ("thoughts", "chain")}
    rest = {path: case.ms(OURS, path, "answer_after_prefill") for path in ours}
    for request in case.requests:
        provider, path = request.provider.name, request.path
        extra = {"labels": {"task": case.task, "path": path}, "versions": request.provider.versions}
        extra |= {"thoughts": request.n_thoughts, "tokens": request.n_tokens} | case.shape
        for metric in ("answer", "answer_after_prefill"):
            results.add(metric, provider, case.ms(provider, path, metric), "ms", **extra)
        if path == "thoughts" and provider != OURS:
            times = case.ms(provider, path, "answer")
            results.add_ratio("answer", provider, times, ours[path], OURS, **extra)
    for metric, times in (("answer", ours), ("answer_after_prefill", rest)):
        extra = {"labels": {"task": case.task, "path": "chain"}} | case.shape
        results.add_ratio(metric, OURS, times["chain"], times["thoughts"], "thoughts", **extra)


def write_steps(results: ResultWriter, case: Case, workload: Workload) -> None:
    """Append the single steps of a case, their rooflines, and others relative to ours."""
    providers = {r.provider.name: r.provider for r in case.requests if r.path == "thoughts"}
    gb_per_s = statistics.median(best(case.bandwidth)[1])
    metrics = ("latent_step", "token_step", "first_token")
    own = {metric: case.ms(OURS, "thoughts", metric) for metric in metrics}
    for metric in metrics:
        for name, provider in providers.items():
            times = case.ms(name, "thoughts", metric)
            extra = {"versions": provider.versions} | case.shape
            results.add(metric, name, times, "ms", **extra)
            if name != OURS:
                results.add_ratio(metric, name, times, own[metric], OURS, **extra)
        if metric != "first_token":
            n_bytes = workload.step_bytes(case.batch, case.context, metric == "token_step")
            ms = n_bytes / gb_per_s / 1e6
            results.add(metric, "roofline", [ms], "ms", spread={}, **case.shape)
    times = own["token_step"], own["latent_step"]
    results.add_ratio("token_step", OURS, *times, "latent_step", **case.shape)


def measure(
    all_cases: list[Case], config: LatencyConfig, workload: Workload, results: ResultWriter
) -> list[str]:
    """Time every case and append its results. Return what was left out, and why."""
    left_out, gb_per_s, bandwidth = [], [], Bandwidth(workload.device)
    for case in all_cases:
        if why := unfit(case, workload):
            left_out.append(why)
            continue
        with catch_oom(workload.device) as failed:
            time_case(case, config, workload, bandwidth)
        if failed:
            left_out.append(f"{case.name}: out of memory")
            continue
        if case.task:
            write_answers(results, case)
        if not case.task or len({r.provider.name for r in case.requests}) > 1:
            write_steps(results, case, workload)
        gb_per_s += case.bandwidth
    if not gb_per_s:
        raise UserError(f"nothing fits: {left_out[0]}.\nGive smaller --contexts and --batches.")
    way, values = best(gb_per_s)
    results.add("memory_bandwidth", "torch", values, "GB/s", labels={"variant": way})
    return left_out


def main() -> None:
    given, _ = parse_cli(LatencyConfig, sys.argv[1:], __doc__)
    config = make_config(LatencyConfig, given)
    device = select_device(config.device)
    load, dtype = os.getloadavg()[0], resolve_dtype(config.dtype, device)
    workload = load_model(config, device)
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
        left_out = measure(all_cases, config, workload, results)
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
