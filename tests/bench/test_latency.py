"""bench/latency.py and throughput.py at a tiny size: results, providers wrong or missing."""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import latency as bench
from bench.common import baselines, roofline, tables, workload
from bench.common.results import read_results
from nanococonut.model import GPTConfig
from nanococonut.runtime.errors import UserError

TINY = GPTConfig(n_layer=2, n_embd=16, n_head=2, vocab_size=64, block_size=512)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A small model, and little memory to measure the bandwidth of."""
    monkeypatch.setattr(workload, "GPT2", TINY)
    monkeypatch.setitem(roofline.BUFFER_BYTES, "cpu", 1 << 16)


@pytest.fixture
def latency(script):
    return lambda *argv: script(*argv, "--device=cpu", script="bench/latency.py")


@pytest.fixture
def tiny():
    """Return (workload, config) with options; nothing is started."""

    def make(**options):
        config = bench.LatencyConfig(checkpoint="random", device="cpu", **options)
        return workload.load_model(config), config

    return make


def fake(folder: Path, replies: list[dict]) -> Path:
    """Make a "Python" that gives these replies, whatever is requested."""
    path = folder / "python"
    lines = [f"read -r _\necho '{json.dumps(reply)}'\n" for reply in replies]
    path.write_text("#!/bin/sh\n" + "".join(lines))
    path.chmod(0o755)
    return path


def test_run_measures_everything(latency, tmp_path):
    argv = ["--rounds=2", "--peers=False", "--batches=1,3", "--contexts=20,40"]
    code, out, err = latency(*argv, "--tasks=prosqa,gsm8k", "--out=rows.jsonl")
    assert code == 0, err
    *shown, last = out.splitlines()
    line, rows = json.loads(last), read_results(tmp_path / "rows.jsonl")
    [run] = tables.newest_runs(rows, "latency")
    assert run.rows == rows and len(line["rows"]) == len(rows)
    assert run.points() == [(1, 20), (1, 40), (3, 20), (3, 40)]
    for batch, context in run.points():
        at = dict(batch=batch, context=context)
        latent, token = (run.value(m, **at) for m in ("latent_step", "token_step"))
        assert 0 < latent < run.value("first_token", **at)
        bounds = [run.value(m, "roofline", **at) for m in ("latent_step", "token_step")]
        assert 0 < bounds[0] < bounds[1] and token > 0
        assert run.value("token_step", relative_to="latent_step", **at) > 0
        numbers = 2 * 2 * 16 * context * batch + 2 * (12 * 16 * 16 + 13 * 16)
        assert bounds[1] / bounds[0] == pytest.approx(1 + 64 * 16 / numbers, rel=1e-3)
    for task in ("prosqa", "gsm8k"):
        for path in ("thoughts", "chain", "direct"):
            where = {"task": task, "path": path}
            whole, rest = (run.value(m, **where) for m in ("answer", "answer_after_prefill"))
            assert 0 < rest < whole
        assert run.value("answer", task=task, path="chain", relative_to="thoughts") > 0
    assert run.value("memory_bandwidth", "torch") > 0
    assert {row["repeats"] for row in rows if row["unit"] == "x"} == {2}  # rounds are whole
    assert line["left_out"] == [] and line["missing"]["released"] == "not requested"
    assert "| prosqa |" in "\n".join(shown) and str(tmp_path) not in out


def test_missing_provider_says_how_to_install_it(tiny, monkeypatch):
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)
    found, config = tiny()
    providers, missing = baselines.start(found, config)
    assert [p.name for p in providers] == ["nanococonut"]
    assert "--released_python" in missing["released"]
    assert "transformers 5" in missing["transformers"]


def test_case_that_does_not_fit_is_left_out(latency):
    argv = ["--rounds=1", "--peers=False", "--batches=1", "--contexts=16,900"]
    code, out, err = latency(*argv, "--tasks=prosqa")
    assert code == 0, err
    left_out = json.loads(out.splitlines()[-1])["left_out"]
    assert any("context 900: 916 positions, the model has 512" in w for w in left_out)
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert any(r["metric"] == "latent_step" for r in rows)  # the main result is measured


def test_windows_lacks_load_and_memory(latency, monkeypatch):
    """os.getloadavg and os.sysconf do not exist there: an AttributeError before any timing."""
    monkeypatch.delattr(os, "getloadavg")
    monkeypatch.delattr(os, "sysconf_names")
    argv = ["--rounds=1", "--peers=False", "--batches=1", "--contexts=16", "--tasks="]
    code, out, err = latency(*argv)
    assert code == 0 and "load nan" in out, err


def test_results_are_written_after_every_case(tiny, tmp_path, monkeypatch):
    """A run that is killed keeps the cases that it finished."""
    options = dict(batches="1", contexts="16,32", tasks="", rounds=1, peers=False)
    found, config = tiny(**options, out=str(tmp_path / "r.jsonl"))
    results = bench.ResultWriter("latency", config, CPU, torch.float32)
    providers, _ = baselines.start(found, config)
    done = []
    time_case = bench.time_case

    def fails_at_second(*args):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return time_case(*args)

    monkeypatch.setattr(bench, "time_case", fails_at_second)
    with pytest.raises(KeyboardInterrupt):
        all_cases = bench.cases(config, providers, False)
        bench.measure(all_cases, config.rounds, found, results)
    rows = read_results(tmp_path / "r.jsonl")
    assert {r["metric"] for r in rows} >= {"latent_step", "token_step", "first_token"}


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--batches=1,x"], "no list of numbers"),
        (["--contexts=0"], "no list of numbers"),
        (["--tasks=chess"], "'chess'"),
        (["--rounds=0"], "rounds=0"),
        (["--released=."], "go together"),
        (["--released=nowhere", "--released_python=python"], "holds no coconut.py"),
        (["--checkpoint=nowhere"], "does not exist"),
        (["--out=nowhere/rows.jsonl"], "folder does not exist"),
        (["--contexts=9000", "--tasks=", "--peers=False"], "nothing fits"),
    ],
)
def test_mistakes_take_two_lines(latency, argv, message):
    code, _, err = latency(*argv)
    assert code == 2 and message in err and len(err.splitlines()) <= 2, err


def test_others_are_checked_before_timing(tiny, tmp_path, monkeypatch):
    """One with other tokens, one that ends, one that is not installed."""
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "coconut.py").write_text("")
    wrong_tokens = {"tokens": [[0] * baselines.N_CHECKED]}
    wrong = str(fake(tmp_path, [{"versions": {"torch": "2"}}, wrong_tokens]))
    found, config = tiny(released=str(tmp_path), released_python=wrong)
    providers, missing = baselines.start(found, config)
    assert [p.name for p in providers] == ["nanococonut", "released"]
    assert providers[1].versions["coconut"] == "unknown"
    baselines.drop_wrong(providers, found, missing, 8)
    assert [p.name for p in providers] == ["nanococonut"]
    assert "not timed, expected tokens" in missing["released"]
    ends = str(fake(tmp_path, []))
    options = dict(released=str(tmp_path), released_python=ends, transformers_python=ends)
    found, config = tiny(**options)
    providers, missing = baselines.start(found, config)
    assert [p.name for p in providers] == ["nanococonut"]
    assert "worker transformers ended" in missing["transformers"]
    found, config = tiny(transformers_python=str(tmp_path / "nothing"))
    assert "cannot be run" in baselines.start(found, config)[1]["transformers"]


def test_closed_worker_leaves_no_process(tmp_path):
    """A compiler that a killed worker had started used to run on, beside the next measurement."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nsleep 20 &\necho '{\"versions\": {}}'\nwait\n")
    python.chmod(0o755)
    worker = baselines.Worker("released", str(python), {})
    assert worker.versions == {}
    began = time.monotonic()
    worker.close()
    worker.close()  # twice is no error
    assert worker.process.stdout.read() == ""  # ends when the last process has closed it
    assert time.monotonic() - began < 10


def test_bug_of_ours_is_an_error(tiny, monkeypatch):
    found, config = tiny(peers=False)
    providers, missing = baselines.start(found, config)
    generate = providers[0].generate
    wrong = lambda *a: generate(*a) | {"tokens": [[1] * baselines.N_CHECKED]}  # noqa: E731
    monkeypatch.setattr(providers[0], "generate", wrong)
    with pytest.raises(UserError, match="bug of ours"):
        baselines.drop_wrong(providers, found, missing, 8)


def test_out_of_memory_is_no_crash():
    for error in (
        torch.OutOfMemoryError("x"),
        MemoryError(),
        RuntimeError("can't allocate memory"),
    ):
        with workload.catch_oom(CPU) as failed:
            raise error
        assert failed
    with pytest.raises(RuntimeError, match="other"), workload.catch_oom(CPU):
        raise RuntimeError("another thing")
    with workload.catch_oom(CPU) as failed:
        pass
    assert not failed


def test_throughput_ends_when_no_longer_faster(script, tmp_path, monkeypatch):
    argv = ["--task=gsm8k", "--rounds=2", "--max_batch=8", "--device=cpu"]
    code, out, err = script(*argv, "--out=rows.jsonl", script="bench/throughput.py")
    assert code == 0, err
    rows, line = read_results(tmp_path / "rows.jsonl"), json.loads(out.splitlines()[-1])
    batches = [row["shape"]["batch"] for row in tables.select(rows, path="thoughts")]
    assert batches == [1, 2, 4, 8][: len(batches)] and len(rows) == 3 * len(batches)
    assert {row["unit"] for row in rows} == {"questions/s"} and line["ended"]
    monkeypatch.setattr(workload, "GPT2", replace(TINY, block_size=64))
    code, _, err = script("--device=cpu", script="bench/throughput.py")
    assert code == 2 and "the model has 64" in err


@pytest.mark.slow
def test_transformers_generates_the_same(latency):
    pytest.importorskip("transformers")
    argv = ["--rounds=2", "--batches=1", "--contexts=20", "--tasks=gsm8k"]
    released, python = map(os.environ.get, ("NANOCOCONUT_RELEASED", "NANOCOCONUT_RELEASED_PYTHON"))
    expected = {"transformers"}
    if released and python:
        argv += [f"--released={released}", f"--released_python={python}"]
        expected.add("released")
    code, out, err = latency(*argv, f"--transformers_python={sys.executable}")
    assert code == 0, err
    line = json.loads(out.splitlines()[-1])
    rows = {(r["metric"], r["provider"]): r for r in line["rows"]}
    for name in expected:
        assert name not in line["missing"]
        for metric in ("latent_step", "token_step", "answer"):
            assert rows[metric, name]["value"] > 0
        assert rows["latent_step", name]["versions"]["transformers"]
