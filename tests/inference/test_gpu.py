"""A CUDA GPU computes the same as the CPU and completes a training run."""

import copy
import json
import math
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, forward, generate, loss_sum, random_gpt, random_sequences

from nanococonut.batch import collate
from nanococonut.inference.engine import Engine, Request
from nanococonut.runtime.graphs import GraphCache
from nanococonut.training.step import TrainStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]


@pytest.mark.parametrize("smear", [False, True])
def test_loss_and_gradients_equal_the_cpus(smear):
    """Guards against a GPU kernel that masks or reduces differently."""
    batch = collate(random_sequences(1, [3, 0, 5, 1]))
    grads = []
    for name in ("cpu", "cuda"):
        model = random_gpt(smear=smear).to(name)
        moved = batch.map(lambda t, name=name: t.to(name))
        loss_sum(forward(model, moved), moved.targets).backward()
        grads.append([p.grad.cpu() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("graph", ["on", "off"])
def test_generation_equals_the_cpus(kernels, graph):
    """Guards captured and replayed graphs and growing buffers, with batches of several shapes."""
    model = random_gpt(seed=8, dtype=torch.float32, n_head=2, n_embd=32, stop=True)
    cpu_engine = Engine(model)
    gpu_engine = Engine(copy.deepcopy(model).cuda(), kernels=kernels, graph=graph)
    requests = [(3, 4, False, 40), (1, 4, True, 40), (5, 2, True, -1), (3, 4, False, -1)]
    for n, thoughts, stop, eos in requests:
        prefixes = [[(7 * b + t) % 39 for t in range(1 + 3 * b)] for b in range(n)]
        expected = cpu_engine.run(Request(prefixes, thoughts, [39], eos, 8, stop))
        for _ in range(2):
            out = gpu_engine.run(Request(prefixes, thoughts, [39], eos, 8, stop))
            assert (out.tokens, out.n_thoughts) == (expected.tokens, expected.n_thoughts)
    assert bool(gpu_engine.graphs.graphs) == (graph == "on")


@pytest.mark.parametrize(
    "kernels, dtype",
    [("torch", torch.float32), ("triton", torch.float32), ("triton", torch.bfloat16)],
)
def test_graphs_equal_eager_steps(kernels, dtype):
    """Guards against a replay that reads stale tensors."""
    model = random_gpt(seed=8, dtype=dtype, n_head=2, n_embd=128, block_size=128).cuda()
    # 64 tokens wide, as graphs pad it, so that the matrix products are the same
    prefixes = [[(7 * b + t) % 39 for t in range(64 - 15 * b)] for b in range(4)]
    args = (prefixes, 5, [39], -1, 8)
    eager = generate(model, *args, kernels=kernels)
    engine = Engine(model, kernels=kernels, graph="on")
    for _ in range(3):
        replayed = engine.run(Request(*args))
        assert replayed.tokens == eager.tokens
        if kernels == "triton":  # bit for bit; torch's attention has a different width
            assert torch.equal(replayed.thoughts, eager.thoughts)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_edits_equal_the_cpus(kernels):
    """Guards edits, which run without graphs, between requests that use them."""
    model = random_gpt(seed=8, dtype=torch.float32, n_head=2, n_embd=32)
    engines = Engine(model), Engine(copy.deepcopy(model).cuda(), kernels=kernels, graph="on")
    prefixes = [[(7 * b + t) % 39 for t in range(1 + 3 * b)] for b in range(3)]
    for edit in (None, lambda i, fed: -fed if i == 1 else fed, None):
        request = Request(prefixes, 4, [39], -1, 8, edit=edit)
        expected, out = (engine.run(request) for engine in engines)
        assert out.tokens == expected.tokens
        torch.testing.assert_close(out.thoughts.cpu(), expected.thoughts, rtol=1e-3, atol=1e-4)


def test_at_most_max_graphs_are_kept():
    """Guards against graphs of all shapes that fill the memory."""
    engine = Engine(random_gpt(dtype=torch.float32).cuda(), graph="on")
    engine.graphs = GraphCache(4)
    for n in (1, 2, 4, 8, 1, 8):
        engine.run(Request([[1, 2, 3]] * n, 2, [39], 40, 6))
        assert 0 < len(engine.graphs.graphs) <= 4


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("half", [False, True])
def test_training_with_graphs_equals_training_without(kernels, half):
    """Guards the gradients of micro-batches of several shapes, and against any device sync."""
    models = [random_gpt(seed=3, dtype=torch.float32, n_head=2, n_embd=32).cuda().train()]
    models.append(copy.deepcopy(models[0]))
    steppers = [
        TrainStep(models[0], kernels, half),
        TrainStep(models[1], kernels, half, graphs=GraphCache(8)),
    ]
    for step in range(4):
        parts = [random_sequences(30 * step + n, list(range(n))) for n in (4, 3, 1, 4)]
        labels, rows = sum(s.n_targets for part in parts for s in part), sum(map(len, parts))
        for model, one in zip(models, steppers, strict=True):
            counts = labels, rows, 0
            ready = [one.prepare(part, [True] * len(part), counts, 3) for part in parts]
            one.zero_grad()
            # the first step captures
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            try:
                for micro in ready:
                    one(micro)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.01 * p.grad
        close = dict(rtol=2e-2, atol=2e-3) if half else dict(rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(steppers[1].totals[0], steppers[0].totals[0], **close)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(q, p, **close)


def test_a_first_run_uses_the_memory_of_graphs():
    """Guards against a first run outside the graphs' pool, which doubles the memory."""
    weight = torch.zeros(1 << 24, device="cuda", requires_grad=True)  # 64 MB

    def fn():
        (weight.exp() * 2).exp().sum().backward()

    graphs = GraphCache(8)
    graphs.run((1,), fn)
    torch.cuda.empty_cache()
    reserved = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    graphs.run((2,), fn)
    assert torch.cuda.max_memory_reserved() <= reserved + (4 << 20)
    graphs.run((1,), fn)
    graphs.run((2,), fn)
    torch.testing.assert_close(weight.grad, torch.full_like(weight, 4 * 2 * math.e**2))


def test_graphs_leave_later_gradients_alone():
    """Guards against a graph without thoughts that overwrites the gradients of the first thought,
    which the first run of a later graph allocates in the memory of both."""
    models = [random_gpt(seed=3, dtype=torch.float32, thought="projected").cuda().train()]
    models.append(copy.deepcopy(models[0]))
    for model, max_graphs in zip(models, (0, 8), strict=True):
        one = TrainStep(model, graphs=GraphCache(max_graphs))
        for n_thoughts in (0, 0, 2, 0, 2, 0):
            sequences = random_sequences(7, [n_thoughts] * 3)
            one(one.prepare(sequences, [True] * 3, (9, 3, 0)))
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5)


def test_dropout_in_graphs_follows_the_seed():
    """Guards against a graph that repeats the dropout mask of its capture."""
    model = random_gpt(seed=3, dtype=torch.float32, n_head=2, n_embd=32, dropout=0.3)
    one = TrainStep(model.cuda().train(), graphs=GraphCache(8))
    sequences = random_sequences(1, [3, 0, 2])
    counts = sum(s.n_targets for s in sequences), 3, 0
    losses = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        one.zero_grad()
        one(one.prepare(sequences, [True] * 3, counts))
        losses.append(one.totals[0].item())
    assert losses[0] == losses[2] != losses[1]


def test_bfloat16_training_runs(tmp_path):
    """Guards the default dtype on a GPU: the loss must fall."""
    command = [sys.executable, "train.py", "config/prosqa_small.py", "--device=cuda"]
    run = subprocess.run(
        [*command, "--max_steps=60", f"--out_dir={tmp_path}/run"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").open()]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
