"""Batches of the final stage, and the two ways in which bench/training.py takes steps on them."""

import copy
import sys
import time
from collections import Counter
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from nanococonut import coconut, device, ops
from nanococonut.build import build_model, build_optimizers
from nanococonut.config import TrainConfig
from nanococonut.curriculum import IGNORE, EncodedRow, collate, layout, n_labels
from nanococonut.graphs import Graphs
from nanococonut.loader import Epochs, curriculum_of, task_tokenizer
from nanococonut.stepper import MicroBatch, Stepper

PARTS = ("collate", "prefix", "thoughts", "suffix", "backward", "optimizer")


class FinalStageBatches:
    """n batches of the final stage, as train.py gets them.

    context: every question is repeated or cut until its prefix has this many tokens. What they say
    makes no difference to the time.
    """

    def __init__(self, recipe: TrainConfig, n: int, context: int | None = None) -> None:
        self.tokenizer, self.curriculum = task_tokenizer(recipe, None), curriculum_of(recipe)
        self.stage, self.thoughts = recipe.max_latent_stage + 1, recipe.final_thoughts
        self.micro_batch_size = recipe.micro_batch_size
        epochs, size = Epochs(recipe, self.curriculum, self.tokenizer, None, []), recipe.batch_size
        examples = epochs(0)
        epochs.close()
        epochs.worker.shutdown()  # waits: the next epoch is not made while a step is measured
        if context:
            examples = [_of_length(example, context - 1) for example in examples]  # and <bot>
        self.batches = [
            sorted(examples[i * size :][:size], key=lambda e: len(e.question)) for i in range(n)
        ]
        self.sequences = [
            [layout(self.curriculum, self.stage, example, self.tokenizer) for example in batch]
            for batch in self.batches
        ]

    def micro_batches(self, i: int, stepper: Stepper) -> tuple[list[MicroBatch], int]:
        """Return batch i as a Stepper takes it: its micro-batches, and the labels of all."""
        batch, made = self.batches[i], []
        stages = [self.stage] * len(batch)
        labels = n_labels(self.curriculum, stages, batch, self.tokenizer)
        for start in range(0, len(batch), self.micro_batch_size):
            part = batch[start : start + self.micro_batch_size]
            collated = collate(self.curriculum, stages[: len(part)], part, self.tokenizer)
            made.append(stepper.ready(collated, [True] * len(part), self.thoughts))
        return made, labels

    def lengths(self, i: int) -> list[tuple[int, int, int, int]]:
        """Return tokens of the prefix, thoughts, suffix and labels of batch i's sequences."""
        return [(len(p), n, len(s), len(s) - skipped) for p, n, s, skipped in self.sequences[i]]

    def padded_fraction(self, stepper: Stepper) -> float:
        """Return how many of the positions that this stepper computes are padding. Without graphs
        the released code pads as many, with thoughts."""
        used = computed = 0
        for i in range(len(self.batches)):
            used += sum(p + n + s for p, n, s, _ in self.lengths(i))
            for micro in self.micro_batches(i, stepper)[0]:
                b = micro.batch
                width = b.prefix.shape[1] + b.max_thoughts + b.suffix.shape[1]
                computed += len(b.length) * width
        return 1 - used / computed

    def as_released(self) -> list[dict[str, list]]:
        """Return the batches as plain sequences: token ids, labels, position of the thoughts."""
        batches = []
        for sequences in self.sequences:
            batch: dict[str, list] = {"ids": [], "labels": [], "first_thought": []}
            for prefix, n, suffix, skipped in sequences:
                batch["ids"].append(prefix + [self.tokenizer.latent] * n + suffix)
                masked = len(prefix) + n + skipped
                batch["labels"].append([IGNORE] * masked + suffix[skipped:])
                batch["first_thought"].append(len(prefix) if n else 0)  # 0: pad on the right only
            batches.append(batch)
        return batches


def _of_length(example: EncodedRow, n: int) -> EncodedRow:
    times = -(-n // len(example.question))
    return EncodedRow((example.question * times)[:n], example.steps, example.answer)


def adamw_settings(recipe: TrainConfig) -> dict[str, float]:
    return {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}


class TrainBackend:
    """A model that takes optimizer steps. plain_adamw: the released code's optimizer, not the
    recipe's."""

    def __init__(
        self,
        recipe: TrainConfig,
        batches: FinalStageBatches,
        model: Any,
        stepper: Stepper,
        plain_adamw: bool,
    ) -> None:
        self.recipe, self.batches, self.model, self.stepper = recipe, batches, model, stepper
        self.device, self.plain_adamw = stepper.device, plain_adamw
        if plain_adamw:
            settings = adamw_settings(recipe) | {"fused": model.wte.weight.is_cuda or None}
            self.optimizers = [torch.optim.AdamW(model.parameters(), **settings)]
        else:
            self.optimizers = build_optimizers(recipe, model)
        model.train()

    def update(self) -> None:
        if self.recipe.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()


class FastBackend(TrainBackend):
    """The step of train.py: its Stepper, its kernels, its graphs, in its order."""

    def __init__(
        self, recipe: TrainConfig, batches: FinalStageBatches, plain_adamw: bool = False
    ) -> None:
        torch.manual_seed(recipe.seed)
        model = build_model(recipe, batches.tokenizer).to(device.choose(recipe.device))
        self.kernels, self.why_kernels = ops.choose_training(recipe.kernels, model)
        self.graph = ops.choose_graph("off" if recipe.ungraphed else recipe.graph, model)
        think = partial(coconut.think, kernels=self.kernels)
        half, graphs = recipe.dtype == "bfloat16", Graphs(64) if self.graph else None
        stepper = Stepper(model, think, half, graphs=graphs)
        super().__init__(recipe, batches, model, stepper, plain_adamw)
        self.prefetched: tuple[int, Any] = (-1, None)

    def check(self) -> dict[str, float]:
        """Return loss and norm of the gradient on the first batch, without dropout."""
        self.model.eval()
        plain = Stepper(self.model, partial(coconut.think, kernels=self.kernels))
        micro_batches, labels = self.batches.micro_batches(0, plain)
        grads = [p.grad for p in self.model.parameters()]  # graphs write to these: put them back
        plain.begin()
        for micro in micro_batches:
            plain(micro, labels, self.recipe.batch_size)
        norms = torch.stack([p.grad.norm() for p in self.model.parameters()])
        for p, grad in zip(self.model.parameters(), grads, strict=True):
            p.grad = grad
        self.model.train()
        return {"loss": plain.sums[0].item(), "gradient": norms.norm().item()}

    def step(self, i: int) -> tuple[float, float]:
        """Take one optimizer step on batch i. Return seconds and loss. As in train.py, a GPU's next
        batch is made while it computes, within this step's time."""
        on_gpu, n = self.device.type == "cuda", len(self.batches.batches)
        if on_gpu and self.prefetched[0] != i:
            self.prefetched = i, self.batches.micro_batches(i, self.stepper)
        began = time.perf_counter()
        made = self.prefetched[1] if on_gpu else self.batches.micro_batches(i, self.stepper)
        micro_batches, labels = made
        torch.manual_seed(self.recipe.seed + i)
        self.stepper.begin()
        for micro in micro_batches:
            self.stepper(micro, labels, self.recipe.batch_size)
        self.update()
        if on_gpu:
            self.prefetched = (i + 1) % n, self.batches.micro_batches((i + 1) % n, self.stepper)
        loss, *_ = self.stepper.sums.tolist()  # here the host waits for the device
        return time.perf_counter() - began, loss


class EagerBackend(TrainBackend):
    """The same step in plain eager torch, with the time of each part.

    On a CPU FastBackend does the same, unless Triton's interpreter was requested.
    """

    def __init__(self, fast: FastBackend) -> None:
        model = copy.deepcopy(fast.model)
        stepper = Stepper(model, half=fast.stepper.half)
        super().__init__(fast.recipe, fast.batches, model, stepper, fast.plain_adamw)
        # every pass through the layers ends in ln_f, which tells the three blocks apart
        model.ln_f.register_forward_hook(lambda *_: self._end_pass())
        self.marks: list[tuple[str, Any]] = []
        self.n_passes = 0

    def _mark(self, part: str) -> None:
        """Note the time at which a part ends; on a GPU as an event, so that nothing waits."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((part, event))
        else:
            self.marks.append((part, time.perf_counter()))

    def _end_pass(self) -> None:
        is_thought = 0 < self.n_passes <= self.batches.thoughts
        self._mark("thoughts" if is_thought else "suffix" if self.n_passes else "prefix")
        self.n_passes += 1

    def step(self, i: int) -> tuple[dict[str, float], float]:
        """Take one optimizer step on batch i. Return the seconds of each part, and the loss."""
        self.marks = []
        self._mark("")
        micro_batches, labels = self.batches.micro_batches(i, self.stepper)
        torch.manual_seed(self.recipe.seed + i)
        self.stepper.begin()
        sums, half = self.stepper.sums, self.stepper.half
        for micro in micro_batches:
            batch, counts = micro.batch.to(self.device), micro.counts.to(self.device)
            self._mark("collate")
            self.n_passes = 0
            with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                thinking = coconut.think(self.model, batch)
                summed, right = coconut.loss(self.model, batch, thinking)
                loss = summed / labels
            self._mark("suffix")
            loss.backward()
            sums += torch.stack([loss.detach(), (right & counts).sum(), counts.sum()])
            self._mark("backward")
        self.update()
        loss, *_ = sums.tolist()
        self._mark("optimizer")
        seconds: Counter[str] = Counter(dict.fromkeys(PARTS, 0.0))
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        for (_, a), (part, b) in pairwise(self.marks):
            seconds[part] += a.elapsed_time(b) / 1000 if self.device.type == "cuda" else b - a
        return dict(seconds), loss


def peak_memory(device: torch.device, reset: bool = False) -> int | None:
    """Return the most bytes of a GPU's tensors since the last reset, or of this process so far;
    None if unknown."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if sys.platform != "linux":
        return None
    with open("/proc/self/status") as lines:  # getrusage's number includes the parent's
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
