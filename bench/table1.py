"""Reproduce the paper's Table 1: train and evaluate every method, next to the paper's numbers.

    python bench/table1.py --task prosqa                    small models, for any machine
    python bench/table1.py --task prosqa --preset gpt2      GPT-2 by the paper's recipe
    python bench/table1.py --seeds 3 --minutes 9            repeat until all runs are done
    python bench/table1.py --methods coconut --set c_thought=2,final_thoughts=None

Each run is a separate train.py process with the same data, steps and learning rates. To continue
after an interruption, repeat the command. --out gets a row per run and split, and a Markdown table.
"""

import itertools
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs without installation

import nanococonut  # isort: skip  # noqa: F401  # first: sets how OpenMP waits
from bench.accuracy import AccuracyConfig, evaluate
from bench.common.results import command_line, read_results
from bench.common.tables import select, table1
from nanococonut.config import TrainConfig
from nanococonut.curriculum import METHODS
from nanococonut.data.tasks import TASKS
from nanococonut.runtime.cli import Options, make_config, option, parse_cli, read_config_file
from nanococonut.runtime.errors import UserError, run_main
from nanococonut.weights import checkpoint

ROOT = Path(__file__).parent.parent
RESERVED = {"method", "seed", "device", "out_dir", "resume"}  # train.py's options set here
DONE = "table1.done"  # marks the folder of a completed run


@dataclass(frozen=True)
class Table1Config(Options):
    task: str = option("prosqa", "task to train on", choices=tuple(TASKS))
    preset: str = option("small", "from random weights, or GPT-2", choices=("small", "gpt2"))
    seeds: int = option(1, "seeds 0 .. seeds - 1", ge=1)
    methods: str = option(",".join(METHODS), "methods, with commas")
    set: str | None = option(None, "settings for all runs: epochs=10,learning_rate=1e-3")
    data: str | None = option(None, "further files of examples to evaluate on, with commas")
    n: int = option(2000, "generated examples per split", ge=1)
    minutes: float = option(0.0, "time limit; the next call continues (0: none)", ge=0)
    runs: str = option("out/table1", "folder of the runs")
    out: str = option("out/table1/rows.jsonl", "append the results to this file")
    device: str = option("auto", "auto, cpu, cuda, mps")

    def validate(self) -> None:
        names = [Path(f).name for f in self.files]
        if len(set(names)) < len(names) or not all(Path(f).is_file() for f in self.files):
            raise UserError(f"--data {self.data}: expected files that exist, with different names.")
        if not self.recipe.is_file():
            raise UserError(f"{self.task} has no {self.preset} preset.\nSee the folder config/.")
        if not (TASKS[self.task].splits or names):
            raise UserError(f"{self.task} has no generated examples.\nGive --data FILE.")

    @property
    def files(self) -> list[str]:
        return [f for f in (self.data or "").split(",") if f]

    @property
    def recipe(self) -> Path:
        suffix = "_small" if self.preset == "small" else ""
        return ROOT / "config" / f"{self.task}{suffix}.py"


def plan_runs(config: Table1Config) -> dict[Path, list[str]]:
    """Return folder -> training command for every run of the table. Raise UserError for a setting
    that train.py would refuse."""
    flags = [f"--{setting.strip()}" for setting in (config.set or "").split(",") if setting]
    overrides, _ = parse_cli(TrainConfig, flags, "")
    if reserved := overrides.keys() & RESERVED:
        raise UserError(f"--set cannot change {min(reserved)!r}.\nSee --help.")
    flags += [f"--device={config.device}"] + ["--fallback=None"] * (config.preset == "gpt2")
    recipe, runs = read_config_file(config.recipe, TrainConfig), {}
    for seed, method in itertools.product(range(config.seeds), config.methods.split(",")):
        name = "_".join(filter(None, (method, config.set, f"s{seed}"))).replace("/", "-")
        folder = Path(config.runs) / f"{config.task}_{config.preset}" / name
        make_config(TrainConfig, recipe, overrides, {"method": method})  # or UserError
        command = [sys.executable, str(ROOT / "train.py"), str(config.recipe), *flags]
        runs[folder] = [*command, f"--method={method}", f"--seed={seed}", f"--out_dir={folder}"]
    return runs


def evaluate_run(folder: Path, config: Table1Config) -> None:
    """Evaluate a run on each split without a result yet, and append the results."""
    own = {"task": config.task, "preset": config.preset, "setting": config.set or ""}
    rows = select(read_results(Path(config.out)), **own, checkpoint=folder.name)
    done = {row["labels"]["data"] for row in rows}
    for split in [*TASKS[config.task].splits, *config.files]:
        if Path(split).name in done:
            continue
        print(f"evaluating {folder.name} on {split}", flush=True)
        # the same limit for all cells instead of each run's, since some written chains never end
        options = dict(n=config.n, device=config.device, max_new_tokens=128)
        [row] = evaluate(AccuracyConfig(str(folder), split, **options)).rows
        row["labels"] |= own
        row["command"] = command_line(config, "bench/table1.py")
        checkpoint.append_row(Path(config.out), row)


def train(folder: Path, command: list[str], seconds: float | None) -> bool:
    """Train a run. Return whether it completed in time. Raise UserError if train.py fails."""
    folder.mkdir(parents=True, exist_ok=True)
    resume = ["--resume"] if checkpoint.list_checkpoints(folder) else []
    with (folder / "train.log").open("a") as log:
        # in its own session, so that Ctrl-C reaches this process only
        process = subprocess.Popen(
            [*command, *resume], stdout=log, stderr=log, start_new_session=True
        )
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    finally:
        process.terminate()  # train.py saves, then exits
        process.wait()
    if code:
        lines = (folder / "train.log").read_text().strip().splitlines()
        raise UserError(
            f"{folder.name} exited with code {code}: {' '.join(lines[-2:])}\n"
            f"See {folder}/train.log, then repeat the command: the other runs are kept."
        )
    (folder / DONE).touch()
    return True


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # runs `finally` in train()
    config = Table1Config.from_cli(__doc__)
    task, preset = config.task, config.preset
    runs, out = plan_runs(config), Path(config.out)
    if out.is_dir():
        raise UserError(f"--out {out} cannot be a folder.")
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = select(read_results(out), task=task, preset=preset)
    rows = [row for row in rows if row["labels"]["data"] in TASKS[task].splits]
    others = {row["shape"]["examples"] for row in rows} - {config.n}
    if others:
        raise UserError(
            f"{out} has cells with {min(others)} examples, not --n {config.n}.\n"
            "All cells of a table need the same number: give another --out."
        )

    # ---- evaluate completed runs, then train and evaluate the rest
    until, errors = time.monotonic() + 60 * config.minutes, []
    for folder in sorted(runs, key=lambda folder: not (folder / DONE).exists()):
        try:
            if not (folder / DONE).exists():
                print(f"training {folder.name}", flush=True)
                left = max(0.0, until - time.monotonic()) if config.minutes else None
                if not train(folder, runs[folder], left):
                    break
            evaluate_run(folder, config)
        except UserError as e:  # a run that fails does not stop the others
            print(f"error: {e}")
            errors.append(str(e))

    # ---- report
    table = table1(read_results(out), task, preset)
    checkpoint.replace_text(out.with_name(f"table1_{task}_{preset}.md"), table + "\n")
    print(table)
    left = sum(not (folder / DONE).exists() for folder in runs)
    if left:
        print(f"{left} of {len(runs)} runs are not done: repeat the command to continue")
    print(json.dumps({"bench": "table1", "runs": len(runs), "left": left}))
    if errors:
        raise UserError(f"{len(errors)} runs failed; the first: {errors[0]}")


if __name__ == "__main__":
    run_main(main)
