"""Batches of the final stage, and train.py's optimizer step on them, for bench/training.py."""

import time
from functools import partial
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
from nanococonut.training.setup import WEIGHT_DECAY, init_model, init_optimizers, init_tokenizer
from nanococonut.training.step import MicroBatch, TrainStep


class FinalStageBatches:
    """n batches of the final stage, as train.py gets them.

    context: every question is repeated or cut until its prefix has this many tokens. What they say
    makes no difference to the time.
    """

    def __init__(self, recipe: TrainConfig, n: int, context: int | None = None) -> None:
        self.tokenizer = init_tokenizer(recipe, None)
        self.curriculum, size = Curriculum.from_config(recipe), recipe.batch_size
        self.stage, self.thoughts = recipe.max_latent_stage + 1, recipe.final_thoughts
        self.micro_batch_size = recipe.micro_batch_size
        loader = TrainLoader(recipe, self.curriculum, self.tokenizer, Data(None, {}))
        examples = loader.epoch(0)
        loader.close(wait=True)  # so that the next epoch is not made while a step is measured
        if context:
            examples = [_of_length(example, context - 1) for example in examples]  # and <bot>
        self.batches = [
            sorted(examples[i * size :][:size], key=lambda e: len(e.question)) for i in range(n)
        ]
        self.sequences = [
            [build_sequence(self.curriculum, self.stage, e, self.tokenizer) for e in batch]
            for batch in self.batches
        ]

    def micro_batches(self, i: int, train_step: TrainStep) -> tuple[list[MicroBatch], int]:
        """Return batch i as a TrainStep takes it: its micro-batches, and the labels of all."""
        batch, made = self.batches[i], []
        stages = [self.stage] * len(batch)
        labels = count_labels(self.curriculum, stages, batch, self.tokenizer)
        for start in range(0, len(batch), self.micro_batch_size):
            part = batch[start : start + self.micro_batch_size]
            collated = collate(self.curriculum, stages[: len(part)], part, self.tokenizer)
            made.append(train_step.prepare(collated, [True] * len(part), self.thoughts))
        return made, labels

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


def _of_length(example: TokenizedExample, n: int) -> TokenizedExample:
    times = -(-n // len(example.question))
    return TokenizedExample((example.question * times)[:n], example.steps, example.answer)


def adamw_settings(recipe: TrainConfig) -> dict[str, float]:
    return {"lr": recipe.learning_rate, "weight_decay": WEIGHT_DECAY}


class TrainBackend:
    """The step of train.py: its TrainStep, its kernels, its graphs, in its order.

    plain_adamw: the released code's optimizer, not the recipe's.
    """

    def __init__(
        self, recipe: TrainConfig, batches: FinalStageBatches, plain_adamw: bool = False
    ) -> None:
        torch.manual_seed(recipe.seed)
        model = init_model(recipe, batches.tokenizer).to(select_device(recipe.device))
        self.recipe, self.batches, self.model = recipe, batches, model
        self.kernels, self.why_kernels = ops.choose_training_backend(recipe.kernels, model)
        self.graph = ops.choose_graph("off" if recipe.ungraphed else recipe.graph, model)
        think = partial(coconut.think, kernels=self.kernels)
        half, graphs = recipe.dtype == "bfloat16", GraphCache(64) if self.graph else None
        self.train_step = TrainStep(model, think, half, graphs=graphs)
        if plain_adamw:
            settings = adamw_settings(recipe) | {"fused": model.wte.weight.is_cuda or None}
            self.optimizers = [torch.optim.AdamW(model.parameters(), **settings)]
        else:
            self.optimizers = init_optimizers(recipe, model)
        self.prefetched: tuple[int, Any] = (-1, None)
        model.train()

    def check(self) -> dict[str, float]:
        """Return loss and norm of the gradient on the first batch, without dropout."""
        self.model.eval()
        plain = TrainStep(self.model, partial(coconut.think, kernels=self.kernels))
        micro_batches, labels = self.batches.micro_batches(0, plain)
        grads = [p.grad for p in self.model.parameters()]  # graphs write to these: put them back
        plain.zero_grad()
        for micro in micro_batches:
            plain(micro, labels, self.recipe.batch_size)
        norms = torch.stack([p.grad.norm() for p in self.model.parameters()])
        for p, grad in zip(self.model.parameters(), grads, strict=True):
            p.grad = grad
        self.model.train()
        return {"loss": plain.totals[0].item(), "gradient": norms.norm().item()}

    def step(self, i: int) -> dict[str, float]:
        """Take one optimizer step on batch i. Return seconds and loss. As in train.py, a GPU's next
        batch is made while it computes, within this step's time."""
        on_gpu, n = self.train_step.device.type == "cuda", len(self.batches.batches)
        if on_gpu and self.prefetched[0] != i:
            self.prefetched = i, self.batches.micro_batches(i, self.train_step)
        began = time.perf_counter()
        made = self.prefetched[1] if on_gpu else self.batches.micro_batches(i, self.train_step)
        micro_batches, labels = made
        torch.manual_seed(self.recipe.seed + i)
        self.train_step.zero_grad()
        for micro in micro_batches:
            self.train_step(micro, labels, self.recipe.batch_size)
        if self.recipe.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
        if on_gpu:
            self.prefetched = (i + 1) % n, self.batches.micro_batches((i + 1) % n, self.train_step)
        loss, *_ = self.train_step.totals.tolist()  # here the host waits for the device
        return {"seconds": time.perf_counter() - began, "loss": loss}
