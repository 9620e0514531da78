"""bench/accuracy.py: the bundled checkpoint on every split, with the categories of its answers."""

import json

import pytest

from nanococonut.data import prosqa
from nanococonut.data.files import write_rows
from nanococonut.data.paths import CATEGORIES


@pytest.fixture
def accuracy(script):
    return lambda *argv: script("--device=cpu", *argv, script="bench/accuracy.py")


@pytest.mark.parametrize("split", prosqa.SPLITS)
def test_every_split_is_asked_with_the_thoughts_of_the_manifest(accuracy, split):
    code, out, err = accuracy(f"--data={split}", "--n=40")
    assert (code, err) == (0, "")
    row = json.loads(out.splitlines()[-1])
    assert (row["data"], row["rows"], row["thoughts"]) == (split, 40, 6)
    assert row["accuracy"] > 0.7 and row["low"] < row["accuracy"] <= row["high"]
    shares = row["categories"]
    assert tuple(shares) == CATEGORIES and sum(shares.values()) == pytest.approx(1)
    # behind six thoughts it says no step, so a right label is a right answer
    assert shares["Correct Label"] == row["accuracy"]
    assert "sweep" not in row


def test_a_sweep_has_a_column_for_each_number_of_thoughts(accuracy):
    code, out, err = accuracy("--data=prosqa_balanced", "--n=40", "--sweep", "--latent=3")
    assert (code, err) == (0, "")
    *lines, last = out.splitlines()
    row = json.loads(last)
    assert [r["thoughts"] for r in row["sweep"]] == [0, 1, 2, 3]
    table = {line[:16].strip(): line[16:].split() for line in lines}
    assert table["thoughts"] == ["0", "1", "2", "3"]
    for category in CATEGORIES:
        wanted = [f"{r['categories'][category]:.1%}" for r in row["sweep"]]
        assert table[category] == wanted
    first, *_, final = row["sweep"]
    assert first["categories"]["Correct Path"] > 0.5 and first["categories"]["Correct Label"] == 0
    assert final["categories"]["Correct Label"] == final["accuracy"] == row["accuracy"]
    assert first["generated_tokens"] > final["generated_tokens"]


def test_rows_of_a_file(accuracy, tmp_path):
    rows = prosqa.generate(20, 5, prosqa.GraphConfig(13, 2, 3))
    write_rows(tmp_path / "rows.json", rows)
    code, out, _ = accuracy("--data=rows.json", "--latent=0", "--out=results.jsonl")
    row = json.loads(out.splitlines()[-1])
    assert code == 0 and json.loads((tmp_path / "results.jsonl").read_text()) == row
    assert (row["data"], row["rows"], row["generated_seed"]) == ("rows.json", 20, None)
    assert row["categories"]["Correct Path"] > 0.4


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--data=prosqa_wide"], "prosqa_wide cannot be read"),
        (["--sweep=maybe"], "sweep='maybe' has the wrong type"),
        (["--latent=-1"], "latent=-1"),
        (["--n=5", "--latent=150"], "does not fit"),
    ],
)
def test_bad_input_is_refused_in_two_lines(accuracy, argv, words):
    code, _, err = accuracy(*argv)
    assert code == 2 and words in err, err
    assert err.startswith("error: ") and err.count("\n") <= 2 and "Traceback" not in err


def test_a_split_of_another_task_is_refused(script):
    code, _, err = script("--data=prontoqa", script="bench/accuracy.py")
    assert code == 2 and "the checkpoint is of prosqa" in err and "prosqa_matched" in err
