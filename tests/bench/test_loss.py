"""bench/loss.py runs two trainings and says how far apart they are."""

import json
from pathlib import Path

import pytest
import torch

TINY = """
tokenizer = "words"
render = "compact"
n_nodes = 10
min_hops = 2
max_hops = 3
n_layer = 1
n_head = 2
n_embd = 32
train_examples = 32
val_examples = 2
batch_size = 8
"""


@pytest.mark.slow  # .ci/run has a run of it
@pytest.mark.skipif(torch.cuda.is_available(), reason="it compares more on a GPU")
def test_bfloat16_is_near_float32_and_not_the_same(script):
    Path("tiny.py").write_text(TINY)
    argv = ("--config=tiny.py", "--steps=3", "--out=rows.jsonl")
    code, out, err = script(*argv, script="bench/loss.py")
    assert (code, err) == (0, "")
    row = json.loads(out.splitlines()[-1])
    assert row == json.loads(Path("rows.jsonl").read_text())
    (apart,) = row["apart"].values()
    assert row["steps"] == 3 and 0 < apart["first"] <= apart["greatest"] < 0.05


def test_what_train_py_refuses_is_told(script):
    code, _, err = script("--config=nowhere.py", script="bench/loss.py")
    assert code == 2 and "nowhere.py" in err
