"""bench/accuracy.py: the bundled checkpoint on every split, with the categories of its texts."""

import json
from dataclasses import replace

import pytest

from bench.common.results import read_results
from nanococonut.data import prosqa
from nanococonut.data.files import write_examples
from nanococonut.evaluation.categories import CATEGORIES
from nanococonut.model import GPT
from nanococonut.weights import checkpoint


@pytest.fixture
def accuracy(script):
    return lambda *argv: script("--device=cpu", *argv, script="bench/accuracy.py")


def rows_of(out: str) -> list[dict]:
    return json.loads(out.splitlines()[-1])["rows"]


@pytest.mark.parametrize("split", prosqa.SPLITS)
def test_every_split_is_evaluated_as_trained(accuracy, split):
    """With the number of thoughts in the manifest."""
    code, out, err = accuracy(f"--data={split}", "--n=200")
    assert (code, err) == (0, "")
    [row] = rows_of(out)
    assert row["labels"]["data"] == split and row["shape"] == {"examples": 200, "thoughts": 6}
    low, high = row["spread"].values()
    assert row["value"] > 0.7 and low < row["value"] <= high
    fractions = row["detail"]["categories"]
    assert tuple(fractions) == CATEGORIES and sum(fractions.values()) == pytest.approx(1)
    # after six thoughts it writes no step, so a correct label is a correct answer
    assert fractions["Correct Label"] == row["value"]


def test_sweep_has_a_row_for_each_number_of_thoughts(accuracy):
    code, out, err = accuracy("--data=prosqa_balanced", "--n=40", "--sweep", "--latent=3")
    assert (code, err) == (0, "")
    rows = rows_of(out)
    assert [r["shape"]["thoughts"] for r in rows] == [0, 1, 2, 3]
    for row in rows:
        assert tuple(row["detail"]["categories"]) == CATEGORIES
        for name, fraction in row["detail"]["categories"].items():
            assert f"  {fraction:6.1%} {name}" in out.splitlines()
    first, *_, last = (r["detail"] for r in rows)
    assert first["categories"]["Correct Path"] > 0.5 and first["categories"]["Correct Label"] == 0
    assert last["categories"]["Correct Label"] == rows[-1]["value"]
    assert first["generated_tokens"] > last["generated_tokens"]


def test_examples_of_a_file(accuracy, tmp_path):
    examples = prosqa.generate(20, 5, prosqa.GraphConfig(13, 2, 3))
    write_examples(tmp_path / "rows.json", examples)
    code, out, _ = accuracy("--data=rows.json", "--latent=0", "--out=results.jsonl")
    [row] = read_results(tmp_path / "results.jsonl")
    assert code == 0 and row["labels"]["data"] == "rows.json" and row["shape"]["examples"] == 20
    assert row["detail"]["generated_seed"] is None
    assert row["detail"]["categories"]["Correct Path"] > 0.4


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--data=prosqa_wide"], "prosqa_wide does not exist"),
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


@pytest.mark.parametrize("logit, taken", [(1.0, 0), (-1.0, 6)])
def test_classifier_can_take_fewer_thoughts(accuracy, tmp_path, logit, taken):
    like_the_bundled(tmp_path / "run", stop=logit, config={"stop": "classifier"})
    code, out, _ = accuracy("--checkpoint=run", "--n=20", "--latent=6", "--max_new_tokens=1")
    [row] = rows_of(out)
    assert code == 0 and row["shape"]["thoughts"] == 6
    assert row["detail"]["thoughts_taken"] == taken
    assert row["detail"]["generated_tokens"] == taken + 1
    assert f", {taken}.0 of them thoughts" in out


def test_answers_are_as_long_as_the_run_says(accuracy, script, tmp_path):
    like_the_bundled(tmp_path / "run", config={"max_new_tokens": 1})
    for more, longest in (([], 1), (["--max_new_tokens=2"], 2)):
        code, out, _ = accuracy("--checkpoint=run", "--n=20", *more)
        detail = rows_of(out)[0]["detail"]
        assert code == 0 and detail["max_new_tokens"] == longest
        assert detail["generated_tokens"] == 6 + longest
        code, out, _ = script("--out_dir=run", "--seed=1", *more, script="sample.py")
        assert code == 0 and f", {longest} tokens" in out


def test_thoughts_that_a_method_never_had_are_noted(accuracy, tmp_path):
    config = {"method": "cot", "max_new_tokens": 1}
    like_the_bundled(tmp_path / "run", method="cot", n_thoughts=0, config=config)
    for argv, noted in (([], False), (["--latent=3"], True)):
        code, out, _ = accuracy("--checkpoint=run", "--n=5", *argv)
        assert code == 0 and ("note: cot has no thoughts in training" in out) == noted
