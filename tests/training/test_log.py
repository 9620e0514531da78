"""The console of a run: when it prints a line, what it says about disk and data; its best step."""

import io
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanococonut.config import TrainConfig
from nanococonut.curriculum import Curriculum
from nanococonut.data.tasks import TASKS, Data
from nanococonut.runtime.errors import UserError
from nanococonut.tokenizer import Tokenizer
from nanococonut.training.log import RunLog, print_data
from nanococonut.training.state import Schedule, TrainState


def new_log(path, metrics):
    """Return the log of a run that writes metrics to this file, and its state."""
    config = TrainConfig(batch_size=10)
    schedule = Schedule(config, Curriculum.from_config(config), steps_per_epoch=1000)
    run = SimpleNamespace(
        path=path, metrics_path=path / "metrics.jsonl", open_metrics=lambda _: metrics
    )
    state = TrainState()
    return RunLog(run, schedule, state), state


@pytest.fixture
def log_steps(monkeypatch, capsys):
    """Return log_steps(seconds of each step) -> lines on a console that is not a terminal."""

    def run(seconds):
        now = [0.0]
        monkeypatch.setattr(
            "nanococonut.training.log.time", SimpleNamespace(monotonic=lambda: now[0])
        )
        log, state = new_log(Path(), io.StringIO())
        with log:
            for s in seconds:
                now[0] += s
                state.advance(0, 1, 1)
                log.step(state, 1.0, 10)
        return capsys.readouterr().out.splitlines()

    return run


def test_slow_steps_are_logged_by_time(log_steps):
    """Guards against an hour without a line if steps are slow."""
    lines = log_steps([4.0] * 20)
    assert [line.split("/")[0] for line in lines] == ["step 2", "step 10", "step 18"]  # 8, 40, 72 s
    assert "2 examples/s" in lines[0]  # 10 each 4 s
    lines = log_steps([0.01] * 250)
    assert [line.split("/")[0] for line in lines] == ["step 100", "step 200"]


def test_best_step_counts_all_splits():
    """Guards against keeping the checkpoint that has learned the shortcut best."""
    state = TrainState()
    for step, plain, matched, best in [(1, 0.9, 0.5, 1), (2, 0.8, 0.9, 2), (3, 0.95, 0.6, 2)]:
        state.step = step
        scores = {"valid_accuracy": plain, "matched_accuracy": matched, "valid_tokens": 99.0}
        state.record(scores, n_thoughts=6, is_last_stage=True, stage_done=False)
        assert state.best_step == best


def test_full_disk_before_a_checkpoint_names_no_resume(tmp_path):
    """Guards against advice to use --resume when nothing was saved."""
    log, state = new_log(tmp_path, Path("/dev/full").open("w"))
    for expected in (False, True):
        with pytest.raises(UserError, match="Free some space") as e:
            log.validation(state, {"valid_accuracy": 1.0})
        assert ("--resume" in str(e.value)) == expected
        (tmp_path / "step_00000001").mkdir(exist_ok=True)
        (tmp_path / "step_00000001/manifest.json").touch()


@pytest.mark.parametrize(
    ("train", "valid", "line"),
    [
        ("abcb", "xy", "1 of 4 in training; 0 of 2 for validation"),
        ("abc", "axa", "0 of 3 in training; 2 of 3 for validation"),
        ("abc", "xyx", None),
        (None, "xyx", None),  # generated: never repeats a validation graph
    ],
)
def test_repeated_questions_are_counted(capsys, train, valid, line):
    """Guards against validation questions that are also in training, without a warning."""
    train, valid = ([{"question": f"Is  it {c}?"} for c in text] if text else None
                    for text in (train, valid))  # fmt: skip
    valid = [{"question": example["question"].replace("  ", " ") + "\n"} for example in valid]
    words = Tokenizer.words([*"abcxy?", "Is", "it"])
    loader = SimpleNamespace(
        config=TrainConfig(), val_splits={"valid": valid}, n_examples=3, task=TASKS["prosqa"],
        tokenizer=words,
    )  # fmt: skip
    print_data(loader, Data(train, {"valid": valid}))
    out = capsys.readouterr().out
    assert line in out if line else out == ""
