"""bench/accuracy.py: the bundled checkpoint on every split, with the categories of its answers."""

import json
from dataclasses import replace

import pytest

from nanococonut.data import prosqa
from nanococonut.data.files import write_examples
from nanococonut.evaluation.categories import CATEGORIES
from nanococonut.model import GPT
from nanococonut.weights import checkpoint


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
    write_examples(tmp_path / "rows.json", rows)
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


def like_the_bundled(run, stop=None, **changes):
    """A run of the bundled model; stop: with a classifier whose logit is always this."""
    model, _, manifest = checkpoint.load(checkpoint.BUNDLED)
    if stop is not None:
        watched = GPT(replace(model.config, stop=True))
        watched.load_state_dict(model.state_dict(), strict=False)
        watched.stop.bias.data.fill_(stop)
        model = watched
    manifest["config"] |= changes.pop("config", {})
    manifest |= changes | {"model": checkpoint.describe_model(model)}
    checkpoint.save(run, manifest["step"], model, [], manifest)


@pytest.mark.parametrize("logit, had", [(1.0, 0), (-1.0, 6)])
def test_a_classifiers_row_has_the_most_thoughts_and_the_mean_had(accuracy, tmp_path, logit, had):
    like_the_bundled(tmp_path / "run", stop=logit, config={"stop": "classifier"})
    code, out, _ = accuracy("--checkpoint=run", "--n=20", "--latent=6", "--max_new_tokens=1")
    row = json.loads(out.splitlines()[-1])
    assert code == 0 and (row["thoughts"], row["thoughts_had"]) == (6, had)
    assert row["generated_tokens"] == had + 1 and f"6 thoughts at most, {had}.0 had" in out


def test_answers_are_as_long_as_the_run_says(accuracy, script, tmp_path):
    like_the_bundled(tmp_path / "run", config={"max_new_tokens": 1})
    for more, longest in (([], 1), (["--max_new_tokens=2"], 2)):
        code, out, _ = accuracy("--checkpoint=run", "--n=20", *more)
        row = json.loads(out.splitlines()[-1])
        assert (code, row["max_new_tokens"], row["generated_tokens"]) == (0, longest, 6 + longest)
        code, out, _ = script("--out_dir=run", "--seed=1", *more, script="sample.py")
        assert code == 0 and f", {longest} tokens" in out


def test_thoughts_that_a_method_never_had_are_noted(accuracy, tmp_path):
    config = {"method": "cot", "max_new_tokens": 1}
    like_the_bundled(tmp_path / "run", method="cot", n_thoughts=0, config=config)
    for argv, noted in (([], False), (["--latent=3"], True)):
        code, out, _ = accuracy("--checkpoint=run", "--n=5", *argv)
        assert code == 0 and ("note: cot has no thoughts in training" in out) == noted
