"""python -m nanococonut.data: write examples; mistakes exit with code 2."""

import pytest

from nanococonut.data import gsm8k, prontoqa, prosqa
from nanococonut.data.files import read_examples

GOOD = {"question": "Is it so?", "steps": [], "answer": "Yes."}


@pytest.fixture
def command(script, tmp_path):
    """command(*args) -> (exit code, stdout, stderr), in a folder with one file."""
    (tmp_path / "there.json").write_text("[]")
    return lambda *args: script(*args, script="nanococonut/data/__main__.py")


def test_prosqa_is_written(command):
    """A flag could be parsed but not reach the generator."""
    size = ("--n_nodes=13", "--min_hops", "2", "--max_hops", "3", "--matched")
    code, out, err = command("prosqa", "--n", "50", "--seed", "4", "--out", "mini.json", *size)
    assert (code, err) == (0, "") and out == "50 examples in mini.json (seed 4)\n"
    mini = prosqa.GraphConfig(n_nodes=13, min_hops=2, max_hops=3, matched=True)
    assert read_examples("mini.json") == prosqa.generate(50, 4, mini)


def test_prontoqa_is_written(command):
    """A flag could be parsed but not reach the generator."""
    args = ("--n", "20", "--seed", "3", "--hops", "2", "--out", "two.json")
    code, out, err = command("prontoqa", *args)
    assert (code, err) == (0, "")
    assert read_examples("two.json") == prontoqa.generate(20, 3, prontoqa.OntologyConfig(hops=2))


def test_gsm8k_from_the_hub_reports_the_commit(command, monkeypatch):
    """Without the commit, the same examples cannot be had again."""
    asked = []

    def from_hub(split, revision, skipped):
        asked.append((split, revision))
        skipped.append("example 3: bad")
        return [GOOD], "c0ffee"

    monkeypatch.setattr(gsm8k, "from_hub", from_hub)
    args = ("--split=test", "--revision=v1", "--out=hub.json", "--skip_bad_rows")
    code, out, err = command("gsm8k", *args)
    assert (code, err) == (0, "") and asked == [("test", "v1")]
    assert read_examples("hub.json") == [GOOD]
    assert "1 of 2 examples skipped, the first: example 3: bad" in out and "c0ffee" in out


def test_help_lists_every_setting(command):
    """Help comes from the dataclasses; a "%" in it breaks argparse."""
    code, out, _ = command("prosqa", "--help")
    assert code == 0 and "--matched" in out and "[28]" in out and "--seed" in out
    code, out, _ = command("gsm8k", "--help")
    assert code == 0 and "train, validation, test" in out


@pytest.mark.parametrize(
    "args, complaint",
    [
        ((), "'' is not a task"),
        (("gsm9k",), "'gsm9k' is not a task"),
        (("prosqa", "--out", "there.json"), "there.json cannot be written: File exists"),
        (("prosqa", "--out", "no/x", "--n", "many"), "n='many'"),
        (("prosqa", "--out", "no/x", "--n", "0"), "n=0"),
        (("prosqa", "--out", "no/x", "--seed", "-1"), "seed=-1"),
        (("prosqa", "--out", "no/x", "--n", "5"), "no/x cannot be written"),
        (("prosqa", "--out", "no/x", "--min_hops", "9"), "max_hops=6"),
        (("prosqa", "--out", "x", "--from", "lines.txt"), "--from"),
        (("gsm8k", "--out", "x", "--split", "valid"), "split='valid' is unknown"),
    ],
)
def test_a_wrong_command_is_one_error_and_code_2(command, tmp_path, args, complaint):
    """argparse prints the whole usage; a failed command must write nothing."""
    code, out, err = command(*args)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and complaint in err and 1 <= err.count("\n") <= 2
    assert not (tmp_path / "x").exists() and (tmp_path / "there.json").read_text() == "[]"
