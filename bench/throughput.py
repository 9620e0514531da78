"""Questions per second against batch: six thoughts, the written chain, the answer alone.

    python bench/throughput.py                         ProsQA's lengths, batch 1, 2, 4, ...
    python bench/throughput.py --task=gsm8k

Batches double until memory ends, or until two of them in a row were no faster.
The model is chosen as bench/latency.py does it; the ways take turns. Lengths are those of
bench/subject.py, prefill included; no row ends early. --out appends rows after every batch; the
last line is JSON.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from nanococonut.runtime.device import select_device

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout works uninstalled too

import torch
from rich.console import Console
from schema import Rows, command_of
from subject import SHAPE, TASKS, THOUGHTS, dtype_of, find, out_of_memory

from nanococonut.inference.engine import Engine
from nanococonut.runtime.cli import make_config, option, parse_cli, validate
from nanococonut.runtime.errors import UserError, run_main

RISES = 1.02  # by less than this it is no faster


@dataclass(frozen=True)
class ThroughputConfig:
    checkpoint: str | None = option(
        None, "a run or checkpoint, or random (None: newest in out/, else random GPT-2 124M)"
    )
    task: str = option("prosqa", "whose lengths", choices=tuple(TASKS))
    rounds: int = option(3, "repeats of every batch", ge=1)
    most: int = option(65536, "largest batch", ge=1)
    device: str = option("auto", "where", choices=("auto", "cpu", "cuda"))
    dtype: str = option(
        "auto", "auto is float32 on a CPU, else bfloat16", choices=("auto", "float32", "bfloat16")
    )
    kernels: str = option("auto", "what runs a step", choices=("auto", "triton", "torch"))
    graph: str = option("auto", "steps by CUDA graphs", choices=("auto", "on", "off"))
    n_layer: int | None = option(None, "random weights: layers", ge=1)
    n_head: int | None = option(None, "random weights: heads", ge=1)
    n_embd: int | None = option(None, "random weights: width", ge=1)
    block_size: int | None = option(None, "random weights: longest sequence", ge=32)
    vocab_size: int | None = option(None, "random weights: vocabulary", ge=16)
    out: str | None = option(None, "append the rows to this file")

    def __post_init__(self) -> None:
        validate(self)


def main() -> None:
    began = time.monotonic()
    given, _ = parse_cli(ThroughputConfig, sys.argv[1:], __doc__.split("\n")[0])
    config = make_config(ThroughputConfig, given)
    device = select_device(config.device)
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
        f"{'yes' if engine.graph else 'no'}; questions per second, median of {config.rounds}"
    )
    console.print(f"{'batch':>8}" + "".join(f"{way:>16}" for way in ways) + f"{'memory':>12}")
    batch, best, no_faster, ended = 1, 0.0, 0, f"the largest batch, {config.most}"
    while batch <= config.most:
        found: dict[str, list[float]] = {way: [] for way in ways}
        with out_of_memory(device) as failed:
            if device.type == "cuda":  # what is captured or chosen at first use is not counted
                for what in ways.values():
                    engine.run(subject.prompts(batch, sizes.question, 0), *what)
            for i in range(config.rounds):
                prompts = subject.prompts(batch, sizes.question, i)
                for way, what in ways.items():
                    took = engine.run(prompts, *what).seconds
                    found[way].append(batch / took)
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
        if no_faster == 2:
            ended = "no faster any more"
            break
        batch *= 2
    console.print(f"ended by {ended}")
    seconds = round(time.monotonic() - began, 1)
    about = {"model": subject.name, "kernels": engine.kernels, "graph": engine.graph}
    print(rows.line("throughput", **about, seconds=seconds, ended=ended))


if __name__ == "__main__":
    run_main(main)
