"""Time a training step, and compare it with the released code's.

    python bench/training.py --config=config/prosqa_small.py --batch_size=64
    python bench/training.py --config=config/prosqa.py --batch_size=128 --device=cuda
    python bench/training.py --set=n_layer=4,micro_batch_size=16
    python bench/training.py --released CLONE --released_python VENV/bin/python

The step is train.py's in the final stage: no written steps, --latent thoughts in every sequence.
The released code (a clone of facebookresearch/coconut, in its own process) takes turns with it:
same weights, examples, dropout, AdamW and threads, float32, whole batches; an error if it does not
compute the same. Only our time includes making the batch: their DataLoader has its own process.

--out appends the results; the last line is JSON.
"""

import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs without installation

import nanococonut  # isort: skip  # noqa: F401  # first: sets how OpenMP waits
import torch

from bench.common.baselines import OPENMP, Worker, check_released
from bench.common.results import OURS, ResultWriter, load_average
from bench.common.workload import SPECIAL, model_shape
from nanococonut import ops
from nanococonut.batch import IGNORE, build_sequence
from nanococonut.config import TrainConfig
from nanococonut.curriculum import Curriculum
from nanococonut.data.tasks import Data
from nanococonut.runtime.cli import make_config, option, parse_cli, read_config_file, validate
from nanococonut.runtime.device import keep_freed_memory, select_device, select_precision
from nanococonut.runtime.errors import UserError, run_main
from nanococonut.runtime.graphs import GraphCache
from nanococonut.training.loader import TrainLoader
from nanococonut.training.setup import init_model, init_optimizers, init_tokenizer
from nanococonut.training.step import TrainStep

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
    latent: int = option(6, "thoughts of every sequence", ge=0)
    repeats: int = option(7, "steps measured", ge=1)
    set: str | None = option(None, "other settings of train.py: n_layer=4,kernels=torch")
    released: str | None = option(None, "a clone of facebookresearch/coconut to compare with")
    released_python: str | None = option(None, "a Python that has torch and transformers 4.46.2")
    device: str = option("cpu", "where to run", choices=("cpu", "cuda"))
    dtype: str = option("float32", "as train.py's", choices=("float32", "tf32", "bfloat16"))
    out: str | None = option(None, "append the results to this file")

    def __post_init__(self) -> None:
        validate(self)
        check_released(self.released, self.released_python)
        if self.released and self.dtype != "float32":
            raise UserError("the comparison is in float32.\nLeave --dtype out with --released.")


def recipe_of(config: StepConfig) -> TrainConfig:
    """Return the training config with the measured sizes in it."""
    flags = [f"--{setting}" for setting in (config.set or "").split(",") if setting]
    settings = read_config_file(config.config, TrainConfig) | parse_cli(TrainConfig, flags, "")[0]
    micro_batch_size = settings.get("micro_batch_size", TrainConfig.micro_batch_size)
    settings |= {
        "method": "coconut",
        "init_from": "scratch",  # the weights make no difference to the time
        "fallback": None,
        "data": None,
        "train_examples": max(EPOCH, WARMUP + config.repeats) * config.batch_size,
        "final_thoughts": config.latent,
        "pad_latent_to_max": True,
        "uniform_prob": 0.0,  # all examples are of the final stage
        "batch_size": config.batch_size,
        "micro_batch_size": min(micro_batch_size, config.batch_size),
        "device": config.device,
        "dtype": config.dtype,
    }
    if config.released:  # whole batches, without what the released code lacks
        settings |= {"smear": False, "grad_clip": 0.0, "muon_learning_rate": 0.0}
        settings |= {"micro_batch_size": config.batch_size}
    return make_config(TrainConfig, settings)


class Trainer:
    """The step of train.py: its loader, its TrainStep, kernels and graphs, in its order."""

    def __init__(self, recipe: TrainConfig) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.tokenizer = recipe, init_tokenizer(recipe, None)
        self.curriculum, self.stage = Curriculum.from_config(recipe), recipe.max_latent_stage + 1
        self.model = init_model(recipe, self.tokenizer).to(select_device(recipe.device)).train()
        self.kernels, self.why_kernels = ops.choose_training_backend(recipe.kernels, self.model)
        self.graph = ops.choose_graph(recipe.graph, self.model)
        use_bf16 = select_precision(recipe.dtype, self.model.wte.weight.device)
        graphs = GraphCache(64 if self.graph else 0)
        self.train_step = TrainStep(self.model, self.kernels, use_bf16, graphs)
        self.optimizers = init_optimizers(recipe, self.model)
        self.loader = TrainLoader(recipe, self.curriculum, self.tokenizer, Data(None, {}))
        self.examples = self.loader.epoch(0)
        self.loader.get(0, self.stage, self.train_step.prepare)
        self.loader.close(wait=True)  # so that no further epoch is made while a step is measured

    def check(self) -> dict[str, float]:
        """Return loss and norm of the gradient on the first batch, without dropout. Call it before
        the first step, as graphs write to the gradients that they find."""
        plain = TrainStep(self.model.eval(), self.kernels)
        batch = self.loader.get(0, self.stage, plain.prepare)
        for micro_batch in batch.micro_batches:
            plain(micro_batch)
        norms = torch.stack([p.grad.norm() for p in self.model.train().parameters()])
        checked = {"loss": plain.totals[0].item(), "gradient": norms.norm().item()}
        plain.zero_grad()
        return checked

    def step(self, i: int) -> dict[str, float]:
        """Take one optimizer step on batch i. Return seconds and loss. As in train.py, a GPU's next
        batch is made while it computes, within this step's time."""
        on_gpu, prepare = self.train_step.device.type == "cuda", self.train_step.prepare
        if on_gpu:
            self.loader.get(i, self.stage, prepare)  # the step before has usually made it
        began = time.perf_counter()
        batch = self.loader.get(i, self.stage, prepare)
        torch.manual_seed(self.recipe.seed + i)
        self.train_step.zero_grad()
        for micro_batch in batch.micro_batches:
            self.train_step(micro_batch)
        if self.recipe.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
        if on_gpu:
            self.loader.prefetch((i + 1) % self.loader.steps_per_epoch, self.stage, prepare)
        loss, *_ = self.train_step.totals.tolist()  # here the host waits for the device
        return {"seconds": time.perf_counter() - began, "loss": loss}

    def released_batches(self, n: int) -> list[dict[str, list]]:
        """Return n batches as the released collator pads them: on the left, so that thoughts share
        their columns, then on the right."""
        batches, size = [], self.recipe.batch_size
        eos, latent = self.tokenizer.eos, self.tokenizer.latent
        for start in range(0, n * size, size):
            sequences = []  # ids, labels, and tokens before the thoughts, 0 if it has none
            for example in self.examples[start : start + size]:
                prefix, n_thoughts, suffix, skipped = build_sequence(
                    self.curriculum, self.stage, example, self.tokenizer
                )
                ids = prefix + [latent] * n_thoughts + suffix
                labels = [IGNORE] * (len(ids) - len(suffix) + skipped) + suffix[skipped:]
                sequences.append((ids, labels, len(prefix) if n_thoughts else 0))
            longest = max(n_before for _, _, n_before in sequences)
            width = max(longest - n_before + len(ids) for ids, _, n_before in sequences)
            batch = {"input_ids": [], "labels": [], "attention_mask": [], "position_ids": []}
            for ids, labels, n_before in sequences:
                left = longest - n_before
                right = width - left - len(ids)
                batch["input_ids"].append([eos] * left + ids + [eos] * right)
                batch["labels"].append([IGNORE] * left + labels + [IGNORE] * right)
                batch["attention_mask"].append([0] * left + [1] * len(ids) + [0] * right)
                batch["position_ids"].append([0] * left + list(range(len(ids))) + [0] * right)
            batches.append(batch)
        return batches


def start_released(config: StepConfig, ours: Trainer) -> tuple[Worker, dict[str, Any]]:
    """Start the released code with our size and weights, and check that it computes the same.
    Return it, and what both computed."""
    with torch.no_grad():  # with initial weights, thoughts and positions hardly change the loss
        for p in ours.model.parameters():
            p.add_(torch.randn_like(p) * ours.recipe.n_embd**-0.5)
    adamw = ours.optimizers[0].param_groups[0]
    special = {name: getattr(ours.tokenizer, name) for name in SPECIAL}
    extra = {"adamw": {name: adamw[name] for name in ("lr", "betas", "weight_decay")}}
    extra |= {"batches": ours.released_batches(WARMUP + config.repeats)}
    os.environ.update(MALLOC)
    python, clone = config.released_python, config.released
    worker = Worker("released_train", python, ours.model, special, clone, **extra)
    mine, theirs = ours.check(), worker.request({})
    for name in mine:
        if not abs(mine[name] - theirs[name]) <= TOLERANCE * abs(theirs[name]):
            worker.close()
            raise UserError(
                f"the two do not compute the same: {name} {mine[name]:.6f} (ours), "
                f"{theirs[name]:.6f} (released).\nA comparison of their speed would mean nothing."
            )
    return worker, {name: {"ours": mine[name], "released": theirs[name]} for name in mine}


def main() -> None:
    given, path = parse_cli(StepConfig, sys.argv[1:], __doc__)  # path: of --config
    config = make_config(StepConfig, given, {"config": path} if path else {})
    keep_freed_memory()

    # ---- warm up
    ours = Trainer(recipe_of(config))
    shared = {"config": Path(config.config).name} | model_shape(ours.model)
    shared |= {"batch": config.batch_size, "micro_batch": ours.recipe.micro_batch_size}
    shared |= {"thoughts": config.latent}
    results = ResultWriter("training", config, ours.train_step.device, config.dtype, **shared)
    print(f"{config.config}: batch {config.batch_size}, {config.latent} thoughts")
    print(f"kernels: {ours.kernels} ({ours.why_kernels}), graphs: {'yes' if ours.graph else 'no'}")
    providers = {OURS: ours.step}
    if config.released:
        worker, checked = start_released(config, ours)
        providers["released"] = lambda i: worker.request({"i": i})
        for i in range(WARMUP):
            providers["released"](i)
    n_steps = WARMUP + config.repeats
    # a graph is captured when its shape is met first: all of them now, or that would be timed
    for i in range(n_steps if ours.graph else WARMUP):
        ours.step(i)

    # ---- steps in turns
    times: dict[str, list[float]] = {name: [] for name in providers}  # milliseconds
    for i in range(WARMUP, n_steps):
        # in random order, or one would always follow the other, with its caches
        for name in random.Random(i).sample([*providers], len(providers)):
            times[name].append(1e3 * providers[name](i)["seconds"])

    # ---- results
    detail = {k: getattr(ours.recipe, k) for k in SETTINGS}
    detail |= {"kernels": ours.kernels, "graphs": ours.graph, "load": load_average()}
    detail |= {"openmp": {name: os.environ.get(name) for name in OPENMP}}
    if config.device == "cuda":  # torch counts its own, the driver also graphs and other processes
        free, total = torch.cuda.mem_get_info()
        detail |= {"max_reserved": torch.cuda.max_memory_reserved(), "used": total - free}
        detail |= {"graphs_kept": len(ours.train_step.graphs.graphs) if ours.graph else 0}
    results.add("step", OURS, times[OURS], "ms", detail=detail)
    if config.released:
        extra = {"versions": worker.versions}
        results.add("step", "released", times["released"], "ms", detail=checked, **extra)
        results.add_ratio("step", "released", times["released"], times[OURS], OURS, **extra)
    print(results.summary())


if __name__ == "__main__":
    run_main(main)
