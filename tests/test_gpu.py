"""On a CUDA GPU: the same numbers as on the CPU, and a training run that ends."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_gpt
from test_coconut import random_batch

from nanococonut import coconut
from nanococonut.engine import generate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("smear", [False, True])
def test_loss_and_gradients_equal_the_cpus(smear):
    batch, _ = random_batch(1, [3, 0, 5, 1])
    grads = []
    for where in ("cpu", "cuda"):
        model = random_gpt(smear=smear).to(where)
        moved = batch.to(torch.device(where))
        coconut.loss_sum(coconut.forward(model, moved), moved.targets).backward()
        grads.append([p.grad.cpu() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_generation_equals_the_cpus():
    prefixes = [[1, 2, 3], [4] * 9, [5]]
    said = [generate(random_gpt().to(w), prefixes, 4, [39], 40, 8) for w in ("cpu", "cuda")]
    assert said[0].tokens == said[1].tokens


def test_bfloat16_training_runs(tmp_path):
    command = [sys.executable, "train.py", "config/prosqa_small.py", "--device=cuda"]
    run = subprocess.run(
        [*command, "--max_steps=60", f"--out_dir={tmp_path}/run"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").open()]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
