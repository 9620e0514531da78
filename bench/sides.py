"""Batches of the final stage, and the two ways in which bench/training.py takes steps on them."""

import copy
import sys
import time
from collections import Counter
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from nanococonut import coconut, ops
from nanococonut.batch import IGNORE, TokenizedExample, build_sequence, collate, count_labels
from nanococonut.config import TrainConfig
from nanococonut.curriculum import Curriculum
from nanococonut.data.tasks import Data
from nanococonut.runtime.device import select_device
from nanococonut.runtime.graphs import GraphCache
from nanococonut.training.loader import TrainLoader
from nanococonut.training.setup import (
    WEIGHT_DECAY,
    init_model,
    init_optimizers,
    init_tokenizer,
)
from nanococonut.training.step import MicroBatch, TrainStep

PARTS = ("collate", "prefix", "thoughts", "suffix", "backward", "optimizer")


class Rows:
    """n batches of the final stage, as train.py gets them. context: each question is repeated or
    cut so that its prefix has just as many tokens; what they say makes no difference to the time.
    """

    def __init__(self, recipe: TrainConfig, n: int, context: int | None = None) -> None:
        self.tokenizer, self.curriculum = (
            init_tokenizer(recipe, None),
            Curriculum.from_config(recipe),
        )
        self.stage, self.thoughts = recipe.max_latent_stage + 1, recipe.final_thoughts
        self.micro = recipe.micro_batch_size
        epochs, size = (
            TrainLoader(recipe, self.curriculum, self.tokenizer, Data(None, {})),
            recipe.batch_size,
        )
        rows = epochs.epoch(0)
        epochs.close(wait=True)  # the next epoch is not made while a step is measured
        if context:
            rows = [_of_length(row, context - 1) for row in rows]  # <bot> is the last
        self.batches = [
            sorted(rows[i * size :][:size], key=lambda row: len(row.question)) for i in range(n)
        ]
        self.layouts = [
            [build_sequence(self.curriculum, self.stage, row, self.tokenizer) for row in batch]
            for batch in self.batches
        ]

    def micro_batches(self, i: int, stepper: TrainStep) -> tuple[list[MicroBatch], int]:
        """Batch i as a TrainStep takes it -> its micro-batches, labels of all."""
        batch, done = self.batches[i], []
        stages = [self.stage] * len(batch)
        labels = count_labels(self.curriculum, stages, batch, self.tokenizer)
        for start in range(0, len(batch), self.micro):
            part = batch[start : start + self.micro]
            collated = collate(self.curriculum, stages[: len(part)], part, self.tokenizer)
            done.append(stepper.prepare(collated, [True] * len(part), self.thoughts))
        return done, labels

    def lengths(self, i: int) -> list[tuple[int, int, int, int]]:
        """Of batch i's rows: tokens of the prefix, thoughts, suffix, supervised labels."""
        return [(len(p), n, len(s), len(s) - skipped) for p, n, s, skipped in self.layouts[i]]

    def padded_share(self, stepper: TrainStep) -> float:
        """Of all positions that this stepper computes. Without graphs the released code pads as
        many, with thoughts."""
        real = slots = 0
        for i in range(len(self.batches)):
            real += sum(p + n + s for p, n, s, _ in self.lengths(i))
            for micro in self.micro_batches(i, stepper)[0]:
                b = micro.batch
                width = b.prefix.shape[1] + b.max_thoughts + b.suffix.shape[1]
                slots += len(b.length) * width
        return 1 - real / slots

    def as_released(self) -> list[dict[str, list]]:
        """The batches as plain sequences: token ids, labels, where the thoughts begin."""
        batches = []
        for batch in self.layouts:
            rows: dict[str, list] = {"ids": [], "labels": [], "first_thought": []}
            for prefix, n, suffix, skipped in batch:
                rows["ids"].append(prefix + [self.tokenizer.latent] * n + suffix)
                masked = len(prefix) + n + skipped
                rows["labels"].append([IGNORE] * masked + suffix[skipped:])
                rows["first_thought"].append(len(prefix) if n else 0)  # without: pad right only
            batches.append(rows)
        return batches


def _of_length(row: TokenizedExample, n: int) -> TokenizedExample:
    times = -(-n // len(row.question))
    return TokenizedExample((row.question * times)[:n], row.steps, row.answer)


def adamw_settings(recipe: TrainConfig) -> dict[str, float]:
    return {"lr": recipe.learning_rate, "weight_decay": WEIGHT_DECAY}


class Side:
    """A model that takes steps: what both ways share. plain_adamw: not the recipe's optimizers."""

    def __init__(
        self, recipe: TrainConfig, rows: Rows, model: Any, stepper: TrainStep, plain_adamw: bool
    ) -> None:
        self.recipe, self.rows, self.model, self.stepper = recipe, rows, model, stepper
        self.device, self.plain_adamw = stepper.device, plain_adamw
        if plain_adamw:  # the released code's
            settings = adamw_settings(recipe) | {"fused": model.wte.weight.is_cuda or None}
            self.optimizers = [torch.optim.AdamW(model.parameters(), **settings)]
        else:
            self.optimizers = init_optimizers(recipe, model)
        model.train()

    def update(self) -> None:
        if self.recipe.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()


class Ours(Side):
    """The step of train.py: its TrainStep, its kernels, its graphs, its order of things."""

    def __init__(self, recipe: TrainConfig, rows: Rows, plain_adamw: bool = False) -> None:
        torch.manual_seed(recipe.seed)
        model = init_model(recipe, rows.tokenizer).to(select_device(recipe.device))
        self.kernels, self.why_kernels = ops.choose_training_backend(recipe.kernels, model)
        self.graph = ops.choose_graph("off" if recipe.ungraphed else recipe.graph, model)
        think = partial(coconut.think, kernels=self.kernels)
        half, graphs = recipe.dtype == "bfloat16", GraphCache(64) if self.graph else None
        stepper = TrainStep(model, think, half, graphs=graphs)
        super().__init__(recipe, rows, model, stepper, plain_adamw)
        self.ahead: tuple[int, Any] = (-1, None)

    def check(self) -> dict[str, float]:
        """Loss and norm of the gradient on the first batch, without dropout; it is not kept."""
        self.model.eval()
        plain = TrainStep(self.model, partial(coconut.think, kernels=self.kernels))
        batches, labels = self.rows.micro_batches(0, plain)
        kept = [p.grad for p in self.model.parameters()]  # graphs write to these
        plain.zero_grad()
        for batch in batches:
            plain(batch, labels, self.recipe.batch_size)
        norms = torch.stack([p.grad.norm() for p in self.model.parameters()])
        for p, grad in zip(self.model.parameters(), kept, strict=True):
            p.grad = grad
        self.model.train()
        return {"loss": plain.totals[0].item(), "gradient": norms.norm().item()}

    def step(self, i: int) -> tuple[float, float]:
        """One optimizer step on batch i -> seconds, loss. As in train.py, a GPU's next batch is
        made while it computes, in this step's time; the first before the clock runs."""
        on_gpu, n = self.device.type == "cuda", len(self.rows.batches)
        if on_gpu and self.ahead[0] != i:
            self.ahead = i, self.rows.micro_batches(i, self.stepper)
        began = time.perf_counter()
        batches, labels = self.ahead[1] if on_gpu else self.rows.micro_batches(i, self.stepper)
        torch.manual_seed(self.recipe.seed + i)
        self.stepper.zero_grad()
        for batch in batches:
            self.stepper(batch, labels, self.recipe.batch_size)
        self.update()
        if on_gpu:
            self.ahead = (i + 1) % n, self.rows.micro_batches((i + 1) % n, self.stepper)
        loss, *_ = self.stepper.totals.tolist()  # here the host waits for the device
        return time.perf_counter() - began, loss


class Plain(Side):
    """The same step written out, eagerly and by plain torch, with a lap at the end of each part.

    On a CPU that is what Ours does too, unless Triton's interpreter was asked for."""

    def __init__(self, ours: Ours) -> None:
        model = copy.deepcopy(ours.model)
        stepper = TrainStep(model, use_bf16=ours.stepper.use_bf16)
        super().__init__(ours.recipe, ours.rows, model, stepper, ours.plain_adamw)
        # every pass through the layers ends in ln_f: that tells the three blocks apart
        model.ln_f.register_forward_hook(lambda *_: self._passed())
        self.laps: list[tuple[str, Any]] = []
        self.passes = 0

    def _lap(self, part: str) -> None:
        """The part that ends now; on a GPU as an event in its queue, so that nobody waits."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.laps.append((part, event))
        else:
            self.laps.append((part, time.perf_counter()))

    def _passed(self) -> None:
        thinks = self.passes <= self.rows.thoughts
        self._lap(("thoughts" if thinks else "suffix") if self.passes else "prefix")
        self.passes += 1

    def step(self, i: int) -> tuple[dict[str, float], float]:
        """One optimizer step on batch i -> the seconds of each part, loss."""
        self.laps = []
        self._lap("")
        batches, labels = self.rows.micro_batches(i, self.stepper)
        torch.manual_seed(self.recipe.seed + i)
        self.stepper.zero_grad()
        sums = self.stepper.totals
        for micro in batches:
            batch, counts = micro.batch.to(self.device), micro.count_mask.to(self.device)
            self._lap("collate")
            self.passes = 0
            half = self.stepper.use_bf16
            with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                trace = coconut.think(self.model, batch)
                summed, right = coconut.loss(self.model, batch, trace)
                loss = summed / labels
            self._lap("suffix")
            loss.backward()
            sums += torch.stack([loss.detach(), (right & counts).sum(), counts.sum()])
            self._lap("backward")
        self.update()
        loss, *_ = sums.tolist()
        self._lap("optimizer")
        took: Counter[str] = Counter(dict.fromkeys(PARTS, 0.0))
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        for (_, a), (part, b) in pairwise(self.laps):
            took[part] += a.elapsed_time(b) / 1000 if self.device.type == "cuda" else b - a
        return dict(took), loss


def high_water(device: torch.device, reset: bool = False) -> int | None:
    """Bytes: the most that a GPU's tensors took since the last reset, or this process so far; None
    where that is not known."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if sys.platform != "linux":
        return None
    with open("/proc/self/status") as lines:  # getrusage's figure comes from the parent too
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
