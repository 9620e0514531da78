"""Time a training step, and compare it with the released code's.

    python bench/training.py --config=config/prosqa_small.py --batch_size=64
    python bench/training.py --config=config/prosqa.py --batch_size=128 --device=cuda
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
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs without installation

import nanococonut  # isort: skip  # noqa: F401  # first: sets OMP_WAIT_POLICY
import torch

from bench.common.results import ResultWriter
from bench.common.worker import Worker, check_released, clone_commit, worker_setup
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

OURS = "nanococonut"
OVERRIDES = ("n_layer", "n_head", "n_embd", "micro_batch_size")  # of the training config
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
    n_layer: int | None = option(None, "layers, if not the config's")
    n_head: int | None = option(None, "attention heads, if not the config's")
    n_embd: int | None = option(None, "width, if not the config's")
    micro_batch_size: int | None = option(None, "sequences of a pass, if not the config's", ge=1)
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
    own: dict[str, Any] = {k: v for k in OVERRIDES if (v := getattr(config, k)) is not None}
    if config.released:  # without what the released code lacks
        own |= {"smear": False, "grad_clip": 0.0, "muon_learning_rate": 0.0}
        own.setdefault("micro_batch_size", config.batch_size)
    own |= {"init_from": "scratch", "fallback": None}  # the weights make no difference to the time
    recipe = make_config(TrainConfig, read_config_file(config.config, TrainConfig), own)
    return replace(
        recipe,
        method="coconut",
        final_thoughts=config.latent,
        pad_latent_to_max=True,
        uniform_prob=0.0,  # all examples are of the final stage
        batch_size=config.batch_size,
        micro_batch_size=min(recipe.micro_batch_size, config.batch_size),
        data=None,
        train_examples=max(EPOCH, WARMUP + config.repeats) * config.batch_size,
        **{k: getattr(config, k) for k in ("device", "dtype", "kernels", "graph")},
    )


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

    def plain_batches(self, n: int) -> list[dict[str, list]]:
        """Return n batches as plain sequences: token ids, labels, position of the thoughts."""
        batches, size = [], self.recipe.batch_size
        for start in range(0, n * size, size):
            batch: dict[str, list] = {"ids": [], "labels": [], "first_thought": []}
            examples = self.examples[start : start + size]
            for example in sorted(examples, key=lambda example: len(example.question)):
                prefix, n_thoughts, suffix, skipped = build_sequence(
                    self.curriculum, self.stage, example, self.tokenizer
                )
                batch["ids"].append(prefix + [self.tokenizer.latent] * n_thoughts + suffix)
                masked = len(prefix) + n_thoughts + skipped
                batch["labels"].append([IGNORE] * masked + suffix[skipped:])
                # 0: pad on the right only
                batch["first_thought"].append(len(prefix) if n_thoughts else 0)
            batches.append(batch)
        return batches


def start_released(config: StepConfig, ours: Trainer) -> tuple[Worker, dict[str, Any]]:
    """Start the released code with our size and weights, and check that it computes the same.
    Return it, and what it is."""
    with torch.no_grad():  # with initial weights, thoughts and positions hardly change the loss
        for p in ours.model.parameters():
            p.add_(torch.randn_like(p) * ours.recipe.n_embd**-0.5)
    adamw = ours.optimizers[0].param_groups[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        setup = worker_setup(ours.model, ours.tokenizer, path, config.released, ours.recipe.dropout)
        setup |= {"adamw": {name: adamw[name] for name in ("lr", "betas", "weight_decay")}}
        setup |= {"batches": ours.plain_batches(WARMUP + config.repeats)}
        os.environ.update(MALLOC)
        worker = Worker("released", config.released_python, setup | {"kind": "released_train"})
    mine, theirs = ours.check(), worker.request({})
    for name in mine:
        if not abs(mine[name] - theirs[name]) <= TOLERANCE * abs(theirs[name]):
            worker.close()
            raise UserError(
                f"the two do not compute the same: {name} {mine[name]:.6f} (ours), "
                f"{theirs[name]:.6f} (released).\nA comparison of their speed would mean nothing."
            )
    about = {"versions": worker.versions, "commit": clone_commit(config.released)}
    about |= {name: {"ours": mine[name], "released": theirs[name]} for name in mine}
    return worker, about


def result_writer(config: StepConfig, ours: Trainer) -> ResultWriter:
    c, device = ours.model.config, ours.model.wte.weight.device
    shape = {k: getattr(c, k) for k in ("n_layer", "n_embd", "vocab_size")}
    shape |= {"parameters": ours.model.n_params(), "batch": config.batch_size}
    shape |= {"micro_batch": ours.recipe.micro_batch_size, "thoughts": config.latent}
    labels = {"config": Path(config.config).name}
    return ResultWriter("training", config, device, config.dtype, labels, shape)


def main() -> None:
    given, path = parse_cli(StepConfig, sys.argv[1:], __doc__)
    config = make_config(StepConfig, given, {"config": path} if path else {})
    keep_freed_memory()

    # ---- warm up
    ours = Trainer(recipe_of(config))
    results = result_writer(config, ours)
    print(f"{config.config}: batch {config.batch_size}, {config.latent} thoughts")
    print(f"kernels: {ours.kernels} ({ours.why_kernels}), graphs: {'yes' if ours.graph else 'no'}")
    providers, about = {OURS: ours.step}, {}
    if config.released:
        worker, about = start_released(config, ours)
        providers["released"] = lambda i: worker.request({"i": i})
        for i in range(WARMUP):
            providers["released"](i)
    n_steps = WARMUP + config.repeats
    # a graph is captured when its shape is met first: all of them now, or that would be timed
    for i in range(n_steps if ours.graph else WARMUP):
        ours.step(i)

    # ---- steps in turns
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for i in range(WARMUP, n_steps):
        # in random order, or one would always follow the other, with its caches
        for name in random.Random(i).sample([*providers], len(providers)):
            seconds[name].append(providers[name](i)["seconds"])
    if config.released:
        worker.close()

    # ---- results
    detail = {k: getattr(ours.recipe, k) for k in SETTINGS}
    detail |= {"kernels": ours.kernels, "graphs": ours.graph, "load": os.getloadavg()[0]}
    detail |= {"omp_wait_policy": os.environ.get("OMP_WAIT_POLICY")}
    if config.device == "cuda":  # torch counts its own, the driver also graphs and other processes
        free, total = torch.cuda.mem_get_info()
        detail |= {"max_reserved": torch.cuda.max_memory_reserved(), "used": total - free}
        detail |= {"graphs_kept": len(ours.train_step.graphs.graphs) if ours.graph else 0}
    results.add("step", OURS, [1e3 * s for s in seconds[OURS]], "ms", detail=detail)
    if config.released:
        times, versions = seconds["released"], about.pop("versions")
        extra = {"detail": about, "versions": versions}
        results.add("step", "released", [1e3 * s for s in times], "ms", **extra)
        results.add_ratio("step", "released", times, seconds[OURS], OURS, versions=versions)
    print(results.summary())


if __name__ == "__main__":
    run_main(main)
