"""The progress of a run, and the schedule that decides what comes next.

The schedule counts steps and examples, never time, so a run can be repeated or resumed bit for bit.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch.optim import Optimizer

from nanococonut.config import TrainConfig
from nanococonut.curriculum import Curriculum, list_stages
from nanococonut.runtime.errors import UserError

ACCURACY_WINDOW = 1280  # recent examples in the training accuracy, which advance_at compares


@dataclass
class TrainState:
    """What a resumed run needs in addition to weights and moments, saved as JSON.

    step           number of optimizer steps so far
    stage          stage of the last step
    stage_index    index in Schedule.stages of the next step's entry
    stage_start    step at which this entry began
    window         (correct, counted) of the last steps, about ACCURACY_WINDOW examples
    validations    log line of each finished stage
    best_step      step of the last stage with the best mean accuracy over the validation splits;
                   -1 before its first validation
    seconds        time spent in the loop
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
        self._measured_at = time.monotonic()  # not a field, so it is not saved

    @classmethod
    def from_saved(cls, saved: dict[str, Any]) -> "TrainState":
        """Return the state with these fields. Raise UserError if a field is unknown."""
        if unknown := saved.keys() - asdict(cls()).keys():
            raise UserError(
                "the run was saved by another version of nanococonut: its progress has unknown "
                f"fields: {', '.join(sorted(unknown))}.\nUse that version, or another --out_dir."
            )
        return cls(**saved)

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
        # drop the oldest step while the window stays full without it
        while len(self.window) > 1 and self.n_counted - self.window[0][1] >= ACCURACY_WINDOW:
            self.window.pop(0)
        self.measure_time()

    def measure_time(self) -> None:
        now = time.monotonic()
        self.seconds, self._measured_at = self.seconds + now - self._measured_at, now

    def record(
        self, scores: dict[str, Any], n_thoughts: int, is_last_stage: bool, stage_done: bool
    ) -> dict[str, Any]:
        """Return the log line of a validation, and keep it if the stage is done."""
        self.measure_time()
        validation = {"stage": self.stage, "thoughts": n_thoughts, **scores}
        validation["minutes"] = self.seconds / 60
        # the mean over all splits, since the plain split rewards shortcuts
        accuracy = statistics.mean(v for k, v in scores.items() if k.endswith("_accuracy"))
        # earlier stages use fewer thoughts, so only the last stage can have the best step
        if is_last_stage and accuracy > self.best_accuracy:
            self.best_accuracy, self.best_step = accuracy, self.step
        if stage_done:
            self.validations.append(validation)
        return validation

    def manifest(self) -> dict[str, Any]:
        """Return the state's entries in the manifest of a checkpoint."""
        return {
            "stage": self.stage,
            "best_step": self.best_step,
            "minutes": self.seconds / 60,
            "progress": asdict(self),
        }

    def next_stage(self) -> None:
        self.stage_index, self.stage_start = self.stage_index + 1, self.step
        self.window.clear()  # the accuracy of the last stage does not count for the next


class Schedule:
    """The stages and learning rates of a run, by step."""

    def __init__(self, config: TrainConfig, curriculum: Curriculum, steps_per_epoch: int) -> None:
        self.config, self.curriculum, self.rules = config, curriculum, curriculum.rules
        self.steps_per_epoch = steps_per_epoch
        self.stages = list_stages(
            curriculum, config.epochs, config.epochs_per_stage, config.first_stage_epochs
        )
        self.total_steps = config.epochs * steps_per_epoch
        self.max_steps = min(self.total_steps, config.max_steps or self.total_steps)

    def check_epochs(self, epochs: int, state: TrainState) -> None:
        """Raise UserError if the steps so far, planned for `epochs`, do not fit this schedule."""
        before = Schedule(
            replace(self.config, epochs=epochs), self.curriculum, self.steps_per_epoch
        )
        i, last_step = state.stage_index, max(0, state.step - 1)
        old, new = (
            (
                schedule.stages[:i],  # the finished stages
                len(schedule.stages) > i,  # whether there is a current stage
                schedule.is_last_stage(state),
                schedule.lr_scale(last_step),
            )
            for schedule in (before, self)
        )
        if old == new:
            return
        options = ""
        if self.rules.advance_by == "stages":  # start in the final stage
            n_thoughts = self.curriculum.n_thoughts(self.curriculum.max_latent_stage + 1)
            options = " --first_stage_epochs=0 --max_latent_stage=0"
            options += f" --final_thoughts={n_thoughts}"
        raise UserError(
            f"stages and learning rates were planned for epochs={epochs}; it is too late to change "
            f"to {self.config.epochs}.\nResume with --epochs={epochs}, or continue in another "
            f"--out_dir: --init_from=RUN{options}"
        )

    def stage(self, state: TrainState) -> int:
        """Return the stage of the next step."""
        return self.stages[state.stage_index].index

    def is_last_stage(self, state: TrainState) -> bool:
        return state.stage_index == len(self.stages) - 1

    def lr_scale(self, step: int) -> float:
        """Return the learning rate factor: linear warm-up, 1, then linear decay to 0."""
        warmup = (step + 1) / max(1, self.config.warmup_steps)
        decay = (self.total_steps - step) / max(1, self.total_steps * self.config.decay_fraction)
        return min(1.0, warmup, decay)

    def set_lr(self, optimizers: Sequence[Optimizer], step: int) -> None:
        """Set the learning rate of every optimizer: its config value times lr_scale."""
        rates = (self.config.learning_rate, self.config.muon_learning_rate)
        for optimizer, rate in zip(optimizers, rates, strict=False):  # [AdamW] or [AdamW, Muon]
            for group in optimizer.param_groups:
                group["lr"] = rate * self.lr_scale(step)

    def resets_optimizer(self, state: TrainState) -> bool:
        """Return whether the optimizer is reset before the next step."""
        if self.config.reset_optimizer == "epoch":
            return state.step % self.steps_per_epoch == 0
        starts_stage = state.step == state.stage_start and state.step > 0
        return self.config.reset_optimizer == "stage" and starts_stage

    def stage_done(self, state: TrainState) -> bool:
        """Return whether the stage is out of epochs, or has reached advance_at."""
        if self.is_last_stage(state):
            return state.step == self.total_steps
        n_steps = self.stages[state.stage_index].epochs * self.steps_per_epoch
        out_of_epochs = state.step - state.stage_start >= n_steps
        # the window must be full, so that a few lucky examples do not end a stage
        is_full, threshold = state.n_counted >= ACCURACY_WINDOW, self.config.advance_at
        learned = threshold > 0 and is_full and state.accuracy >= threshold
        return out_of_epochs or learned

    def eval_due(self, state: TrainState, stage_done: bool) -> bool:
        """Return whether to validate: after each stage, and every eval_interval in the last one."""
        last, interval = self.is_last_stage(state), self.config.eval_interval
        if stage_done:
            # iCoT has too many stages, one per epoch, to validate after each
            return last or self.rules.advance_by != "epochs"
        return bool(last and interval and (state.step - state.stage_start) % interval == 0)
