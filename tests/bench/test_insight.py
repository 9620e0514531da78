"""bench/insight.py writes a page and a valid row, or neither, and refuses bad input early."""

import json
import re
from functools import partial

import pytest
import torch
from helpers import save_random_run
from safetensors.torch import load_file, save_file

from bench.common.results import read_results
from nanococonut.data.files import write_examples
from nanococonut.tokenizer import Tokenizer

N = 100


@pytest.fixture
def insight(script):
    """Return insight(*argv) -> (exit code, stdout, stderr), in an empty folder."""
    return partial(script, script="bench/insight.py")


@pytest.fixture
def files(tmp_path):
    """Save a run, examples and their twins. Return the arguments that name them."""
    words = "Which letter is of x a b ### . ?".split()
    save_random_run(tmp_path / "run", Tokenizer.words(words), render="sentences", n_layer=1)
    # both answers occur for the same question, so no model can exceed one half
    examples = [
        {"question": f"Which {'x' * (i // 2 % 3)} is?", "steps": ["x", "x"], "answer": "ab"[i % 2]}
        for i in range(N)
    ]
    twins = [
        {**x, "question": x["question"].replace("is", "of"), "answer": "ba"[i % 2]}
        for i, x in enumerate(examples)
    ]
    write_examples(tmp_path / "data.json", examples)
    write_examples(tmp_path / "twins.json", twins)
    write_examples(tmp_path / "few.json", twins[1:])
    (tmp_path / "other.jsonl").write_text('{"bench": "accuracy", "detail": {}}\n')
    write_examples(tmp_path / "same.json", [*twins[:4], *examples[4:]])
    return ["--checkpoint=run", "--data=data.json", "--twins=twins.json"]


def test_page_and_row_of_a_users_task(insight, files, tmp_path):
    """The row must follow the schema, and the page must be drawn from the row alone."""
    code, out, err = insight(*files, "--out=rows.jsonl")
    assert code == 0, err
    page = (tmp_path / "run/insight.html").read_text()
    assert "does not solve these questions" in out and "does not solve" in page
    (row,) = read_results(tmp_path / "rows.jsonl")
    assert row["detail"]["provenance"]["rows"] == N and row["labels"]["checkpoint"] == "run"
    assert json.loads(out.splitlines()[-1])["rows"][0]["detail"]["verdict"]
    code, out, err = insight("--redraw=rows.jsonl")
    assert code == 0 and (tmp_path / "insight.html").read_text() == page
    assert not re.search(r'(src|href)="?http|@import|url\(', page)


def test_unseen_examples_and_control(insight, files, tmp_path):
    """The output did not say that a run's own file was measured, or a control was as accurate."""
    tokenizer, file = Tokenizer.words("Which is x a b ### . ?".split()), str(tmp_path / "data.json")
    save_random_run(tmp_path / "own", tokenizer, render="sentences", data=file, valid_data=file)
    code, out, err = insight("--checkpoint=own", "--against=own", "--html=page.html")
    assert code == 0, err
    assert f"own: {N} held-out examples" in err and "training examples" not in out
    assert "own, data.json with" in out and "data.json" in (tmp_path / "page.html").read_text()
    assert "[?] Whether the model is more accurate than the control is undecided." in out
    assert "The candidate answers have only" in out  # a random model
    assert "than the control" in (tmp_path / "page.html").read_text()
    assert insight("--checkpoint=own", "--against=run")[0] == 2  # has no held-out examples
    out = insight("--checkpoint=own", "--data=data.json")[1]
    assert "data.json has this run's training examples" in out


@pytest.mark.parametrize(
    "argv, error",
    [
        (["--checkpoint=nowhere"], "nowhere does not exist"),
        (["--twins=few.json"], "99 twins of 100 examples"),
        (["--twins=same.json"], "twin of example 4 has the same answer"),
        (["--rows=49"], "at least 50"),
        (["--html=run"], "run cannot be written"),
        (["--out=no/rows.jsonl"], "rows.jsonl cannot be written"),
        (["--redraw=data.json"], "not JSON"),
        (["--redraw=nothing.jsonl"], "nothing.jsonl does not exist"),
        (["--redraw=other.jsonl"], "has no row"),
        (["--against=nowhere"], "nowhere does not exist"),
        (["--data=nothing.json"], "nothing.json does not exist"),
    ],
)
def test_bad_input_is_refused(insight, files, tmp_path, argv, error):
    """Such an error came after minutes of work, or left half a result."""
    code, out, err = insight(*files, *argv)
    assert code == 2 and error in err and len(err.strip().splitlines()) <= 3, err
    assert not (tmp_path / "run/insight.html").exists() and "interchange" not in err


def test_bad_models_are_refused(insight, files, tmp_path):
    """NaN weights, or a control with another number of thoughts, would measure nothing."""
    tokenizer = Tokenizer.words(["a"])
    save_random_run(tmp_path / "other", tokenizer, render="sentences", n_thoughts=2, n_layer=1)
    code, _, err = insight(*files, "--against=other")
    assert code == 2 and "2 thoughts" in err
    code, _, err = insight("--checkpoint=run")
    assert code == 2 and "rows.json does not exist" in err and "Give --data" in err
    code, _, err = insight("--checkpoint=run", "--twins=twins.json")
    assert code == 2 and "Give --data too" in err
    (weights,) = (tmp_path / "run").glob("step_*/model.safetensors")
    tensors = load_file(weights)
    tensors["wpe.weight"] = torch.full_like(tensors["wpe.weight"], float("nan"))
    save_file(tensors, weights)
    manifest = weights.parent / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"].pop("model.safetensors")
    del content["digest"]
    manifest.write_text(json.dumps(content))
    code, _, err = insight(*files)
    assert code == 2 and "wpe.weight has NaN" in err
