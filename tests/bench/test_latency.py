"""bench/latency.py and throughput.py at a tiny size: rows, peers wrong or missing."""

import json
import os
import sys
from pathlib import Path

import bandwidth
import peers
import pytest
import schema
import subject
import tables
import torch

from nanococonut.runtime.errors import UserError

TINY = "--n_layer=2 --n_embd=16 --n_head=2 --vocab_size=64 --block_size=512".split()
SHAPE = dict(n_layer=2, n_embd=16, n_head=2, vocab_size=64, block_size=512)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    monkeypatch.setitem(bandwidth.BYTES, "cpu", 1 << 16)


@pytest.fixture
def latency(script):
    return lambda *argv: script(*TINY, *argv, "--device=cpu", script="bench/latency.py")


def fake(folder: Path, replies: list[dict]) -> Path:
    """A "Python" that gives these replies, whatever it is asked."""
    path = folder / "python"
    lines = [f"read -r _\necho '{json.dumps(reply)}'\n" for reply in replies]
    path.write_text("#!/bin/sh\n" + "".join(lines))
    path.chmod(0o755)
    return path


def test_a_run_measures_everything(latency, tmp_path):
    argv = ["--rounds=2", "--peers=False", "--batches=1,3", "--contexts=20,40"]
    code, out, err = latency(*argv, "--tasks=prosqa,gsm8k", "--out=rows.jsonl")
    assert code == 0, err
    *shown, last = out.splitlines()
    line, rows = json.loads(last), tables.read_jsonl(tmp_path / "rows.jsonl")
    for row in rows:
        schema.check(row)
    [run] = tables.runs(rows, "latency")
    assert run.rows == rows and len(line["rows"]) == len(rows)
    assert run.points() == [(1, 20), (1, 40), (3, 20), (3, 40)]
    for batch, context in run.points():
        latent, token = (
            run.value(w, "ours", batch=batch, context=context)
            for w in ("latent step", "token step")
        )
        assert 0 < latent < run.value("first token", "ours", batch=batch, context=context)
        floors = [
            run.value(w, "floor", batch=batch, context=context)
            for w in ("latent step", "token step")
        ]
        assert 0 < floors[0] < floors[1] and token > 0
        at = f"token step / latent step, batch {batch}, context {context}"
        numbers = 2 * 2 * 16 * context * batch + 2 * (12 * 16 * 16 + 13 * 16)
        times = run.value("token step by latent step", "ours", batch=batch, context=context)
        assert line["ratios"][at]["measured"] == pytest.approx(times, abs=1e-3)
        assert line["ratios"][at]["bytes"] == pytest.approx(1 + 64 * 16 / numbers, abs=1e-3)
    for task in ("prosqa", "gsm8k"):
        whole = {
            w: run.value(f"{task} answer, {w}", "ours") for w in ("6 thoughts", "written chain")
        }
        rest = run.value(f"{task} answer after prefill, written chain", "ours")
        assert 0 < rest < whole["written chain"]
        times = run.value(f"{task} answer, written chain by 6 thoughts", "ours")
        ratios = line["ratios"][f"{task}, chain / thoughts"]
        assert 0 < ratios["prefill share"] < 1
        assert ratios["whole"] == pytest.approx(times, rel=1e-3)
    rates = [run.value("memory bandwidth", way) for way in ("copy", "matrix times vector")]
    assert any(rates) and not all(rates)  # the faster of the two
    assert {row["repeats"] for row in rows if row["unit"] == "times"} == {2}  # rounds are whole
    assert line["left_out"] == [] and set(line["without"]) >= {"released", "ours, eager"}
    assert "not installed" in line["without"]["released"]
    assert any("by bytes" in s for s in shown) and str(tmp_path) not in out


def test_what_does_not_fit_is_left_out_and_said(latency):
    argv = ["--rounds=1", "--peers=False", "--batches=1", "--contexts=16,900"]
    code, out, err = latency(*argv, "--tasks=prosqa")
    assert code == 0, err
    left_out = json.loads(out.splitlines()[-1])["left_out"]
    assert any("context 900: 916 positions, the model has 512" in w for w in left_out)
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert any(r["what"] == "latent step" for r in rows)  # what it is all about is measured


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--batches=1,x"], "no list of numbers"),
        (["--contexts=0"], "no list of numbers"),
        (["--tasks=chess"], "'chess'"),
        (["--rounds=0"], "rounds=0"),
        (["--released=."], "go together"),
        (["--released=nowhere", "--released_python=python"], "holds no coconut.py"),
        (["--checkpoint=nowhere"], "Give no --checkpoint"),
        (["--n_head=3"], "does not divide"),
        (["--out=nowhere/rows.jsonl"], "folder is not there"),
        (["--contexts=9000", "--tasks=", "--peers=False"], "nothing fits"),
    ],
)
def test_mistakes_take_two_lines(latency, argv, said):
    code, _, err = latency(*argv)
    assert code == 2 and said in err and len(err.splitlines()) <= 2, err


def test_others_are_checked_before_anything_is_timed(tmp_path, monkeypatch):
    """One that says other tokens, one that ends, one that is not installed."""
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    found = subject.find("random", SHAPE, CPU)
    (tmp_path / "coconut.py").write_text("")
    lies = fake(tmp_path, [{"versions": {"torch": "2"}}, {"tokens": [[0] * peers.TOKENS]}])
    sides = peers.start(found, str(tmp_path), str(lies), None)
    assert [side.name for side in sides.all] == ["ours", "released"]
    assert sides.all[1].versions["coconut"] == "unknown"
    peers.check(sides, found, [8])
    assert [side.name for side in sides.all] == ["ours"]
    assert "says other tokens than ours" in sides.missing["released"]
    assert "pip install transformers" in sides.missing["transformers, dynamic cache"]
    ends = fake(tmp_path, [])
    sides = peers.start(found, str(tmp_path), str(ends), str(ends))
    assert [side.name for side in sides.all] == ["ours"]
    assert "generate_worker ended" in sides.missing["transformers, dynamic cache"]
    with pytest.raises(UserError, match="cannot be run"):
        peers.start(found, None, None, str(tmp_path / "nothing"))


def test_a_defect_of_ours_is_an_error(monkeypatch):
    found = subject.find("random", SHAPE, CPU)
    sides = peers.start(found, None, None, None, others=False)
    said = sides.first.answer
    wrong = lambda *a: said(*a) | {"tokens": [[1] * peers.TOKENS]}  # noqa: E731
    monkeypatch.setattr(sides.first, "answer", wrong)
    with pytest.raises(UserError, match="defect of ours"):
        peers.check(sides, found, [8])


def test_memory_that_is_not_enough_is_no_crash():
    for error in (
        torch.OutOfMemoryError("x"),
        MemoryError(),
        RuntimeError("can't allocate memory"),
    ):
        with subject.out_of_memory(CPU) as failed:
            raise error
        assert failed
    with pytest.raises(RuntimeError, match="other"), subject.out_of_memory(CPU):
        raise RuntimeError("another thing")
    with subject.out_of_memory(CPU) as failed:
        pass
    assert not failed


def test_throughput_goes_on_until_it_rises_no_more(script, tmp_path):
    argv = [*TINY, "--task=gsm8k", "--rounds=2", "--most=8", "--device=cpu"]
    code, out, err = script(*argv, "--out=rows.jsonl", script="bench/throughput.py")
    assert code == 0, err
    rows, line = tables.read_jsonl(tmp_path / "rows.jsonl"), json.loads(out.splitlines()[-1])
    for row in rows:
        schema.check(row)
    batches = [row["shapes"]["batch"] for row in rows if row["variant"] == "6 thoughts"]
    assert batches == [1, 2, 4, 8][: len(batches)] and len(rows) == 3 * len(batches)
    assert {row["unit"] for row in rows} == {"questions/s"} and line["ended"]
    code, _, err = script(*TINY[:-1], "--block_size=64", script="bench/throughput.py")
    assert code == 2 and "the model has 64" in err


@pytest.mark.slow
def test_transformers_says_the_same(latency):
    pytest.importorskip("transformers")
    argv = ["--rounds=2", "--batches=1", "--contexts=20", "--tasks=gsm8k"]
    released, python = map(os.environ.get, ("NANOCOCONUT_RELEASED", "NANOCOCONUT_RELEASED_PYTHON"))
    wanted = {"transformers, dynamic cache"}
    if released and python:
        argv += [f"--released={released}", f"--released_python={python}"]
        wanted.add("released")
    code, out, err = latency(*argv, f"--transformers_python={sys.executable}")
    assert code == 0, err
    line = json.loads(out.splitlines()[-1])
    rows = {(r["what"], r["variant"]): r for r in line["rows"]}
    for name in wanted:
        assert name not in line["without"]
        for what in ("latent step", "token step", "gsm8k answer, 6 thoughts"):
            assert rows[what, name]["value"] > 0
        assert rows["latent step", name]["versions"]["transformers"]


@pytest.mark.gpu
def test_launches_are_counted_on_a_gpu(script, tmp_path):
    argv = [*TINY, "--peers=False", "--rounds=1", "--batches=1", "--contexts=20", "--tasks=gsm8k"]
    code, out, err = script(*argv, "--out=rows.jsonl", script="bench/latency.py")
    assert code == 0, err
    rows = tables.read_jsonl(tmp_path / "rows.jsonl")
    counted = {(r["what"], r["variant"]): r["value"] for r in rows if r["unit"] == "launches"}
    assert counted["latent step kernels", "ours, eager"] > 20
    assert counted["latent step launches", "ours"] < 1  # a graph for the whole chain
    assert counted["latent step kernels", "ours"] < counted["latent step kernels", "ours, eager"]
