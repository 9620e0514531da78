"""bench/training.py times what it says, and gives the released code the same work."""

import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from fake_graphs import FakeGraphCache
from helpers import ROOT, forward, random_gpt

from bench import training
from bench.common import train_backends
from bench.common.results import read_results
from bench.common.tables import Run
from bench.common.train_backends import FinalStageBatches, TrainBackend
from bench.workers import serve
from nanococonut import coconut, ops
from nanococonut.training.step import TrainStep

SCRIPT = ROOT / "bench" / "training.py"
CONFIG = str(ROOT / "config" / "prosqa_small.py")
TINY = [f"--config={CONFIG}", "--n_layer=1", "--n_embd=8"]
TINY += ["--n_head=2", "--batch_size=3", "--repeats=1"]
OURS = training.OURS


@pytest.fixture
def bench(script):
    """bench(*argv) -> (exit code, stdout, stderr), in this process."""
    return lambda *argv: script(*TINY, *argv, script="bench/training.py")


@pytest.fixture
def clone(tmp_path):
    """A folder that looks like the released code's."""
    (tmp_path / "coconut.py").write_text("")
    return tmp_path


def test_run_writes_every_metric(tmp_path):
    log = tmp_path / "rows.jsonl"
    argv = [sys.executable, SCRIPT, *TINY, "--latent=2", f"--out={log}"]
    run = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    *shown, last = run.stdout.splitlines()
    rows = read_results(log)
    assert len(rows) == len(json.loads(last)["rows"]) == len(shown) - 2
    row = rows[0]
    assert row["labels"] == {"config": "prosqa_small.py"} and row["bench"] == "training"
    sizes = dict(n_layer=1, n_embd=8, batch=3, micro_batch=3, thoughts=2)
    assert sizes.items() <= row["shape"].items() and "context" not in row["shape"]
    assert row["detail"]["smear"] and row["detail"]["kernels"] == "torch"
    assert row["repeats"] == 1 and "torch" in row["versions"]
    found = Run(rows)
    step = found.value("step")
    assert found.value("examples_per_s") == pytest.approx(3e3 / step, rel=1e-3)
    assert str(ROOT) not in last and str(tmp_path) not in last


def test_more_layers_are_more_parameters(bench):
    runs = []
    for own in (["--latent=0"], ["--latent=0", "--n_layer=2"]):
        code, out, err = bench(*own)
        assert code == 0, err
        runs.append(json.loads(out.splitlines()[-1])["rows"][0])
    layer = 12 * 8 * 8 + 13 * 8  # its matrices; its biases and LayerNorms
    assert runs[1]["shape"]["parameters"] - runs[0]["shape"]["parameters"] == layer


def made(**settings):
    """Return (recipe, two batches) of a tiny model."""
    own = dict(config=CONFIG, n_layer=2, n_embd=8, batch_size=5, repeats=1)
    config = training.StepConfig(**own | settings)
    recipe = training.recipe_of(config)
    return recipe, FinalStageBatches(recipe, 2, config.context)


@pytest.mark.parametrize("latent, micro", [(0, 5), (2, 2)])
def test_loss_is_that_of_all_micro_batches(latent, micro):
    recipe, batches = made(latent=latent, micro_batch_size=micro)
    backend = TrainBackend(recipe, batches)
    before = copy.deepcopy(backend.model)
    expected = n_labels = 0
    for micro_batch in batches.micro_batches(0, backend.train_step)[0]:
        batch = micro_batch.batch
        logits = forward(before, batch)
        expected += coconut.loss_sum(logits, batch.targets)
        n_labels += batch.n_labels
    assert len(batches.micro_batches(0, backend.train_step)[0]) == -(-5 // micro)
    expected = pytest.approx((expected / n_labels).item(), rel=1e-5)
    assert backend.check()["loss"] == expected
    reply = backend.step(0)
    assert reply["loss"] == expected and reply["seconds"] > 0
    for new, old in zip(backend.model.parameters(), before.parameters(), strict=True):
        assert not torch.equal(new, old) or not old.any()


def test_both_backends_take_the_same_steps(monkeypatch):
    """With graphs or without: same losses, same weights afterwards. A check() in between must not
    move the gradients that graphs write to."""
    recipe, batches = made(latent=1, micro_batch_size=3)
    eager = TrainBackend(recipe, batches)
    monkeypatch.setattr(train_backends, "GraphCache", FakeGraphCache)
    monkeypatch.setattr(ops, "choose_graph", lambda *_: True)
    fast = TrainBackend(recipe, batches)
    assert fast.graph and not eager.graph
    for i in (0, 1, 0):
        assert fast.step(i)["loss"] == pytest.approx(eager.step(i)["loss"], rel=1e-5)
        assert fast.check()["loss"] > 0
    assert 0 < len(fast.train_step.graphs.graphs) < 6
    for a, b in zip(fast.model.parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_context_is_exact():
    recipe, batches = made(context=203, latent=3)
    for sequences in batches.sequences:
        assert [len(prefix) for prefix, *_ in sequences] == [203] * 5
    longest = max(len(prefix) + n + len(suffix) for prefix, n, suffix, _ in batches.sequences[0])
    assert recipe.block_size >= longest
    repeated = batches.sequences[0][0][0]
    assert repeated[-1] == batches.tokenizer.bot and len(set(repeated)) > 8


@pytest.mark.parametrize("latent", [0, 3])
def test_released_code_gets_the_same_sequences(latent):
    """Compare with our own blocks: tokens, labels, positions and padding."""
    _, batches = made(latent=latent)
    plain = TrainStep(random_gpt())
    for i, batch in enumerate(batches.as_released()):
        theirs = serve.padded(batch, batches.tokenizer.eos, "cpu")
        ours = batches.micro_batches(i, plain)[0][0].batch
        real = theirs["attention_mask"] == 1
        assert (theirs["labels"][~real] == -100).all()
        assert theirs["input_ids"].shape[1] == (
            ours.prefix.shape[1] + latent + ours.suffix.shape[1] if latent else real.sum(1).max()
        )
        for b in range(5):
            ids = theirs["input_ids"][b, real[b]].tolist()
            p, n = ours.length[b].item(), latent
            words = ids[p + n :]
            assert ids[:p] == ours.prefix[b, :p].tolist() and ids[p - 1] == batches.tokenizer.bot
            assert ids[p : p + n] == [batches.tokenizer.latent] * n
            assert words == ours.suffix[b, : len(words)].tolist()
            assert (words[0], words[-1]) == (batches.tokenizer.eot, batches.tokenizer.eos)
            labels = [-100] * (p + n) + ours.targets[b, : len(words)].tolist()
            assert theirs["labels"][b, real[b]].tolist() == labels
            assert theirs["position_ids"][b, real[b]].tolist() == list(range(len(ids)))
        if latent:  # all sequences think in the same columns
            columns = (theirs["input_ids"] == batches.tokenizer.latent).any(dim=0)
            assert columns.sum() == latent


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--repeats=0"], "repeats=0"),
        (["--config=nowhere.py"], "nowhere.py does not exist"),
        (["--n_head=3"], "is not a multiple"),
        (["--latent=500"], "500 thoughts"),
        (["--released=."], "go together"),
        (["--released=nowhere", "--released_python=python"], "holds no coconut.py"),
        (["--out=nowhere/rows.jsonl"], "cannot be written"),
    ],
)
def test_mistakes_take_two_lines(bench, argv, message):
    code, _, err = bench(*argv)
    assert code == 2 and message in err and len(err.splitlines()) <= 2


def test_python_that_cannot_be_run(bench, clone):
    code, _, err = bench(f"--released={clone}", f"--released_python={clone}/python")
    assert code == 2 and "cannot be run" in err and len(err.splitlines()) <= 2


def test_worker_that_dies(bench, clone):
    code, _, err = bench(f"--released={clone}", f"--released_python={shutil.which('false')}")
    assert code == 2 and "worker released_train ended" in err and len(err.splitlines()) <= 2


def test_worker_that_computes_something_else(bench, clone):
    fake = clone / "python"
    replies = ['{"versions": {}}', '{"loss": 1.0, "gradient": 1.0}']
    fake.write_text("#!/bin/sh\n" + "".join(f"read -r _\necho '{reply}'\n" for reply in replies))
    fake.chmod(0o755)
    code, _, err = bench(f"--released={clone}", f"--released_python={fake}")
    assert code == 2 and "do not compute the same: loss" in err and len(err.splitlines()) <= 2


def test_released_code_computes_the_same(bench):
    released, python = map(os.environ.get, ("NANOCOCONUT_RELEASED", "NANOCOCONUT_RELEASED_PYTHON"))
    if not (released and python):
        pytest.skip("NANOCOCONUT_RELEASED and NANOCOCONUT_RELEASED_PYTHON are not set")
    code, out, err = bench(f"--released={released}", f"--released_python={python}")
    assert code == 0, err
    last = out.splitlines()[-1]
    line = json.loads(last)
    rows = [row for row in line["rows"] if row["provider"] == "released"]
    [about] = [row["detail"] for row in rows if row.get("detail")]
    for name in ("loss", "gradient"):
        assert about[name]["ours"] == pytest.approx(about[name]["released"], rel=1e-4)
    assert rows[0]["versions"]["transformers"].startswith("4.")
    assert not line["rows"][0]["detail"]["smear"]
    step, rate, ratio = (row["value"] for row in rows[:3])
    assert ratio == pytest.approx(step / line["rows"][0]["value"], rel=0.01) and rate > 0
    assert about["commit"] != "unknown" and released not in last and python not in last
