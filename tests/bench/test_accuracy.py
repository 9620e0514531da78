"""bench/accuracy.py: splits, files, sweeps, and checkpoints with and without a run."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from helpers import gpt2_tokenizer, random_gpt

from bench.common.results import read_results
from nanococonut.config import TrainConfig
from nanococonut.curriculum import METHODS, Curriculum
from nanococonut.data import prosqa
from nanococonut.data.files import write_examples
from nanococonut.data.tasks import load_data
from nanococonut.evaluation.accuracy import score
from nanococonut.evaluation.paper import CATEGORIES
from nanococonut.inference.engine import Engine
from nanococonut.model import GPT
from nanococonut.runtime.cli import make_config
from nanococonut.weights import checkpoint
from nanococonut.weights.pretrained import CONV1D_WEIGHTS


@pytest.fixture
def accuracy(script):
    return lambda *argv: script("--device=cpu", *argv, script="bench/accuracy.py")


def rows_of(out: str) -> list[dict]:
    return json.loads(out.splitlines()[-1])["rows"]


@pytest.mark.parametrize("split", prosqa.SPLITS)
def test_every_split_uses_the_trained_thoughts(accuracy, split):
    """The default number of thoughts is the manifest's."""
    code, out, err = accuracy(f"--data={split}", "--n=200")
    assert (code, err) == (0, "")
    [row] = rows_of(out)
    assert row["labels"]["data"] == split and row["shape"] == {"examples": 200, "thoughts": 6}
    low, high = row["spread"].values()
    assert row["value"] > 0.7 and low < row["value"] <= high
    fractions = row["detail"]["categories"]
    assert tuple(fractions) == CATEGORIES and sum(fractions.values()) == pytest.approx(1)
    # after six thoughts the model writes no steps, so a correct label is a correct answer
    assert fractions["Correct Label"] == row["value"]


def test_all_fractions_are_shown_as_percentages(accuracy):
    """The accuracy was printed as .97, but categories and rules as 97.0%."""
    code, out, _ = accuracy("--n=20", "--max_new_tokens=1")
    assert code == 0
    assert (
        "\n      0%             nanococonut          accuracy, examples 20, thoughts 6 (0% .. "
        in out
    )


def test_sweep_has_a_row_for_each_number_of_thoughts(accuracy):
    code, out, err = accuracy("--data=prosqa_balanced", "--n=40", "--sweep", "--latent=3")
    assert (code, err) == (0, "")
    *rows, stopped = rows_of(out)
    assert [r["shape"]["thoughts"] for r in rows] == [0, 1, 2, 3]
    assert stopped["labels"]["stop"] == "the readout repeats"
    assert 1 <= stopped["detail"]["thoughts_taken"] <= 3
    for row in rows:
        fractions = row["detail"]["categories"]
        assert tuple(fractions) == CATEGORIES
        line = ", ".join(f"{name} {p:.1%}" for name, p in fractions.items() if p)
        assert f"  {line}" in out.splitlines()
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
        (["--data=prosqa_wide"], "Did you mean prosqa_dense?"),
        (["--sweep=maybe"], "sweep='maybe': expected True or False"),
        (["--latent=-1"], "latent=-1"),
        (["--n=5", "--latent=150"], "do not fit"),
    ],
)
def test_bad_input_is_refused_in_two_lines(accuracy, argv, words):
    code, _, err = accuracy(*argv)
    assert code == 2 and words in err, err
    assert err.startswith("error: ") and err.count("\n") <= 2 and "Traceback" not in err


def test_a_split_of_another_task_is_refused(script):
    code, _, err = script("--data=prontoqa", script="bench/accuracy.py")
    assert code == 2 and "the checkpoint is of prosqa" in err and "prosqa_matched" in err


def save_bundled_as(run, stop=None, **changes):
    """Save a run of the bundled model. stop: add a classifier that always returns this logit."""
    model, _, manifest = checkpoint.load(checkpoint.BUNDLED)
    if stop is not None:
        watched = GPT(replace(model.config, stop=True))
        watched.load_state_dict(model.state_dict(), strict=False)
        watched.stop.bias.data.fill_(stop)
        model = watched
    manifest["config"] |= changes.pop("config", {})
    manifest |= changes | {"model": asdict(model.config)}
    checkpoint.save(run, manifest["step"], checkpoint.gather_tensors(model), manifest)


@pytest.mark.parametrize("logit, taken", [(1.0, 0), (-1.0, 6)])
def test_classifier_can_take_fewer_thoughts(accuracy, tmp_path, logit, taken):
    # also without padding: the number of steps must not tell the model when to stop
    config = {"stop": "classifier", "pad_latent_to_max": False}
    save_bundled_as(tmp_path / "run", stop=logit, config=config)
    code, out, _ = accuracy("--checkpoint=run", "--n=20", "--max_new_tokens=1")
    [row] = rows_of(out)
    assert code == 0 and row["shape"]["thoughts"] == 6
    assert row["detail"]["thoughts_taken"] == taken
    assert row["detail"]["generated_tokens"] == taken + 1
    assert f", {taken}.0 of them thoughts" in out


def test_answers_are_as_long_as_the_run_says(accuracy, script, tmp_path):
    save_bundled_as(tmp_path / "run", config={"max_new_tokens": 1})
    for more, longest in (([], 1), (["--max_new_tokens=2"], 2)):
        code, out, _ = accuracy("--checkpoint=run", "--n=20", *more)
        detail = rows_of(out)[0]["detail"]
        assert code == 0 and detail["max_new_tokens"] == longest
        assert detail["generated_tokens"] == 6 + longest
        code, out, _ = script("--out_dir=run", "--seed=1", *more, script="sample.py")
        assert code == 0 and f", {longest} tokens" in out
        assert ('(wrong, no answer after "###"; correct: ' in out) == (longest == 1)


def test_unpadded_runs_use_the_trained_thoughts(accuracy, script, tmp_path):
    """Both scripts used the maximum, even for examples that had fewer thoughts in training."""
    save_bundled_as(tmp_path / "run", config={"pad_latent_to_max": False, "max_new_tokens": 1})
    code, out, _ = accuracy("--checkpoint=run", "--n=20")
    detail = rows_of(out)[0]["detail"]
    steps = {int(n): count for n, (_, count) in detail["by_steps"].items()}
    assert code == 0 and detail["thoughts_taken"] == sum(n * c for n, c in steps.items()) / 20
    _, out, _ = accuracy("--checkpoint=run", "--n=20", "--sweep")
    taken = [row["detail"]["thoughts_taken"] for row in rows_of(out)]
    assert taken == [0, 1, 2, *[detail["thoughts_taken"]] * 4]  # 2 or 3 steps
    _, out, _ = accuracy("--checkpoint=run", "--n=20", "--latent=6")
    assert rows_of(out)[0]["detail"]["thoughts_taken"] == 6
    code, out, _ = script("--out_dir=run", "--seed=1", script="sample.py")
    [example] = prosqa.generate(1, 1, prosqa.GraphConfig(13, 2, 3))
    assert code == 0 and "up to 6 thoughts" in out and example["question"] in out
    numbers = [line[2] for line in out.splitlines() if line.startswith("│ ")]
    assert numbers == ["1", "2", "3"][: len(example["steps"])]


def test_untrained_thoughts_are_noted(accuracy, tmp_path):
    config = {"method": "cot", "max_new_tokens": 1}
    save_bundled_as(tmp_path / "run", method="cot", n_thoughts=0, config=config)
    for argv, noted in (([], False), (["--latent=3"], True)):
        code, out, _ = accuracy("--checkpoint=run", "--n=5", *argv)
        assert code == 0 and ("note: cot has no thoughts in training" in out) == noted


def released_file(path, vocab_size):
    """Save a random GPT-2 in the released code's format and return it."""
    model = random_gpt(dtype=torch.float32, vocab_size=vocab_size, block_size=96)
    state = {
        f"base_causallm.transformer.{name}": p.t() if name.endswith(CONV1D_WEIGHTS) else p
        for name, p in model.state_dict().items()
    }
    state["base_causallm.lm_head.weight"] = state["embedding.weight"] = model.wte.weight.data
    torch.save({name: p.contiguous() for name, p in state.items()}, path)
    sizes = {"n_positions": 96, "n_layer": 2, "n_head": 3, "n_embd": 24}
    path.with_name("config.json").write_text(json.dumps(sizes))
    return model


@pytest.fixture
def scored(monkeypatch):
    """Return a list that collects the scores the script computes."""
    scores = []

    def spy(*args, **kwargs):
        scores.append(score(*args, **kwargs))
        return scores[-1]

    monkeypatch.setattr("nanococonut.evaluation.accuracy.score", spy)
    return scores


ROWS = [
    {"question": "Two pens cost 3 each. What is paid?", "steps": ["<<2*3=6>>"], "answer": "6"},
    {"question": "One plus one?", "steps": ["<<1+1=2>>"], "answer": "2"},
]


@pytest.mark.parametrize("method, n", [("coconut", 6), ("pause", 6), ("cot", 0)])
def test_a_released_checkpoint_needs_no_run(accuracy, scored, tmp_path, method, n):
    """A released checkpoint could be evaluated only after starting a run from it."""
    tokenizer = gpt2_tokenizer()
    markers = METHODS[method].markers
    model = released_file(tmp_path / "checkpoint_33", tokenizer.vocab_size - 3 * (not markers))
    write_examples(tmp_path / "rows.json", ROWS)
    argv = ["--checkpoint=checkpoint_33", f"--method={method}", "--data=rows.json"]
    code, out, err = accuracy(*argv, *[f"--latent={n}"] * (n > 0), "--max_new_tokens=5")
    assert (code, err) == (0, "") and f"checkpoint_33: {method}, {n} thoughts" in out
    [row] = rows_of(out)
    labels = {"method": method, "task": "gsm8k", "data": "rows.json", "checkpoint": "checkpoint_33"}
    assert row["labels"] == labels and row["shape"] == {"examples": 2, "thoughts": n}
    assert row["detail"]["trained"] == {} and row["detail"]["generated_seed"] is None
    engine = Engine(model, tokenizer, Curriculum(method), kernels="torch")
    expected = [engine.generate([x["question"] + "\n"], n, 5).text[0] for x in ROWS]
    assert scored[0].texts == expected and len(set(expected)) == 2


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "Give --method, --data and --latent"),
        (["--method=coconut", "--latent=6"], "belongs to no run"),
        (["--method=coconut", "--data=rows.json"], "belongs to no run"),
        (["--method=coconut", "--data=rows.json", "--latent=6"], "needs 50260"),
        (
            ["--method=coconut", "--checkpoint=nowhere", "--data=rows.json", "--latent=6"],
            "no weights at",
        ),
        (["--method=cot", "--data=nothing.json"], "nothing.json does not exist"),
        (["--method=cot", "--data=rows.json", "--checkpoint=rows.json"], "holds no GPT-2"),
        (["--method=cot", "--checkpoint=run"], "run records its method"),
        (["--checkpoint=."], "Give --method"),  # a folder with config.json
        (["--method=soft_thought", "--data=rows.json", "--latent=6"], "needs 50260 and soft"),
    ],
)
def test_wrong_use_of_weights_is_refused(accuracy, tmp_path, argv, words):
    """A missing option or weights of another method would give a wrong number."""
    gpt2_tokenizer()
    released_file(tmp_path / "file.pt", 50257)
    write_examples(tmp_path / "rows.json", ROWS)
    save_bundled_as(tmp_path / "run")
    code, _, err = accuracy("--checkpoint=file.pt", *argv)
    assert code == 2 and words in err and err.count("\n") == 2, err


def test_default_data_is_what_the_run_held_out(accuracy, scored, tmp_path):
    """--data was required, though the run records its file and held out part of it."""
    examples = prosqa.generate(60, 5, prosqa.GraphConfig(13, 2, 3))
    write_examples(tmp_path / "rows.json", examples)
    save_bundled_as(tmp_path / "run", config={"data": str(tmp_path / "rows.json")})
    code, out, err = accuracy("--checkpoint=run", "--max_new_tokens=2")
    [row] = rows_of(out)
    config = make_config(
        TrainConfig, checkpoint.read_manifest(tmp_path / "run/step_00005000")["config"]
    )
    held_out = load_data(config).val["valid"]
    assert (code, err) == (0, "") and len(held_out) == 6
    assert row["labels"]["data"] == "rows.json, held out" and row["shape"]["examples"] == 6
    assert sum(n for _, n in row["detail"]["by_steps"].values()) == 6
    write_examples(tmp_path / "valid.json", examples[:9])
    config = {"data": str(tmp_path / "rows.json"), "valid_data": str(tmp_path / "valid.json")}
    save_bundled_as(tmp_path / "run2", config=config)
    [row] = rows_of(accuracy("--checkpoint=run2", "--max_new_tokens=2")[1])
    assert row["labels"]["data"] == "valid.json, held out" and row["shape"]["examples"] == 9
    save_bundled_as(tmp_path / "run3", config=config, examples="a digest of others")
    code, _, err = accuracy("--checkpoint=run3")
    assert code == 2 and "trained on other examples than those of" in err and "valid.json" in err
    long = examples[0] | {"question": "Every lempus is a wumpus. " * 50 + examples[0]["question"]}
    write_examples(tmp_path / "long.json", [*examples[:9], long])  # which training skipped
    config |= {"valid_data": str(tmp_path / "long.json"), "skip_bad_rows": True}
    save_bundled_as(tmp_path / "run4", config=config)
    [row] = rows_of(accuracy("--checkpoint=run4", "--max_new_tokens=2")[1])
    assert row["shape"]["examples"] == 9
    (tmp_path / "rows.json").unlink()
    code, _, err = accuracy("--checkpoint=run")
    assert code == 2 and "rows.json does not exist" in err and "Give --data: a file" in err


def test_changed_file_holds_out_no_examples(accuracy, tmp_path):
    """If the file grew, the held-out tenth would be a different one, mostly trained on."""
    examples = prosqa.generate(60, 5, prosqa.GraphConfig(13, 2, 3))
    path, grown = tmp_path / "rows.json", tmp_path / "grown.json"
    write_examples(path, examples[:50])
    config = {"data": str(path)}
    _, digest = checkpoint.load_run_data(TrainConfig(**config), {})
    save_bundled_as(tmp_path / "run", config=config, examples=digest)
    assert accuracy("--checkpoint=run", "--max_new_tokens=2")[0] == 0
    write_examples(grown, examples)
    grown.replace(path)
    code, _, err = accuracy("--checkpoint=run")
    assert code == 2 and "rows.json" in err and err.count("\n") == 2
    assert "trained on other examples than those of" in err


def test_bfloat16_is_used_and_recorded(accuracy, tmp_path):
    """The weights stayed in float32, or the row said float32."""
    code, _, err = accuracy("--n=60", "--dtype=bfloat16", "--out=rows.jsonl")
    assert (code, err) == (0, "")
    [row] = read_results(tmp_path / "rows.jsonl")
    assert row["dtype"] == "bfloat16" and row["value"] > 0.9
