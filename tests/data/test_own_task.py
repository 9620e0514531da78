"""Your own task: ten lines of Python write a file that train.py and sample.py accept."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanococonut.config import TrainConfig
from nanococonut.data.files import read_examples, write_examples
from nanococonut.data.tasks import TASKS, Task, load_data
from nanococonut.weights import checkpoint

TEN_LINES = """
import itertools, json

rows = []
for a, b, c in itertools.product(range(10), repeat=3):
    rows.append({
        "question": f"{a} + {b} + {c} = ?",
        "steps": [f"{a} + {b} = {a + b}", f"{a + b} + {c} = {a + b + c}"],
        "answer": str(a + b + c),
    })
json.dump(rows, open("sums.json", "w"))
"""
SMALL = """
tokenizer = "words"
render = "sentences"
n_layer = 1
n_head = 2
n_embd = 32
block_size = 64
max_latent_stage = 2
epochs_per_stage = 1
epochs = 3
batch_size = 64
micro_batch_size = 64
val_examples = 10
max_new_tokens = 8
learning_rate = 3e-3
"""


def test_a_task_needs_no_solver():
    """sample.py --question ended in a traceback."""
    task = Task(SimpleNamespace(SPLITS=TASKS["prosqa"].splits))
    example = {"question": "2 + 3 = ?", "steps": [], "answer": "5"}
    assert task.solve("2 + 3 = ?") is task.twin(example) is task.reworded(example) is None


def test_ten_lines_make_a_task_that_trains(script):
    """The README's example could stop working unnoticed."""
    exec(TEN_LINES.replace("range(10)", "range(7)"), {})
    rows = read_examples("sums.json")
    assert len(rows) == 7**3 and all(len(row["steps"]) == 2 for row in rows)
    Path("small.py").write_text(SMALL)
    code, out, err = script("small.py", "--data=sums.json")
    assert (code, err) == (0, "") and "333 examples per epoch" in out
    run = Path("out/small")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 18 and losses[-1] < losses[0]  # six steps a stage
    assert {line["stage"] for line in lines if "stage" in line} == {0, 1, 2}
    _, tokenizer, _ = checkpoint.load(run)
    assert not tokenizer.unknown_words("7 + 8 + 9 = ?")
    code, out, err = script("--out_dir=out/small", "--seed=1", "--latent=2", script="sample.py")
    assert (code, err) == (0, "") and "= ?" in out


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"question": "<|endoftext|> + 1 = ?", "steps": [], "answer": "1"}, "special token"),
        ({"question": "1 + 1 = ? " * 30, "steps": [], "answer": "2"}, "block_size=64"),
        ({"question": "\ud800 = ?", "steps": [], "answer": "2"}, "surrogate"),
        ({"question": "1 = ?", "steps": []}, "'answer' is missing"),
    ],
)
def test_a_bad_example_is_named_or_skipped(script, bad, words):
    """train.py could fail with a traceback, or drop examples silently."""
    good = {"question": "1 + 1 = ?", "steps": ["1 + 1 = 2"], "answer": "2"}
    Path("mine.json").write_text(json.dumps([good] * 20 + [bad]))
    Path("small.py").write_text(SMALL)
    argv = ["small.py", "--data=mine.json", "--valid_data=valid.json", "--max_steps=1"]
    Path("valid.json").write_text(json.dumps([good]))
    code, _, err = script(*argv, "--out_dir=a")
    assert code == 2 and words in err and err.count("\n") <= 2
    # by its place in the file if it is invalid, by its text if it is too long
    assert re.search(
        f"mine.json, (example 20:|the example .*{re.escape(bad['question'][:9])})", err
    ), err
    wrong = (*argv, "--out_dir=c", "--render=compact", "--data=valid.json")
    code, _, err = script(*wrong)
    assert code == 2 and "'1 + 1 = ?'..." in err and "--render=sentences" in err
    assert err.count("\n") <= 2
    code, out, err = script(*argv, "--out_dir=b", "--skip_bad_rows")
    assert (code, err) == (0, "") and "1 of 22 examples skipped" in out and words in out


def test_every_seed_holds_out_the_same_examples(tmp_path):
    """Another seed of the next run in a curriculum validated on what the last one had learned."""
    examples = [{"question": f"{i}?", "steps": [], "answer": str(i)} for i in range(50)]
    write_examples(tmp_path / "rows.json", examples)
    held_out = [
        load_data(TrainConfig(data=str(tmp_path / "rows.json"), seed=seed)).val["valid"]
        for seed in (0, 1)
    ]
    assert held_out[0] == held_out[1] and len(held_out[0]) == 5
