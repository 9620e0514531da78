"""sample.py answers at once from the bundled checkpoint, and refuses in two lines."""

import json
import re
from functools import partial

import pytest

from nanococonut.curriculum import Curriculum
from nanococonut.evaluation.probe import concept_probabilities
from nanococonut.weights import checkpoint

QUESTION = (
    "Tom is a terpus. Every terpus is a brimpus. Sam is a gorpus. Every gorpus is a lorpus. "
    "Every brimpus is a lempus. Is Tom a lorpus or lempus?"
)


@pytest.fixture
def sample(script):
    """sample(*argv) -> (exit code, stdout, stderr), in a folder without a run."""
    return partial(script, script="sample.py")


def test_the_bundled_checkpoint_is_small_whole_and_described():
    manifest = checkpoint.verify(checkpoint.BUNDLED)
    assert sum(p.stat().st_size for p in checkpoint.BUNDLED.iterdir()) < 1_000_000
    assert (manifest["method"], manifest["n_thoughts"]) == ("coconut", 6)
    assert manifest["trained_with"]["commit"] and manifest["config"]["task"] == "prosqa"


def test_it_answers_without_a_run_of_ones_own(sample):
    code, out, err = sample("--latent", "6", "--seed", "1")
    assert (code, err) == (0, "")
    for word in ("bundled", "question", "thought", "answer", "first word after", "ms a thought"):
        assert word in out
    assert "(right)" in out or "(wrong:" in out  # it knows the answer of its own questions
    assert out.count("%") >= 30  # six thoughts, five words each


def test_most_answers_are_right(sample):
    said = [sample("--latent=6", f"--seed={seed}")[1] for seed in range(12)]
    assert sum("(right)" in out for out in said) >= 9  # chance: 1 in 4096 * 299 for guessing


@pytest.mark.parametrize("latent", [0, 1, 9])
def test_any_number_of_thoughts(sample, latent):
    code, out, _ = sample(f"--latent={latent}", "--question", QUESTION)
    assert code == 0 and "trained to answer after 6" in out
    assert ("ms a thought" in out) == (latent > 0)


def test_a_typed_question_in_sentences(sample):
    code, out, _ = sample("--question", QUESTION)
    assert code == 0 and "Tom is a l" in out and "(right)" in out
    assert "never trained on" not in out


def test_unknown_words_are_warned_of(sample):
    code, out, _ = sample("--question", QUESTION.replace("brimpus", "zonk"))
    assert code == 0 and "never trained on: zonk" in out


@pytest.mark.parametrize("method", ["no_cot", "pause", "coconut_no_curriculum"])
def test_another_layout(sample, method):
    code, out, _ = sample(f"--method={method}", "--latent=0", "--seed=3")
    assert code == 0 and "answer" in out


REFUSED = {
    "negative": (["--latent=-1"], "latent=-1"),
    "negative, apart": (["--latent", "-1"], "latent=-1"),
    "not a number": (["--latent=six"], "latent='six'"),
    "no run there": (["--out_dir=nowhere"], "nowhere is not there"),
    "nothing in it": (["--out_dir=."], "holds no checkpoint"),
    "not ProsQA": (["--question=What is 2+2?"], "not a ProsQA question"),
    "too long": (["--question", QUESTION.replace("Sam", "Sam is a gorpus. " * 99 + "Sam")], "fit"),
    "special token": (["--question", QUESTION.replace("Sam", "<|latent|>")], "ProsQA"),
    "no device": (["--device=toaster"], "cannot be used"),
    "unknown key": (["--latnt=3"], "Did you mean --latent?"),
    "other thoughts": (["--method=soft_thought"], "trained by soft_thought"),
    "thoughts of no map": (["--method=projected"], "something else than this model"),
    "unknown method": (["--method=cots"], "Did you mean cot?"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_two_lines(sample, case):
    argv, words = REFUSED[case]
    code, _, err = sample(*argv)
    assert code == 2 and words in err, err
    assert err.startswith("error: ") and err.count("\n") <= 2 and "Traceback" not in err


def test_accuracy_bench_agrees_with_what_is_claimed(sample):
    code, out, err = sample("--n=60", script="bench/accuracy.py")
    assert (code, err) == (0, "")
    line = json.loads(out.splitlines()[-1])
    [row] = line["rows"]
    assert row["labels"]["checkpoint"] == "bundled" and row["value"] > 0.85
    assert row["shape"] == {"examples": 60, "thoughts": 6}
    assert row["detail"]["shortcuts"]["random"] == 0.5 and line["commit"]
    code, _, err = sample("--data=none.json", script="bench/accuracy.py")
    assert code == 2 and "none.json" in err


# a short cut from terpus to lempus past brimpus; gorpus and lorpus are Sam's
GRAPH = (
    "Tom is a terpus. Every terpus is a brimpus. Every brimpus is a lempus. Every terpus is a "
    "lempus. Every lempus is a yumpus. Every yumpus is a wumpus. Sam is a gorpus. Every gorpus is "
    "a lorpus. Is Tom a lorpus or wumpus?"
)
AWAY = {"terpus": "1", "brimpus": "2", "lempus": "2", "yumpus": "3", "wumpus": "4"}
AWAY |= {"gorpus": "-", "lorpus": "-"}  # counted by hand


def test_nodes_are_named_with_their_distance(sample):
    """For 0, 1, ... thoughts the three likeliest concepts of nodes.py, and how far each is."""
    code, out, err = sample("--latent=6", "--nodes", "--question", GRAPH)
    assert (code, err) == (0, "")
    table = out[out.index("if it had to speak") : out.index("answer")]
    lines = [line for line in table.splitlines() if "%" in line]
    model, tokenizer, _ = checkpoint.load(checkpoint.BUNDLED)
    shown = {}
    for k, line in enumerate(lines):
        values = concept_probabilities(model, tokenizer, Curriculum("coconut"), GRAPH, "compact", k)
        best = sorted(values, key=values.get, reverse=True)[:3]
        found = re.findall(r"(\w+) \(([-\d]+)\) (\d+%)", line)
        total = sum(values.values())
        assert [node for node, _, _ in found] == best
        assert [share for _, _, share in found] == [f"{values[n] / total:.0%}" for n in best]
        assert f" {total:.1%} " in line
        shown |= {node: away for node, away, _ in found}
    assert len(lines) == 7 and shown == AWAY


def test_words_are_drawn_at_a_temperature(sample):
    said = {sample("--latent=0", "--temperature=9", f"--seed={s}", "--question", QUESTION)[1]
            for s in range(3)}  # fmt: skip
    answers = {out[out.index("answer") : out.index("first word")] for out in said}
    assert len(answers) == 3
    code, _, err = sample("--temperature=-1")
    assert code == 2 and "temperature=-1" in err


def test_kernels_that_cannot_run_are_an_error_and_what_runs_is_said(sample):
    code, out, err = sample("--kernels=triton", "--device=cpu")
    assert code == 2 and "triton cannot run here" in err and err.count("\n") <= 2
    assert "kernels: torch (as asked for)" in sample("--kernels=torch", "--seed=1")[1]
