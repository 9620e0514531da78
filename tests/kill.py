"""Check that a training run killed at random times resumes to the same bits.

    OMP_NUM_THREADS=1 python tests/kill.py 100

A run is killed with SIGKILL several times, anywhere between Python's start and the last save, then
resumed and finished. Its weights, moments and log must equal those of an uninterrupted run. 100
kills take 15 minutes on two cores. pytest does not collect this file.
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanococonut.weights.checkpoint import list_checkpoints, verify

ROOT = Path(__file__).resolve().parent.parent
# 4 steps per epoch, five stages, and a save after every step, so that kills often hit a save
SETTINGS = (
    "config/prosqa_small.py --train_examples=64 --batch_size=16 --micro_batch_size=8 "
    "--val_examples=8 --n_embd=32 --dropout=0.1 --epochs=8 --first_stage_epochs=1 "
    "--epochs_per_stage=1 --max_new_tokens=8 --warmup_steps=5 --advance_at=0 --device=cpu "
    "--n_nodes=10 --save_interval=1 --eval_interval=3"
).split()


def start(out_dir: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "train.py", *SETTINGS, f"--out_dir={out_dir}", *flags]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, **pipes)


def outcome(run: Path) -> tuple:
    """Return the digests of the last weights and moments, and the log without its times."""
    log = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    log = [{k: v for k, v in x.items() if k not in ("examples_per_s", "minutes")} for x in log]
    return verify(list_checkpoints(run)[-1], resume=True)["files"], log


def main() -> None:
    n_kills, folder = int(sys.argv[1]), Path(tempfile.mkdtemp())
    killed = in_save = runs = 0
    began = time.monotonic()
    start(folder / "whole").communicate()
    seconds, expected = time.monotonic() - began, outcome(folder / "whole")
    while killed < n_kills:
        run, in_this_run, stopped = folder / f"run{runs}", 0, True
        while stopped:
            process = start(run, *(["--resume"] if list_checkpoints(run) else []))
            more = in_this_run < 10 and killed < n_kills  # ten kills per run
            with suppress(subprocess.TimeoutExpired):
                process.wait(random.uniform(0, seconds) if more else None)
            process.kill()  # no effect if it has ended
            err = process.communicate()[1]
            stopped = process.returncode == -9
            killed, in_this_run = killed + stopped, in_this_run + stopped
            in_save += stopped and any(run.glob(".*.partial"))
            if not stopped and process.returncode:
                sys.exit(f"{run} failed after {killed} kills:\n{err}")
        if outcome(run) != expected:
            sys.exit(f"{run} differs from {folder / 'whole'} after {killed} kills.")
        runs += 1
        print(f"{killed} kills ({in_save} during a save), {runs} runs, all equal", flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
