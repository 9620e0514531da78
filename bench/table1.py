"""The paper's Table 1 from one command: every method trained and evaluated, beside its figures.

    python bench/table1.py --task prosqa                    small models, for any machine
    python bench/table1.py --task prosqa --preset gpt2      GPT-2 by the paper's recipe
    python bench/table1.py --seeds 3 --minutes 9            in as many calls as it takes
    python bench/table1.py --methods coconut --sweep c_thought=0,1,2 --set final_thoughts=None

Each run is a train.py of its own, with the same rows, steps and rates. Stopped at any moment, the
same command goes on where it was. Results: one JSON row for each run and split, and a Markdown
table (mean ± standard deviation over seeds).
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout works uninstalled too

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tables import read_jsonl, table1

from nanococonut.config import TrainConfig
from nanococonut.curriculum import METHODS
from nanococonut.data.tasks import TASKS
from nanococonut.runtime.cli import make_config, option, parse_cli, read_config_file, validate
from nanococonut.runtime.errors import UserError, run_main
from nanococonut.weights import checkpoint

ROOT = Path(__file__).parent.parent
console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Table1Config:
    task: str = option("prosqa", "what to learn", choices=tuple(TASKS))
    preset: str = option("small", "small from-scratch models, or GPT-2", choices=("small", "gpt2"))
    seeds: int = option(1, "seeds 0 .. seeds - 1", ge=1)
    methods: str = option(",".join(tuple(METHODS)), "which, with commas")
    sweep: str | None = option(None, "a setting and its values: c_thought=0,1,2")
    set: str | None = option(
        None, "settings for all runs, with commas: epochs=10,learning_rate=1e-3"
    )
    data: str | None = option(None, "files of rows to evaluate on too, with commas")
    n: int = option(2000, "generated rows of a split", ge=1)
    jobs: int = option(1, "runs at a time", ge=1)
    minutes: float = option(0.0, "stop after these, to go on later (0: when all is done)", ge=0)
    runs: str = option("out/table1", "folder of the runs")
    out: str = option("out/table1/rows.jsonl", "rows are appended to this file")
    device: str = option("auto", "auto, cpu, cuda, mps")

    def __post_init__(self) -> None:
        validate(self)


@dataclass
class Job:
    """One run of one method: what train.py is told, and where it has got to."""

    method: str
    setting: str  # what differs from the preset: "c_thought=2", or ""
    seed: int
    folder: Path
    command: list[str]
    total: int  # steps, 0 where the rows of a file decide
    process: subprocess.Popen | None = field(default=None, repr=False)

    @property
    def done(self) -> Path:
        return self.folder / "table1.done"

    def step(self) -> int:
        """The step of the last whole line of its metrics."""
        try:
            with (self.folder / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
                lines = file.read().decode().splitlines()
        except OSError:
            return 0
        steps = [checkpoint.logged_step(line) for line in lines]
        return int(max((s for s in steps if s != float("inf")), default=0))


def pairs(text: str | None) -> dict[str, str]:
    """ "a=1,b=2" -> {"a": "1", "b": "2"}"""
    parts = [part.partition("=") for part in (text or "").split(",") if part]
    if bad := [key for key, sign, _ in parts if not sign]:
        raise UserError(f"--set {text}: {bad[0]!r} has no value.\nWrite key=value,key=value.")
    return {key.strip(): value for key, _, value in parts}


def jobs_of(config: Table1Config) -> list[Job]:
    """Every run that the table needs. UserError for a setting that train.py would refuse."""
    methods = [m for m in config.methods.split(",") if m]
    if not methods:
        raise UserError("--methods names none.\nGive some, with commas, or leave it out.")
    names = [Path(f).name for f in files_of(config)]
    if len(set(names)) < len(names) or not all(Path(f).is_file() for f in files_of(config)):
        raise UserError(
            f"--data {config.data}: files that are there, of different names, are wanted."
        )
    if unknown := [m for m in methods if m not in tuple(METHODS)]:
        raise UserError(
            f"--methods {unknown[0]!r} is not known.\nChoose of: {', '.join(tuple(METHODS))}."
        )
    file = f"{config.task}_small.py" if config.preset == "small" else f"{config.task}.py"
    path = ROOT / "config" / file
    if not path.is_file():
        raise UserError(
            f"there is no {config.preset} preset for {config.task} (config/{file}).\n"
            "Choose another --preset or --task."
        )
    if not (TASKS[config.task].splits or names):
        raise UserError(f"{config.task} has no generated rows.\nGive --data FILE to evaluate on.")
    fixed = pairs(config.set) | {"device": config.device}
    if config.preset == "gpt2":
        fixed["fallback"] = "None"
    key, _, values = (config.sweep or "").partition("=")
    if ours := {key, *pairs(config.set)} & {"method", "seed", "device", "out_dir", "resume"}:
        raise UserError(
            f"--sweep and --set leave {min(ours)!r} to this script.\nSee --methods, --seeds, "
            "--device and --runs."
        )
    swept = [f"{key}={value}" for value in values.split(",")] if config.sweep else [""]
    if config.sweep and not (key and all(values.split(","))):
        raise UserError(f"--sweep {config.sweep} has no values.\nWrite c_thought=0,1,2.")
    jobs = []
    for seed in range(config.seeds):
        for method in methods:
            for one in swept:
                setting = ",".join(filter(None, (config.set, one)))
                name = "_".join(filter(None, (method, setting, f"s{seed}"))).replace("/", "-")
                folder = Path(config.runs) / f"{config.task}_{config.preset}" / name
                told = fixed | pairs(one) | {"method": method, "seed": str(seed)}
                flags = [f"--{k}={v}" for k, v in told.items()]
                given, _ = parse_cli(TrainConfig, flags, "")
                resolved = make_config(TrainConfig, read_config_file(path, TrainConfig), given)
                steps = math.ceil(resolved.train_examples / resolved.batch_size)
                jobs.append(
                    Job(
                        method,
                        setting,
                        seed,
                        folder,
                        [sys.executable, str(ROOT / "train.py"), str(path), *flags],
                        0
                        if resolved.data or TASKS[config.task].load_split
                        else resolved.epochs * steps,
                    )
                )
    return jobs


def files_of(config: Table1Config) -> list[str]:
    """Files of rows to evaluate on."""
    return [f for f in (config.data or "").split(",") if f]


def start(job: Job) -> None:
    job.folder.mkdir(parents=True, exist_ok=True)
    resume = ["--resume"] if checkpoint.list_checkpoints(job.folder) else []
    with (job.folder / "train.log").open("a") as log:
        command = [*job.command, f"--out_dir={job.folder}", *resume]
        # a session of its own: Ctrl-C is for us, who then ask it to save and end
        job.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def evaluate(job: Job, config: Table1Config) -> None:
    """One row for each split that has none yet."""
    have = {
        (r["table1"]["task"], r["table1"]["preset"], r["method"], r["table1"]["setting"],
         r["trained"]["seed"], r["data"]): r["rows"]
        for r in read_jsonl(Path(config.out))
    }  # fmt: skip
    for split in [*TASKS[config.task].splits, *files_of(config)]:
        kind = (config.task, config.preset, job.method, job.setting, job.seed, Path(split).name)
        if kind in have:
            if split in TASKS[config.task].splits and have[kind] != config.n:
                raise UserError(
                    f"{config.out} has {job.folder.name} on {split} by {have[kind]} rows, now --n "
                    f"{config.n} is asked for.\nGive another --out: cells of one table are of as "
                    "many rows."
                )
            continue
        command = [sys.executable, str(ROOT / "bench/accuracy.py"), f"--checkpoint={job.folder}"]
        command += [f"--data={split}", f"--n={config.n}", f"--device={config.device}"]
        # one limit for all cells, whatever a run's own: some written chains never end
        command.append("--max_new_tokens=128")
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise UserError(
                f"{job.folder.name} could not be evaluated on {split}: {run.stderr.strip()[-300:]}"
            )
        row = json.loads(run.stdout.splitlines()[-1])
        place = {"task": config.task, "preset": config.preset, "setting": job.setting}
        checkpoint.append_row(Path(config.out), row | {"table1": place})
        console.print(f"{job.folder.name} on {row['data']}: {row['accuracy']:.1%}", markup=False)


def finish(job: Job, config: Table1Config) -> None:
    """After its process has ended: evaluated where it was trained to its end."""
    code = job.process.returncode
    if code:
        log = (job.folder / "train.log").read_text().strip().splitlines()
        raise UserError(
            f"{job.folder.name} ended with code {code}: {' '.join(log[-2:])}\n"
            f"The other runs are kept; see {job.folder}/train.log, then give the same command."
        )
    job.done.touch()
    evaluate(job, config)


def asked_to_stop(number: int, _: object) -> None:
    sys.exit(128 + number)  # through the finally that ends the runs


def main() -> None:
    signal.signal(signal.SIGTERM, asked_to_stop)
    given, _ = parse_cli(Table1Config, sys.argv[1:], __doc__.split("\n")[0])
    config = make_config(Table1Config, given)
    jobs = jobs_of(config)
    out = Path(config.out)
    read_jsonl(out)  # what cannot be read or written is said before the work
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.open("a").close()
    except OSError as e:
        raise UserError(f"--out {out} cannot be written: {e.strerror}.\nGive another.") from None
    until = time.monotonic() + 60 * config.minutes if config.minutes else math.inf

    waiting, running = [], []
    for job in jobs:
        if job.done.exists():
            evaluate(job, config)
        else:
            waiting.append(job)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps, left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    n_done = len(jobs) - len(waiting)
    whole = bar.add_task("table", total=sum(job.total for job in jobs) or None)
    lines: dict[str, int] = {}
    failed: list[str] = []
    try:
        with bar:
            while waiting or running:
                while waiting and len(running) < config.jobs:
                    job = waiting.pop(0)
                    start(job)
                    running.append(job)
                    lines[job.folder.name] = bar.add_task(job.folder.name, total=job.total or None)
                time.sleep(0.5)
                for job in list(running):
                    bar.update(lines[job.folder.name], completed=job.step())
                    if job.process.poll() is not None:
                        running.remove(job)
                        bar.remove_task(lines.pop(job.folder.name))
                        try:
                            finish(job, config)
                        except UserError as e:  # the others go on
                            console.print(f"error: {e}", markup=False)
                            reason = str(e).split(": ", 1)[-1].splitlines()[0]
                            if job.process.returncode == 2 and any(reason in f for f in failed):
                                console.print("the others are not tried: it would be the same")
                                waiting.clear()
                            failed.append(str(e))
                        n_done += 1
                steps = sum(job.total if job.done.exists() else job.step() for job in jobs)
                bar.update(whole, completed=steps, description=f"run {n_done + 1} of {len(jobs)}")
                if time.monotonic() > until:
                    break
    finally:
        for job in running:
            job.process.terminate()  # it saves, then ends
        for job in running:
            job.process.wait()

    rows = read_jsonl(out)
    table = table1(rows, config.task, config.preset)
    checkpoint.replace_text(out.with_name(f"table1_{config.task}_{config.preset}.md"), table + "\n")
    print(table)
    left = sum(not job.done.exists() for job in jobs)
    if left:
        print(f"{left} of {len(jobs)} runs are not done: give the same command to go on")
    summary = {"bench": "table1", "task": config.task, "preset": config.preset}
    print(json.dumps(summary | {"runs": len(jobs), "left": left, "rows": str(out)}))
    if failed:
        raise UserError(f"{len(failed)} runs failed, the first: {failed[0]}")


if __name__ == "__main__":
    run_main(main)
