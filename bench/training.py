"""Time a training step, and compare it with the released code's.

    python bench/training.py --config=config/prosqa_small.py --batch_size=64
    python bench/training.py --released CLONE --released_python VENV/bin/python
    python bench/training.py --sweep              thoughts x context lengths: how cost grows

The step is train.py's in the final stage: no written steps, --latent thoughts in every sequence,
one forward pass for each micro-batch. In turns with it, in a new random order for each batch, so
that only one computes at a time:

    nanococonut, eager   on a GPU: the same step without graphs and kernels
    released             a clone of facebookresearch/coconut in its own process: same weights,
                         examples, dropout, AdamW and threads, float32, whole batches; an error if
                         it does not compute the same. Our time includes making the batch; theirs
                         does not, since their DataLoader makes it in another process

FLOP are counted (bench/common/roofline.py); the machine's peak is measured in the same run. --out
appends results after every case, which also prints a line of JSON. If others compute on the same
cores, set OMP_WAIT_POLICY=passive: threads that wait by spinning take each other's time.
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

from bench.common.results import ResultWriter, command_line
from bench.common.roofline import matmul_peak, step_flop
from bench.common.train_backends import (
    FinalStageBatches,
    TrainBackend,
    adamw_settings,
    peak_memory,
)
from bench.common.worker import Worker, as_gpt2, check_released, clone_commit
from nanococonut.config import TrainConfig
from nanococonut.runtime.cli import make_config, option, parse_cli, read_config_file, validate
from nanococonut.runtime.errors import UserError, run_main

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
    config: str = option("config/prosqa_small.py", "training config whose model and data are used")
    batch_size: int = option(32, "sequences of a step", ge=1)
    micro_batch_size: int | None = option(
        None, "sequences of a forward pass, if not the config's; with --released the whole batch",
        ge=1,
    )  # fmt: skip
    latent: int = option(6, "thoughts of every sequence", ge=0)
    context: int | None = option(
        None, "tokens of every prefix: questions repeated or cut, if not as they are", ge=2
    )
    sweep: bool = option(False, "0 to 6 thoughts, contexts of 100 to 1,000 tokens, a case each")
    repeats: int = option(7, "steps measured", ge=1)
    n_layer: int | None = option(None, "layers, if not the config's")
    n_head: int | None = option(None, "attention heads, if not the config's")
    n_embd: int | None = option(None, "width, if not the config's")
    block_size: int | None = option(None, "longest sequence, if not the config's")
    released: str | None = option(None, "a clone of facebookresearch/coconut to compare with")
    released_python: str | None = option(None, "a Python that has torch and transformers 4.46.2")
    device: str = option("cpu", "where to run", choices=("cpu", "cuda"))
    dtype: str = option("float32", "as train.py's", choices=("float32", "tf32", "bfloat16"))
    kernels: str = option("auto", "as train.py's", choices=("auto", "triton", "torch"))
    graph: str = option("auto", "as train.py's", choices=("auto", "on", "off"))
    peak_size: int | None = option(
        None, "width of the square matrices that measure the peak (None: 8192, on a CPU 1024)",
        ge=1,
    )  # fmt: skip
    out: str | None = option(None, "append the results to this file")

    def __post_init__(self) -> None:
        validate(self)
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
    recipe = make_config(TrainConfig, read_config_file(config.config, TrainConfig), own)
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
        train_examples=max(EPOCH, WARMUP + config.repeats) * config.batch_size,
        **{k: getattr(config, k) for k in ("device", "dtype", "kernels", "graph")},
    )


def start_released(config: StepConfig, fast: TrainBackend) -> tuple[Worker, dict[str, Any]]:
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
    """What time_case measured, by provider. about: what the released code is, {} without it."""

    fast: TrainBackend
    about: dict[str, Any]
    seconds: dict[str, list[float]] = field(default_factory=dict)  # of each step
    memory: dict[str, float | None] = field(default_factory=dict)  # peak MiB


def time_case(config: StepConfig) -> Timings:
    """Take steps in turns, each of them timed."""
    device, recipe, plain_adamw = (
        torch.device(config.device),
        recipe_of(config),
        bool(config.released),
    )
    batches = FinalStageBatches(recipe, WARMUP + config.repeats, config.context)
    before = peak_memory(device, reset=True)
    fast = TrainBackend(recipe, batches, plain_adamw)
    providers = {OURS: fast.step}
    timings = Timings(fast, {}, memory={OURS: warm_up(fast, before)})
    if config.released:
        released, timings.about = start_released(config, fast)
        providers["released"] = released.request
        for i in range(WARMUP):
            released.request(i)
    if fast.graph or fast.kernels != "torch":
        before = peak_memory(device, reset=True)
        plain = replace(recipe, kernels="torch", graph="off")
        eager = TrainBackend(plain, batches, plain_adamw)
        providers[EAGER] = eager.step
        timings.memory[EAGER] = warm_up(eager, before)
        eager.model.load_state_dict(fast.model.state_dict())
    timings.seconds = {name: [] for name in providers}
    for i in range(WARMUP, WARMUP + config.repeats):
        replies = {}
        # in random order, or one would always follow the same other, with its caches
        for name in random.Random(i).sample([*providers], len(providers)):
            replies[name] = providers[name](i)
            timings.seconds[name].append(replies[name]["seconds"])
        if i == WARMUP and EAGER in replies and not recipe.dropout:  # from the same weights
            check_losses(replies[OURS]["loss"], replies[EAGER]["loss"], config.dtype)
    if config.released:
        timings.memory["released"] = replies["released"]["memory_mib"]
        released.close()
    return timings


def warm_up(backend: TrainBackend, before: int | None) -> float | None:
    """Take steps that are not timed. Return the peak MiB since `before`, None if unknown."""
    # a graph is captured when its shape is met first: all of them now, or that would be timed
    for i in range(len(backend.batches.batches) if backend.graph else WARMUP):
        backend.step(i)
    after = peak_memory(backend.train_step.device)
    return None if after is None or before is None else (after - before) / 2**20


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
    labels, command = (
        {"config": Path(config.config).name},
        command_line(config, "bench/training.py"),
    )
    results = ResultWriter("training", device, config.dtype, command, config.out, labels, shape)
    detail = {k: getattr(recipe, k) for k in SETTINGS}
    detail |= {"kernels": fast.kernels, "graphs": fast.graph}
    detail |= {"load": os.getloadavg()[0], "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY")}
    released_versions, details = about.pop("versions", None), {OURS: detail, "released": about}
    own = timings.seconds[OURS]
    for name, seconds in timings.seconds.items():
        versions = released_versions if name == "released" else None
        ms, rates = [1e3 * s for s in seconds], [config.batch_size / s for s in seconds]
        results.add("step", name, ms, "ms", detail=details.get(name), versions=versions)
        results.add("examples_per_s", name, rates, "examples/s", versions=versions)
        if name != OURS:
            ratios = [b / a for a, b in zip(own, seconds, strict=True)]
            relative = {"relative_to": OURS}
            results.add("step", name, ratios, "x", labels=relative, versions=versions)
        if timings.memory[name] is not None:
            memory = [timings.memory[name]]
            results.add("peak_memory", name, memory, "MiB", spread={}, versions=versions)
    measured = range(WARMUP, len(batches.batches))
    gflop = [sum(step_flop(c, batches.lengths(i))) / 1e9 for i in measured]
    results.add("model_flop", OURS, gflop, "GFLOP")
    results.add("flop_rate", OURS, [f / s for f, s in zip(gflop, own, strict=True)], "GFLOP/s")
    size = config.peak_size or (8192 if config.device == "cuda" else 1024)
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    results.add(
        "flop_peak", "torch", [matmul_peak(device, dtype, size) / 1e9], "GFLOP/s", spread={}
    )
    padded = batches.padded_fraction(fast.train_step)
    results.add("padded_fraction", OURS, [padded], "fraction", spread={})
    return results


def main() -> None:
    given, path = parse_cli(StepConfig, sys.argv[1:], __doc__.split("\n")[0])
    config = make_config(
        StepConfig, given, {"config": path} if path else {}
    )  # parse_cli sets it apart
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
    for case in cases:
        context = f" after {case.context} tokens" if case.context else ""
        print(f"{case.config}: batch {case.batch_size}, {case.latent} thoughts{context}")
        print(write_case(case, time_case(case)).summary(), flush=True)
        gc.collect()  # graphs and models refer to each other


if __name__ == "__main__":
    run_main(main)
