"""Micro-batches accumulate the gradient of the plain loss, eagerly and as graphs."""

import copy
import dataclasses

import pytest
import torch
from fake_graphs import FakeGraphCache
from helpers import ROOT, exact_match, forward, loss_sum, random_gpt, random_sequences

from nanococonut import batch as batch_module
from nanococonut import coconut
from nanococonut.batch import IGNORE, collate
from nanococonut.config import TrainConfig
from nanococonut.training.step import TrainStep

BATCHES = [(1, [3, 0, 2]), (2, [2, 1, 3]), (3, [0, 0]), (4, [1]), (1, [3, 0, 2])]


@pytest.fixture(autouse=True)
def small_multiples(monkeypatch):
    """Choose small multiples, so that tiny batches have several padded shapes."""
    for name, multiple in dict(PREFIX=8, SUFFIX=6, TARGETS=16).items():
        monkeypatch.setattr(batch_module, name, multiple)


def count_thought_labels(batch):
    return int((batch.thought_targets != IGNORE).any(-1).sum())


def plain(model, batches, labels, thought_loss=0.0):
    """Return the loss and its gradients without TrainStep."""
    model.zero_grad()
    loss = objective = 0
    n_thought_labels = sum(map(count_thought_labels, batches))
    for batch in batches:
        logits = forward(model, batch)
        loss = loss + loss_sum(logits, batch.targets) / labels
        if thought_loss and batch.max_thoughts:
            summed = coconut.thought_loss(model, batch, coconut.forward(model, batch))
            objective = objective + thought_loss * summed / n_thought_labels
    (loss + objective).backward()
    return loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("seed, n_thoughts", BATCHES)
def test_padding_changes_nothing(gpt, seed, n_thoughts):
    """Guards against padding that reaches the loss or a gradient."""
    sequences = random_sequences(seed, n_thoughts)
    batch, wide = collate(sequences), collate(sequences, gpt.config.block_size, 4)
    assert wide.prefix.numel() > batch.prefix.numel() and wide.max_thoughts == 4
    assert wide.suffix.numel() > batch.suffix.numel() and wide.n_targets > batch.n_targets
    loss, grads = plain(gpt, [batch], batch.n_targets)
    padded_loss, padded_grads = plain(gpt, [wide], batch.n_targets)
    close(padded_loss, loss)
    close(padded_grads, grads)
    gpt.zero_grad()
    hidden = coconut.forward(gpt, wide)
    summed, right = coconut.loss(gpt, wide, hidden)
    (summed / batch.n_targets).backward()
    close(summed / batch.n_targets, loss)
    close([p.grad for p in gpt.parameters() if p.grad is not None], grads)
    want = exact_match(forward(gpt, batch), batch.targets)
    assert torch.equal(right[: len(want)], want)


@pytest.mark.parametrize("stop, thought_loss", [(False, 0), (True, 0), (True, 0.7)])
@pytest.mark.parametrize("smear", [False, True])
def test_graphs_train_as_eager_does(stop, thought_loss, smear):
    """Guards against a graph that keeps inputs, counts or gradients of its capture."""
    models = [random_gpt(seed=3, smear=smear, stop=stop).train()]
    models.append(copy.deepcopy(models[0]))
    FakeGraphCache.captured = FakeGraphCache.replayed = 0
    train_steps = [
        TrainStep(models[0], thought_loss=thought_loss),
        TrainStep(models[1], graphs=FakeGraphCache(8), thought_loss=thought_loss),
    ]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in models]
    for step in range(3):
        parts = [random_sequences(10 * step + seed, n) for seed, n in BATCHES]
        batches = list(map(collate, parts))
        n_targets = sum(b.n_targets for b in batches)
        n_states = sum(s.n_thoughts + 1 for sequences in parts for s in sequences)
        n_thought_labels = sum(map(count_thought_labels, batches))
        for train_step in train_steps:
            train_step.zero_grad()
            for sequences in parts:
                even = [b % 2 == 0 for b in range(len(sequences))]
                counts = n_targets, n_states, n_thought_labels
                train_step(train_step.prepare(sequences, even, counts, 3))
        loss, _ = plain(copy.deepcopy(models[0]), batches, n_targets)
        close(train_steps[0].totals[0], loss.detach())
        close(train_steps[1].totals, train_steps[0].totals)
        assert train_steps[0].totals[2] == sum((len(b.length) + 1) // 2 for b in batches)
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                close(q.grad, p.grad)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        close(q, p)
    assert FakeGraphCache.captured >= 5 and FakeGraphCache.replayed >= 5


def test_stop_loss_is_a_mean_over_the_whole_step():
    """Guards against a mean of means, which weighs the states of a small micro-batch more."""
    model = random_gpt(stop=True)
    sequences = random_sequences(5, [0, 0, 4, 4])
    counts = sum(s.n_targets for s in sequences), sum(s.n_thoughts + 1 for s in sequences), 0
    grads = []
    for size in (4, 2):
        train_step = TrainStep(model)
        train_step.zero_grad()
        for i in range(0, 4, size):
            train_step(train_step.prepare(sequences[i : i + size], [True] * size, counts))
        grads.append(model.stop.weight.grad.clone())
    close(*grads)


def test_graphs_leave_unused_parameters_alone():
    """Guards against zero gradients of unused layers, for which AdamW would count steps."""
    models = [random_gpt(seed=3, thought="projected").train()]
    models.append(copy.deepcopy(models[0]))
    train_steps = [TrainStep(models[0]), TrainStep(models[1], graphs=FakeGraphCache(8))]
    # a large eps, or AdamW would magnify roundings of gradients near zero
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01, eps=1e-3) for m in models]
    for n_thoughts in (0, 0, 2, 2):  # as in the stages of a curriculum
        sequences = random_sequences(7, [n_thoughts] * 3)
        counts = sum(s.n_targets for s in sequences), 3, 0
        for train_step, optimizer in zip(train_steps, optimizers, strict=True):
            train_step.zero_grad()
            train_step(train_step.prepare(sequences, [True] * 3, counts))
            optimizer.step()
        is_used = n_thoughts > 0
        assert all((p.grad is not None) == is_used for p in models[1].project.parameters())
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        close(q, p)


class SharedMemory(FakeGraphCache):
    """A graph overwrites gradients that were allocated after its capture, in the same pool."""

    def __init__(self, model):
        super().__init__(8)
        self.parameters, self.number, self.made = list(model.parameters()), 0, {}

    def run(self, key, fn):
        if key in self.graphs:
            for p, number in self.made.items():
                if number > self.graphs[key].number:
                    p.grad.fill_(float("nan"))
        super().run(key, fn)

    def _run_and_capture(self, fn):
        self.number += 1
        graph = super()._run_and_capture(fn)
        graph.number = self.number
        for p in self.parameters:
            if p.grad is not None:
                self.made.setdefault(p, self.number)
        return graph


@pytest.mark.parametrize("thought", ["projected", "fixed"])
def test_no_graph_is_older_than_a_gradient(thought):
    """Guards against a graph without thoughts that overwrites the gradients of the first thought,
    as with uniform_prob, which mixes stages."""
    models = [random_gpt(seed=3, thought=thought).train()]
    models.append(copy.deepcopy(models[0]))
    train_steps = [TrainStep(models[0]), TrainStep(models[1], graphs=SharedMemory(models[1]))]
    for train_step in train_steps:
        train_step.zero_grad()
        for n_thoughts in (0, 0, 2, 0, 2, 0):
            sequences = random_sequences(7, [n_thoughts] * 3)
            train_step(train_step.prepare(sequences, [True] * 3, (9, 3, 0)))
    close(*([p.grad for p in model.parameters()] for model in models))


@pytest.mark.parametrize("thought_loss", [0.0, 0.5])
def test_loss_is_the_mean_of_the_whole_step(gpt, thought_loss):
    """Guards against a mean of means, which weighs labels of small micro-batches more."""
    parts = [random_sequences(5, [2, 1, 0]), random_sequences(6, [3])]
    batches = list(map(collate, parts))
    n_targets = sum(b.n_targets for b in batches)
    n_thought_labels = sum(map(count_thought_labels, batches))
    loss, grads = plain(gpt, batches, n_targets, thought_loss)
    train_step = TrainStep(gpt, thought_loss=thought_loss)
    train_step.zero_grad()
    for sequences in parts:
        counts = n_targets, 4, n_thought_labels
        train_step(train_step.prepare(sequences, [True] * len(sequences), counts))
    close(train_step.totals[0], loss.detach())
    close([p.grad for p in gpt.parameters() if p.grad is not None], grads)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_micro_batches_change_what_dropout_draws(dropout):
    """Guards a claim of the README and configs: micro_batch_size changes dropout masks, too."""
    model = random_gpt(dropout=dropout).train()
    sequences = random_sequences(5, [2, 1, 0, 2])
    counts = sum(s.n_targets for s in sequences), 4, 0
    grads = []
    for size in (4, 2):
        train_step = TrainStep(model)
        train_step.zero_grad()
        torch.manual_seed(0)  # as train.py in every step
        for start in range(0, 4, size):
            part = sequences[start : start + size]
            train_step(train_step.prepare(part, [True] * size, counts))
        grads.append(model.wte.weight.grad.clone())
    assert torch.allclose(*grads) == (dropout == 0)
    (help_text,) = (
        f.metadata["help"] for f in dataclasses.fields(TrainConfig) if f.name == "micro_batch_size"
    )
    texts = [help_text, *(path.read_text() for path in (ROOT / "config").glob("pro*qa.py"))]
    texts = [line for text in texts for line in text.split("\n") if "rounding" in line]
    assert len(texts) == 3 and all("dropout" in line for line in texts)
