"""Train a GPT-2 to reason in continuous thoughts, stage by stage.

    python train.py config/prosqa.py                 the paper's recipe
    python train.py config/prosqa_small.py --seed=1  any setting of the config file, by name
    torchrun --nproc_per_node=8 train.py config/prosqa.py   the same batch on eight GPUs

The loop is in view below: rows -> three blocks -> loss -> AdamW -> next stage -> validation.
Schedules count steps and rows, never time, so a run can be repeated and resumed bit for bit (CPU).
"""

import json
import math
import os
import signal
import sys
import time
from collections import deque
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from nanococonut import coconut, ops
from nanococonut.batch import collate, count_labels
from nanococonut.config import TrainConfig
from nanococonut.curriculum import METHODS, Curriculum, ignored_options, schedule
from nanococonut.data.files import skipped_summary
from nanococonut.data.seeds import STAGE_STREAM
from nanococonut.data.tasks import TASKS, load_data
from nanococonut.evaluation.accuracy import score
from nanococonut.inference.engine import Engine
from nanococonut.runtime import device
from nanococonut.runtime.cli import format_config, make_config, parse_cli, read_config_file
from nanococonut.runtime.distributed import Distributed, run_distributed
from nanococonut.runtime.errors import UserError
from nanococonut.runtime.graphs import GraphCache
from nanococonut.training.loader import TrainLoader
from nanococonut.training.setup import init_model, init_optimizers, init_tokenizer
from nanococonut.training.step import MicroBatch, TrainStep
from nanococonut.weights import checkpoint
from nanococonut.weights.pretrained import GPT2_SIZES, WeightsUnavailable, resolve_weights

console = Console(highlight=False, soft_wrap=True)
ADVANCE_ROWS = 1280  # recent rows that advance_at looks at


def settings(argv: list[str]) -> tuple[TrainConfig, str, dict]:
    """Command line -> (resolved config, the run's name, why a fallback was taken if it was)."""
    given, path = parse_cli(TrainConfig, argv, __doc__.split("\n")[0], config_file=True)
    config = make_config(TrainConfig, read_config_file(path, TrainConfig) if path else {}, given)
    fell_back, why = {}, None
    no_gpu = not torch.cuda.is_available() and config.device in ("auto", "cpu")
    if config.init_from in GPT2_SIZES and no_gpu and config.fallback:
        why = f"no GPU to train {config.init_from!r} on"  # nothing is downloaded in vain
    elif config.init_from != "scratch":
        try:
            resolve_weights(config.init_from)
        except WeightsUnavailable as e:
            if not config.fallback:
                raise
            why = str(e).split("\n")[0].rstrip(".")
    if why:
        to = str(Path(path or ".").parent / config.fallback)
        console.print(f"[bold red]NOT TRAINING {path}[/]: {escape(why)}.")
        console.print(f"[bold red]TRAINING {to} INSTEAD[/]. To insist: --fallback=None")
        fell_back = {"instead_of": path, "because": why}
        given = {k: v for k, v in given.items() if k not in ("init_from", "fallback")}
        config, path = make_config(TrainConfig, read_config_file(to, TrainConfig), given), to
    # a config file may be for several methods; what is typed is meant to do something
    if idle := [f"--{key}" for key in given if key in ignored_options(METHODS[config.method])]:
        console.print(f"[bold red]NOT USED[/] by method {config.method}: {', '.join(idle)}")
    return config, Path(path).stem if path else "run", fell_back


def main() -> None:
    config, name, fell_back = settings(sys.argv[1:])
    out = Path(config.out_dir or f"out/{name}")

    # -- where it runs
    device.keep_freed_memory()
    ranks = Distributed.from_env()  # one, or those that torchrun started; rank 0 writes
    where = ranks.device(config.device)
    half = config.dtype == "bfloat16" or (
        config.dtype == "auto" and where.type == "cuda" and torch.cuda.is_bf16_supported()
    )
    autocast = torch.autocast(where.type, torch.bfloat16) if half else nullcontext()
    torch.set_float32_matmul_precision("high" if config.dtype == "tf32" else "highest")

    # -- an earlier run is gone on with, or left alone
    if (out / checkpoint.MANIFEST).is_file():
        raise UserError(f"--out_dir {out} is a checkpoint, not a run.\nGive the folder it is in.")
    earlier = checkpoint.list_checkpoints(out)
    if earlier and not config.resume:
        raise UserError(
            f"{out} already holds a run (saved at step {int(earlier[-1].name[5:])}).\n"
            "Go on with it by --resume, or choose another --out_dir."
        )
    manifest = None
    if config.resume:
        folder = checkpoint.resolve(out)
        manifest = checkpoint.verify(folder, resume=True)
        begun = asdict(
            make_config(TrainConfig, manifest["config"])
        )  # what came later has its default
        checkpoint.check_resumable(manifest | {"config": begun}, asdict(config), out)

    # -- tokenizer, rows, model, optimizer
    skipped: list[str] | None = [] if config.skip_bad_rows else None
    # a branch may have moved since the run began: its rows are those of the commit it began with
    begun_at = (manifest or {}).get("hub_commit") or config.hub_revision
    data = load_data(replace(config, hub_revision=begun_at), skipped)
    given, splits, hub_commit = data.train, data.val, data.commit
    tokenizer = init_tokenizer(config, given)
    curriculum = Curriculum.from_config(config)
    held_out = [row for rows in splits.values() for row in rows]
    epochs = TrainLoader(config, curriculum, tokenizer, given, held_out, skipped)
    # what does not fit is refused now, not at the first validation
    splits = {name: epochs.drop_too_long(rows) for name, rows in splits.items()}
    if skipped:
        n_rows = epochs.n_rows + sum(map(len, splits.values()))
        console.print(f"  {escape(skipped_summary(n_rows, skipped))}")
    if hub_commit:
        console.print(f"  rows of the hub's commit {hub_commit}", markup=False)
    if config.data and not config.valid_data:
        console.print(f"  {len(held_out)} rows of {escape(config.data)} are held out to validate")
    torch.manual_seed(config.seed)
    model = init_model(config, tokenizer).to(where)
    if manifest:
        checkpoint.load_weights(model, folder)
    kernels, why_kernels = ops.choose_training_backend(config.kernels, model)
    graph = ops.choose_graph("off" if config.ungraphed else config.graph, model)
    optimizers = init_optimizers(config, model)
    think = partial(coconut.think, kernels=kernels)

    # -- the schedule, in steps
    stages = schedule(curriculum, config.epochs, config.epochs_per_stage, config.first_stage_epochs)
    steps_per_epoch = math.ceil(epochs.n_rows / config.batch_size)
    total = config.epochs * steps_per_epoch
    until = min(total, config.max_steps or total)

    # -- where we are; everything that a resumed run needs beside weights and moments
    at = {"step": 0, "stage": 0, "stage_start": 0, "recent": [], "table": [], "best": -1.0}
    at |= {"seconds": 0.0, "trained": stages[0].index}  # the stage of the last step taken
    if manifest:
        checkpoint.load_optimizers(optimizers, folder)
        at |= manifest["progress"]
        console.print(f"going on with {out} at step {at['step']} of {total}", markup=False)
    # only now: what was refused leaves no folder
    history = out / "metrics.jsonl"
    try:
        if ranks.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            history.open("a").close()
    except OSError as e:
        raise UserError(
            f"--out_dir {out} cannot be written: {e.strerror}.\nChoose another --out_dir."
        ) from None
    # what a killed run logged after its last save will be logged again
    if ranks.rank == 0:
        whole = [line for line in history.read_text().splitlines(True) if line.endswith("\n")]
        kept = [line for line in whole if checkpoint.logged_step(line) <= at["step"]]
        if whole and not manifest:  # a run that ended before its first save, or somebody's file
            history.replace(out / "metrics.before.jsonl")
        checkpoint.replace_text(history, "".join(kept) if manifest else "")
    metrics = open(os.devnull if ranks.rank else history, "a")
    recent = deque(map(tuple, at["recent"]))  # (rows all right, rows) of the last batches
    best_step = manifest.get("best_step", -1) if manifest else -1

    def save() -> None:
        if any(
            ranks.all_reduce_sum([not all(torch.isfinite(p).all() for p in model.parameters())])
        ):
            diverged("weights")
        at["recent"] = list(recent)
        if ranks.rank:
            return
        checkpoint.save(
            out,
            at["step"],
            model,
            optimizers,
            {
                "config": asdict(config),
                "model": checkpoint.describe_model(model),
                "tokenizer": tokenizer.spec,
                "method": config.method,
                "stage": at["trained"],
                "n_thoughts": curriculum.n_thoughts(at["trained"]),
                "best_step": best_step,
                "hub_commit": hub_commit,
                "fell_back": fell_back,
                "minutes": at["seconds"] / 60,
                "device": str(where),
                "kernels": kernels,
                "graph": graph,
                "threads": torch.get_num_threads(),
                "processes": ranks.world,
                "progress": at,
            },
        )

    def diverged(what: str) -> None:
        kept = checkpoint.list_checkpoints(out)
        saved = f"the checkpoint of step {int(kept[-1].name[5:])} is kept" if kept else "none saved"
        raise UserError(
            f"the {what} became infinite or NaN at step {at['step']}; {saved}.\n"
            "Try a lower --learning_rate, --grad_clip=1 or more --warmup_steps, in a new --out_dir."
        )

    def log(row: dict) -> None:
        try:
            metrics.write(json.dumps({"step": at["step"], **row}) + "\n")
            metrics.flush()
        except OSError as e:
            raise UserError(
                f"{history} cannot be written at step {at['step']}: {e.strerror}.\n"
                "Make room, then go on from the last checkpoint with --resume."
            ) from None

    def validate(stage: int) -> dict:
        n, row = curriculum.n_thoughts(stage), {"stage": stage}
        with autocast:
            engine = Engine(model, tokenizer, curriculum, kernels="torch", graph="off")
            for split, rows in splits.items():
                right, tokens = 0, 0
                if mine := ranks.shard(rows):
                    shown = TASKS[config.task].render(mine, config.render)
                    s = score(engine, shown, n, max_new_tokens=config.max_new_tokens)
                    right, tokens = sum(s.right), round(s.generated_tokens * s.rows)
                right, tokens = ranks.all_reduce_sum([right, tokens])
                row |= {f"{split}_accuracy": right / len(rows)}
                row |= {f"{split}_tokens": tokens / len(rows)}
        return row | {"thoughts": n, "minutes": (at["seconds"] + time.time() - began) / 60}

    stop = []  # the signal that asked for an end; honoured between two steps

    def asked_to_stop(number: int, _: object) -> None:
        if stop and ranks.world == 1:  # for the second time: at once, what is saved is saved
            sys.exit(128 + number)
        stop.append(number)  # torchrun adds its own to the terminal's, and waits half a minute
        if len(stop) == 1:
            once_more = "" if ranks.world > 1 else "; once more: at once"
            print(f"stopping after this step{once_more}", flush=True)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, asked_to_stop)

    console.print(format_config(config), markup=False)
    console.print(
        f"  {model.n_params():,} parameters on {where}, {epochs.n_rows:,} rows an epoch, "
        f"{total:,} steps, run kept in {out}\n  kernels: {kernels} ({why_kernels}), "
        f"CUDA graphs {'on' if graph else 'off'}",
        markup=False,
    )

    # -- the loop
    bar = Progress(
        TextColumn("stage {task.fields[stage]}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("loss {task.fields[loss]:.3f} right {task.fields[right]:.3f}"),
        TextColumn("{task.fields[speed]:.0f} rows/s, left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    task = bar.add_task(
        "", total=until, completed=at["step"], stage=0, loss=0.0, right=0.0, speed=0.0
    )
    began, seen, ending, ahead = time.time(), 0, 0, None
    epoch_rows: tuple[int, list] = (-1, [])
    stepper = TrainStep(model, think, half, GraphCache(64) if graph else None)

    def prepared(step: int, stage: int) -> tuple[list[MicroBatch], int, int]:
        """A step's rows, each at its own stage, and this process's micro-batches of them: like
        lengths together, so that little is padding. -> these, labels and rows of the whole step"""
        nonlocal epoch_rows
        epoch, index = divmod(step, steps_per_epoch)
        if epoch_rows[0] != epoch:
            epoch_rows = epoch, epochs(epoch)
        mine = epoch_rows[1][index * config.batch_size :][: config.batch_size]
        rng = np.random.default_rng((config.seed, STAGE_STREAM, step))
        drawn = curriculum.sample_stages(stage, [len(row.steps) for row in mine], rng)
        labels = count_labels(curriculum, drawn, mine, tokenizer)
        pairs = sorted(zip(drawn, mine, strict=True), key=lambda p: len(p[1].question))
        pairs, size = ranks.shard(pairs), config.micro_batch_size
        batches = []
        for i in range(0, len(pairs), size):
            its_stages, its_rows = zip(*pairs[i : i + size], strict=True)
            batch = collate(curriculum, its_stages, its_rows, tokenizer)
            counts = [s == stage for s in its_stages]
            batches.append(stepper.prepare(batch, counts, curriculum.n_thoughts(stage)))
        return batches, labels, len(mine)

    model.train()
    with bar:
        while at["step"] < until and not ending:
            stage = stages[at["stage"]].index
            if config.reset_optimizer == "epoch" and at["step"] % steps_per_epoch == 0:
                optimizers = init_optimizers(config, model)
            if ahead is None or ahead[0] != (at["step"], stage):
                ahead = (at["step"], stage), prepared(at["step"], stage)
            batches, labels, n_rows = ahead[1]

            rate_share = min(
                1.0,
                (at["step"] + 1) / max(1, config.warmup_steps),
                (total - at["step"]) / max(1, total * config.decay_fraction),
            )
            rates = (config.learning_rate, config.muon_learning_rate)
            for optimizer, rate in zip(optimizers, rates, strict=False):
                for group in optimizer.param_groups:
                    group["lr"] = rate * rate_share
            # dropout; no state to keep
            torch.manual_seed(ranks.seed(config.seed * 1_000_003 + at["step"]))
            stepper.zero_grad()
            for batch in batches:
                stepper(batch, labels, n_rows)
            counts = None
            if ranks.world > 1:
                counts = ranks.all_reduce_gradients(
                    model.parameters(), [*stepper.totals.tolist(), len(stop)]
                )
            if config.grad_clip:
                torch.nn.utils.clip_grad_norm_(
                    [p for name, p in model.named_parameters() if not name.startswith("stop.")],
                    config.grad_clip,
                )  # the stop classifier watches: with it or without, the model is the same
            for optimizer in optimizers:
                optimizer.step()
            if where.type == "cuda" and at["step"] + 1 < until:  # while it computes
                ahead = (at["step"] + 1, stage), prepared(at["step"] + 1, stage)
            # here the host waits for the device, once a step
            loss, right, counted, ending = counts or [*stepper.totals.tolist(), len(stop)]
            if not math.isfinite(loss):
                diverged("loss")
            at["step"] += 1
            at["trained"] = stage
            seen += n_rows

            recent.append((right, counted))
            while len(recent) > 1 and sum(n for _, n in recent) - recent[0][1] >= ADVANCE_ROWS:
                recent.popleft()
            share = sum(r for r, _ in recent) / max(1, sum(n for _, n in recent))
            speed = seen / (time.time() - began)
            log({"stage": stage, "loss": loss, "right": share, "rows_per_s": round(speed, 1)})
            bar.update(task, completed=at["step"], stage=stage, loss=loss, right=share, speed=speed)
            if not console.is_terminal and at["step"] % 100 == 0:
                left = (until - at["step"]) * (time.time() - began) / seen * config.batch_size / 60
                console.print(
                    f"step {at['step']}/{until} stage {stage} loss {loss:.3f} right {share:.3f} "
                    f"{speed:.0f} rows/s, {left:.1f} min left"
                )

            # is this stage at its end? by its epochs, or because it is learnt
            last = at["stage"] == len(stages) - 1
            used = at["step"] - at["stage_start"]
            over = used >= stages[at["stage"]].epochs * steps_per_epoch
            enough = sum(n for _, n in recent) >= ADVANCE_ROWS
            learnt = config.advance_at > 0 and enough and share >= config.advance_at
            ended = at["step"] == total or (not last and (over or learnt))
            due = last and config.eval_interval and used % config.eval_interval == 0
            by_epoch = curriculum.rules.advance_by == "epochs" and not last  # too many to validate
            if (ended and not by_epoch) or due:
                row = validate(stage)
                log(row)
                accuracy = row["valid_accuracy"]
                if last and accuracy > at["best"]:
                    at["best"], best_step = accuracy, at["step"]
                if ended:
                    at["table"].append(row)
                console.print(
                    f"step {at['step']} stage {stage}: "
                    + " ".join(f"{s} {row[f'{s}_accuracy']:.3f}" for s in splits)
                )
            if ended and not last:
                at["stage"] += 1
                at["stage_start"] = at["step"]
                recent.clear()
                if config.reset_optimizer == "stage":
                    optimizers = init_optimizers(config, model)
            if at["step"] % config.save_interval == 0 or best_step == at["step"]:
                at["seconds"] += time.time() - began
                began, seen = time.time(), 0
                save()

    at["seconds"] += time.time() - began
    save()
    epochs.close()
    if ending:
        print(f"stopped at step {at['step']}, saved in {out}; go on with --resume")
        sys.exit(128 + (stop[0] if stop else signal.SIGTERM))

    # -- how it went
    table = Table(title=f"{name}: {config.method}, {at['step']} of {total} steps")
    for heading in ("stage", "thoughts", *splits, "generated tokens", "minutes"):
        table.add_column(heading, justify="right")
    for row in at["table"]:
        accuracies = [f"{row[f'{split}_accuracy']:.1%}" for split in splits]
        tokens = f"{row['valid_tokens']:.1f}"
        minutes = f"{row['minutes']:.1f}"
        table.add_row(str(row["stage"]), str(row["thoughts"]), *accuracies, tokens, minutes)
    if at["table"]:
        console.print(table)
    else:
        console.print(f"no stage has ended in {at['step']} of {total} steps: none is validated yet")
    with suppress(UserError):  # rows of one's own have no such heuristics
        task = TASKS[config.task]
        baselines = {split: task.shortcuts(rows) for split, rows in splits.items()}
        for rule in baselines["valid"]:
            shares = [f"{scores[rule]:.1%} {split}" for split, scores in baselines.items()]
            console.print(f"  no model, {rule}: {', '.join(shares)}")
    thoughts = curriculum.n_thoughts(at["trained"])
    print(f"ask it: python sample.py --out_dir {out} --latent {thoughts}")


if __name__ == "__main__":
    run_distributed(main)
