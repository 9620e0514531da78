"""Questions per second against batch: six thoughts, the written chain, the answer alone.

    python bench/throughput.py                         ProsQA's lengths, batch 1, 2, 4, ...
    python bench/throughput.py --task=gsm8k --minutes=1

Batches double until memory ends, or the time, or (on a CPU) two of them in a row were no faster.
The model is chosen as bench/latency.py does it; the ways take turns. Lengths are those of
bench/subject.py, prefill included; no row ends early. The last line is JSON.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout works uninstalled too

import torch
from rich.console import Console
from schema import Rows, command_of
from subject import SHAPE, TASKS, THOUGHTS, dtype_of, find, out_of_memory

from nanococonut import device as devices
from nanococonut.config import build, check_values, opt, parse_cli
from nanococonut.engine import Engine
from nanococonut.errors import UserError, main_guard

RISES = 1.02  # by less than this it is no faster


@dataclass(frozen=True)
class ThroughputConfig:
    checkpoint: str | None = opt(
        None, "a run or checkpoint, or random (None: newest in out/, else random GPT-2 124M)"
    )
    task: str = opt("prosqa", "whose lengths", choices=tuple(TASKS))
    minutes: float = opt(2.0, "about how long it may take", above=0)
    repeats: int = opt(3, "of every batch", at_least=1)
    most: int = opt(65536, "largest batch", at_least=1)
    device: str = opt("auto", "where", choices=("auto", "cpu", "cuda"))
    dtype: str = opt(
        "auto", "auto is float32 on a CPU, else bfloat16", choices=("auto", "float32", "bfloat16")
    )
    kernels: str = opt("auto", "what runs a step", choices=("auto", "triton", "torch"))
    graph: str = opt("auto", "steps by CUDA graphs", choices=("auto", "on", "off"))
    n_layer: int | None = opt(None, "random weights: layers", at_least=1)
    n_head: int | None = opt(None, "random weights: heads", at_least=1)
    n_embd: int | None = opt(None, "random weights: width", at_least=1)
    block_size: int | None = opt(None, "random weights: longest sequence", at_least=32)
    vocab_size: int | None = opt(None, "random weights: vocabulary", at_least=16)
    out: str | None = opt(None, "append the rows to this file")

    def __post_init__(self) -> None:
        check_values(self)


def main() -> None:
    began = time.monotonic()
    given, _ = parse_cli(ThroughputConfig, sys.argv[1:], __doc__.split("\n")[0])
    config = build(ThroughputConfig, given)
    device = devices.choose(config.device)
    shape = {k: v for k in SHAPE if (v := getattr(config, k)) is not None}
    subject = find(config.checkpoint, shape, device)
    model, sizes = subject.model.to(dtype_of(config.dtype, device)), TASKS[config.task]
    longest = sizes.question + max(sizes.chain, THOUGHTS + 1 + sizes.answer)
    if longest > model.config.block_size:
        raise UserError(
            f"{config.task}'s answers take {longest} positions, the model has "
            f"{model.config.block_size}.\nGive another --task or --checkpoint=random."
        )
    engine = Engine(model, kernels=config.kernels, graph=config.graph)
    command = command_of(config, "bench/throughput.py")
    rows = Rows(device, model.wte.weight.dtype, command, config.out, subject.sizes())
    ways = {
        f"{THOUGHTS} thoughts": (THOUGHTS, subject.opening, -1, sizes.answer),
        "written chain": (0, [], -1, sizes.chain),
        "direct": (0, [], -1, sizes.answer),
    }  # what Engine.run takes; -1: no token ends a row
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{subject.name}, {config.task}: a question of {sizes.question} tokens, a chain of "
        f"{sizes.chain} with its answer, an answer of {sizes.answer}\n{rows.common['device']}, "
        f"{rows.common['dtype']}, kernels: {engine.kernels}, CUDA graphs: "
        f"{'yes' if engine.graph else 'no'}; questions per second, median of {config.repeats}"
    )
    console.print(f"{'batch':>8}" + "".join(f"{way:>16}" for way in ways) + f"{'memory':>12}")
    deadline, batch, round_took = began + 60 * config.minutes, 1, 0.0
    best, no_faster, ended = 0.0, 0, f"the largest batch, {config.most}"
    while batch <= config.most:
        # the next batch takes at most twice as long, and a first time where shapes are new
        if rows.rows and time.monotonic() + 2 * round_took > deadline:
            ended = f"the time, before batch {batch}"
            break
        found: dict[str, list[float]] = {way: [] for way in ways}
        with out_of_memory(device) as failed:
            if device.type == "cuda":  # what is captured or chosen at first use is not counted
                for what in ways.values():
                    engine.run(subject.prompts(batch, sizes.question, 0), *what)
            for i in range(config.repeats):
                since = time.monotonic()
                prompts = subject.prompts(batch, sizes.question, i)
                for way, what in ways.items():
                    took = engine.run(prompts, *what).seconds
                    found[way].append(batch / took)
                round_took = time.monotonic() - since
                if time.monotonic() + round_took > deadline:
                    break
        if failed:
            ended = f"memory, at batch {batch}"
            break
        for way, values in found.items():
            rows.add(f"{config.task} answers", way, values, "questions/s", batch=batch)
        medians = [statistics.median(values) for values in found.values()]
        taken = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        memory = f"{taken / 2**30:9.1f} GiB" if taken else "-"
        console.print(f"{batch:>8}" + "".join(f"{m:>16.2f}" for m in medians) + f"{memory:>12}")
        no_faster = 0 if medians[0] > RISES * best else no_faster + 1
        best = max(best, medians[0])
        if device.type == "cpu" and no_faster == 2:
            ended = "no faster any more"
            break
        batch *= 2
    console.print(f"ended by {ended}")
    seconds = round(time.monotonic() - began, 1)
    about = {"model": subject.name, "kernels": engine.kernels, "graph": engine.graph}
    print(rows.line("throughput", **about, seconds=seconds, ended=ended))


if __name__ == "__main__":
    main_guard(main)
