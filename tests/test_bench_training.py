"""bench/training.py times what it says, and gives the released code the same work."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "bench" / "training.py"
TINY = [f"--config={ROOT / 'config' / 'prosqa_small.py'}", "--n_layer=1", "--n_embd=8"]
TINY += ["--n_head=2", "--batch_size=3", "--repeats=1"]


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
    assert min(parts) > 0 and sum(parts) == pytest.approx(row["step_ms"]["median"], abs=0.01)
    rate, step = row["rows_per_s"]["median"], row["step_ms"]["median"]
    rounding = 0.006 + rate * 0.0006 / step  # the row has two digits of one, three of the other
    assert rate == pytest.approx(3e3 / step, abs=rounding)
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


@pytest.mark.parametrize("latent", [0, 3])
def test_the_released_code_gets_the_same_rows(names, latent):
    """Against our own blocks: the same real tokens, labels, positions and amount of padding."""
    bench = names["StepConfig"](
        config=str(ROOT / "config" / "prosqa_small.py"), batch_size=5, latent=latent, repeats=2
    )
    rows = names["Rows"](bench, names["recipe_of"](bench))
    worker = runpy.run_path(str(SCRIPT.with_name("released_worker.py")), run_name="worker")
    padding = slots = 0
    for i, batch in enumerate(rows.as_released()):
        theirs, ours = worker["padded"](batch, rows.tokenizer.eos, "cpu"), rows.collate(i)
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
        assert rows.padded_share() == pytest.approx(padding / slots)


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--repeats=0"], "repeats=0"),
        (["--config=nowhere.py"], "nowhere.py is not there"),
        (["--n_head=3"], "does not divide"),
        (["--latent=500"], "500 thoughts"),
        (["--released=."], "go together"),
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
