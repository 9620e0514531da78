"""Kill a small training with SIGKILL at random moments: is what it resumes to equal to the bit?

    OMP_NUM_THREADS=1 python tests/kill.py --kills=100

A run is killed several times, at any moment from Python's start to the last save, resumed after
each, and finished; its weights, moments and log must be those of a run that was never interrupted.
Slow (the more kills, the longer) and not collected by pytest.
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanococonut.runtime.cli import make_config, option, parse_cli
from nanococonut.runtime.errors import UserError, run_main
from nanococonut.weights.checkpoint import list_checkpoints, verify

ROOT = Path(__file__).resolve().parent.parent
# 4 steps an epoch, five stages, and a save after every step: a kill often hits a save
SETTINGS = (
    "--train_examples=64 --batch_size=16 --micro_batch_size=8 --val_examples=8 --n_embd=32 "
    "--dropout=0.1 --epochs=8 --first_stage_epochs=1 --epochs_per_stage=1 --max_new_tokens=8 "
    "--warmup_steps=5 --advance_at=0 --device=cpu --n_nodes=10 --save_interval=1 --eval_interval=3"
).split()


@dataclass(frozen=True)
class KillConfig:
    kills: int = option(100, "how often to kill", ge=1)
    kills_per_run: int = option(10, "kills before a run may finish", ge=1)
    seed: int = option(0, "of the moments")


def start(out_dir: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), str(ROOT / "config" / "prosqa_small.py")]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*command, *SETTINGS, f"--out_dir={out_dir}", *flags], **pipes)


def outcome(run: Path) -> tuple:
    """Return the digests of the last weights and moments, and the log without its times."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    log = [{k: v for k, v in x.items() if k not in ("examples_per_s", "minutes")} for x in lines]
    return verify(list_checkpoints(run)[-1], resume=True)["files"], log


def main() -> None:
    c = make_config(KillConfig, parse_cli(KillConfig, sys.argv[1:], "Kill and resume.")[0])
    folder, rng, killed, in_save, runs = Path(tempfile.mkdtemp()), random.Random(c.seed), 0, 0, 0
    began = time.monotonic()
    start(folder / "whole").communicate()
    seconds, expected = time.monotonic() - began, outcome(folder / "whole")
    while killed < c.kills:
        run, in_this_run, stopped = folder / f"run{runs}", 0, True
        while stopped:
            process = start(run, *(["--resume"] if list_checkpoints(run) else []))
            more = in_this_run < c.kills_per_run and killed < c.kills
            try:  # a moment anywhere in what an uninterrupted run takes
                _, err = process.communicate(timeout=rng.uniform(0, seconds) if more else None)
            except subprocess.TimeoutExpired:
                process.kill()
                _, err = process.communicate()
            stopped = process.returncode == -9
            killed, in_this_run = killed + stopped, in_this_run + stopped
            in_save += bool(stopped and list(run.glob(".*.partial")))
            if not stopped and process.returncode:
                raise UserError(f"{run} failed after {killed} kills:\n{err}")
        if outcome(run) != expected:
            raise UserError(f"{run} differs from {folder / 'whole'} after {killed} kills.")
        runs += 1
        print(f"{killed} kills ({in_save} during a save), {runs} runs, all equal", flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    run_main(main)
