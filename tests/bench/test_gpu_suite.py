"""bench/gpu_suite.sh, rehearsed without a GPU."""

import os
import subprocess
from collections import defaultdict

from helpers import ROOT

from bench.accuracy import AccuracyConfig
from bench.kernels import KernelsConfig
from bench.latency import LatencyConfig
from bench.throughput import ThroughputConfig
from bench.training import StepConfig
from nanococonut.runtime.cli import make_config, parse_cli
from nanococonut.training.setup import load_config

OPTIONS = {
    "bench/accuracy.py": AccuracyConfig,
    "bench/kernels.py": KernelsConfig,
    "bench/latency.py": LatencyConfig,
    "bench/throughput.py": ThroughputConfig,
    "bench/training.py": StepConfig,
}


def test_every_command_is_valid_and_fits_the_time(tmp_path, monkeypatch):
    """A renamed option or file would fail only on a GPU, and lose its part of the results."""
    # instead of running a command, `timeout` writes it down; train.py's saves a checkpoint
    fake = tmp_path / "timeout"
    fake.write_text('#!/bin/sh\necho "$@" >> "$COMMANDS"\nmkdir -p "$RESULTS/run/step_1"\n')
    fake.chmod(0o755)
    results, commands, out = (tmp_path / name for name in ("results", "commands", "out"))
    out.mkdir()
    names = dict(PYTHON="true", COMMANDS=str(commands), RESULTS=str(results), OUT=str(out))
    env = os.environ | names | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = [ROOT / "bench" / "gpu_suite.sh", results]
    done = subprocess.run(["bash", *script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "gpu.tgz").stat().st_size > 0
    monkeypatch.chdir(ROOT)
    seconds = defaultdict(list)
    for line in commands.read_text().splitlines():
        limit, _, command = line.partition(" true ")
        name, *argv = command.split()
        seconds[name].append(int(limit.split()[-1]))
        if name in OPTIONS:
            make_config(OPTIONS[name], parse_cli(OPTIONS[name], argv, "")[0])
        elif name == "train.py":
            load_config(argv, "")
        else:
            assert "pytest -q -m gpu and not slow" in command and (ROOT / argv[-1]).is_file()
    assert {*seconds} == {*OPTIONS, "train.py", "-m"}
    # the test files run at the same time
    total = max(seconds.pop("-m")) + sum(sum(limits) for limits in seconds.values())
    assert total <= 540
