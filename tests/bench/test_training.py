"""bench/training.py times what it says, and gives the released code the same work."""

import copy
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sides
import torch
from fake_graphs import FakeGraphCache
from flops import matmul_peak, step_flop
from helpers import random_gpt
from torch.utils.flop_counter import FlopCounterMode

from nanococonut import coconut, ops
from nanococonut.batch import TokenizedExample
from nanococonut.model import GPTConfig
from nanococonut.runtime.graphs import GraphCache
from nanococonut.training.step import TrainStep

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "training.py"
TINY = [f"--config={ROOT / 'config' / 'prosqa_small.py'}", "--n_layer=1", "--n_embd=8"]
TINY += ["--n_head=2", "--batch_size=3", "--repeats=1", "--peak_size=8"]


@pytest.fixture(scope="module")
def names():
    """What the script defines."""
    return runpy.run_path(str(SCRIPT), run_name="bench")


@pytest.fixture
def bench(monkeypatch, capsys, names):
    """bench(*argv) -> (exit code, stdout, stderr), in this process: importing torch takes long."""
    for key, value in names["MALLOC"].items():  # where they are not set, it starts itself anew
        monkeypatch.setenv(key, value)

    def run(*argv):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, argv)])
        code = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def clone(tmp_path):
    """A folder that looks like the released code's."""
    (tmp_path / "coconut.py").write_text("")
    return tmp_path


def test_a_run_tells_where_the_time_goes(tmp_path):
    log = tmp_path / "rows.jsonl"
    log.write_text("{}\n")
    argv = [sys.executable, SCRIPT, *TINY, "--latent=2", f"--out={log}"]
    run = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    *shown, last = run.stdout.splitlines()
    assert log.read_text() == "{}\n" + last + "\n"
    row = json.loads(last)
    assert (row["bench"], row["config"], row["latent"]) == ("training", "prosqa_small.py", 2)
    assert (row["n_layer"], row["n_embd"], row["batch_size"], row["repeats"]) == (1, 8, 3, 1)
    assert row["smear"] and row["released"] is None and row["threads"] >= 1
    assert {"commit", "versions", "platform", "device"} <= row.keys()
    parts = [part["median"] for part in row["parts_ms"].values()]
    assert list(row["parts_ms"]) == "collate prefix thoughts suffix backward optimizer".split()
    plain = row["plain"]["step_ms"]["median"]
    assert row["parts_of"] == "plain"
    assert min(parts) > 0 and sum(parts) == pytest.approx(plain, abs=0.01)
    for side in (row, row["plain"]):
        rate, step = side["rows_per_s"]["median"], side["step_ms"]["median"]
        rounding = 0.006 + rate * 0.0006 / step  # the row has two digits of one, three of the other
        assert rate == pytest.approx(3e3 / step, abs=rounding)
    ratio, step = row["plain"]["ours_times_faster"]["median"], row["step_ms"]["median"]
    assert ratio == pytest.approx(plain / step, rel=0.01, abs=0.001)
    assert row["gflop_per_s"]["median"] == pytest.approx(row["model_gflop"] * 1e3 / step, abs=0.01)
    assert row["peak_gflop_per_s"] > 0 and row["share_of_peak"]["median"] > 0
    assert row["peak_memory_mib"]["ours"] >= 0 and row["peak_memory_mib"]["plain"] is None
    assert 0 <= row["padded_share"] < row["padded_share_graphs"] < 1
    assert (row["kernels"], row["graphs"], row["context"]) == ("torch", 0, None)
    assert str(ROOT) not in last and str(tmp_path) not in last
    assert any(line.split()[0] == "thoughts" for line in shown)


def test_no_thoughts_take_no_time_and_more_layers_are_more_parameters(bench):
    rows = []
    for own in (["--latent=0"], ["--latent=0", "--n_layer=2"]):
        code, out, err = bench(*TINY, *own)
        assert code == 0, err
        rows.append(json.loads(out.splitlines()[-1]))
        assert rows[-1]["parts_ms"]["thoughts"]["max"] == 0
        assert rows[-1]["parts_ms"]["suffix"]["max"] > 0
    layer = 12 * 8 * 8 + 13 * 8  # its matrices; its biases and LayerNorms
    assert rows[1]["parameters"] - rows[0]["parameters"] == layer


@pytest.fixture
def made(names):
    """made(**settings) -> (recipe, rows) of a tiny model."""

    def make(**settings):
        config = dict(config=str(ROOT / "config" / "prosqa_small.py"), n_layer=2, n_embd=8)
        bench = names["StepConfig"](**config | dict(batch_size=5, repeats=1) | settings)
        recipe = names["recipe_of"](bench)
        return recipe, names["Rows"](recipe, 2, bench.context)

    return make


@pytest.mark.parametrize("latent, micro", [(0, 5), (2, 2)])
def test_both_ways_take_the_same_steps(names, made, latent, micro):
    """As train.py's loss has it, of all micro-batches; and with the same weights afterwards."""
    recipe, rows = made(latent=latent, micro_batch_size=micro)
    ours = names["Ours"](recipe, rows)
    plain = names["Plain"](ours)
    before = copy.deepcopy(ours.model)
    want = losses = 0
    for micro_batch in rows.micro_batches(0, plain.stepper)[0]:
        batch = micro_batch.batch
        logits = coconut.forward(before, batch)
        want, losses = want + coconut.loss_sum(logits, batch.targets), losses + batch.n_labels
    assert len(rows.micro_batches(0, plain.stepper)[0]) == -(-5 // micro)
    assert ours.check()["loss"] == pytest.approx((want / losses).item(), rel=1e-5)
    for i in (0, 1):
        (took, loss), (parts, plain_loss) = ours.step(i), plain.step(i)
        if i == 0:
            assert loss == pytest.approx((want / losses).item(), rel=1e-5)
        assert loss == pytest.approx(plain_loss, rel=1e-5)
        assert took > 0 and (parts["thoughts"] > 0) == (latent > 0)
    for a, b, old in zip(*(m.parameters() for m in (ours.model, plain.model, before)), strict=True):
        torch.testing.assert_close(a, b)
        assert not torch.equal(a, old) or not old.any()


def test_graphs_take_the_same_steps_too(names, made, monkeypatch):
    """By fake_graphs in their place; a check in between leaves what they write to where it is."""
    monkeypatch.setattr(sides, "GraphCache", FakeGraphCache)
    monkeypatch.setattr(ops, "choose_graph", lambda *_: True)
    recipe, rows = made(latent=1, micro_batch_size=3)
    ours = names["Ours"](recipe, rows)
    plain = names["Plain"](ours)
    for i in (0, 1, 0):
        (_, loss), (_, plain_loss) = ours.step(i), plain.step(i)
        assert loss == pytest.approx(plain_loss, rel=1e-5)
        assert ours.check()["loss"] > 0
    assert 0 < len(ours.stepper.graphs.graphs) < 6


def test_two_ways_that_differ_are_not_compared(names):
    names["same"](1.0, 1.00001, "float32")
    names["same"](1.0, 1.01, "bfloat16")
    for loss in (1.01, float("nan")):
        with pytest.raises(names["UserError"], match="do not compute the same"):
            names["same"](loss, 1.0, "float32")


def test_a_context_is_just_as_long(made):
    recipe, rows = made(context=203, latent=3)
    for i in (0, 1):
        assert [p for p, *_ in rows.lengths(i)] == [203] * 5
    assert recipe.block_size >= max(sum(row[:3]) for row in rows.lengths(0))
    repeated = rows.layouts[0][0][0]
    assert repeated[-1] == rows.tokenizer.bot and len(set(repeated)) > 8


def test_padding_is_counted_as_it_comes_and_for_graphs(made):
    recipe, rows = made(latent=2, micro_batch_size=3)  # of 5 rows: 3 and 2, for graphs 4 and 2
    question = list(range(8))
    rows.batches = [[TokenizedExample(question[:n], [], [1, 2]) for n in (1, 3, 5, 7, 7)]]
    rows.layouts = [[([0] * (len(row.question) + 1), 2, [0] * 4, 1) for row in rows.batches[0]]]
    model = random_gpt(block_size=160)
    real = sum((2, 4, 6, 8, 8)) + 5 * (2 + 4)
    slots = 3 * (6 + 2 + 4) + 2 * (8 + 2 + 4)
    assert rows.padded_share(TrainStep(model)) == pytest.approx(1 - real / slots)
    for_graphs = (4 + 2) * (64 + 2 + 16)
    assert rows.padded_share(TrainStep(model, graphs=GraphCache(1))) == pytest.approx(
        1 - real / for_graphs
    )


@pytest.mark.parametrize("smear", [False, True])
@pytest.mark.parametrize("thoughts", [0, 3])
def test_flop_are_those_that_torch_counts(made, smear, thoughts):
    """Of rows without padding. One thing is made and not needed: the last layer's other queries."""
    recipe, rows = made(latent=thoughts, batch_size=1)
    model = random_gpt(smear=smear, dtype=torch.float32, vocab_size=400, block_size=160)
    batch = rows.micro_batches(0, TrainStep(model))[0][0].batch
    with FlopCounterMode(display=False) as counter:
        coconut.loss(model, batch, coconut.think(model, batch))[0].backward()
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    dense = sum(n for op, n in counted.items() if op in ("aten.mm", "aten.addmm"))
    lengths = rows.lengths(0)
    matrices, _ = step_flop(model.config, lengths)
    others = 6 * model.config.n_embd**2 * (lengths[0][0] - 1)
    assert dense == matrices + others


def test_flop_of_attention_are_those_of_a_mask():
    config = GPTConfig(n_layer=3, n_head=1, n_embd=4)
    rows = [(5, 2, 3, 2), (1, 0, 1, 1)]
    want = 0
    for prefix, thoughts, suffix, _ in rows:
        seen = torch.ones(*[prefix + thoughts + suffix - 1] * 2).tril()
        want += 2 * seen.sum() + seen[prefix - 1 :].sum()  # the last layer has fewer queries
    assert step_flop(config, rows)[1] == 3 * 4 * 4 * want


def test_a_peak_is_measured():
    assert matmul_peak(torch.device("cpu"), torch.float32, 16, 2) > 0


def test_a_sweep_has_a_row_for_each_cell(bench, names, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(names["main"].__globals__, "CONTEXTS", (20, 200))
    monkeypatch.setitem(names["main"].__globals__, "THOUGHTS", (0, 2))
    log = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *TINY, "--sweep", f"--out={log}"])
    names["main"]()
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    cells = [(row["context"], row["latent"]) for row in rows]
    assert cells == [(20, 0), (20, 2), (200, 0), (200, 2)]
    flop = [row["model_gflop"] for row in rows]
    assert flop[0] < flop[1] < flop[2] < flop[3]
    assert all(row["padded_share"] < 0.2 for row in rows)
    *_, heading, a, b, c, d = capsys.readouterr().out.splitlines()
    assert heading.startswith("context") and d.split()[:2] == ["200", "2"]
    growth = [float(line.split()[4]) for line in (a, b, c, d)]
    ms = [row["step_ms"]["median"] for row in rows]
    assert growth == pytest.approx([1, ms[1] / ms[0], 1, ms[3] / ms[2]], abs=0.006)


@pytest.mark.parametrize("latent", [0, 3])
def test_the_released_code_gets_the_same_rows(made, latent):
    """Against our own blocks: the same real tokens, labels, positions and amount of padding."""
    _, rows = made(latent=latent)
    plain = TrainStep(random_gpt())
    worker = runpy.run_path(str(SCRIPT.with_name("released_worker.py")), run_name="worker")
    padding = slots = 0
    for i, batch in enumerate(rows.as_released()):
        theirs = worker["padded"](batch, rows.tokenizer.eos, "cpu")
        ours = rows.micro_batches(i, plain)[0][0].batch
        real = theirs["attention_mask"] == 1
        padding, slots = padding + int((~real).sum()), slots + real.numel()
        assert (theirs["labels"][~real] == -100).all()
        assert theirs["input_ids"].shape[1] == (
            ours.prefix.shape[1] + latent + ours.suffix.shape[1] if latent else real.sum(1).max()
        )
        for b in range(5):
            ids = theirs["input_ids"][b, real[b]].tolist()
            p, n = ours.length[b].item(), latent
            words = ids[p + n :]
            assert ids[:p] == ours.prefix[b, :p].tolist() and ids[p - 1] == rows.tokenizer.bot
            assert ids[p : p + n] == [rows.tokenizer.latent] * n
            assert words == ours.suffix[b, : len(words)].tolist()
            assert (words[0], words[-1]) == (rows.tokenizer.eot, rows.tokenizer.eos)
            labels = [-100] * (p + n) + ours.targets[b, : len(words)].tolist()
            assert theirs["labels"][b, real[b]].tolist() == labels
            assert theirs["position_ids"][b, real[b]].tolist() == list(range(len(ids)))
        if latent:  # all rows think in the same columns
            columns = (theirs["input_ids"] == rows.tokenizer.latent).any(dim=0)
            assert columns.sum() == latent
    if latent:
        assert rows.padded_share(plain) == pytest.approx(padding / slots)


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--repeats=0"], "repeats=0"),
        (["--config=nowhere.py"], "nowhere.py is not there"),
        (["--n_head=3"], "does not divide"),
        (["--latent=500"], "500 thoughts"),
        (["--released=."], "go together"),
        (["--sweep", "--context=9"], "a --context of its own"),
        (["--released=nowhere", "--released_python=python"], "holds no coconut.py"),
        (["--out=nowhere/rows.jsonl"], "cannot be written"),
    ],
)
def test_mistakes_take_two_lines(bench, argv, said):
    code, _, err = bench(*TINY, *argv)
    assert code == 2 and said in err and len(err.splitlines()) <= 2


def test_a_python_that_cannot_be_run(bench, clone):
    code, _, err = bench(*TINY, f"--released={clone}", f"--released_python={clone}/python")
    assert code == 2 and "cannot be run" in err and len(err.splitlines()) <= 2


def test_a_worker_that_dies(bench, clone):
    code, _, err = bench(*TINY, f"--released={clone}", f"--released_python={shutil.which('false')}")
    assert code == 2 and "worker ended" in err and len(err.splitlines()) <= 2


def test_a_worker_that_computes_something_else(bench, clone):
    fake = clone / "python"
    replies = ['{"versions": {}}', '{"loss": 1.0, "gradient": 1.0}']
    fake.write_text("#!/bin/sh\n" + "".join(f"read -r _\necho '{reply}'\n" for reply in replies))
    fake.chmod(0o755)
    code, _, err = bench(*TINY, f"--released={clone}", f"--released_python={fake}")
    assert code == 2 and "do not compute the same: loss" in err and len(err.splitlines()) <= 2


def test_the_released_code_computes_the_same(bench):
    released, python = map(os.environ.get, ("NANOCOCONUT_RELEASED", "NANOCOCONUT_RELEASED_PYTHON"))
    if not (released and python):
        pytest.skip("NANOCOCONUT_RELEASED and NANOCOCONUT_RELEASED_PYTHON are not set")
    code, out, err = bench(*TINY, f"--released={released}", f"--released_python={python}")
    assert code == 0, err
    last = out.splitlines()[-1]
    row, theirs = json.loads(last), json.loads(last)["released"]
    for what in ("loss", "gradient"):
        assert theirs[what]["ours"] == pytest.approx(theirs[what]["released"], rel=1e-4)
    assert theirs["parameters"] == row["parameters"] and not row["smear"]
    assert theirs["versions"]["transformers"].startswith("4.")
    ratio = theirs["step_ms"]["median"] / row["step_ms"]["median"]
    assert theirs["ours_times_faster"]["median"] == pytest.approx(ratio, rel=0.01)
    assert theirs["commit"] != "unknown" and released not in last and python not in last
