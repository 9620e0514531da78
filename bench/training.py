"""Speed of a training step, where its time goes, and how the released code does on the same.

    python bench/training.py --config=config/prosqa_small.py --batch_size=64
    python bench/training.py --released CLONE --released_python VENV/bin/python

The step is train.py's in the final stage: no written steps, --latent thoughts in every row, one
forward pass. With --released, a clone of facebookresearch/coconut takes the same steps in a process
of its own: same weights, rows, dropout, AdamW and threads, float32, in turns, so that only one
computes at a time; an error if the two do not compute the same. Our time includes making the batch,
theirs does not, since their DataLoader makes it in another process. The last line is JSON.
"""

import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout works uninstalled too

import torch
from safetensors.torch import save_file
from worker import Worker, as_gpt2, commit_of

from nanococonut import checkpoint, coconut, ops
from nanococonut.build import build_model, build_optimizers
from nanococonut.config import TrainConfig, build, check_values, opt, parse_cli, read_config_file
from nanococonut.curriculum import IGNORE, Batch, collate, layout
from nanococonut.errors import UserError, main_guard
from nanococonut.loader import Epochs, curriculum_of, task_tokenizer

PARTS = ("collate", "prefix", "thoughts", "suffix", "backward", "optimizer")
SHAPE = ("n_layer", "n_head", "n_embd", "block_size")
SETTINGS = "tokenizer render length_pool smear dropout optimizer grad_clip seed".split()
WARMUP = 2  # steps before those that count
TOLERANCE = 1e-4  # between our loss and gradient and theirs, relative; rounding makes up to 2e-5
# train.py's keep_freed_memory, but for both sides: glibc reads these when a process starts
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(256 << 20),
}


@dataclass(frozen=True)
class StepConfig:
    config: str = opt("config/prosqa_small.py", "training config whose model and rows are used")
    batch_size: int = opt(32, "rows of a step", at_least=1)
    latent: int = opt(6, "thoughts of every row", at_least=0)
    repeats: int = opt(7, "steps measured", at_least=1)
    n_layer: int | None = opt(None, "layers, if not the config's")
    n_head: int | None = opt(None, "attention heads, if not the config's")
    n_embd: int | None = opt(None, "width, if not the config's")
    block_size: int | None = opt(None, "longest sequence, if not the config's")
    released: str | None = opt(None, "a clone of facebookresearch/coconut to compare with")
    released_python: str | None = opt(None, "a Python that has torch and transformers 4.46.2")
    device: str = opt("cpu", "where", choices=("cpu", "cuda"))
    dtype: str = opt("float32", "forward pass", choices=("float32", "bfloat16"))
    kernels: str = opt("auto", "as train.py's", choices=("auto", "triton", "torch"))
    out: str | None = opt(None, "append the JSON row to this file")

    def __post_init__(self) -> None:
        check_values(self)
        if (self.released is None) != (self.released_python is None):
            raise UserError(
                "--released and --released_python go together.\n"
                "Give a clone of facebookresearch/coconut and a Python that has what it needs."
            )
        if self.released and not (Path(self.released) / "coconut.py").is_file():
            raise UserError(
                f"--released {self.released} holds no coconut.py.\n"
                "Give a clone of facebookresearch/coconut."
            )
        if self.released and self.dtype != "float32":
            raise UserError("the comparison is in float32.\nLeave --dtype out with --released.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("there is no GPU that torch can use.\nTry --device=cpu.")


def recipe_of(bench: StepConfig) -> TrainConfig:
    """The training config with what is measured put in its place."""
    own: dict[str, Any] = {k: v for k in SHAPE if (v := getattr(bench, k)) is not None}
    if bench.released:  # what it has not
        own |= {"smear": False, "grad_clip": 0.0, "optimizer": "adamw"}
    own |= {"init_from": "scratch", "fallback": None}  # the weights make no difference to the time
    recipe = build(TrainConfig, read_config_file(bench.config, TrainConfig), own)
    pools = math.ceil((WARMUP + bench.repeats) / recipe.length_pool)
    return replace(
        recipe,
        method="coconut",
        final_thoughts=bench.latent,
        pad_latent_to_max=True,
        batch_size=bench.batch_size,
        data=None,
        fresh_rows=False,
        rows_per_epoch=pools * recipe.length_pool * bench.batch_size,  # as padded as in training
    )


def adamw(recipe: TrainConfig) -> dict[str, Any]:
    return {
        "lr": recipe.learning_rate,
        "betas": (recipe.beta1, recipe.beta2),
        "weight_decay": recipe.weight_decay,
    }


class Rows:
    """Batches of the final stage, as train.py gets them."""

    def __init__(self, bench: StepConfig, recipe: TrainConfig) -> None:
        self.tokenizer, self.curriculum = task_tokenizer(recipe, None), curriculum_of(recipe)
        self.stage, self.thoughts = recipe.max_latent_stage + 1, bench.latent
        epochs = Epochs(recipe, self.curriculum, self.tokenizer, None, [])
        rows, size = epochs(0), bench.batch_size
        epochs.close()
        self.batches = [rows[i * size :][:size] for i in range(WARMUP + bench.repeats)]
        self.layouts = [
            [layout(self.curriculum, self.stage, row, self.tokenizer) for row in batch]
            for batch in self.batches
        ]

    def collate(self, i: int) -> Batch:
        batch = self.batches[i]
        return collate(self.curriculum, [self.stage] * len(batch), batch, self.tokenizer)

    def padded_share(self) -> float:
        """Of all positions that are computed. With thoughts, the released code pads as many."""
        real = slots = 0
        for batch in self.layouts:
            prefixes, _, suffixes, _ = zip(*batch, strict=True)
            real += sum(map(len, prefixes)) + sum(map(len, suffixes)) + len(batch) * self.thoughts
            width = max(map(len, prefixes)) + self.thoughts + max(map(len, suffixes))
            slots += len(batch) * width
        return 1 - real / slots

    def as_released(self) -> list[dict[str, list]]:
        """The batches as plain sequences: token ids, labels, where the thoughts begin."""
        batches = []
        for batch in self.layouts:
            rows: dict[str, list] = {"ids": [], "labels": [], "first_thought": []}
            for prefix, n, suffix, skipped in batch:
                rows["ids"].append(prefix + [self.tokenizer.latent] * n + suffix)
                masked = len(prefix) + n + skipped
                rows["labels"].append([IGNORE] * masked + suffix[skipped:])
                rows["first_thought"].append(len(prefix) if n else 0)  # without: pad right only
            batches.append(rows)
        return batches


class Ours:
    """Our side: the step of train.py."""

    def __init__(self, bench: StepConfig, recipe: TrainConfig, rows: Rows) -> None:
        self.rows, self.grad_clip = rows, recipe.grad_clip
        self.device = torch.device(bench.device)
        half = bench.dtype == "bfloat16"
        self.autocast = torch.autocast(bench.device, torch.bfloat16) if half else nullcontext()
        torch.manual_seed(recipe.seed)
        self.model = build_model(recipe, rows.tokenizer).to(self.device)
        # every pass through the layers ends in ln_f: that tells the three blocks apart
        self.model.ln_f.register_forward_hook(lambda *_: self._lap())
        self.laps: list[Any] = []
        self.optimizers = build_optimizers(recipe, self.model)
        self.kernels, self.why_kernels = ops.choose_training(bench.kernels, self.model)

    def _lap(self) -> None:
        """The time now; on a GPU as an event in its queue, so that nobody waits for it."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.laps.append(event)
        else:
            self.laps.append(time.perf_counter())

    def check(self) -> dict[str, float]:
        """Loss and norm of the gradient on the first batch, without dropout."""
        self.model.eval()
        batch = self.rows.collate(0).to(self.device)
        thinking = coconut.think(self.model, batch, self.kernels)
        loss = coconut.loss(self.model, batch, thinking)[0] / batch.n_labels
        loss.backward()
        norms = torch.stack([p.grad.norm() for p in self.model.parameters()])
        self.model.zero_grad()
        self.model.train()
        return {"loss": loss.item(), "gradient": norms.norm().item()}

    def step(self, i: int) -> dict[str, float]:
        """One optimizer step on batch i -> the seconds of each part."""
        self.laps = []
        self._lap()
        batch = self.rows.collate(i).to(self.device)
        self._lap()
        with self.autocast:
            thinking = coconut.think(self.model, batch, self.kernels)  # a lap for each thought
            loss, right = coconut.loss(self.model, batch, thinking)
        loss = loss / batch.n_labels
        right.sum()
        self._lap()
        loss.backward()
        loss.item()
        self._lap()
        if self.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._lap()
        ends = [0, 1, 2, 2 + self.rows.thoughts, -3, -2, -1]  # of the parts, among the laps
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            took = [self.laps[a].elapsed_time(self.laps[b]) / 1000 for a, b in pairwise(ends)]
        else:
            took = [self.laps[b] - self.laps[a] for a, b in pairwise(ends)]
        return dict(zip(PARTS, took, strict=True))


def start_released(
    bench: StepConfig, recipe: TrainConfig, ours: Ours
) -> tuple[Worker, dict[str, Any]]:
    """Their model with our size and weights, checked to compute what ours does, and what it is."""
    with torch.no_grad():  # with initial weights, thoughts and positions hardly touch the loss
        for p in ours.model.parameters():
            p.add_(torch.randn_like(p) * recipe.n_embd**-0.5)
    gpt2, weights = as_gpt2(ours.model, recipe.dropout)
    special = {name: getattr(ours.rows.tokenizer, name) for name in ("eos", "bot", "eot", "latent")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(weights, path)
        task = {
            "clone": str(Path(bench.released).resolve()),
            "weights": str(path),
            "gpt2": gpt2,
            "special": special,
            "adamw": adamw(recipe),
            "batches": ours.rows.as_released(),
            "threads": torch.get_num_threads(),
            "device": bench.device,
        }
        flag, needs = "--released_python", "torch and transformers 4.46.2"
        worker = Worker("released_worker.py", bench.released_python, flag, needs)
        about = worker.ask(task)
    mine, theirs = ours.check(), worker.ask("check")
    for what in mine:
        if not abs(mine[what] - theirs[what]) <= TOLERANCE * abs(theirs[what]):
            raise UserError(
                f"the two do not compute the same: {what} {mine[what]:.6f} (ours), "
                f"{theirs[what]:.6f} (released).\nA comparison of their speed would mean nothing."
            )
    about |= {"commit": commit_of(bench.released)}
    about |= {what: {"ours": mine[what], "released": theirs[what]} for what in mine}
    return worker, about


def spread(values: Sequence[float], digits: int) -> dict[str, float]:
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in found.items()}


def shown(s: dict[str, float], digits: int = 1) -> str:
    return f"{s['median']:9,.{digits}f}  ({s['min']:,.{digits}f}..{s['max']:,.{digits}f})"


def main() -> None:
    given, path = parse_cli(StepConfig, sys.argv[1:], __doc__.split("\n")[0])
    bench = build(StepConfig, given, {"config": path} if path else {})  # parse_cli sets it apart
    recipe = recipe_of(bench)
    try:
        out = open(bench.out, "a") if bench.out else nullcontext()
    except OSError as e:
        raise UserError(f"--out {bench.out} cannot be written: {e.strerror}.") from None
    if sys.platform == "linux" and not MALLOC.items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, os.environ | MALLOC)
    load = os.getloadavg()[0]

    rows = Rows(bench, recipe)
    ours = Ours(bench, recipe, rows)
    print(f"kernels: {ours.kernels} ({ours.why_kernels})")
    released, about = start_released(bench, recipe, ours) if bench.released else (None, {})

    parts, theirs = [], []
    for i in range(WARMUP + bench.repeats):
        parts.append(ours.step(i))
        if released:
            theirs.append(released.ask(i)["seconds"])
    parts, theirs = parts[WARMUP:], theirs[WARMUP:]
    seconds = [sum(part.values()) for part in parts]

    row = {
        "bench": "training",
        "config": Path(bench.config).name,
        **{k: getattr(recipe, k) for k in (*SHAPE, *SETTINGS)},
        "vocab_size": rows.tokenizer.vocab_size,
        "parameters": ours.model.n_params(),
        **{k: v for k, v in asdict(bench).items() if k in ("batch_size", "latent", "repeats")},
        "dtype": bench.dtype,
        "kernels": ours.kernels,
        "rows_per_s": spread([bench.batch_size / s for s in seconds], 2),
        "step_ms": spread([s * 1000 for s in seconds], 3),
        "parts_ms": {name: spread([part[name] * 1000 for part in parts], 3) for name in PARTS},
        "padded_share": round(rows.padded_share(), 4),
        "released": None,
    }
    if released:
        row["released"] = about | {
            "rows_per_s": spread([bench.batch_size / s for s in theirs], 2),
            "step_ms": spread([s * 1000 for s in theirs], 3),
            "ours_times_faster": spread([b / a for a, b in zip(seconds, theirs, strict=True)], 3),
        }
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    row |= {
        "threads": torch.get_num_threads(),
        "load_at_start": round(load, 2),
        "device": bench.device,
        "hardware": torch.cuda.get_device_name() if bench.device == "cuda" else cpu,
        **checkpoint.provenance(),
    }
    report(row)
    line = json.dumps(row)
    with out as file:
        if file:
            file.write(line + "\n")
    print(line)


def report(row: dict[str, Any]) -> None:
    print(
        f"{row['config']}: {row['n_layer']} layers, width {row['n_embd']}, {row['parameters']:,} "
        f"parameters; {row['batch_size']} rows with {row['latent']} thoughts\n"
        f"{row['device']}, {row['threads']} threads, {row['dtype']}, load {row['load_at_start']} "
        f"at the start; median (min..max) of {row['repeats']} steps"
    )
    print(f"rows per second  {shown(row['rows_per_s'])}")
    print(f"ms per step      {shown(row['step_ms'], 2)}")
    for name, part in row["parts_ms"].items():
        share = part["median"] / row["step_ms"]["median"]
        print(f"  {name:<14} {shown(part, 2)}  {share:.1%}")
    print(f"padded tokens    {row['padded_share']:9.1%}")
    if theirs := row["released"]:
        versions = ", ".join(f"{k} {v}" for k, v in theirs["versions"].items())
        print(f"released code {theirs['commit'][:7]} ({versions}), in turns with ours")
        for what in ("loss", "gradient"):
            both = ", ".join(f"{side} {value:.6f}" for side, value in theirs[what].items())
            print(f"first {what:<10} {both}")
        print(f"rows per second  {shown(theirs['rows_per_s'])}")
        print(f"ms per step      {shown(theirs['step_ms'], 2)}")
        print(f"ours is faster   {shown(theirs['ours_times_faster'], 2)}  times, pair by pair")


if __name__ == "__main__":
    main_guard(main)
