"""python -m nanococonut.data writes examples; mistakes exit with code 2."""

import runpy
import sys

import pytest

from nanococonut.data import gsm8k, prontoqa, prosqa
from nanococonut.data.files import read_examples

GOOD = {"question": "Is it so?", "steps": [], "answer": "Yes."}


@pytest.fixture
def command(script, tmp_path):
    """Return command(*args) -> (exit code, stdout, stderr), in a folder with one file."""
    (tmp_path / "there.json").write_text("[]")
    return lambda *args: script(*args, script="nanococonut/data/__main__.py")


def test_prosqa_is_written(command):
    """A flag could be parsed but not reach the generator."""
    size = ("--n_nodes=13", "--min_hops", "2", "--max_hops", "3")
    args = ("--data=prosqa_matched", "--n", "50", "--seed", "4", "--out", "mini.json", *size)
    code, out, err = command(*args)
    assert (code, err) == (0, "") and out == "50 examples in mini.json (seed 4)\n"
    mini = prosqa.GraphConfig(n_nodes=13, min_hops=2, max_hops=3, matched=True)
    assert read_examples("mini.json") == prosqa.generate(50, 4, mini)


def test_help_names_the_command(monkeypatch, capsys):
    """The usage line said __main__.py, which nobody can run."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/nanococonut/data/__main__.py", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_module("nanococonut.data", run_name="__main__", alter_sys=True)
    assert capsys.readouterr().out.startswith("usage: python -m nanococonut.data [-h]")


def test_prontoqa_is_written(command):
    """A flag could be parsed but not reach the generator."""
    size = ("--min_hops=1", "--max_hops=2")
    code, _, err = command("--data=prontoqa", "--n=20", "--seed=3", "--out=two.json", *size)
    assert (code, err) == (0, "")
    assert read_examples("two.json") == prontoqa.generate(20, 3, prontoqa.OntologyConfig(hops=2))
    code, _, err = command("--data=prontoqa_matched", "--n=5", "--out=matched.json")
    assert (code, err) == (0, "")  # the default number of hops was ProsQA's


def test_gsm8k_from_the_hub_reports_the_commit(command, monkeypatch):
    """Without the commit, nobody could download the same examples again."""
    requests = []

    def from_hub(split, revision):
        requests.append((split, revision))
        return [GOOD], "c0ffee"

    monkeypatch.setattr(gsm8k, "from_hub", from_hub)
    code, out, err = command("--data=gsm8k", "--split=test", "--revision=v1", "--out=hub.json")
    assert (code, err) == (0, "") and requests == [("test", "v1")]
    assert read_examples("hub.json") == [GOOD] and "--revision=c0ffee" in out


def test_help_lists_every_split(command):
    """Help comes from TASKS; a "%" in it breaks argparse."""
    code, out, _ = command("--help")
    words = out.replace(",", " ").split()
    assert code == 0 and {*prosqa.SPLITS, "prontoqa", "prontoqa_matched", "gsm8k"} <= {*words}


@pytest.mark.parametrize(
    "args, complaint",
    [
        (("prosca",), "data='prosca' is unknown. Did you mean prosqa?"),
        (("--data=gsm9k",), "data='gsm9k' is unknown. Did you mean gsm8k?"),
        (("--out", "there.json"), "there.json cannot be written: File exists"),
        (("--out", "x", "--n", "many"), "n='many'"),
        (("--out", "x", "--n", "0"), "n=0"),
        (("--out", "x", "--seed", "-1"), "seed=-1"),
        (("--out", "no/x", "--n", "5"), "no/x cannot be written"),
        (("--out", "x", "--min_hops", "9"), "max_hops=6"),
        (("--out", "x", "--from", "lines.txt"), "--from"),
        (("--out", "x", "--data=gsm8k", "--split", "valid"), "split='valid' is unknown"),
    ],
)
def test_a_wrong_command_is_one_error_and_code_2(command, tmp_path, args, complaint):
    """argparse prints the whole usage; a failed command must write nothing."""
    code, out, err = command(*args)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and complaint in err and 1 <= err.count("\n") <= 2
    assert not (tmp_path / "x").exists() and (tmp_path / "there.json").read_text() == "[]"
