"""Time a training step, find where its time goes, and compare with the released code.

    python bench/training.py --config=config/prosqa_small.py --batch_size=64
    python bench/training.py --released CLONE --released_python VENV/bin/python
    python bench/training.py --sweep              thoughts x context lengths: how cost grows

The step is train.py's in the final stage: no written steps, --latent thoughts in every sequence,
one forward pass for each micro-batch. In turns with it, in a new random order for each batch, so
that only one computes at a time:

    nanococonut, eager   the same step in plain torch, without graphs and kernels. The time of its
                         parts is measured here. On a CPU both are the same code, so that their
                         ratio is the noise
    released             a clone of facebookresearch/coconut in its own process: same weights,
                         examples, dropout, AdamW and threads, float32, whole batches; an error if
                         it does not compute the same. Our time includes making the batch; theirs
                         does not, since their DataLoader makes it in another process

FLOP are counted (bench/common/roofline.py); the machine's peak is measured in the same run. --out
appends results after every case; each case also prints a line of JSON. If others compute on the
same cores, set OMP_WAIT_POLICY=passive: threads that wait by spinning take each other's time.
"""

import gc
import os
import random
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs without installation

import torch
from safetensors.torch import save_file

from bench.common.results import ResultWriter, command_line, fmt
from bench.common.roofline import matmul_peak, step_flop
from bench.common.tables import Run
from bench.common.train_backends import (
    PARTS,
    EagerBackend,
    FastBackend,
    FinalStageBatches,
    adamw_settings,
    peak_memory,
)
from bench.common.worker import Worker, as_gpt2, check_released, clone_commit
from nanococonut.config import TrainConfig, build, check_values, opt, parse_cli, read_config_file
from nanococonut.errors import UserError, main_guard
from nanococonut.graphs import Graphs
from nanococonut.stepper import Stepper

OURS, EAGER = "nanococonut", "nanococonut, eager"
MODEL_SHAPE = ("n_layer", "n_head", "n_embd", "block_size")
SETTINGS = "tokenizer render smear dropout muon_learning_rate grad_clip seed".split()
CONTEXTS, THOUGHTS = (100, 400, 1000), (0, 1, 3, 6)  # of --sweep
WARMUP = 2  # steps before those that count
EPOCH = 64  # batches of an epoch: examples are sorted by length among as many as in training
# relative: between our loss and gradient and the released code's (rounding makes up to 2e-5), and
# between the losses of our two backends
TOLERANCE = 1e-4
HALF_TOLERANCE = 2e-2
# train.py's keep_freed_memory, but for both processes: glibc reads these when a process starts
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(256 << 20),
}


@dataclass(frozen=True)
class StepConfig:
    config: str = opt("config/prosqa_small.py", "training config whose model and data are used")
    batch_size: int = opt(32, "sequences of a step", at_least=1)
    micro_batch_size: int | None = opt(
        None, "sequences of a forward pass, if not the config's; with --released the whole batch",
        at_least=1,
    )  # fmt: skip
    latent: int = opt(6, "thoughts of every sequence", at_least=0)
    context: int | None = opt(
        None, "tokens of every prefix: questions repeated or cut, if not as they are", at_least=2
    )
    sweep: bool = opt(False, "0 to 6 thoughts, contexts of 100 to 1,000 tokens, a case each")
    repeats: int = opt(7, "steps measured", at_least=1)
    n_layer: int | None = opt(None, "layers, if not the config's")
    n_head: int | None = opt(None, "attention heads, if not the config's")
    n_embd: int | None = opt(None, "width, if not the config's")
    block_size: int | None = opt(None, "longest sequence, if not the config's")
    released: str | None = opt(None, "a clone of facebookresearch/coconut to compare with")
    released_python: str | None = opt(None, "a Python that has torch and transformers 4.46.2")
    device: str = opt("cpu", "where to run", choices=("cpu", "cuda"))
    dtype: str = opt("float32", "as train.py's", choices=("float32", "tf32", "bfloat16"))
    kernels: str = opt("auto", "as train.py's", choices=("auto", "triton", "torch"))
    graph: str = opt("auto", "as train.py's", choices=("auto", "on", "off"))
    peak_size: int | None = opt(
        None, "width of the square matrices that measure the peak (None: 8192, on a CPU 1024)",
        at_least=1,
    )  # fmt: skip
    out: str | None = opt(None, "append the results to this file")

    def __post_init__(self) -> None:
        check_values(self)
        check_released(self.released, self.released_python)
        if self.released and self.dtype != "float32":
            raise UserError("the comparison is in float32.\nLeave --dtype out with --released.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("there is no GPU that torch can use.\nTry --device=cpu.")


def recipe_of(config: StepConfig) -> TrainConfig:
    """Return the training config with the measured sizes in it."""
    own: dict[str, Any] = {k: v for k in MODEL_SHAPE if (v := getattr(config, k)) is not None}
    if config.micro_batch_size:
        own |= {"micro_batch_size": config.micro_batch_size}
    if config.released:  # without what the released code lacks
        own |= {"smear": False, "grad_clip": 0.0, "muon_learning_rate": 0.0}
        own |= {"micro_batch_size": config.batch_size}
    own |= {"init_from": "scratch", "fallback": None}  # the weights make no difference to the time
    recipe = build(TrainConfig, read_config_file(config.config, TrainConfig), own)
    room = config.context + config.latent + 64 if config.context else 0  # an answer takes less
    return replace(
        recipe,
        method="coconut",
        final_thoughts=config.latent,
        pad_latent_to_max=True,
        batch_size=config.batch_size,
        micro_batch_size=min(recipe.micro_batch_size, config.batch_size),
        block_size=max(recipe.block_size, room),
        data=None,
        rows_per_epoch=max(EPOCH, WARMUP + config.repeats) * config.batch_size,
        **{k: getattr(config, k) for k in ("device", "dtype", "kernels", "graph")},
    )


def start_released(config: StepConfig, fast: FastBackend) -> tuple[Worker, dict[str, Any]]:
    """Start the released code with our size and weights, and check that it computes the same.
    Return it, and what it is."""
    with torch.no_grad():  # with initial weights, thoughts and positions hardly change the loss
        for p in fast.model.parameters():
            p.add_(torch.randn_like(p) * fast.recipe.n_embd**-0.5)
    gpt2, weights = as_gpt2(fast.model, fast.recipe.dropout)
    tokenizer = fast.batches.tokenizer
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(weights, path)
        setup = {
            "clone": str(Path(config.released).resolve()),
            "weights": str(path),
            "gpt2": gpt2,
            "special": {n: getattr(tokenizer, n) for n in ("eos", "bot", "eot", "latent")},
            "adamw": adamw_settings(fast.recipe),
            "batches": fast.batches.as_released(),
            "threads": torch.get_num_threads(),
            "device": config.device,
        }
        flag, needs = "--released_python", "torch and transformers 4.46.2"
        worker = Worker("released_train.py", config.released_python, flag, needs)
        about = worker.request(setup)
    ours, theirs = fast.check(), worker.request("check")
    for name in ours:
        if not abs(ours[name] - theirs[name]) <= TOLERANCE * abs(theirs[name]):
            worker.close()
            raise UserError(
                f"the two do not compute the same: {name} {ours[name]:.6f} (ours), "
                f"{theirs[name]:.6f} (released).\nA comparison of their speed would mean nothing."
            )
    about |= {"commit": clone_commit(config.released)}
    about |= {name: {"ours": ours[name], "released": theirs[name]} for name in ours}
    return worker, about


@dataclass
class Timings:
    """What time_case measured. about: of the released code, {} without it."""

    fast: FastBackend
    eager: EagerBackend
    about: dict[str, Any]
    load: float
    seconds: dict[str, list[float]] = field(default_factory=dict)  # provider -> of each step
    parts: list[dict[str, float]] = field(default_factory=list)  # of the eager steps
    memory: dict[str, float | None] = field(default_factory=dict)  # provider -> MiB


def time_case(config: StepConfig) -> Timings:
    """Take steps in turns, each of them timed."""
    load, device, on_gpu = os.getloadavg()[0], torch.device(config.device), config.device == "cuda"
    recipe = recipe_of(config)
    batches = FinalStageBatches(recipe, WARMUP + config.repeats, config.context)
    before = peak_memory(device, reset=True)
    fast = FastBackend(recipe, batches, plain_adamw=config.released is not None)
    # a graph is captured when its shape is met first: all of them now, or that would be measured
    for i in range(len(batches.batches) if fast.graph else WARMUP):
        fast.step(i)
    memory = {OURS: _mib(peak_memory(device), before)}
    released, about = start_released(config, fast) if config.released else (None, {})
    before = peak_memory(device, reset=True)
    eager = EagerBackend(fast)
    for i in range(WARMUP):
        eager.step(i)
        if released:
            released.request(i)
    if on_gpu:
        memory[EAGER] = _mib(peak_memory(device), before)
    elif config.sweep:  # of one process only the first growth is known
        memory = {}
    eager.model.load_state_dict(fast.model.state_dict())

    timings = Timings(fast, eager, about, load, memory=memory)
    steps = {OURS: fast.step, EAGER: eager.step}
    if released:
        steps["released"] = released.request
    timings.seconds = {name: [] for name in steps}
    for i in range(WARMUP, WARMUP + config.repeats):
        losses = {}
        # in random order, or one would always follow the same other, with its caches
        for name in random.Random(i).sample([*steps], len(steps)):
            reply = steps[name](i)
            if name == "released":
                seconds, memory[name] = reply["seconds"], reply["memory_mib"]
            else:
                seconds, losses[name] = reply
            if name == EAGER:
                timings.parts.append(seconds)
                seconds = sum(seconds.values())
            timings.seconds[name].append(seconds)
        if i == WARMUP and not recipe.dropout:  # both have the same weights
            check_losses(losses[OURS], losses[EAGER], config.dtype)
    if released:
        released.close()
    return timings


def _mib(now: int | None, before: int | None) -> float | None:
    return None if now is None or before is None else (now - before) / 2**20


def check_losses(loss: float, eager: float, dtype: str) -> None:
    """Raise UserError if our two backends do not compute the same."""
    tolerance = TOLERANCE if dtype == "float32" else HALF_TOLERANCE
    if not abs(loss - eager) <= tolerance * abs(eager):
        raise UserError(
            f"our two backends do not compute the same: loss {loss:.6f}, {eager:.6f} (eager).\n"
            "A comparison of their speed would mean nothing."
        )


def write_case(config: StepConfig, timings: Timings) -> ResultWriter:
    """Append the results of a case."""
    fast, recipe, about = timings.fast, timings.fast.recipe, timings.about
    c, batches, device = fast.model.config, fast.batches, torch.device(config.device)
    shape = {k: getattr(c, k) for k in ("n_layer", "n_embd", "vocab_size")}
    shape |= {"parameters": fast.model.n_params(), "batch": config.batch_size}
    shape |= {"micro_batch": recipe.micro_batch_size, "thoughts": config.latent}
    shape |= {"context": config.context} if config.context else {}
    command, labels = (
        command_line(config, "bench/training.py"),
        {"config": Path(config.config).name},
    )
    results = ResultWriter(
        "training", device, config.dtype, command, config.out, shape=shape, labels=labels
    )
    detail = {k: getattr(recipe, k) for k in SETTINGS}
    detail |= {
        "kernels": fast.kernels,
        "graphs": fast.graph,
        "load_at_start": round(timings.load, 2),
    }
    detail |= {"omp_wait_policy": os.environ.get("OMP_WAIT_POLICY")}
    versions = {"released": about.pop("versions", None)}
    details = {OURS: detail, "released": about}
    own = timings.seconds[OURS]
    for name, seconds in timings.seconds.items():
        more = {"versions": versions.get(name)}
        ms, rates = [1e3 * s for s in seconds], [config.batch_size / s for s in seconds]
        results.add("step", name, ms, "ms", detail=details.get(name), **more)
        results.add("examples_per_s", name, rates, "examples/s", **more)
        if name != OURS:
            ratios = [b / a for a, b in zip(own, seconds, strict=True)]
            results.add("step", name, ratios, "x", labels={"relative_to": OURS}, **more)
        if timings.memory.get(name) is not None:
            results.add("peak_memory", name, [timings.memory[name]], "MiB", spread={}, **more)
    for part in PARTS:
        ms = [1e3 * parts[part] for parts in timings.parts]
        results.add("step_part", EAGER, ms, "ms", labels={"part": part})
    measured = range(WARMUP, len(batches.batches))
    gflop = [sum(step_flop(c, batches.lengths(i))) / 1e9 for i in measured]
    results.add("model_flop", OURS, gflop, "GFLOP")
    rates = [a / s for a, s in zip(gflop, own, strict=True)]
    results.add("flop_rate", OURS, rates, "GFLOP/s")
    half = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    size = config.peak_size or (8192 if config.device == "cuda" else 1024)
    results.add("flop_peak", "torch", [matmul_peak(device, half, size) / 1e9], "GFLOP/s", spread={})
    for name, stepper in (
        (EAGER, timings.eager.stepper),
        (OURS, Stepper(fast.model, graphs=Graphs(1))),
    ):
        padded, how = batches.padded_fraction(stepper), "graphs" if name == OURS else "no graphs"
        results.add(
            "padded_fraction", OURS, [padded], "fraction", labels={"variant": how}, spread={}
        )
    return results


def report(results: ResultWriter) -> None:
    """Print every result on a line: median, p10 and p90."""
    c, config = results.shape, results.labels["config"]
    context = f" after {c['context']} tokens" if "context" in c else ""
    print(
        f"{config}: {c['n_layer']} layers, width {c['n_embd']}, {c['parameters']:,} parameters; "
        f"batch {c['batch']}, {c['thoughts']} thoughts{context}\n"
        f"{results.common['device']}, {results.common['dtype']}; median (p10 .. p90)"
    )
    for row in results.rows:
        labels = [v for k, v in row["labels"].items() if k not in ("config", "relative_to")]
        name = " ".join([row["metric"].replace("_", " "), *labels])
        spread = " .. ".join(fmt(v) for v in row["spread"].values())
        spread = f"({spread})" if spread else ""
        print(f"{name:<28}{row['provider']:<20}{fmt(row['value']):>9} {row['unit']:<11}{spread}")


def sweep_table(rows: list[dict[str, Any]]) -> None:
    """Print how cost grows, relative to no thoughts and to the shortest context."""
    run = Run(rows)
    print("context  thoughts  ms/step  x no thoughts  x context  x eager")
    for context in CONTEXTS:
        for n in THOUGHTS:
            own = run.value("step", context=context, thoughts=n)
            first = run.value("step", context=context, thoughts=THOUGHTS[0])
            short = run.value("step", context=CONTEXTS[0], thoughts=n)
            eager = run.value("step", EAGER, relative_to=OURS, context=context, thoughts=n)
            print(
                f"{context:7} {n:9} {own:8.1f} {own / first:14.2f} {own / short:10.2f} {eager:8.2f}"
            )


def main() -> None:
    given, path = parse_cli(StepConfig, sys.argv[1:], __doc__.split("\n")[0])
    config = build(StepConfig, given, {"config": path} if path else {})  # parse_cli sets it apart
    cases = [config]
    if config.sweep:
        if chosen := sorted({"context", "latent"} & given.keys()):
            raise UserError(f"--sweep has its own values of --{chosen[0]}.\nLeave one of them out.")
        cases = [replace(config, context=c, latent=n) for c in CONTEXTS for n in THOUGHTS]
    for case in cases:
        recipe_of(case)  # errors are reported before any work
    try:
        if config.out:
            open(config.out, "a").close()
    except OSError as e:
        raise UserError(f"--out {config.out} cannot be written: {e.strerror}.") from None
    if sys.platform == "linux" and not MALLOC.items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, os.environ | MALLOC)
    torch.set_float32_matmul_precision("high" if config.dtype == "tf32" else "highest")
    rows = []
    for case in cases:
        results = write_case(case, time_case(case))
        report(results)
        print(results.summary(), flush=True)
        rows += results.rows
        gc.collect()  # a model and the hook on it refer to each other
    if config.sweep:
        sweep_table(rows)


if __name__ == "__main__":
    main_guard(main)
