"""bench/latency.py and throughput.py at a tiny size: results, and bad or missing providers."""

import json
import os
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from fake_graphs import FakeGraphCache

from bench import latency as bench
from bench.common import baselines, tables, workload
from bench.common.results import OURS, read_results
from nanococonut.inference.engine import MAX_GRAPHS
from nanococonut.model import GPTConfig
from nanococonut.runtime.errors import UserError

TINY = GPTConfig(n_layer=2, n_embd=16, n_head=2, vocab_size=64, block_size=1024)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Use a tiny model and a tiny buffer for the bandwidth."""
    monkeypatch.setattr(workload, "GPT2", TINY)
    monkeypatch.setitem(workload.BUFFER_BYTES, "cpu", 1 << 16)


@pytest.fixture
def latency(script):
    return lambda *argv: script(*argv, "--device=cpu", script="bench/latency.py")


@pytest.fixture
def tiny():
    """Return make(**options) -> (workload, config), which starts nothing."""

    def make(**options):
        config = bench.LatencyConfig(device="cpu", **options)
        return workload.Workload(config), config

    return make


def fake(folder: Path, replies: list[dict]) -> Path:
    """Write a fake Python that prints these replies, whatever the requests are."""
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
    work, config = tiny()
    providers, missing = baselines.start(work, config)
    assert [p.name for p in providers] == ["nanococonut"]
    assert "--released_python" in missing["released"]
    assert "pip install transformers" in missing["transformers"]


def test_case_that_does_not_fit_is_left_out(latency, monkeypatch):
    generate = baselines.EngineProvider.generate

    def runs_out_of_memory(provider, request):
        if len(request.prefixes) > 2:
            raise torch.OutOfMemoryError("too large")
        return generate(provider, request)

    monkeypatch.setattr(baselines.EngineProvider, "generate", runs_out_of_memory)
    argv = ["--rounds=1", "--peers=False", "--batches=1,3", "--contexts=16"]
    code, out, err = latency(*argv, "--tasks=prosqa")
    assert code == 0, err
    line = json.loads(out.splitlines()[-1])
    assert line["left_out"] == ["batch 3, context 16: out of memory"]
    steps = [r for r in line["rows"] if r["metric"] == "latent_step"]
    assert {r["shape"]["batch"] for r in steps} == {1}  # other cases are still measured


def test_missing_load_average_is_nan(latency, monkeypatch):
    """Windows has no os.getloadavg, so the script failed with an AttributeError."""
    monkeypatch.delattr(os, "getloadavg")
    argv = ["--rounds=1", "--peers=False", "--batches=1", "--contexts=16", "--tasks="]
    code, out, err = latency(*argv)
    assert code == 0 and "load nan" in out, err


def test_nothing_is_captured_in_a_timed_round(tiny):
    """A capture takes as long as many steps, and would be part of the first round's time."""
    work, config = tiny(batches="1,3", contexts="40", tasks="prosqa,gsm8k")
    provider = baselines.EngineProvider(OURS, work, "torch", "off")
    provider.engine.graphs = FakeGraphCache(MAX_GRAPHS)
    for case in bench.cases(config, [provider], on_gpu=True):
        FakeGraphCache.captured = FakeGraphCache.replayed = 0
        bench.warm_up(case, work)
        captured = FakeGraphCache.captured
        bench.time_case(case, 2, work)
        assert captured == FakeGraphCache.captured > 0 and FakeGraphCache.replayed > 0


def test_results_are_written_after_every_case(tiny, tmp_path, monkeypatch):
    """A run that was killed lost the cases it had finished."""
    options = dict(batches="1", contexts="16,32", tasks="", rounds=1, peers=False)
    work, config = tiny(**options, out=str(tmp_path / "r.jsonl"))
    results = bench.ResultWriter("latency", config, CPU, torch.float32)
    providers, _ = baselines.start(work, config)
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
        bench.measure(all_cases, config.rounds, work, results)
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
    """A worker with wrong tokens, one that exits, and a missing Python."""
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "coconut.py").write_text("")
    wrong_tokens = {"tokens": [[0] * baselines.N_CHECKED]}
    wrong = str(fake(tmp_path, [{"versions": {"torch": "2"}}, wrong_tokens]))
    work, config = tiny(released=str(tmp_path), released_python=wrong)
    providers, missing = baselines.start(work, config)
    assert [p.name for p in providers] == ["nanococonut"]
    assert "not timed, expected tokens" in missing["released"]
    ends = str(fake(tmp_path, []))
    work, config = tiny(released=str(tmp_path), released_python=ends)
    providers, missing = baselines.start(work, config)
    assert [p.name for p in providers] == ["nanococonut"]
    assert "worker released ended" in missing["released"]
    work, config = tiny(released=str(tmp_path), released_python=str(tmp_path / "nothing"))
    assert "cannot be run" in baselines.start(work, config)[1]["released"]


def test_closed_worker_leaves_no_process(tiny, tmp_path):
    """A compiler started by a killed worker kept running during the next measurement."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nsleep 20 &\necho '{\"versions\": {}}'\nwait\n")
    python.chmod(0o755)
    work, _ = tiny()
    worker = baselines.Worker("released", str(python), work.model, work.special)
    assert worker.versions == {}
    began = time.monotonic()
    worker.close()
    worker.close()  # twice is no error
    assert worker.process.stdout.read() == ""  # EOF once the last process has closed it
    assert time.monotonic() - began < 10


def test_own_wrong_tokens_are_an_error(tiny, monkeypatch):
    work, config = tiny(peers=False)
    generate = baselines.EngineProvider.generate

    def wrong(provider, request):
        tokens = [[1] * baselines.N_CHECKED]
        return generate(provider, request) | ({"tokens": tokens} if provider.name == OURS else {})

    monkeypatch.setattr(baselines.EngineProvider, "generate", wrong)
    with pytest.raises(UserError, match="bug in nanococonut"):
        baselines.start(work, config)


def test_out_of_memory_is_caught():
    def fail(error):
        raise error

    texts = "can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"
    in_capture = RuntimeError("operation failed due to a previous error during capture")
    in_capture.__context__ = torch.OutOfMemoryError("x")
    errors = torch.OutOfMemoryError("x"), MemoryError(), in_capture, *map(RuntimeError, texts)
    for error in errors:
        assert workload.out_of_memory(partial(fail, error))
    for text in ("another thing", str(in_capture)):  # a bug in a capture is no lack of memory
        with pytest.raises(RuntimeError, match="other|previous error"):
            workload.out_of_memory(partial(fail, RuntimeError(text)))
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
