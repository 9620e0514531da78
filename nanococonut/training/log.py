"""Logging of a run: metrics.jsonl, the console and TensorBoard.

Every rank may call these functions; only rank 0 writes and prints.
"""

import itertools
import json
import time
from collections import Counter, deque
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from nanococonut.data.examples import Example
from nanococonut.data.tasks import TASKS, Data
from nanococonut.model import GPT
from nanococonut.runtime.cli import format_config
from nanococonut.runtime.errors import UserError
from nanococonut.training.loader import TrainLoader
from nanococonut.training.state import Schedule, TrainState
from nanococonut.weights.checkpoint import RunDir, list_checkpoints

# without a terminal, print a line every PRINT_INTERVAL steps, or after FIRST_LINE seconds and then
# every LATER_LINES seconds if the steps are slow
PRINT_INTERVAL, FIRST_LINE, LATER_LINES = 100, 5, 30
COLLAPSED = 0.999  # cosine similarity of the thoughts of different questions
console = Console(highlight=False, soft_wrap=True)


class RunLog:
    """The log of every step and validation. As a context manager, it shows a progress bar."""

    def __init__(self, run: RunDir, schedule: Schedule, state: TrainState) -> None:
        self.run, self.config, self.schedule = run, schedule.config, schedule
        self._metrics = run.open_metrics(state.step)
        self._writer = None
        if self.config.tensorboard and run.dist.is_master:
            from torch.utils.tensorboard import SummaryWriter  # optional, and slow to import

            # hide the events of later steps, which a resumed run logs again
            self._writer = SummaryWriter(run.path / "tensorboard", purge_step=state.step + 1)
        self._recent: deque[tuple[float, int]] = deque(maxlen=PRINT_INTERVAL)  # seconds, examples
        self._last_step = time.monotonic()
        self._next_line = self._last_step + FIRST_LINE
        columns = BarColumn(), TextColumn("{task.description}")
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=schedule.max_steps, completed=state.step)

    def __enter__(self) -> "RunLog":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        with suppress(OSError):  # the failed write has already reported a full disk
            self._metrics.close()
        if self._writer:
            self._writer.close()

    def header(self, model: GPT, n_examples: int, backend: str, use_graphs: bool) -> None:
        """Print the settings that differ from their defaults, the model and the backend."""
        console.print(
            f"{format_config(self.config, self.config.unused)}\n"
            f"  {model.n_params():,} parameters on {model.wte.weight.device}, "
            f"{n_examples:,} examples per epoch, {self.schedule.total_steps:,} steps, "
            f"run saved in {self.run.path}\n"
            f"  kernels: {backend}, CUDA graphs {'on' if use_graphs else 'off'}",
            markup=False,
        )

    def step(self, state: TrainState, loss: float, n_examples: int) -> None:
        """Log the last step."""
        now = time.monotonic()
        self._recent.append((now - self._last_step, n_examples))
        self._last_step = now
        seconds, examples = map(sum, zip(*self._recent, strict=True))
        speed = examples / max(seconds, 1e-9)
        values = {
            "stage": state.stage,
            "loss": loss,
            "accuracy": state.accuracy,
            "lr": self.config.learning_rate * self.schedule.lr_scale(state.step - 1),
            "examples_per_s": round(speed, 1),
        }
        self._write(state.step, "train", values)
        n_left = (self.schedule.max_steps - state.step) * self.config.batch_size
        line = (
            f"step {state.step}/{self.schedule.max_steps} stage {state.stage} loss {loss:.3f} "
            f"accuracy {state.accuracy:.2f} {speed:.0f} examples/s, "
            f"{n_left / speed / 60:.1f} min left"
        )
        self._bar.update(self._task, completed=state.step, description=line)
        is_due = state.step % PRINT_INTERVAL == 0 or now >= self._next_line
        if is_due and not console.is_terminal:
            self._next_line = now + LATER_LINES
            console.print(line)

    def validation(self, state: TrainState, validation: dict[str, Any]) -> None:
        """Log the accuracy of every split."""
        self._write(state.step, "validation", validation)
        scores = [
            f"{name.removesuffix('_accuracy')} {score:.3f}"
            for name, score in validation.items()
            if name.endswith("_accuracy")
        ]
        console.print(f"step {state.step} stage {state.stage} validation: {' '.join(scores)}")
        if min(validation.get("thought_similarity", [0])) > COLLAPSED:
            console.print(
                "[bold red]THE THOUGHTS COLLAPSED[/]: they are the same for every question. "
                "Try a lower learning rate, --grad_clip=1, or more epochs for the early stages."
            )

    def _write(self, step: int, group: str, values: dict[str, Any]) -> None:
        """Write the values to metrics.jsonl, and the numbers among them to TensorBoard."""
        if self._writer:
            for name, value in values.items():
                if not isinstance(value, list):
                    self._writer.add_scalar(f"{group}/{name}", value, step)
        try:
            self._metrics.write(json.dumps({"step": step, **values}) + "\n")
            self._metrics.flush()  # so that a killed run loses no line
        except OSError as e:
            saved = list_checkpoints(self.run.path)
            advice = "continue from the last checkpoint with --resume" if saved else "train again"
            raise UserError(
                f"{self.run.metrics_path} cannot be written at step {step}: {e.strerror}.\n"
                f"Free some space, then {advice}."
            ) from None


def print_data(loader: TrainLoader, data: Data) -> None:
    """Print facts about the data that are not in the config, such as repeated questions."""
    config = loader.config
    n_val = sum(map(len, loader.val_splits.values()))
    if data.skipped:
        n_all = loader.n_examples + n_val + len(data.skipped)
        summary = f"{len(data.skipped)} of {n_all} examples skipped, the first: {data.skipped[0]}"
        console.print(f"  {summary}", markup=False)
    if data.commit:
        console.print(f"  examples from the hub at commit {data.commit}", markup=False)
    if config.data and not config.valid_data:
        console.print(f"  {n_val} examples of {config.data} held out for validation", markup=False)
    unknown: set[str] = set()
    for example in itertools.chain(*loader.val_splits.values()):
        question = loader.task.render_question(example["question"], config.render)
        unknown.update(loader.tokenizer.unknown_words(question))
    if unknown:
        some = escape(", ".join(sorted(unknown)[:8]))
        console.print(
            f"  [bold]UNKNOWN WORDS[/]: {len(unknown):,} in validation questions are in no "
            f"training example ({some}), and are split into bytes. --tokenizer=gpt2 avoids that."
        )
    train = Counter(" ".join(example["question"].split()) for example in data.train or ())
    n_repeated = train.total() - len(train)
    held_out = [example["question"] for split in data.val.values() for example in split]
    n_overlap = sum(" ".join(question.split()) in train for question in held_out)
    if n_repeated or n_overlap:
        console.print(
            f"  [bold]REPEATED QUESTIONS[/]: {n_repeated:,} of {train.total():,} in training; "
            f"{n_overlap:,} of {len(held_out):,} for validation are also in training"
        )


def print_summary(
    name: str, schedule: Schedule, state: TrainState, splits: dict[str, list[Example]]
) -> None:
    """Print a table of the finished stages, and the accuracy of shortcut rules without a model.

    splits: name -> validation examples
    """
    steps = f"{state.step} of {schedule.total_steps} steps"
    if state.validations:
        keys = [key for key in state.validations[0] if key.endswith("_accuracy")]
        names = [key.removesuffix("_accuracy") for key in keys]
        table = Table(title=f"{name}: {schedule.config.method}, {steps}")
        for heading in ("stage", "thoughts", *names, "generated tokens", "minutes"):
            table.add_column(heading, justify="right")
        for v in state.validations:
            rest = [f"{v['valid_tokens']:.1f}", f"{v['minutes']:.1f}"]
            accuracies = [f"{v[key]:.1%}" for key in keys]
            table.add_row(str(v["stage"]), str(v["thoughts"]), *accuracies, *rest)
        console.print(table)
    else:
        console.print(f"no stage was finished in {steps}, so there is no validation yet")
    if state.step < schedule.total_steps:  # max_steps is saved, so --resume alone would stop again
        console.print(f"  ended by max_steps={state.step}: to go on, --resume with --max_steps=0")
    with suppress(UserError):  # a user's own data may not support these rules
        shortcuts = TASKS[schedule.config.task].shortcuts
        baselines = {split: shortcuts(examples) for split, examples in splits.items()}
        for rule in next(iter(baselines.values())):
            accuracies = [f"{scores[rule]:.1%} {split}" for split, scores in baselines.items()]
            console.print(f"  no model, {rule}: {', '.join(accuracies)}")
