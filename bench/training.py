"""Time a training step, and compare it with the released code's.

    python bench/training.py --config=config/prosqa_small.py --batch_size=64
    python bench/training.py --config=config/prosqa.py --batch_size=128 --device=cuda
    python bench/training.py --set=n_layer=4,micro_batch_size=16
    python bench/training.py --released CLONE --released_python VENV/bin/python

It times the step of train.py in the final stage: no written steps, --latent thoughts per sequence.
The released code (a clone of facebookresearch/coconut, in its own process) takes turns with it, in
float32 and whole batches. Both use the same weights, examples, dropout, AdamW settings and threads.
It is an error if their losses or gradient norms differ. Only our time includes building the batch:
the released DataLoader does that in another process.

--out appends the results; the last line of the output is JSON.
"""

import os
import random
import signal
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
from nanococonut.batch import IGNORE, build_sequence, pad_lists
from nanococonut.config import TrainConfig
from nanococonut.curriculum import Curriculum
from nanococonut.data.tasks import TASKS, Data
from nanococonut.runtime.cli import Options, make_config, option, parse_cli, read_config_file
from nanococonut.runtime.device import keep_freed_memory, select_device, select_precision
from nanococonut.runtime.errors import UserError, run_main
from nanococonut.runtime.graphs import GraphCache
from nanococonut.training.loader import TrainLoader
from nanococonut.training.setup import init_model, init_optimizers, init_tokenizer
from nanococonut.training.step import TrainStep

SETTINGS = "tokenizer render smear dropout muon_learning_rate grad_clip seed".split()
WARMUP = 2  # untimed steps
EPOCH = 64  # minimum batches per epoch, so that examples are sorted by length as in training
TOLERANCE = 1e-4  # relative, for loss and gradient; rounding causes up to 2e-5
# keep_freed_memory() for the other process: glibc reads these variables when it starts
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(256 << 20),
}


@dataclass(frozen=True)
class StepConfig(Options):
    config: str = option("config/prosqa_small.py", "training config with the model and the data")
    batch_size: int = option(32, "sequences per step", ge=1)
    latent: int = option(6, "thoughts per sequence", ge=0)
    repeats: int = option(7, "timed steps", ge=1)
    set: str | None = option(None, "further settings of train.py: n_layer=4,kernels=torch")
    released: str | None = option(None, "a clone of facebookresearch/coconut to compare with")
    released_python: str | None = option(None, "a Python with torch and transformers 4.46.2")
    device: str = option("cpu", "where to run", choices=("cpu", "cuda"))
    dtype: str = option("float32", "as in train.py", choices=("float32", "tf32", "bfloat16"))
    out: str | None = option(None, "append the results to this file")

    def validate(self) -> None:
        check_released(self.released, self.released_python)
        if self.released and self.dtype != "float32":
            raise UserError("--released is compared in float32.\nLeave --dtype out.")


def recipe_of(config: StepConfig) -> TrainConfig:
    """Return the training config with the sizes to measure."""
    flags = [f"--{setting}" for setting in (config.set or "").split(",") if setting]
    settings = read_config_file(config.config, TrainConfig) | parse_cli(TrainConfig, flags, "")[0]
    if not TASKS[task := settings.get("task", TrainConfig.task)].splits:
        raise UserError(
            f"{config.config}: {task} is read from files, but generated examples are timed."
            "\nGive a config of ProsQA or ProntoQA."
        )
    micro_batch_size = settings.get("micro_batch_size", TrainConfig.micro_batch_size)
    settings |= {
        "method": "coconut",
        "init_from": "scratch",  # the time does not depend on the weights
        "fallback": None,
        "data": None,
        "train_examples": max(EPOCH, WARMUP + config.repeats) * config.batch_size,
        "final_thoughts": config.latent,
        "pad_latent_to_max": True,
        "uniform_prob": 0.0,  # every example is in the final stage
        "grow_epochs": 0,  # and has full size
        "batch_size": config.batch_size,
        "micro_batch_size": min(micro_batch_size, config.batch_size),
        "device": config.device,
        "dtype": config.dtype,
    }
    if config.released:  # without what the released code lacks
        settings |= {"smear": False, "grad_clip": 0.0, "muon_learning_rate": 0.0}
        settings |= {"thought_labels": "none", "train_positions": True}
        settings["micro_batch_size"] = config.batch_size
    return make_config(TrainConfig, settings)


class Trainer:
    """The training step of train.py: the same loader, kernels, CUDA graphs and order of calls."""

    def __init__(self, recipe: TrainConfig) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.tokenizer = recipe, init_tokenizer(recipe, None)
        self.curriculum = Curriculum.from_config(recipe)
        self.stage = recipe.max_latent_stage + 1  # the final one
        self.model = init_model(recipe, self.tokenizer).to(select_device(recipe.device)).train()
        use_bf16 = select_precision(recipe.dtype, self.model.wte.weight.device)
        self.kernels, self.why_kernels = ops.choose_training_backend(
            recipe.kernels, self.model, use_bf16
        )
        self.graph = ops.choose_graph(recipe.graph, self.model)
        graphs = GraphCache(64 if self.graph else 0)
        self.train_step = TrainStep(self.model, self.kernels, use_bf16, graphs, recipe.thought_loss)
        self.optimizers = init_optimizers(recipe, self.model)
        self.loader = TrainLoader(recipe, self.curriculum, self.tokenizer, Data(None, {}))
        self.examples = self.loader.epoch(0)
        self.loader.get(0, self.stage, self.train_step.prepare)
        self.loader.close(wait=True)  # no epoch is generated while steps are timed

    def check(self) -> dict[str, float]:
        """Return loss and gradient norm of the first batch, without dropout. Call it before the
        first step: graphs write to the gradient tensors they were captured with."""
        plain = TrainStep(self.model.eval(), self.kernels)
        batch = self.loader.get(0, self.stage, plain.prepare)
        for micro_batch in batch.micro_batches:
            plain(micro_batch)
        grads = [p.grad for p in self.model.train().parameters() if p.requires_grad]
        norms = torch.stack([grad.norm() for grad in grads])
        checked = {"loss": plain.totals[0].item(), "gradient": norms.norm().item()}
        plain.zero_grad()
        return checked

    def step(self, i: int) -> dict[str, float]:
        """Take one optimizer step on batch i. Return its seconds and loss.

        As in train.py, the next batch for a GPU is built during this step, within its time.
        """
        on_gpu, prepare = self.train_step.device.type == "cuda", self.train_step.prepare
        if on_gpu:
            self.loader.get(i, self.stage, prepare)  # usually prefetched by the last step
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
        loss, *_ = self.train_step.totals.tolist()  # the host waits for the device here
        return {"seconds": time.perf_counter() - began, "loss": loss}

    def released_batches(self, n: int) -> list[dict[str, list]]:
        """Return the first n batches, padded like the released collator does: on the left to align
        the thoughts of all sequences, then on the right."""
        fills = dict(input_ids=self.tokenizer.eos, labels=IGNORE, attention_mask=0, position_ids=0)
        batches, size = [], self.recipe.batch_size
        for start in range(0, n * size, size):
            rows, n_before = [], []  # n_before: tokens before the thoughts, 0 if there are none
            for example in self.examples[start : start + size]:
                s = build_sequence(self.curriculum, self.stage, example, self.tokenizer)
                ids = s.prefix + [self.tokenizer.latent] * s.n_thoughts + s.suffix
                labels = [IGNORE] * (len(ids) - s.n_targets) + s.suffix[s.n_forced :]
                row = dict(input_ids=ids, labels=labels, attention_mask=[1] * len(ids))
                rows.append(row | {"position_ids": [*range(len(ids))]})
                n_before.append(len(s.prefix) if s.n_thoughts else 0)
            n_left = [max(n_before) - n for n in n_before]
            batch = {}
            for name, fill in fills.items():
                lists = [[fill] * left + row[name] for left, row in zip(n_left, rows, strict=True)]
                batch[name] = pad_lists(lists, fill).tolist()
            batches.append(batch)
        return batches


def start_released(config: StepConfig, ours: Trainer) -> tuple[Worker, dict[str, Any]]:
    """Start the released code with our model. Return its worker, and loss and gradient norm of
    both. Raise UserError if these differ."""
    with torch.no_grad():  # at initialization, thoughts and positions hardly affect the loss
        for p in ours.model.parameters():
            p.add_(torch.randn_like(p) * ours.recipe.n_embd**-0.5)
    group = ours.optimizers[0].param_groups[0]
    adamw = {name: group[name] for name in ("lr", "betas", "weight_decay")}
    special = {name: getattr(ours.tokenizer, name) for name in SPECIAL}
    batches = ours.released_batches(WARMUP + config.repeats)
    os.environ.update(MALLOC)
    worker = Worker(
        "released_train", config.released_python, ours.model, special, config.released,
        adamw=adamw, batches=batches,
    )  # fmt: skip
    own, released = ours.check(), worker.request({})
    for name in own:
        if not abs(own[name] - released[name]) <= TOLERANCE * abs(released[name]):  # NaN too
            worker.close()
            raise UserError(
                f"the two compute different values: {name} {own[name]:.6f} (ours), "
                f"{released[name]:.6f} (released).\nComparing their speed would mean nothing."
            )
    return worker, {name: {"ours": own[name], "released": released[name]} for name in own}


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # runs atexit, which ends workers
    config = StepConfig.from_cli(__doc__)
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
    # a graph is captured on the first batch of its shape, so run all batches once, untimed
    for i in range(n_steps if ours.graph else WARMUP):
        ours.step(i)

    # ---- steps in turns
    times: dict[str, list[float]] = {name: [] for name in providers}  # milliseconds
    for i in range(WARMUP, n_steps):
        # in random order, so that neither always finds the caches as the other left them
        for name in random.Random(i).sample([*providers], len(providers)):
            times[name].append(1e3 * providers[name](i)["seconds"])

    # ---- results
    detail = {k: getattr(ours.recipe, k) for k in SETTINGS}
    detail |= {"kernels": ours.kernels, "graphs": ours.graph, "load": load_average()}
    detail |= {"openmp": {name: os.environ.get(name) for name in OPENMP}}
    if config.device == "cuda":
        free, total = torch.cuda.mem_get_info()  # the driver also counts graphs, other processes
        detail |= {"max_reserved": torch.cuda.max_memory_reserved(), "used": total - free}
        detail |= {"graphs_kept": len(ours.train_step.graphs.graphs) if ours.graph else 0}
    results.add("step", OURS, times[OURS], "ms", detail=detail)
    if config.released:
        extra = {"versions": worker.versions}
        results.add("step", "released", times["released"], "ms", detail=checked, **extra)
        results.add_ratio("step", "released", times["released"], times[OURS], OURS, **extra)
    results.print_summary()


if __name__ == "__main__":
    run_main(main)
