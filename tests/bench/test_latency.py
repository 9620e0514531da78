"""bench/latency.py and throughput.py at a tiny size: results, providers wrong or missing."""

import json
import os
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import latency as bench
from bench.common import baselines, tables, workload
from bench.common.results import OURS, read_results
from nanococonut.model import GPTConfig
from nanococonut.runtime.errors import UserError

TINY = GPTConfig(n_layer=2, n_embd=16, n_head=2, vocab_size=64, block_size=1024)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A small model, and little memory to measure the bandwidth of."""
    monkeypatch.setattr(workload, "GPT2", TINY)
    monkeypatch.setitem(workload.BUFFER_BYTES, "cpu", 1 << 16)


@pytest.fixture
def latency(script):
    return lambda *argv: script(*argv, "--device=cpu", script="bench/latency.py")


@pytest.fixture
def tiny():
    """Return (workload, config) with options; nothing is started."""

    def make(**options):
        config = bench.LatencyConfig(device="cpu", **options)
        return workload.Workload(config), config

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
    [run] = tables.newest_runs(rows)
    value = partial(tables.value, run)
    assert run == rows and len(line["rows"]) == len(rows)
    assert tables.points(run) == [(1, 20), (1, 40), (3, 20), (3, 40)]
    for batch, context in tables.points(run):
        at = dict(batch=batch, context=context)
        latent, token = (value(m, **at) for m in ("latent_step", "token_step"))
        assert 0 < latent < value("first_token", **at)
        bounds = [value(m, "roofline", **at) for m in ("latent_step", "token_step")]
        assert 0 < bounds[0] < bounds[1] and token > 0
        assert value("token_step", relative_to="latent_step", **at) > 0
        numbers = 2 * 2 * 16 * context * batch + 2 * (12 * 16 * 16 + 13 * 16)
        assert bounds[1] / bounds[0] == pytest.approx(1 + 64 * 16 / numbers, rel=1e-3)
    for task in ("prosqa", "gsm8k"):
        for path in ("thoughts", "chain", "direct"):
            where = {"task": task, "path": path}
            whole, rest = (value(m, **where) for m in ("answer", "answer_after_prefill"))
            assert 0 < rest < whole
        assert value("answer", task=task, path="chain", relative_to="thoughts") > 0
    assert value("memory_bandwidth", "torch") > 0
    assert {row["repeats"] for row in rows if row["unit"] == "x"} == {2}  # rounds are whole
    assert line["left_out"] == [] and line["missing"]["released"] == "not requested"
    assert "| prosqa |" in "\n".join(shown) and str(tmp_path) not in out


def test_missing_provider_says_how_to_install_it(tiny, monkeypatch):
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)
    found, config = tiny()
    providers, missing = baselines.start(found, config)
    assert [p.name for p in providers] == ["nanococonut"]
    assert "--released_python" in missing["released"]
    assert "pip install transformers" in missing["transformers"]


def test_case_that_does_not_fit_is_left_out(latency, monkeypatch):
    generate = baselines.EngineProvider.generate

    def of_little_memory(provider, request):
        if len(request.prefixes) > 2:
            raise torch.OutOfMemoryError("too large")
        return generate(provider, request)

    monkeypatch.setattr(baselines.EngineProvider, "generate", of_little_memory)
    argv = ["--rounds=1", "--peers=False", "--batches=1,3", "--contexts=16"]
    code, out, err = latency(*argv, "--tasks=prosqa")
    assert code == 0, err
    line = json.loads(out.splitlines()[-1])
    assert line["left_out"] == ["batch 3, context 16: out of memory"]
    steps = [r for r in line["rows"] if r["metric"] == "latent_step"]
    assert {r["shape"]["batch"] for r in steps} == {1}  # the main result is measured


def test_windows_lacks_the_load(latency, monkeypatch):
    """os.getloadavg does not exist there: an AttributeError before any timing."""
    monkeypatch.delattr(os, "getloadavg")
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
        (["--batches=1,x"], "expected positive whole numbers"),
        (["--contexts=0"], "expected positive whole numbers"),
        (["--tasks=chess"], "'chess'"),
        (["--rounds=0"], "rounds=0"),
        (["--released=."], "go together"),
        (["--released=nowhere", "--released_python=python"], "has no coconut.py"),
        (["--out=nowhere/rows.jsonl"], "folder does not exist"),
        (["--contexts=9000"], "is too long"),
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
    assert [p.name for p in providers] == ["nanococonut"]
    assert "not timed, expected tokens" in missing["released"]
    ends = str(fake(tmp_path, []))
    found, config = tiny(released=str(tmp_path), released_python=ends)
    providers, missing = baselines.start(found, config)
    assert [p.name for p in providers] == ["nanococonut"]
    assert "worker released ended" in missing["released"]
    found, config = tiny(released=str(tmp_path), released_python=str(tmp_path / "nothing"))
    assert "cannot be run" in baselines.start(found, config)[1]["released"]


def test_closed_worker_leaves_no_process(tiny, tmp_path):
    """A compiler that a killed worker had started used to run on, beside the next measurement."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nsleep 20 &\necho '{\"versions\": {}}'\nwait\n")
    python.chmod(0o755)
    found, _ = tiny()
    worker = baselines.Worker("released", str(python), found.model, found.special)
    assert worker.versions == {}
    began = time.monotonic()
    worker.close()
    worker.close()  # twice is no error
    assert worker.process.stdout.read() == ""  # ends when the last process has closed it
    assert time.monotonic() - began < 10


def test_bug_of_ours_is_an_error(tiny, monkeypatch):
    found, config = tiny(peers=False)
    generate = baselines.EngineProvider.generate

    def wrong(provider, request):
        tokens = [[1] * baselines.N_CHECKED]
        return generate(provider, request) | ({"tokens": tokens} if provider.name == OURS else {})

    monkeypatch.setattr(baselines.EngineProvider, "generate", wrong)
    with pytest.raises(UserError, match="bug in nanococonut"):
        baselines.start(found, config)


def test_out_of_memory_is_no_crash():
    def fail(error):
        raise error

    cpu_allocator = RuntimeError("can't allocate memory")
    for error in (torch.OutOfMemoryError("x"), MemoryError(), cpu_allocator):
        assert workload.out_of_memory(partial(fail, error))
    with pytest.raises(RuntimeError, match="other"):
        workload.out_of_memory(partial(fail, RuntimeError("another thing")))
    assert not workload.out_of_memory(lambda: None)


def test_throughput_ends_when_no_longer_faster(script, tmp_path):
    argv = ["--task=gsm8k", "--rounds=2", "--device=cpu"]
    code, out, err = script(*argv, "--out=rows.jsonl", script="bench/throughput.py")
    assert code == 0, err
    rows, line = read_results(tmp_path / "rows.jsonl"), json.loads(out.splitlines()[-1])
    batches = [row["shape"]["batch"] for row in tables.select(rows, path="thoughts")]
    assert batches == [2**i for i in range(len(batches))] and len(rows) == 3 * len(batches)
    assert {row["unit"] for row in rows} == {"questions/s"} and line["ended"]


@pytest.mark.slow
def test_transformers_generates_the_same(latency):
    pytest.importorskip("transformers")
    argv = ["--rounds=2", "--batches=1", "--contexts=20", "--tasks=gsm8k"]
    released, python = map(os.environ.get, ("NANOCOCONUT_RELEASED", "NANOCOCONUT_RELEASED_PYTHON"))
    expected = {"transformers"}
    if released and python:
        argv += [f"--released={released}", f"--released_python={python}"]
        expected.add("released")
    code, out, err = latency(*argv)
    assert code == 0, err
    line = json.loads(out.splitlines()[-1])
    rows = {(r["metric"], r["provider"]): r for r in line["rows"]}
    for name in expected:
        assert name not in line["missing"]
        for metric in ("latent_step", "token_step", "answer"):
            assert rows[metric, name]["value"] > 0
        assert rows["latent_step", name]["versions"]["transformers"]
