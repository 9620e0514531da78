"""python -m nanococonut.data: write, describe and convert examples; mistakes exit with code 2."""

import json

import pytest
from nanococonut.data.statistics import PRONTOQA_RELEASED

from nanococonut.data import gsm8k, prontoqa, prosqa
from nanococonut.data.files import parse_gsm8k_line, parse_raw_prontoqa, read_examples

GOOD = {"question": "Is it so?", "steps": [], "answer": "Yes."}
LINES = [f"What is {i} and {i}?||<<{i}+{i}={2 * i}>> #### {2 * i}" for i in range(30)]


@pytest.fixture
def command(script, tmp_path):
    """command(*args) -> (exit code, stdout, stderr), in a folder with a few files."""
    (tmp_path / "lines.txt").write_text("\n".join(LINES))
    (tmp_path / "mixed.jsonl").write_text(f"{json.dumps(GOOD)}\nno\n{{}}\n")
    (tmp_path / "there.json").write_text("[]")
    return lambda *args: script(*args, script="nanococonut/data/__main__.py")


def shown(out: str) -> dict[str, list[str]]:
    """The table under the first line: key -> its columns, as far as they are there."""
    head, *examples = out.splitlines()[1:]
    width = len(head) - 20
    return {example[:width].strip(): example[width:].split() for example in examples}


def test_prosqa_is_written_and_described(command):
    """A flag could be parsed but not reach the generator."""
    size = ("--n_nodes=13", "--min_hops", "2", "--max_hops", "3", "--matched")
    code, out, err = command("prosqa", "--n", "50", "--seed", "4", "--out", "mini.json", *size)
    assert (code, err) == (0, "") and out == "50 examples in mini.json (seed 4)\n"
    mini = prosqa.GraphConfig(n_nodes=13, min_hops=2, max_hops=3, matched=True)
    assert read_examples("mini.json") == prosqa.generate(50, 4, mini)
    code, out, err = command("prosqa", "--stats", "mini.json")
    assert (code, err) == (0, "")
    table = shown(out)
    assert table["deeper"] == ["0.500", "0.925"]
    assert table["nodes"][1] == "22.800" and 9 < float(table["nodes"][0]) < 13
    assert float(table["hops 2"][0]) + float(table["hops 3"][0]) == pytest.approx(1, abs=2e-3)


def test_prontoqa_is_written_and_described(command):
    """A flag could be parsed but not reach the generator."""
    args = ("--n", "20", "--seed", "3", "--hops", "2", "--out", "two.json")
    code, out, err = command("prontoqa", *args)
    assert (code, err) == (0, "")
    assert read_examples("two.json") == prontoqa.generate(20, 3, prontoqa.OntologyConfig(hops=2))
    code, out, err = command("prontoqa", "--stats", "two.json")
    assert (code, err) == (0, "") and "20 examples of two.json" in out
    for key, released in PRONTOQA_RELEASED.items():
        assert shown(out)[key][-1] == f"{released:.3f}"


def test_gsm8k_from_the_hub_whole_or_sampled(command, monkeypatch):
    """A larger sample has to begin with the smaller one."""
    examples = [parse_gsm8k_line(line) for line in LINES]
    monkeypatch.setattr(gsm8k, "from_hub", lambda *args: (examples, "c0ffee"))
    code, out, err = command("gsm8k", "--out", "all.json")
    assert (code, err) == (0, "") and "30 examples in all.json" in out
    assert read_examples("all.json") == examples
    for n, seed, name in ((5, 1, "a"), (12, 1, "b"), (12, 2, "c")):
        assert command("gsm8k", "--n", n, "--seed", seed, "--out", f"{name}.json")[0] == 0
    a, b, c = (read_examples(f"{name}.json") for name in "abc")
    assert a == b[:5] and b != c
    assert len({example["question"] for example in b}) == 12
    assert all(example in examples for example in b + c)
    code, out, err = command("gsm8k", "--n", 31, "--out", "x")
    assert code == 2 and "has 30 examples" in err


def test_gsm8k_from_the_hub_reports_the_commit(command, monkeypatch):
    """Without the commit, the same examples cannot be had again."""
    asked = []

    def from_hub(split, name, revision, skipped):
        asked.append((split, name, revision))
        skipped.append("example 3: bad")
        return [GOOD], "c0ffee"

    monkeypatch.setattr(gsm8k, "from_hub", from_hub)
    args = ("--split=test", "--revision=v1", "--out=hub.json", "--skip_bad_rows")
    code, out, err = command("gsm8k", *args)
    assert (code, err) == (0, "") and asked == [("test", gsm8k.HUB[0], "v1")]
    assert read_examples("hub.json") == [GOOD]
    assert "1 of 2 examples skipped, the first: example 3: bad" in out and "c0ffee" in out


def test_any_format_is_converted(command):
    """convert could keep the input's format."""
    assert command("convert", "lines.txt", "--out", "a.json")[0] == 0
    assert read_examples("a.json") == read_examples("lines.txt")
    assert isinstance(json.loads(open("a.json").read()), list)
    code, out, err = command("convert", "mixed.jsonl", "--out", "b.json", "--skip_bad_rows")
    assert (code, err) == (0, "") and read_examples("b.json") == [GOOD]
    assert "2 of 3 examples skipped, the first: mixed.jsonl, line 2: not JSON" in out


def test_raw_prontoqa_is_converted(command, released):
    """The public generator's file has another layout."""
    raw = released / "prontoqa_raw_5hop_sample.json"
    assert command("convert", raw, "--out", "raw.json")[0] == 0
    assert read_examples("raw.json") == [
        parse_raw_prontoqa(example) for example in json.loads(raw.read_text()).values()
    ]


def test_help_lists_every_task(command):
    """Help comes from TASKS; a "%" in it breaks argparse."""
    code, out, _ = command("--help")
    assert code == 0 and all(f"\n  {task} " in out for task in ("prosqa", "prontoqa", "gsm8k"))
    code, out, _ = command("prosqa", "--help")
    assert code == 0 and "--matched" in out and "[28]" in out


@pytest.mark.parametrize(
    "args, complaint",
    [
        ((), "TASK"),
        (("gsm9k",), "invalid choice: 'gsm9k'"),
        (("prosqa",), "--out FILE"),
        (("prosqa", "--out", "a", "--stats", "b"), "one of the two"),
        (("prosqa", "--stats", "no.json"), "no.json cannot be read"),
        (("prosqa", "--stats", "lines.txt"), "does not store its graph"),
        (("prosqa", "--out", "there.json"), "there.json exists already"),
        (("prosqa", "--out", "no/x", "--n", "many"), "--n"),
        (("prosqa", "--out", "no/x", "--n", "0"), "--n 0"),
        (("prosqa", "--out", "no/x", "--seed", "-1"), "--seed -1"),
        (("prosqa", "--out", "no/x", "--n", "5"), "no/x cannot be written"),
        (("prosqa", "--out", "no/x", "--min_hops", "9"), "max_hops=6"),
        (("prosqa", "--out", "x", "--from", "lines.txt"), "--from"),
        (("gsm8k", "--n", "-1", "--out", "x"), "--n -1"),
        (("gsm8k", "--out", "there.json"), "there.json exists already"),
        (("gsm8k", "--stats", "x.json"), "--stats"),
        (("gsm8k", "--out", "x", "--split", "valid"), "invalid choice"),
        (("convert",), "IN"),
        (("convert", "lines.txt"), "--out"),
        (("convert", "lines.txt", "--out", "there.json"), "there.json exists already"),
        (("convert", "there.json", "--out", "x"), "there.json holds no examples"),
        (("convert", "mixed.jsonl", "--out", "x"), "line 2: not JSON"),
    ],
)
def test_a_wrong_command_is_one_error_and_code_2(command, tmp_path, args, complaint):
    """argparse prints the whole usage; a failed command must write nothing."""
    code, out, err = command(*args)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and complaint in err and 1 <= err.count("\n") <= 2
    assert not (tmp_path / "x").exists() and (tmp_path / "there.json").read_text() == "[]"
