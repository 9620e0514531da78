"""Thoughts against a chain of thought written token by token, and against what else there is.

    python bench/latency.py                    anywhere: a GPU or a CPU
    python bench/latency.py --released CLONE --released_python VENV/bin/python

The model is the newest run in out/, else a GPT-2 124M of random weights, which are as fast as any.
Measured: a step that feeds back a thought, a step that reads a word and says the next, the time to
the first word behind 6 thoughts, and whole answers with the paper's lengths: question -> 6 thoughts
-> answer; question -> written chain and answer; question -> answer. No row ends early.

Everybody takes turns: what is compared stems from the same minutes. Peers (bench/peers.py) have the
same weights and prompts and are timed only where they say the same greedy tokens in float32. The
floor of a step is the bytes that it has to read (weights of the layers, for a word also the head,
keys and values) at the bandwidth measured in the same rounds (bench/bandwidth.py). --out appends
rows (bench/schema.py) after every case; the last line is JSON.
"""

import math
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanococonut.runtime.device import select_device

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout works uninstalled too

import peers
import torch
from bandwidth import Bandwidth, best
from peers import Side, Sides
from rich.console import Console
from rich.table import Table
from schema import Rows, command_of, quantiles
from subject import SHAPE, TASKS, THOUGHTS, Subject, dtype_of, find, out_of_memory
from worker import check_released

from nanococonut.runtime.cli import make_config, option, parse_cli, validate
from nanococonut.runtime.errors import UserError, run_main

STEP_TOKENS = 9  # words said where single steps are measured: 8 steps between them
KINDS = {"thoughts": f"{THOUGHTS} thoughts", "chain": "written chain", "direct": "direct"}
STEPS = {"latent step": "latent_step", "token step": "token_step", "first token": "first"}
COLUMNS = "ms|batch|context|by|p10|p50|p90|no prefill|chain / it|floor|GB/s|launches|n".split("|")
BATCHES = {"cpu": "1,8", "cuda": "1,8,64,256"}
MAIN_CONTEXT = 400  # of those swept, what comes first


@dataclass(frozen=True)
class LatencyConfig:
    checkpoint: str | None = option(
        None, "a run or checkpoint, or random (None: newest in out/, else random GPT-2 124M)"
    )
    rounds: int = option(5, "repeats of each comparison", ge=1)
    batches: str | None = option(None, "rows at once, with commas (None: 1,8,64,256; on a CPU 1,8)")
    contexts: str = option("100,400,1000", "tokens before the thoughts, with commas")
    tasks: str = option(",".join(TASKS), "whose answers' lengths, with commas")
    device: str = option("auto", "where", choices=("auto", "cpu", "cuda"))
    dtype: str = option(
        "auto", "auto is float32 on a CPU, else bfloat16", choices=("auto", "float32", "bfloat16")
    )
    peers: bool = option(True, "others too, where they are installed")
    released: str | None = option(None, "a clone of facebookresearch/coconut to compare with")
    released_python: str | None = option(None, "a Python that has torch and transformers 4.46.2")
    transformers_python: str | None = option(
        None, "a Python that has transformers 5 (None: this one, if it has)"
    )
    n_layer: int | None = option(None, "random weights: layers", ge=1)
    n_head: int | None = option(None, "random weights: heads", ge=1)
    n_embd: int | None = option(None, "random weights: width", ge=1)
    block_size: int | None = option(None, "random weights: longest sequence", ge=32)
    vocab_size: int | None = option(None, "random weights: vocabulary", ge=16)
    seed: int = option(0, "of the prompts", ge=0)
    out: str | None = option(None, "append the rows to this file")

    def __post_init__(self) -> None:
        validate(self)
        check_released(self.released, self.released_python)
        self.numbers("batches", BATCHES["cuda"])
        self.numbers("contexts")
        for task in filter(None, self.tasks.split(",")):
            if task not in TASKS:
                raise UserError(f"--tasks names {task!r}.\nThere are {', '.join(TASKS)}.")

    def numbers(self, name: str, default: str = "") -> list[int]:
        parts = (getattr(self, name) or default).split(",")
        if not all(p.strip().isdigit() and int(p) for p in parts):
            raise UserError(f"--{name}={getattr(self, name)} is no list of numbers, as in 1,8,64.")
        return sorted({int(p) for p in parts})


@dataclass
class Call:
    """One answer of one side: the unit of a round."""

    side: Side
    kind: str  # of KINDS
    tokens: int

    @property
    def thoughts(self) -> int:
        return THOUGHTS if self.kind == "thoughts" else 0


@dataclass
class Job:
    """Calls that are compared with each other, at one batch and context. task: whose answers' they
    are; "" for single steps. found: per call, what each round took. memory: GB/s in each round."""

    task: str
    batch: int
    context: int
    calls: list[Call]
    memory: list[dict[str, float]] = field(default_factory=list)
    found: list[list[dict[str, float]]] = field(default_factory=list)

    @property
    def name(self) -> str:
        what = f"{self.task} answers" if self.task else "steps"
        return f"{what}, batch {self.batch}, context {self.context}"

    @property
    def gb(self) -> float:
        return statistics.median(best(self.memory)[1])

    @property
    def positions(self) -> int:
        return max(c.thoughts + 1 + c.tokens for c in self.calls) + self.context

    def values(self, name: str, kind: str, what: str) -> list[float]:
        """Of the side `name`, seconds in every round; what as in peers.Answer, or "after prefill",
        the rest of a whole answer."""
        for call, rounds in zip(self.calls, self.found, strict=True):
            if (call.side.name, call.kind) == (name, kind):
                if what == "after prefill":
                    return [r["total"] - r["prefill"] for r in rounds]
                return [r[what] for r in rounds]
        return []


def jobs_of(config: LatencyConfig, sides: Sides) -> list[Job]:
    """All there is to measure, what matters most first."""
    gpu = sides.first.engine.model.wte.weight.device.type == "cuda"
    tasks = [t for t in TASKS if t in config.tasks.split(",")]
    batches = config.numbers("batches", BATCHES["cuda" if gpu else "cpu"])
    contexts = config.numbers("contexts")
    main = min(contexts, key=lambda c: abs(c - MAIN_CONTEXT))

    def answers(task: str, others: bool) -> Job:
        sizes = TASKS[task]
        words = {"thoughts": sizes.answer, "chain": sizes.chain, "direct": sizes.answer}
        calls = [Call(sides.first, kind, n) for kind, n in words.items()]
        for side in sides.all[1:] if others else ():
            # released: every further word is a whole forward pass, so no chain of it
            kinds = ("thoughts",) if side.most_rows else ("thoughts", "chain")
            calls += [Call(side, kind, words[kind]) for kind in kinds]
        return Job(task, 1, sizes.question, calls)

    def steps(batch: int, context: int) -> Job:
        able = [
            side
            for side in sides.all
            if side is sides.first or (gpu and batch <= (side.most_rows or batch))
        ]
        calls = [Call(side, "thoughts", STEP_TOKENS) for side in able]
        return Job("", batch, context, calls)

    at_one = sorted(contexts, key=lambda c: c != main) if 1 in batches else []
    swept = sorted(
        ((b, c) for b in batches for c in contexts if b > 1), key=lambda bc: (bc[0] * bc[1], bc)
    )
    return [
        *(steps(1, c) for c in at_one[:1]),
        *(answers(task, True) for task in tasks[:1]),
        *(steps(1, c) for c in at_one[1:]),
        *(answers(task, False) for task in reversed(tasks[1:])),
        *(steps(*bc) for bc in swept),
    ]


def run_job(job: Job, rounds: int, subject: Subject, bandwidth: Bandwidth, seed: int) -> list[str]:
    """So many rounds. In every round each call is made once; the order turns. -> others' calls that
    could not be made, and why."""
    left_out = []

    def ask(call: Call, prompts: list[list[int]]) -> dict[str, Any]:
        opening = subject.opening if call.thoughts else []
        return call.side.answer(prompts, call.thoughts, opening, call.tokens)

    gpu = subject.model.wte.weight.device.type == "cuda"
    if gpu:  # what is captured, compiled or chosen at first use is not counted
        prompts = subject.prompts(job.batch, job.context, seed)
        for call in list(job.calls):
            try:
                ask(call, prompts)
            except torch.OutOfMemoryError:
                if call.side is job.calls[0].side:
                    raise
                job.calls.remove(call)
                what = f"{call.side.name}, {KINDS[call.kind]}"
                left_out.append(f"{job.name}, {what}: out of memory")
    job.found = [[] for _ in job.calls]
    for i in range(rounds):
        job.memory.append(bandwidth.measure())
        prompts = subject.prompts(job.batch, job.context, seed + i)
        for j in range(len(job.calls)):
            j = (i + j) % len(job.calls)
            took = ask(job.calls[j], prompts)
            job.found[j].append({k: v for k, v in took.items() if k != "tokens"})
    return left_out


def free_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return math.inf


def drop_too_long(jobs: list[Job], subject: Subject) -> tuple[list[Job], list[str]]:
    """-> those that positions and memory are enough for, what was left out and why."""
    device, block_size = subject.model.wte.weight.device, subject.model.config.block_size
    fit, left_out = [], []
    for job in jobs:
        if job.positions > block_size:
            left_out.append(f"{job.name}: {job.positions} positions, the model has {block_size}")
        elif subject.cache_bytes(job.batch, job.positions) > 0.6 * free_memory(device):
            left_out.append(f"{job.name}: memory")
        else:
            fit.append(job)
    if not fit:
        raise UserError(f"nothing fits: {left_out[0]}.\nGive smaller --contexts and --batches.")
    return fit, left_out


def count(
    job: Job, subject: Subject, left_out: list[str]
) -> dict[tuple[str, str], tuple[float, float]]:
    """(side, "latent step" or "token step") -> launches by the host, kernels on the GPU, each. A
    side that cannot be profiled is left out: all that was timed is still to be written."""
    prompts, opening = subject.prompts(job.batch, job.context, seed=0), subject.opening
    found = {}
    for side in {call.side.name: call.side for call in job.calls}.values():
        try:
            none, thought, said = (
                side.launches(prompts, *what)
                for what in ((0, opening, 1), (THOUGHTS, opening, 1), (0, opening, STEP_TOKENS))
            )
        except (UserError, RuntimeError) as e:
            left_out.append(f"launches of {side.name}: {str(e).splitlines()[0]}")
            continue
        for what, more, n in (
            ("latent step", thought, THOUGHTS),
            ("token step", said, STEP_TOKENS - 1),
        ):
            found[side.name, what] = tuple((b - a) / n for a, b in zip(none, more, strict=True))
    return found


def ratios(slower: list[float], faster: list[float]) -> list[float]:
    """Of what stems from the same rounds, pair by pair."""
    return [a / b for a, b in zip(slower, faster, strict=True)]


def ratio(slower: list[float], faster: list[float]) -> float:
    return statistics.median(ratios(slower, faster))


def shown(v: float) -> str:
    return f"{v:,.3f}" if v < 1 else f"{v:,.2f}" if v < 100 else f"{v:,.0f}"


def sizes(job: Job) -> dict[str, int]:
    return {"batch": job.batch, "context": job.context}


def report(
    subject: Subject,
    rows: Rows,
    job: Job,
    launches: dict[tuple[str, str], tuple[float, float]],
    table: Table,
) -> None:
    """Rows of a job, written at once, and its lines of the table."""

    def add(what: str, job: Job, side: Side, seconds: list[float]) -> list[str]:
        values = [1e3 * s for s in seconds]
        rows.add(what, side.name, values, "ms", side.versions, **sizes(job))
        return [shown(v) for v in quantiles(values)]

    table.add_section()
    mine, where = job.calls[0].side.name, [str(job.batch), str(job.context)]
    for call in job.calls if job.task else ():
        name, kind = call.side.name, KINDS[call.kind]
        total, rest = (job.values(name, call.kind, w) for w in ("total", "after prefill"))
        cells = add(f"{job.task} answer, {kind}", job, call.side, total)
        behind = add(f"{job.task} answer after prefill, {kind}", job, call.side, rest)[1]
        times = f"{ratio(job.values(mine, 'chain', 'total'), total):.2f}x"
        more = [behind, times, "-", "-", "-", str(len(total))]
        table.add_row(f"{job.task}, {kind}", *where, name, *cells, *more)
        if call.kind == "thoughts" and name != mine:
            times = ratios(total, job.values(mine, call.kind, "total"))
            what = f"{job.task} answer, {kind}, by ours"
            rows.add(what, name, times, "times", call.side.versions, **sizes(job))
    for what in ("total", "after prefill") if job.task else ():
        times = ratios(*(job.values(mine, kind, what) for kind in ("chain", "thoughts")))
        behind = " after prefill" if what != "total" else ""
        what = f"{job.task} answer{behind}, written chain by {THOUGHTS} thoughts"
        rows.add(what, mine, times, "times", **sizes(job))
    sides = {call.side.name: call.side for call in job.calls if call.kind == "thoughts"}
    word = job.values(mine, "thoughts", "token_step")
    if job.task and len(sides) == 1:
        return
    for what in STEPS:
        for name, side in sides.items():
            seconds = job.values(name, "thoughts", STEPS[what])
            cells, more = add(what, job, side, seconds), ["-"] * 5
            if what != "first token":
                n_bytes = subject.step_bytes(job.batch, job.context, what == "token step")
                reads = n_bytes / statistics.median(seconds) / 1e9
                if name != mine:
                    times = ratios(seconds, job.values(mine, "thoughts", STEPS[what]))
                    told = f"{what}, by ours"
                    rows.add(told, name, times, "times", side.versions, **sizes(job))
                else:
                    floor = [n_bytes / job.gb / 1e6]
                    rows.add(what, "floor", floor, "ms", derived=True, **sizes(job))
                more[1:4] = [
                    f"{ratio(word, seconds):.2f}x",
                    f"{reads / job.gb:.0%}",
                    shown(reads),
                ]
            if (name, what) in launches:
                asked, ran = launches[name, what]
                more[4] = f"{asked:.3g} ({ran:.0f})"
            table.add_row(what, *where, name, *cells, *more, str(len(seconds)))
    times = ratios(word, job.values(mine, "thoughts", "latent_step"))
    rows.add("token step by latent step", mine, times, "times", **sizes(job))
    for (name, what), numbers in launches.items():
        for suffix, value in zip(("launches", "kernels"), numbers, strict=True):
            rows.add(f"{what} {suffix}", name, [value], "launches", derived=True, batch=job.batch)


def conclusions(subject: Subject, jobs: list[Job]) -> tuple[list[str], dict[str, Any]]:
    """The few figures that matter: in words, and as numbers."""
    said: list[str] = []
    numbers: dict[str, Any] = {}
    for job in jobs:
        if job.task:
            continue
        mine = job.calls[0].side.name
        latent, token = (job.values(mine, "thoughts", w) for w in ("latent_step", "token_step"))
        measured = ratio(token, latent)
        word, thought = (subject.step_bytes(job.batch, job.context, head) for head in (True, False))
        by_bytes = word / thought
        found = {"measured": measured, "bytes": by_bytes}
        where = f"batch {job.batch}, context {job.context}"
        numbers[f"token step / latent step, {where}"] = {k: round(v, 3) for k, v in found.items()}
        if not said:  # the first of them is the main one
            said.append(
                f"token step / latent step, {where}: measured {measured:.2f}, by bytes "
                f"{by_bytes:.2f} ({measured / by_bytes - 1:+.0%}): a thought needs no LM head"
            )
    for job in jobs:
        if not job.task:
            continue
        mine = job.calls[0].side.name

        def faster(name: str, kind: str, what: str, job: Job = job, mine: str = mine) -> float:
            return ratio(job.values(name, kind, what), job.values(mine, "thoughts", what))

        whole, rest = (faster(mine, "chain", what) for what in ("total", "after prefill"))
        times = (job.values(mine, "thoughts", what) for what in ("prefill", "total"))
        read = ratio(*times)
        said.append(
            f"{job.task}, {THOUGHTS} thoughts against the written chain: {whole:.2f}x faster, "
            f"{rest:.2f}x behind the prefill, which is {read:.0%} of the answer"
        )
        found = {"whole": whole, "after prefill": rest, "prefill share": read}
        numbers[f"{job.task}, chain / thoughts"] = {k: round(v, 3) for k, v in found.items()}
        for name in [c.side.name for c in job.calls if c.kind == "thoughts"][1:]:
            found = {
                what: round(faster(name, "thoughts", what), 3)
                for what in ("total", "after prefill", "latent_step", "token_step")
            }
            numbers[f"{job.task}, {name} / ours"] = found
            said.append(
                f"{job.task}, against {name}: whole answer {found['total']:.2f}x, latent step "
                f"{found['latent_step']:.2f}x, each further word {found['token_step']:.2f}x faster"
            )
    return said, numbers


def main() -> None:
    began = time.monotonic()
    given, _ = parse_cli(LatencyConfig, sys.argv[1:], __doc__.split("\n")[0])
    config = make_config(LatencyConfig, given)
    device = select_device(config.device)
    shape = {k: v for k in SHAPE if (v := getattr(config, k)) is not None}
    subject = find(config.checkpoint, shape, device)
    model = subject.model
    load = os.getloadavg()[0]
    dtype = dtype_of(config.dtype, device)
    command = command_of(config, "bench/latency.py")
    rows = Rows(device, dtype, command, config.out, subject.sizes())
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
    aside = Console(stderr=True)
    table = Table(title=f"{rows.common['device']}, {rows.common['dtype']}", title_justify="left")
    for name in COLUMNS:
        justify = "left" if name in ("ms", "by") else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    console.print(
        f"{subject.name}: {model.config.n_layer} layers, width {model.config.n_embd}, "
        f"{model.n_params():,} parameters (weights make no difference to the speed)"
    )
    with aside.status("starting and checking peers"):
        sides = peers.start(
            subject,
            config.released,
            config.released_python,
            config.transformers_python,
            config.peers,
        )
        try:
            length = min(48, model.config.block_size // 2)
            peers.check(sides, subject, [length])
        except UserError:
            sides.end()
            raise
    engine = sides.first.engine
    console.print(
        f"{rows.common['device']}, {rows.common['dtype']}, kernels: {engine.kernels} "
        f"({engine.reason}), CUDA graphs: {'yes' if engine.graph else 'no'}, load {load:.1f} at "
        "the start"
    )
    names = ", ".join(side.name for side in sides.all)
    console.print(f"in turns, the same greedy tokens in float32: {names}")
    for name, why in sides.missing.items():
        console.print(f"[yellow]without[/] {name}: {why}", soft_wrap=True)
    try:
        model.to(dtype)
        for side in sides.all:
            side.cast(rows.common["dtype"])
        jobs, left_out = drop_too_long(jobs_of(config, sides), subject)
        counted = next((job for job in jobs if not job.task and device.type == "cuda"), None)
        bandwidth, done = Bandwidth(device), []
        with aside.status("") as status:
            for job in jobs:
                status.update(job.name)
                with out_of_memory(device) as failed:
                    left_out += run_job(job, config.rounds, subject, bandwidth, config.seed)
                if failed:
                    left_out.append(f"{job.name}: out of memory")
                    continue
                launches = count(job, subject, left_out) if job is counted else {}
                report(subject, rows, job, launches, table)
                done.append(job)
    finally:
        sides.end()
    if not done:
        raise UserError(f"nothing fits: {left_out[0]}.\nGive smaller --contexts and --batches.")
    kind, values = best([m for job in done for m in job.memory])
    rows.add("memory bandwidth", kind, values, "GB/s")
    gb = statistics.median(values)
    console.print(table)
    console.print(
        "no prefill: what comes behind it. chain / it: how many times longer it takes word by word "
        "(an answer: with the written chain; a step: a word's).\nfloor: share of the speed that "
        f"memory bandwidth allows, measured in the same rounds, {gb:,.1f} GB/s in the whole run; "
        "GB/s: of what a step has to read. launches: by the host (kernels run). n: repeats."
    )
    said, numbers = conclusions(subject, done)
    for line in said:
        console.print(f"[bold]{line}[/]")
    for what in left_out:
        console.print(f"[yellow]left out[/] {what}")
    seconds = time.monotonic() - began
    console.print(f"{seconds:.0f} seconds")
    more = {
        "model": subject.name,
        "kernels": engine.kernels,
        "graph": engine.graph,
        "load_at_start": round(load, 2),
        "seconds": round(seconds, 1),
        "ratios": numbers,
        "without": sides.missing,
        "left_out": left_out,
    }
    print(rows.line("latency", **more))


if __name__ == "__main__":
    run_main(main)
