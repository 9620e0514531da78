"""bench/table1.py: train, stop, continue."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT

from bench.common.results import read_results
from nanococonut.data.tasks import TASKS

TINY = "--set=epochs=2,train_examples=64,val_examples=10,advance_at=0,max_new_tokens=4"


def test_stopped_table_continues(script):
    argv = [
        "--task=prontoqa",
        "--methods=no_cot",
        TINY,
        "--n=20",
        "--out=rows.jsonl",
        "--runs=runs",
    ]
    code, out, err = script(*argv, "--minutes=0.0001", script="bench/table1.py")
    assert (code, err) == (0, "") and json.loads(out.splitlines()[-1])["left"] == 1
    code, out, err = script(*argv, script="bench/table1.py")
    assert (code, err) == (0, "") and json.loads(out.splitlines()[-1])["left"] == 0
    rows = read_results(Path("rows.jsonl"))
    assert [r["labels"]["data"] for r in rows] == list(TASKS["prontoqa"].splits)
    own = {"method": "no_cot", "task": "prontoqa", "preset": "small", "setting": TINY[6:]}
    assert all(own.items() <= r["labels"].items() for r in rows)
    assert all(r["detail"]["trained"]["steps"] == 2 for r in rows)
    assert all("bench/table1.py" in r["command"] for r in rows)
    table = Path("table1_prontoqa_small.md").read_text()
    assert f"no_cot {TINY[6:]}" in table and table in out
    assert script(*argv, script="bench/table1.py")[0] == 0  # nothing is run again
    assert read_results(Path("rows.jsonl")) == rows
    code, _, err = script(*argv[:3], "--n=21", *argv[4:], script="bench/table1.py")
    assert code == 2 and "with 20 examples" in err


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM handlers")
def test_sigterm_saves_the_run_in_progress(tmp_path):
    """Guards against a training process that outlives the table, and against losing its steps."""
    settings = "--set=epochs=100000,train_examples=64,val_examples=10,save_interval=1000000"
    command = [sys.executable, "bench/table1.py", "--task=prontoqa", "--methods=no_cot", settings]
    command += [f"--runs={tmp_path}", f"--out={tmp_path}/rows.jsonl"]
    table = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline, log = time.monotonic() + 100, None
    try:
        while not log:
            assert time.monotonic() < deadline and table.poll() is None
            time.sleep(0.2)
            logs = tmp_path.rglob("train.log")
            log = next((path for path in logs if "examples/s" in path.read_text()), None)
        table.send_signal(signal.SIGTERM)
        assert table.wait(60) == 143
    finally:
        table.kill()
    last = log.read_text().splitlines()[-1]
    assert last.startswith("stopped at step") and "--resume" in last
    assert list(log.parent.glob("step_*/manifest.json"))


def test_failed_run_does_not_stop_the_table(script):
    """A run fails if its folder is a checkpoint already."""
    place = Path("runs/prontoqa_small") / f"no_cot_{TINY[6:]}_s0"
    place.mkdir(parents=True)
    (place / "manifest.json").write_text("{}")
    argv = ["--task=prontoqa", "--methods=no_cot", TINY, "--out=rows.jsonl", "--runs=runs"]
    code, out, err = script(*argv, script="bench/table1.py")
    assert code == 2 and "1 runs failed" in err and "is a checkpoint" in err
    assert "| no_cot |" in out and json.loads(out.splitlines()[-1])["left"] == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--methods=coconutt"], "coconutt"),
        (["--task=gsm8k"], "has no small preset"),
        (["--set=epochs"], "expected one argument"),
        (["--set=c_thout=0"], "Did you mean --c_thought"),
        (["--set=epochs=0"], "at least 1"),
        (["--seeds=0"], "at least 1"),
        (["--methods="], "method='' is unknown"),
        (["--set=method=cot"], "'method'"),
        (["--set=out_dir=x"], "'out_dir'"),
        (["--data=nope.json"], "files that exist"),
        (["--out=."], "cannot be"),
    ],
)
def test_bad_input_is_refused_before_any_run(script, argv, words):
    code, out, err = script(*argv, script="bench/table1.py")
    assert code == 2 and words in err and err.count("\n") <= 3 and "Traceback" not in err
    assert not Path("out").exists()
