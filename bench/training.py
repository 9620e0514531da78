"""Speed of a training step, where its time goes, and how the released code does on the same.

    python bench/training.py --config=config/prosqa_small.py --batch_size=64
    python bench/training.py --released CLONE --released_python VENV/bin/python
    python bench/training.py --sweep              thoughts and context lengths: how cost grows

The step is train.py's in the final stage: no written steps, --latent thoughts in every row, one
forward pass of each micro-batch. In turns with it, so that only one computes at a time (in an order
drawn anew for each batch), go

    plain     the same step by plain eager torch: no graphs, no kernels. Where the time goes is
              measured here (within a graph nobody can look); on a CPU both are the same, so that
              the ratio of the two says how much noise there is
    released  a clone of facebookresearch/coconut in a process of its own: same weights, rows,
              dropout, AdamW and threads, float32, whole batches; an error if it does not compute
              the same. Our time includes making the batch, theirs does not, since their DataLoader
              makes it in another process

FLOP are counted by formula (flops.py), the machine's peak is measured in the same run. Each row is
a line of JSON; without --sweep the last line is one. Where others compute on the same cores, set
OMP_WAIT_POLICY=passive (both sides get it): threads that wait by spinning take each other's time.
"""

import gc
import json
import os
import platform
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout works uninstalled too

import torch
from flops import matmul_peak, step_flop
from safetensors.torch import save_file
from sides import PARTS, Ours, Plain, Rows, adamw_settings, high_water
from worker import Worker, as_gpt2, check_released, commit_of

from nanococonut import checkpoint
from nanococonut.config import TrainConfig, build, check_values, opt, parse_cli, read_config_file
from nanococonut.errors import UserError, main_guard
from nanococonut.graphs import Graphs
from nanococonut.stepper import Stepper

SHAPE = ("n_layer", "n_head", "n_embd", "block_size")
SETTINGS = "tokenizer render fresh_rows smear dropout muon_learning_rate grad_clip seed".split()
ASKED = "batch_size micro_batch_size latent context repeats dtype".split()
CONTEXTS, THOUGHTS = (100, 400, 1000), (0, 1, 3, 6)  # of --sweep
WARMUP = 2  # steps before those that count
EPOCH = 64  # batches of an epoch: rows are sorted by length among as many as in training
# relative, between our loss and gradient and theirs (rounding makes up to 2e-5), and between our
# two losses of one step
TOLERANCE = 1e-4
HALF_TOLERANCE = 2e-2
# train.py's keep_freed_memory, but for both sides: glibc reads these when a process starts
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(256 << 20),
}


@dataclass(frozen=True)
class StepConfig:
    config: str = opt("config/prosqa_small.py", "training config whose model and rows are used")
    batch_size: int = opt(32, "rows of a step", at_least=1)
    micro_batch_size: int | None = opt(
        None, "rows of a forward pass, if not the config's; with --released all of them", at_least=1
    )
    latent: int = opt(6, "thoughts of every row", at_least=0)
    context: int | None = opt(
        None, "tokens of every prefix: questions repeated or cut, if not as they are", at_least=2
    )
    sweep: bool = opt(False, "at 0 to 6 thoughts and contexts of 100 to 1,000 tokens, a row each")
    repeats: int = opt(7, "steps measured", at_least=1)
    n_layer: int | None = opt(None, "layers, if not the config's")
    n_head: int | None = opt(None, "attention heads, if not the config's")
    n_embd: int | None = opt(None, "width, if not the config's")
    block_size: int | None = opt(None, "longest sequence, if not the config's")
    released: str | None = opt(None, "a clone of facebookresearch/coconut to compare with")
    released_python: str | None = opt(None, "a Python that has torch and transformers 4.46.2")
    device: str = opt("cpu", "where", choices=("cpu", "cuda"))
    dtype: str = opt("float32", "as train.py's", choices=("float32", "tf32", "bfloat16"))
    kernels: str = opt("auto", "as train.py's", choices=("auto", "triton", "torch"))
    graph: str = opt("auto", "as train.py's", choices=("auto", "on", "off"))
    peak_size: int | None = opt(
        None, "rows of the square matrices that the peak is measured by (None: 8192, a CPU's 1024)",
        at_least=1,
    )  # fmt: skip
    out: str | None = opt(None, "append the JSON rows to this file")

    def __post_init__(self) -> None:
        check_values(self)
        check_released(self.released, self.released_python)
        if self.released and self.dtype != "float32":
            raise UserError("the comparison is in float32.\nLeave --dtype out with --released.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("there is no GPU that torch can use.\nTry --device=cpu.")


def recipe_of(bench: StepConfig) -> TrainConfig:
    """The training config with what is measured put in its place."""
    own: dict[str, Any] = {k: v for k in SHAPE if (v := getattr(bench, k)) is not None}
    if bench.micro_batch_size:
        own |= {"micro_batch_size": bench.micro_batch_size}
    if bench.released:  # what it has not
        own |= {"smear": False, "grad_clip": 0.0, "muon_learning_rate": 0.0}
        own |= {"micro_batch_size": bench.batch_size}
    own |= {"init_from": "scratch", "fallback": None}  # the weights make no difference to the time
    recipe = build(TrainConfig, read_config_file(bench.config, TrainConfig), own)
    room = bench.context + bench.latent + 64 if bench.context else 0  # an answer takes less
    return replace(
        recipe,
        method="coconut",
        final_thoughts=bench.latent,
        pad_latent_to_max=True,
        batch_size=bench.batch_size,
        micro_batch_size=min(recipe.micro_batch_size, bench.batch_size),
        block_size=max(recipe.block_size, room),
        data=None,
        rows_per_epoch=max(EPOCH, WARMUP + bench.repeats) * bench.batch_size,
        **{k: getattr(bench, k) for k in ("device", "dtype", "kernels", "graph")},
    )


def start_released(
    bench: StepConfig, recipe: TrainConfig, ours: Ours
) -> tuple[Worker, dict[str, Any]]:
    """Their model with our size and weights, checked to compute what ours does, and what it is."""
    with torch.no_grad():  # with initial weights, thoughts and positions hardly touch the loss
        for p in ours.model.parameters():
            p.add_(torch.randn_like(p) * recipe.n_embd**-0.5)
    gpt2, weights = as_gpt2(ours.model, recipe.dropout)
    special = {name: getattr(ours.rows.tokenizer, name) for name in ("eos", "bot", "eot", "latent")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(weights, path)
        task = {
            "clone": str(Path(bench.released).resolve()),
            "weights": str(path),
            "gpt2": gpt2,
            "special": special,
            "adamw": adamw_settings(recipe),
            "batches": ours.rows.as_released(),
            "threads": torch.get_num_threads(),
            "device": bench.device,
        }
        flag, needs = "--released_python", "torch and transformers 4.46.2"
        worker = Worker("released_worker.py", bench.released_python, flag, needs)
        about = worker.ask(task)
    mine, theirs = ours.check(), worker.ask("check")
    for what in mine:
        if not abs(mine[what] - theirs[what]) <= TOLERANCE * abs(theirs[what]):
            raise UserError(
                f"the two do not compute the same: {what} {mine[what]:.6f} (ours), "
                f"{theirs[what]:.6f} (released).\nA comparison of their speed would mean nothing."
            )
    about |= {"commit": commit_of(bench.released)}
    about |= {what: {"ours": mine[what], "released": theirs[what]} for what in mine}
    return worker, about


def spread(values: Sequence[float], digits: int) -> dict[str, float]:
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in found.items()}


def shown(s: dict[str, float], digits: int = 1) -> str:
    return f"{s['median']:9,.{digits}f}  ({s['min']:,.{digits}f}..{s['max']:,.{digits}f})"


def rates(rows: int, seconds: Sequence[float]) -> dict[str, Any]:
    return {
        "rows_per_s": spread([rows / s for s in seconds], 2),
        "step_ms": spread([s * 1000 for s in seconds], 3),
    }


def times_faster(ours: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    return spread([b / a for a, b in zip(ours, others, strict=True)], 3)


def mebibytes(now: int | None, before: int | None) -> float | None:
    return None if now is None or before is None else round((now - before) / 2**20, 1)


def measure(bench: StepConfig) -> dict[str, Any]:
    """One row of figures."""
    load, recipe = os.getloadavg()[0], recipe_of(bench)
    rows = Rows(recipe, WARMUP + bench.repeats, bench.context)
    device = torch.device(bench.device)
    before = high_water(device, reset=True)
    ours = Ours(recipe, rows, plain_adamw=bench.released is not None)
    print(f"kernels: {ours.kernels} ({ours.why_kernels}), graphs {'on' if ours.graph else 'off'}")
    # a graph is captured where its shape is met first: all are, or that would be measured
    for i in range(len(rows.batches) if ours.graph else WARMUP):
        ours.step(i)
    memory = {"ours": mebibytes(high_water(device), before)}
    released, about = start_released(bench, recipe, ours) if bench.released else (None, {})
    before = high_water(device, reset=True)
    plain = Plain(ours)
    for i in range(WARMUP):
        plain.step(i)
        if released:
            released.ask(i)
    memory["plain"] = mebibytes(high_water(device), before)
    if bench.device == "cpu":  # of one process only the first growth is known
        memory["plain"] = None
        memory["ours"] = None if bench.sweep else memory["ours"]
    plain.model.load_state_dict(ours.model.state_dict())

    sides = {"ours": ours.step, "plain": plain.step}
    if released:
        sides["released"] = lambda i: released.ask(i)
    done: dict[str, list[Any]] = {name: [] for name in sides}
    for i in range(WARMUP, WARMUP + bench.repeats):
        # by chance, or one would always come behind the same other, with its caches
        for name in random.Random(i).sample([*sides], len(sides)):
            done[name].append(sides[name](i))
    if not recipe.dropout:  # from the same weights
        same(*(done[name][0][1] for name in ("ours", "plain")), bench.dtype)
    seconds, parts = ([took for took, _ in done[name]] for name in ("ours", "plain"))
    plain_seconds = [sum(part.values()) for part in parts]
    if released:
        released.end()
        theirs = [answer["seconds"] for answer in done["released"]]
        memory["released"] = done["released"][-1]["memory_mib"]

    flop = [sum(step_flop(ours.model.config, rows.lengths(i))) for i in range(len(rows.batches))]
    speed = [f / s for f, s in zip(flop[WARMUP:], seconds, strict=True)]
    size = bench.peak_size or (8192 if bench.device == "cuda" else 1024)
    half = bench.dtype == "bfloat16"
    peak = matmul_peak(device, torch.bfloat16 if half else torch.float32, size)
    row = {
        "bench": "training",
        "config": Path(bench.config).name,
        **{k: getattr(recipe, k) for k in (*SHAPE, *SETTINGS)},
        "optimizer": "muon" if len(ours.optimizers) > 1 else "adamw",
        "vocab_size": rows.tokenizer.vocab_size,
        "parameters": ours.model.n_params(),
        **{k: getattr(bench, k) for k in ASKED},
        "micro_batch_size": recipe.micro_batch_size,
        "kernels": ours.kernels,
        "graphs": len(ours.stepper.graphs.kept) if ours.graph else 0,
        **rates(bench.batch_size, seconds),
        "plain": rates(bench.batch_size, plain_seconds)
        | {"ours_times_faster": times_faster(seconds, plain_seconds)},
        "parts_of": "plain",
        "parts_ms": {name: spread([part[name] * 1000 for part in parts], 3) for name in PARTS},
        "peak_memory_mib": memory,
        "model_gflop": round(statistics.median(flop[WARMUP:]) / 1e9, 4),
        "gflop_per_s": spread([s / 1e9 for s in speed], 3),
        "peak_gflop_per_s": round(peak / 1e9, 1),
        "share_of_peak": spread([s / peak for s in speed], 4),
        "padded_share": round(rows.padded_share(plain.stepper), 4),
        "padded_share_graphs": round(rows.padded_share(Stepper(ours.model, graphs=Graphs(1))), 4),
        "released": None,
    }
    if released:
        row["released"] = about | rates(bench.batch_size, theirs)
        row["released"] |= {"ours_times_faster": times_faster(seconds, theirs)}
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return row | {
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "load_at_start": round(load, 2),
        "device": bench.device,
        "hardware": torch.cuda.get_device_name() if bench.device == "cuda" else cpu,
        **checkpoint.provenance(),
    }


def same(loss: float, plain: float, dtype: str) -> None:
    """UserError where the two ways of ours do not compute the same."""
    tolerance = TOLERANCE if dtype == "float32" else HALF_TOLERANCE
    if not abs(loss - plain) <= tolerance * abs(plain):
        raise UserError(
            f"our two ways do not compute the same: loss {loss:.6f}, {plain:.6f} (plain).\n"
            "A comparison of their speed would mean nothing."
        )


def main() -> None:
    given, path = parse_cli(StepConfig, sys.argv[1:], __doc__.split("\n")[0])
    bench = build(StepConfig, given, {"config": path} if path else {})  # parse_cli sets it apart
    cells = [bench]
    if bench.sweep:
        if chosen := sorted({"context", "latent"} & given.keys()):
            raise UserError(f"--sweep has a --{chosen[0]} of its own.\nLeave one of them out.")
        cells = [replace(bench, context=c, latent=n) for c in CONTEXTS for n in THOUGHTS]
    for cell in cells:
        recipe_of(cell)  # what is wrong is said before any work
    try:
        if bench.out:
            open(bench.out, "a").close()
    except OSError as e:
        raise UserError(f"--out {bench.out} cannot be written: {e.strerror}.") from None
    if sys.platform == "linux" and not MALLOC.items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, os.environ | MALLOC)
    torch.set_float32_matmul_precision("high" if bench.dtype == "tf32" else "highest")
    measured = []
    for cell in cells:
        row = measure(cell)
        report(row)
        print(json.dumps(row), flush=True)
        if bench.out:
            checkpoint.append_row(Path(bench.out), row)
        measured.append(row)
        gc.collect()  # a model and the hook on it know each other: they would stay for a while
    if bench.sweep:
        table(measured)


def report(row: dict[str, Any]) -> None:
    context = f" behind {row['context']} tokens" if row["context"] else ""
    print(
        f"{row['config']}: {row['n_layer']} layers, width {row['n_embd']}, {row['parameters']:,} "
        f"parameters; {row['batch_size']} rows with {row['latent']} thoughts{context}\n"
        f"{row['device']}, {row['threads']} threads, {row['dtype']}, load {row['load_at_start']} "
        f"at the start; median (min..max) of {row['repeats']} steps"
    )

    def rate(of: dict[str, Any]) -> None:
        print(f"rows per second  {shown(of['rows_per_s'])}")
        print(f"ms per step      {shown(of['step_ms'], 2)}")
        if of is not row:
            print(f"ours is faster   {shown(of['ours_times_faster'], 2)}  times, pair by pair")

    rate(row)
    print(f"model GFLOP/s    {shown(row['gflop_per_s'])}  of {row['model_gflop']:,.3f} a step")
    share, peak = row["share_of_peak"], row["peak_gflop_per_s"]
    print(
        f"share of peak    {share['median']:9.1%}  of {peak:,.0f}, which a matrix product reaches"
    )
    print(
        f"padded tokens    {row['padded_share']:9.1%}  {row['padded_share_graphs']:.1%} for graphs"
    )
    known = [
        f"{mib:,.0f} {side}" for side, mib in row["peak_memory_mib"].items() if mib is not None
    ]
    print(f"peak memory, MiB {', '.join(known) or '-'}")
    print("plain path, in turns with ours")
    rate(row["plain"])
    for name, part in row["parts_ms"].items():
        share = part["median"] / row["plain"]["step_ms"]["median"]
        print(f"  {name:<14} {shown(part, 2)}  {share:.1%}")
    if theirs := row["released"]:
        versions = ", ".join(f"{k} {v}" for k, v in theirs["versions"].items())
        print(f"released code {theirs['commit'][:7]} ({versions}), in turns with ours")
        for what in ("loss", "gradient"):
            both = ", ".join(f"{side} {value:.6f}" for side, value in theirs[what].items())
            print(f"first {what:<10} {both}")
        rate(theirs)


def table(rows: Sequence[dict[str, Any]]) -> None:
    """How cost grows: against no thoughts of the same context, and the shortest context."""
    ms = {(row["context"], row["latent"]): row["step_ms"]["median"] for row in rows}
    print("context  thoughts  rows/s   ms/step  x no thoughts  x context  x plain  share of peak")
    for row in rows:
        at, n = row["context"], row["latent"]
        print(
            f"{at:7} {n:9} {row['rows_per_s']['median']:7.0f} {ms[at, n]:9.1f} "
            f"{ms[at, n] / ms[at, THOUGHTS[0]]:14.2f} {ms[at, n] / ms[CONTEXTS[0], n]:10.2f} "
            f"{row['plain']['ours_times_faster']['median']:8.2f} "
            f"{row['share_of_peak']['median']:14.1%}"
        )


if __name__ == "__main__":
    main_guard(main)
