"""bench/training.py: the timed steps are train.py's, and the released code gets the same work."""

import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from fake_graphs import FakeGraphCache
from helpers import ROOT, forward, loss_sum

from bench import training
from bench.common.results import read_results
from bench.common.tables import value
from nanococonut import ops

SCRIPT = ROOT / "bench" / "training.py"
CONFIG = str(ROOT / "config" / "prosqa_small.py")
SIZES = "n_layer=1,n_embd=8,n_head=2"
TINY = [f"--config={CONFIG}", f"--set={SIZES}", "--batch_size=3", "--repeats=1"]
OURS = training.OURS


@pytest.fixture
def bench(script):
    """bench(*argv) -> (exit code, stdout, stderr), in this process."""
    return lambda *argv: script(*TINY, *argv, script="bench/training.py")


@pytest.fixture
def clone(tmp_path):
    """Return a folder that looks like a clone of the released code."""
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
    assert sizes.items() <= row["shape"].items()
    assert row["detail"]["smear"] and row["detail"]["kernels"] == "torch"
    assert row["repeats"] == 1 and "torch" in row["versions"]
    assert value(rows, "step") > 0
    assert str(ROOT) not in last and str(tmp_path) not in last


def test_steps_are_those_of_the_final_stage(clone):
    """The small graphs of grow_epochs were timed, and thought_loss was not."""
    given = dict(config=str(ROOT / "config" / "prosqa_scratch.py"), batch_size=3, repeats=1)
    recipe = training.recipe_of(training.StepConfig(**given, set="n_layer=1"))
    ours = training.Trainer(recipe)
    assert max(len(x.steps) for x in ours.examples) > 3  # 2 or 3 in the first epochs
    assert ours.train_step.thought_loss == 1.0
    released = training.StepConfig(**given, released=str(clone), released_python="python")
    assert training.recipe_of(released).thought_loss == 0.0


def test_more_layers_are_more_parameters(bench):
    runs = []
    for own in (["--latent=0"], ["--latent=0", f"--set={SIZES},n_layer=2"]):
        code, out, err = bench(*own)
        assert code == 0, err
        runs.append(json.loads(out.splitlines()[-1])["rows"][0])
    layer = 12 * 8 * 8 + 13 * 8  # matrices, then biases and LayerNorms
    assert runs[1]["shape"]["parameters"] - runs[0]["shape"]["parameters"] == layer


def trainer(micro_batch_size=64, **settings):
    """Return the Trainer of a tiny model."""
    sizes = f"n_layer=2,n_embd=8,micro_batch_size={micro_batch_size}"
    own = dict(config=CONFIG, set=sizes, batch_size=5, repeats=1)
    return training.Trainer(training.recipe_of(training.StepConfig(**own | settings)))


@pytest.mark.parametrize("latent, micro", [(0, 5), (2, 2)])
def test_loss_is_that_of_all_micro_batches(latent, micro):
    backend = trainer(micro, latent=latent)
    before = copy.deepcopy(backend.model)
    expected = n_targets = 0
    step_batch = backend.loader.get(0, backend.stage, backend.train_step.prepare)
    for batch in step_batch.micro_batches:
        logits = forward(before, batch)
        expected += loss_sum(logits, batch.targets)
        n_targets += batch.n_targets
    assert len(step_batch.micro_batches) == -(-5 // micro)
    expected = pytest.approx((expected / n_targets).item(), rel=1e-5)
    assert backend.check()["loss"] == expected
    reply = backend.step(0)
    assert reply["loss"] == expected and reply["seconds"] > 0
    for new, old in zip(backend.model.parameters(), before.parameters(), strict=True):
        assert not torch.equal(new, old) or not old.any()


def test_graphs_take_the_same_steps(monkeypatch):
    """Losses and weights are the same with graphs, even after a check(): it left gradients to
    which the graphs added theirs."""
    eager = trainer(3, latent=1)
    monkeypatch.setattr(training, "GraphCache", FakeGraphCache)
    monkeypatch.setattr(ops, "choose_graph", lambda *_: True)
    fast = trainer(3, latent=1)
    assert fast.graph and not eager.graph
    assert fast.check() == pytest.approx(eager.check(), rel=1e-5)
    for i in (0, 1, 2):
        assert fast.step(i)["loss"] == pytest.approx(eager.step(i)["loss"], rel=1e-5)
    assert 0 < len(fast.train_step.graphs.graphs) < 6
    for a, b in zip(fast.model.parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("latent", [0, 3])
def test_released_code_gets_the_same_sequences(latent):
    """Compare tokens, labels, positions and padding with our own blocks."""
    backend = trainer(latent=latent)
    tokenizer = backend.tokenizer
    for i, batch in enumerate(backend.released_batches(2)):
        theirs = {name: torch.tensor(values) for name, values in batch.items()}
        step_batch = backend.loader.get(i, backend.stage, backend.train_step.prepare)
        ours = step_batch.micro_batches[0]
        real = theirs["attention_mask"] == 1
        assert (theirs["labels"][~real] == -100).all()
        assert theirs["input_ids"].shape[1] == (
            ours.prefix.shape[1] + latent + ours.suffix.shape[1] if latent else real.sum(1).max()
        )
        for b in range(5):
            ids = theirs["input_ids"][b, real[b]].tolist()
            p, n = ours.length[b].item(), latent
            words = ids[p + n :]
            assert ids[:p] == ours.prefix[b, :p].tolist() and ids[p - 1] == tokenizer.bot
            assert ids[p : p + n] == [tokenizer.latent] * n
            assert words == ours.suffix[b, : len(words)].tolist()
            assert (words[0], words[-1]) == (tokenizer.eot, tokenizer.eos)
            labels = [-100] * (p + n) + ours.targets[b, : len(words)].tolist()
            assert theirs["labels"][b, real[b]].tolist() == labels
            assert theirs["position_ids"][b, real[b]].tolist() == list(range(len(ids)))
        if latent:  # the thoughts of all sequences are in the same columns
            columns = (theirs["input_ids"] == tokenizer.latent).any(dim=0)
            assert columns.sum() == latent


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--repeats=0"], "repeats=0"),
        (["--config=nowhere.py"], "nowhere.py does not exist"),
        ([f"--config={ROOT / 'config' / 'gsm8k.py'}"], "gsm8k is read from files"),
        (["--set=n_head=3"], "is not a multiple"),
        (["--set=n_heads=3"], "Did you mean --n_head?"),
        (["--latent=500"], "fewer thoughts"),
        (["--released=."], "go together"),
        (["--released=nowhere", "--released_python=python"], "has no coconut.py"),
        (["--out=nowhere/rows.jsonl"], "cannot be written"),
    ],
)
def test_mistakes_take_two_lines(bench, argv, message):
    code, _, err = bench(*argv)
    assert code == 2 and message in err and len(err.splitlines()) <= 2


def test_missing_python_is_an_error(bench, clone):
    code, _, err = bench(f"--released={clone}", f"--released_python={clone}/python")
    assert code == 2 and "cannot be run" in err and len(err.splitlines()) <= 2


def test_dead_worker_is_an_error(bench, clone):
    code, _, err = bench(f"--released={clone}", f"--released_python={shutil.which('false')}")
    assert code == 2 and "worker released_train ended" in err and len(err.splitlines()) <= 2


def test_other_losses_are_an_error(bench, clone):
    fake = clone / "python"
    replies = ['{"versions": {}}', '{"loss": 1.0, "gradient": 1.0}']
    fake.write_text("#!/bin/sh\n" + "".join(f"read -r _\necho '{reply}'\n" for reply in replies))
    fake.chmod(0o755)
    code, _, err = bench(f"--released={clone}", f"--released_python={fake}")
    assert code == 2 and "compute different values: loss" in err and len(err.splitlines()) <= 2


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
    step, ratio = (row["value"] for row in rows)
    assert ratio == pytest.approx(step / line["rows"][0]["value"], rel=0.01)
    assert rows[0]["versions"]["coconut"] != "unknown"
    assert released not in last and python not in last
