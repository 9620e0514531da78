"""sample.py answers from the bundled checkpoint, and refuses bad input in two lines."""

import json
import os
import re
import sys
from functools import partial
from select import select

import pytest
from helpers import save_random_run

import nanococonut
from nanococonut.evaluation.readout import concept_probabilities
from nanococonut.weights import checkpoint

QUESTION = (
    "Tom is a terpus. Every terpus is a brimpus. Sam is a gorpus. Every gorpus is a lorpus. "
    "Every brimpus is a lempus. Is Tom a lorpus or lempus?"
)


@pytest.fixture
def sample(script):
    """Return sample(*argv) -> (exit code, stdout, stderr), in a folder without a run."""
    return partial(script, script="sample.py")


def test_bundled_checkpoint_is_small_and_described():
    """Guards against megabytes in the repository, and a model of unknown origin."""
    manifest = checkpoint.verify(checkpoint.BUNDLED)
    assert sum(p.stat().st_size for p in checkpoint.BUNDLED.iterdir()) < 1_000_000
    assert (manifest["method"], manifest["n_thoughts"]) == ("coconut", 6)
    assert manifest["trained_with"]["commit"] and manifest["config"]["task"] == "prosqa"


def test_bundled_model_answers_its_own_question(sample):
    """Guards a new user's first command: an answer and thoughts without a run."""
    code, out, err = sample("--latent", "6", "--seed", "1")
    assert (code, err) == (0, "")
    for words in ("bundled", "question", "Thoughts", "first token after", "ms per thought"):
        assert words in out
    assert "(correct)" in out or "(wrong:" in out  # the answer to its own question is known
    assert "not trained to the end" not in out
    assert out.count("%") >= 30  # six thoughts, five tokens each


def test_most_answers_are_correct(sample):
    """Guards against a prompt in a different format than in training."""
    outs = [sample("--latent=6", f"--seed={seed}")[1] for seed in range(12)]
    assert sum("(correct)" in out for out in outs) >= 9  # by guessing: 299 in 4096


@pytest.mark.parametrize("latent", [0, 1, 9])
def test_any_number_of_thoughts(sample, latent):
    """Guards against a division by zero without thoughts, or with more than in training."""
    code, out, _ = sample(f"--latent={latent}", "--question", QUESTION)
    assert code == 0 and "trained with 6 thoughts" in out
    assert ("ms per thought" in out) == (latent > 0)


def test_a_typed_question_in_sentences(sample):
    """Guards the conversion to the compact format that the bundled model reads."""
    code, out, _ = sample("--question", QUESTION)
    assert code == 0 and "Tom is a l" in out and "(correct)" in out
    assert "warning" not in out


def test_interactive_mode(sample, monkeypatch):
    """Errors do not end it, an empty line asks a new question, and Ctrl-D ends it."""
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    lines = iter([QUESTION, "What is 2+2?", ""])

    def read(*_, **__):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("rich.console.Console.input", read)
    code, out, _ = sample("--latent=6", "--seed=3")
    out = re.sub(r"\x1b\[\d+m", "", out)  # colours
    assert code == 0 and "Tom is a lempus.  (correct)" in out
    assert "not a ProsQA question" in out and out.count("first token after") == 3


def test_a_bad_question_in_a_terminal_is_an_error(sample, monkeypatch):
    """Guards against exit code 0 for a bad --question in a terminal."""
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    code, _, err = sample("--question=What is 2+2?")
    assert code == 2 and "not a ProsQA question" in err


@pytest.fixture
def piped(monkeypatch):
    """Return piped(data), which makes stdin a pipe with this data (None: silent, but open)."""

    def pipe(data):
        read, write = os.pipe()
        if data is not None:
            os.write(write, data)
            os.close(write)
        monkeypatch.setattr("sys.stdin", os.fdopen(read, encoding="utf-8"))

    return pipe


def test_piped_questions_are_answered(sample, piped):
    """Guards against ignoring the questions on stdin."""
    other = QUESTION.replace("Is Tom a", "Is Sam a")
    piped(f"\ufeff{QUESTION}\n\n{other}\r\n".encode())
    code, out, err = sample("--latent=6")
    asked = [line[10:] for line in out.splitlines() if line.startswith("question  ")]
    assert (code, err, asked) == (0, "", [QUESTION, other])
    assert "Tom is a lempus.  (correct)" in out and "Sam is a lorpus.  (correct)" in out


def test_a_bad_piped_question_does_not_end_the_rest(sample, piped):
    """Guards against questions that nobody asks because of one bad line before them."""
    piped(f"What is 2+2?\n{QUESTION}\n".encode())
    code, out, err = sample()
    assert code == 2 and err.startswith("error: not a ProsQA question") and err.count("\n") == 2
    assert out.count("answer") == 1


def test_a_typed_question_leaves_stdin_alone(sample, piped):
    """Guards a shell's `while read` loop, whose next lines are on stdin."""
    piped(b"not for us\n")
    code, out, _ = sample("--latent=6", "--question", QUESTION)
    assert code == 0 and out.count("question  ") == 1 and sys.stdin.readline() == "not for us\n"


@pytest.mark.parametrize("data", [b"", b"\n \n", None], ids=["closed", "blank", "silent"])
def test_stdin_without_a_question_asks_the_tasks_own(sample, piped, monkeypatch, data):
    """Guards against an error or a hang: a job runner's stdin may be empty or silent."""
    monkeypatch.setattr("select.select", lambda r, w, x, t: select(r, w, x, 0))  # without the wait
    piped(data)
    code, out, _ = sample("--latent=6", "--seed=1")
    assert code == 0 and out.count("question  ") == 1 and "first token after" in out
    assert ("no input on stdin" in out) == (data is None)
    monkeypatch.setattr("sys.stdin", None)  # closed by the shell
    assert sample("--latent=6", "--seed=1")[0] == 0


def test_bad_bytes_on_stdin_are_no_traceback(sample, piped):
    """Guards against a UnicodeDecodeError."""
    piped(b"caf\xe9?\n")
    code, _, err = sample()
    assert code == 2 and "not a ProsQA question" in err and err.count("\n") == 2


def test_missing_data_of_a_run_names_the_question(sample, tokenizer, tmp_path):
    """Guards against an error that names the option of another script."""
    save_random_run(tmp_path / "run", tokenizer)  # its data file does not exist
    code, _, err = sample("--out_dir=run")
    assert code == 2 and "/home/somebody/rows.json does not exist" in err
    assert "--question=" in err and err.count("\n") == 2
    code, out, _ = sample("--out_dir=run", "--question", QUESTION)
    assert code == 0 and "not trained to the end" in out


def test_unknown_words_are_warned_of(sample):
    """Guards against a silent answer to words that the model reads as bytes."""
    code, out, _ = sample("--question", QUESTION.replace("brimpus", "zonk"))
    assert code == 0 and "not in the vocabulary: zonk" in out


REFUSED = {
    "negative": (["--latent=-1"], "latent=-1"),
    "negative, apart": (["--latent", "-1"], "latent=-1"),
    "not a number": (["--latent=six"], "latent='six'"),
    "no run there": (["--out_dir=nowhere"], "nowhere does not exist"),
    "nothing in it": (["--out_dir=."], "holds no checkpoint"),
    "not ProsQA": (["--question=What is 2+2?"], "not a ProsQA question"),
    "too long": (
        ["--question", QUESTION.replace("Sam", "Sam is a gorpus. " * 99 + "Sam")],
        "leaves room for 0",
    ),
    "special token": (["--question", QUESTION.replace("Sam", "<|latent|>")], "ProsQA"),
    "no device": (["--device=toaster"], "auto, cpu, cuda"),
    "too many thoughts": (["--latent=1000"], "1000 thoughts do not fit"),
    "a bare question": (["Is Tom a lempus?"], "Options start with --"),
    "another name": (["--checkpoint=out"], "Did you mean --out_dir?"),
    "a file": ([f"--out_dir={__file__}"], "is a file, not a folder"),
    "unknown key": (["--latnt=3"], "Did you mean --latent?"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_two_lines(sample, case):
    """Guards against tracebacks."""
    argv, words = REFUSED[case]
    code, _, err = sample(*argv)
    assert code == 2 and words in err, err
    assert err.startswith("error: ") and err.count("\n") <= 2 and "Traceback" not in err


def test_accuracy_bench_of_the_bundled_model(sample):
    """Guards the README's accuracy of the bundled model."""
    code, out, err = sample("--n=60", script="bench/accuracy.py")
    assert (code, err) == (0, "")
    line = json.loads(out.splitlines()[-1])
    [row] = line["rows"]
    assert row["labels"]["checkpoint"] == "bundled" and row["value"] > 0.85
    assert row["shape"] == {"examples": 60, "thoughts": 6}
    assert row["detail"]["shortcuts"]["random"] == 0.5 and line["commit"]
    code, _, err = sample("--data=none.json", script="bench/accuracy.py")
    assert code == 2 and "none.json" in err


# an edge from terpus to lempus skips brimpus; gorpus and lorpus are Sam's
GRAPH = (
    "Tom is a terpus. Every terpus is a brimpus. Every brimpus is a lempus. Every terpus is a "
    "lempus. Every lempus is a yumpus. Every yumpus is a wumpus. Sam is a gorpus. Every gorpus is "
    "a lorpus. Is Tom a lorpus or wumpus?"
)
STEPS = {"terpus": "1", "brimpus": "2", "lempus": "2", "yumpus": "3", "wumpus": "4"}
STEPS |= {"gorpus": "-", "lorpus": "-"}  # counted by hand


def test_nodes_have_names_and_distances(sample):
    """Guards the three most probable concepts after each thought, and their distances."""
    code, out, err = sample("--latent=6", "--nodes", "--question", GRAPH)
    assert (code, err) == (0, "")
    table = out[out.index("Next concept if") : out.index("answer")]
    lines = [line for line in table.splitlines() if "%" in line]
    engine = nanococonut.load(device="cpu")
    shown = {}
    for k, line in enumerate(lines):
        values = concept_probabilities(engine, GRAPH, k)
        best = sorted(values, key=values.get, reverse=True)[:3]
        cells = re.findall(r"(\w+) \(([-\d]+)\) ([.\d]+%)", line)
        total = f"{sum(values.values()):.1%}"
        assert f" {total} " in line
        if total == "0.0%":  # no fractions of a total of 0
            assert not cells and " no concept " in line
            continue
        assert [node for node, _, _ in cells] == best
        assert [p for _, _, p in cells] == [f"{values[n]:.1%}" for n in best]
        shown |= {node: steps for node, steps, _ in cells}
    assert len(lines) == 7 and lines[-1].count("no concept") == 1
    assert {node: STEPS[node] for node in shown} == shown and "-" in shown.values()
    assert "no concept: the model would write another word" in out


def test_numbers_stay_whole_in_a_narrow_terminal(sample, monkeypatch):
    """Guards against numbers cut to "1…"."""
    monkeypatch.setenv("COLUMNS", "50")
    code, out, _ = sample("--latent=100", "--question", QUESTION)
    assert code == 0 and "┃ #   ┃" in out and "│ 100 │" in out and "│ 9   │" in out


def test_tokens_are_sampled_at_a_temperature(sample):
    """Guards against sampling that ignores the seed."""
    outs = {sample("--latent=0", "--temperature=9", f"--seed={s}", "--question", QUESTION)[1]
            for s in range(3)}  # fmt: skip
    answers = {out[out.index("answer") : out.index("first token")] for out in outs}
    assert len(answers) == 3
    code, _, err = sample("--temperature=-1")
    assert code == 2 and "temperature=-1" in err


def test_the_backend_is_named_and_never_replaced(sample):
    """Guards against a silent fallback."""
    code, out, err = sample("--kernels=triton", "--device=cpu")
    assert code == 2 and "triton cannot run here" in err and err.count("\n") <= 2
    assert "kernels: torch (as requested)" in sample("--kernels=torch", "--seed=1")[1]


def test_a_view_is_written(sample, tmp_path):
    """Guards the page of a typed question, which has no generated graph."""
    page = tmp_path / "view.html"
    code, out, _ = sample("--view", page, "--question", QUESTION)
    assert code == 0 and str(page.name) in out
    assert "brimpus" in page.read_text() and "http" not in page.read_text()
    code, _, err = sample("--view", page, "--latent=0", "--question", QUESTION)
    assert code == 2 and "--view needs" in err
