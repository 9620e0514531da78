"""Time a training step, and compare it with the released code's.

    python bench/training.py --config=config/prosqa_small.py --batch_size=64
    python bench/training.py --released CLONE --released_python VENV/bin/python
    python bench/training.py --context=400 --latent=3     how cost grows, a call for each

The step is train.py's in the final stage: no written steps, --latent thoughts in every sequence.
The released code (a clone of facebookresearch/coconut, in its own process) takes turns with it:
same weights, examples, dropout, AdamW and threads, float32, whole batches; an error if it does not
compute the same. Only our time includes making the batch: their DataLoader has its own process.

--out appends the results; the last line is JSON.
"""

import os
import random
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs without installation

import nanococonut  # isort: skip  # noqa: F401  # first: sets OMP_WAIT_POLICY
import torch

from bench.common.results import ResultWriter
from bench.common.train_backends import FinalStageBatches, TrainBackend, adamw_settings
from bench.common.worker import Worker, check_released, clone_commit, worker_setup
from nanococonut.config import TrainConfig
from nanococonut.runtime.cli import make_config, option, parse_cli, read_config_file, validate
from nanococonut.runtime.device import keep_freed_memory
from nanococonut.runtime.errors import UserError, run_main

OURS = "nanococonut"
MODEL_SHAPE = ("n_layer", "n_head", "n_embd", "block_size")
SETTINGS = "tokenizer render smear dropout muon_learning_rate grad_clip seed".split()
WARMUP = 2  # steps before those that count
EPOCH = 64  # batches of an epoch: examples are sorted by length among as many as in training
TOLERANCE = 1e-4  # relative, of loss and gradient; rounding makes up to 2e-5
# what keep_freed_memory does here, for the other process: glibc reads these when it starts
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
    out: str | None = option(None, "append the results to this file")

    def __post_init__(self) -> None:
        validate(self)
        check_released(self.released, self.released_python)
        if self.released and self.dtype != "float32":
            raise UserError("the comparison is in float32.\nLeave --dtype out with --released.")


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


def start_released(config: StepConfig, ours: TrainBackend) -> tuple[Worker, dict[str, Any]]:
    """Start the released code with our size and weights, and check that it computes the same.
    Return it, and what it is."""
    with torch.no_grad():  # with initial weights, thoughts and positions hardly change the loss
        for p in ours.model.parameters():
            p.add_(torch.randn_like(p) * ours.recipe.n_embd**-0.5)
    batches, recipe = ours.batches, ours.recipe
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        setup = worker_setup(ours.model, batches.tokenizer, path, config.released, recipe.dropout)
        setup |= {"adamw": adamw_settings(recipe), "batches": batches.as_released()}
        setup |= {"kind": "released_train"}
        flag, needs = "--released_python", "torch and transformers 4.46.2"
        os.environ.update(MALLOC)
        worker = Worker("released_train", config.released_python, flag, needs)
        about = worker.request(setup)
    mine, theirs = ours.check(), worker.request({})
    for name in mine:
        if not abs(mine[name] - theirs[name]) <= TOLERANCE * abs(theirs[name]):
            worker.close()
            raise UserError(
                f"the two do not compute the same: {name} {mine[name]:.6f} (ours), "
                f"{theirs[name]:.6f} (released).\nA comparison of their speed would mean nothing."
            )
    about |= {"commit": clone_commit(config.released)}
    about |= {name: {"ours": mine[name], "released": theirs[name]} for name in mine}
    return worker, about


def write_results(
    config: StepConfig, ours: TrainBackend, seconds: dict[str, list[float]], about: dict[str, Any]
) -> ResultWriter:
    """Append the results. seconds: provider -> of each step; about: what the released code is."""
    c, device, recipe = ours.model.config, ours.model.wte.weight.device, ours.recipe
    shape = {k: getattr(c, k) for k in ("n_layer", "n_embd", "vocab_size")}
    shape |= {"parameters": ours.model.n_params(), "batch": config.batch_size}
    shape |= {"micro_batch": recipe.micro_batch_size, "thoughts": config.latent}
    shape |= {"context": config.context} if config.context else {}
    labels = {"config": Path(config.config).name}
    results = ResultWriter("training", config, device, config.dtype, labels, shape)
    detail = {k: getattr(recipe, k) for k in SETTINGS}
    detail |= {"kernels": ours.kernels, "graphs": ours.graph, "load": os.getloadavg()[0]}
    detail |= {"omp_wait_policy": os.environ.get("OMP_WAIT_POLICY")}
    details = {OURS: detail, "released": about}
    for name, times in seconds.items():
        versions = about.pop("versions") if name == "released" else None
        ms, rates = [1e3 * s for s in times], [config.batch_size / s for s in times]
        results.add("step", name, ms, "ms", detail=details[name], versions=versions)
        results.add("examples_per_s", name, rates, "examples/s", versions=versions)
        if name != OURS:
            results.add_ratio("step", name, times, seconds[OURS], OURS, versions=versions)
    return results


def main() -> None:
    given, path = parse_cli(StepConfig, sys.argv[1:], __doc__)
    config = make_config(StepConfig, given, {"config": path} if path else {})
    recipe = recipe_of(config)
    if config.out and not Path(config.out).parent.is_dir():
        raise UserError(f"--out {config.out} cannot be written: its folder does not exist.")
    keep_freed_memory()
    torch.set_float32_matmul_precision("high" if config.dtype == "tf32" else "highest")

    # ---- warm up
    batches = FinalStageBatches(recipe, WARMUP + config.repeats, config.context)
    ours = TrainBackend(recipe, batches, plain_adamw=bool(config.released))
    print(f"{config.config}: batch {config.batch_size}, {config.latent} thoughts")
    print(f"kernels: {ours.kernels} ({ours.why_kernels}), graphs: {'yes' if ours.graph else 'no'}")
    # a graph is captured when its shape is met first: all of them now, or that would be timed
    for i in range(len(batches.batches) if ours.graph else WARMUP):
        ours.step(i)
    providers, about = {OURS: ours.step}, {}
    if config.released:
        worker, about = start_released(config, ours)
        providers["released"] = lambda i: worker.request({"i": i})
        for i in range(WARMUP):
            providers["released"](i)

    # ---- steps in turns
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for i in range(WARMUP, WARMUP + config.repeats):
        # in random order, or one would always follow the other, with its caches
        for name in random.Random(i).sample([*providers], len(providers)):
            seconds[name].append(providers[name](i)["seconds"])
    if config.released:
        worker.close()
    print(write_results(config, ours, seconds, about).summary())


if __name__ == "__main__":
    run_main(main)
