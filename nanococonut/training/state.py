"""Where a run is, and what the schedule makes of it.

A schedule counts steps and examples, never time, so a run can be repeated and resumed bit for bit.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch.optim import Optimizer

from nanococonut.config import TrainConfig
from nanococonut.curriculum import Curriculum, schedule
from nanococonut.runtime.errors import UserError

ACCURACY_WINDOW = 1280  # examples in the training accuracy that advance_at is compared with


@dataclass
class TrainState:
    """Everything a resumed run needs in addition to weights and moments. JSON can hold it.

    step           optimizer steps taken
    stage          of the last step taken
    stage_index    position in Schedule.stages: the entry that the next step belongs to
    stage_start    the step at which that entry began
    window         (correct, counted) of the last steps, about ACCURACY_WINDOW examples
    validations    one for each stage that ended
    best_step      with the best validation accuracy in the final stage, -1 before any
    seconds        spent in the loop
    """

    step: int = 0
    stage: int = 0
    stage_index: int = 0
    stage_start: int = 0
    window: list[tuple[float, float]] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)
    best_accuracy: float = -1.0
    best_step: int = -1
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._measured_at = time.monotonic()  # not a field: a resumed run has another clock

    @classmethod
    def from_saved(cls, saved: dict[str, Any]) -> "TrainState":
        """Return the state with these fields.

        Raise TypeError, KeyError or ValueError if one is not as we save it.
        """
        state = cls(**saved)
        integers = {"step", "stage", "stage_index", "stage_start", "best_step"}
        if any(type(saved[name]) is not int for name in integers & saved.keys()):
            raise ValueError("a step or stage is no whole number")
        if not 0 <= state.stage_start <= state.step or state.stage_index < 0:
            raise ValueError("its steps or stages are out of order")
        numbers = [state.best_accuracy, state.seconds]
        numbers += [x for correct, counted in state.window for x in (correct, counted)]
        shown = {"stage", "thoughts", "valid_accuracy", "valid_tokens", "minutes"}
        for validation in state.validations:
            shown |= {key for key in validation if key.endswith("_accuracy")}
            numbers += [validation[key] for key in shown]
        if any(type(x) not in (int, float) for x in numbers):
            raise ValueError("accuracy, window or validations hold more than numbers")
        return state

    @property
    def n_counted(self) -> float:
        return sum(counted for _, counted in self.window)

    @property
    def accuracy(self) -> float:
        """Return the fraction of recent examples with every label correct (teacher-forced)."""
        return sum(correct for correct, _ in self.window) / max(1, self.n_counted)

    @property
    def is_best(self) -> bool:
        return self.step == self.best_step

    def advance(self, stage: int, n_correct: float, n_counted: float) -> None:
        """Count one optimizer step."""
        self.step, self.stage = self.step + 1, stage
        self.window.append((n_correct, n_counted))
        # drop the oldest step if the window is full without it
        while len(self.window) > 1 and self.n_counted - self.window[0][1] >= ACCURACY_WINDOW:
            self.window.pop(0)
        self.measure_time()

    def measure_time(self) -> None:
        now = time.monotonic()
        self.seconds, self._measured_at = self.seconds + now - self._measured_at, now

    def record(
        self, scores: dict[str, Any], n_thoughts: int, is_last_stage: bool, stage_done: bool
    ) -> dict[str, Any]:
        """Return a validation's log line; keep it in the table of stages if the stage is done."""
        self.measure_time()
        validation = {"stage": self.stage, "thoughts": n_thoughts, **scores}
        validation["minutes"] = self.seconds / 60
        # earlier stages answer with fewer thoughts, so they do not compete for the best
        if is_last_stage and scores["valid_accuracy"] > self.best_accuracy:
            self.best_accuracy, self.best_step = scores["valid_accuracy"], self.step
        if stage_done:
            self.validations.append(validation)
        return validation

    def manifest(self) -> dict[str, Any]:
        """Return what the manifest of a checkpoint says of the state."""
        return {
            "stage": self.stage,
            "best_step": self.best_step,
            "minutes": self.seconds / 60,
            "progress": asdict(self),
        }

    def next_stage(self) -> None:
        self.stage_index, self.stage_start = self.stage_index + 1, self.step
        self.window.clear()  # another stage, another task


class Schedule:
    """The run's stages and learning rates, in steps."""

    def __init__(self, config: TrainConfig, curriculum: Curriculum, steps_per_epoch: int) -> None:
        self.config, self.curriculum, self.rules = config, curriculum, curriculum.rules
        self.steps_per_epoch = steps_per_epoch
        self.stages = schedule(
            curriculum, config.epochs, config.epochs_per_stage, config.first_stage_epochs
        )
        self.total_steps = config.epochs * steps_per_epoch
        self.max_steps = min(self.total_steps, config.max_steps or self.total_steps)

    def check_epochs(self, epochs: int, state: TrainState) -> None:
        """Raise UserError if the steps taken, in a run of `epochs`, differ from this schedule's."""
        before = Schedule(
            replace(self.config, epochs=epochs), self.curriculum, self.steps_per_epoch
        )
        i, last_step = state.stage_index, max(0, state.step - 1)
        taken = [
            (x.stages[:i], len(x.stages) > i, x.is_last_stage(state), x.lr_scale(last_step))
            for x in (before, self)
        ]
        if taken[0] == taken[1]:
            return
        options = ""
        if self.rules.advance_by == "stages":  # start in the final stage
            n_thoughts = self.curriculum.n_thoughts(self.curriculum.max_latent_stage + 1)
            options = " --first_stage_epochs=0 --max_latent_stage=0"
            options += f" --final_thoughts={n_thoughts}"
        raise UserError(
            f"the steps taken follow the rates and stages of epochs={epochs}, not "
            f"{self.config.epochs}.\nResume with --epochs={epochs}, or train on in another "
            f"--out_dir: --init_from=RUN{options}"
        )

    def stage(self, state: TrainState) -> int:
        """Return the stage of the next step."""
        return self.stages[state.stage_index].index

    def is_last_stage(self, state: TrainState) -> bool:
        return state.stage_index == len(self.stages) - 1

    def lr_scale(self, step: int) -> float:
        """Return the factor of the learning rates: warm-up, 1, and a linear decay to 0."""
        warmup = (step + 1) / max(1, self.config.warmup_steps)
        decay = (self.total_steps - step) / max(1, self.total_steps * self.config.decay_fraction)
        return min(1.0, warmup, decay)

    def set_lr(self, optimizers: Sequence[Optimizer], step: int) -> None:
        """Set the learning rate of every optimizer: its config value times lr_scale."""
        # of [AdamW], or [AdamW, Muon]
        rates = (self.config.learning_rate, self.config.muon_learning_rate)
        for optimizer, rate in zip(optimizers, rates, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = rate * self.lr_scale(step)

    def resets_optimizer(self, state: TrainState) -> bool:
        """Return whether the next step starts from fresh moments."""
        if self.config.reset_optimizer == "epoch":
            return state.step % self.steps_per_epoch == 0
        starts_stage = state.step == state.stage_start and state.step > 0
        return self.config.reset_optimizer == "stage" and starts_stage

    def stage_done(self, state: TrainState) -> bool:
        """Return whether the stage is out of epochs, or learned well enough to move on."""
        if self.is_last_stage(state):
            return state.step == self.total_steps
        n_steps = self.stages[state.stage_index].epochs * self.steps_per_epoch
        out_of_epochs = state.step - state.stage_start >= n_steps
        # a few lucky examples at a stage's start are not enough: the window must be full
        full, threshold = state.n_counted >= ACCURACY_WINDOW, self.config.advance_at
        learned = threshold > 0 and full and state.accuracy >= threshold
        return out_of_epochs or learned or state.step == self.total_steps

    def eval_due(self, state: TrainState, stage_done: bool) -> bool:
        """Return whether to validate: at a stage's end, and every eval_interval in the last."""
        last, interval = self.is_last_stage(state), self.config.eval_interval
        if stage_done:
            # iCoT has a stage per epoch, too many to validate each
            return last or self.rules.advance_by != "epochs"
        return bool(last and interval and (state.step - state.stage_start) % interval == 0)
