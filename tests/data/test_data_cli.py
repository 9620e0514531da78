"""python -m nanococonut.data: rows written, looked at and converted; mistakes end with code 2."""

import json

import pytest

from nanococonut.data import gsm8k, prosqa
from nanococonut.data.files import read_examples

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
    head, *rows = out.splitlines()[1:]
    width = len(head) - 20
    return {row[:width].strip(): row[width:].split() for row in rows}


def test_prosqa_is_written_and_its_statistics_shown(command):
    size = ("--n_nodes=13", "--min_hops", "2", "--max_hops", "3", "--matched")
    code, out, err = command("prosqa", "--n", "50", "--seed", "4", "--out", "mini.json", *size)
    assert (code, err) == (0, "") and out == "50 rows in mini.json (seed 4)\n"
    mini = prosqa.GraphConfig(n_nodes=13, min_hops=2, max_hops=3, matched=True)
    assert read_examples("mini.json") == prosqa.generate(50, 4, mini)
    code, out, err = command("prosqa", "--stats", "mini.json")
    assert (code, err) == (0, "")
    table = shown(out)
    assert table["deeper"] == ["0.500", "0.925"]
    assert table["nodes"][1] == "22.800" and 9 < float(table["nodes"][0]) < 13
    assert float(table["hops 2"][0]) + float(table["hops 3"][0]) == pytest.approx(1, abs=2e-3)


def test_prontoqa_is_written_and_its_statistics_shown(command):
    prontoqa = pytest.importorskip("nanococonut.data.prontoqa")
    args = ("--n", "20", "--seed", "3", "--hops", "2", "--out", "two.json")
    code, out, err = command("prontoqa", *args)
    assert (code, err) == (0, "")
    assert read_examples("two.json") == prontoqa.generate(20, 3, prontoqa.OntologyConfig(hops=2))
    code, out, err = command("prontoqa", "--stats", "two.json")
    assert (code, err) == (0, "") and "20 rows of two.json" in out
    for key, released in prontoqa.RELEASED.items():
        assert shown(out)[key][-1] == f"{released:.3f}"


def test_gsm8k_rows_come_from_a_file_all_or_drawn(command):
    code, out, err = command("gsm8k", "--from", "lines.txt", "--out", "all.json")
    assert (code, err) == (0, "") and "30 rows in all.json" in out
    rows = read_examples("all.json")
    assert rows == [gsm8k.row_of_line(line) for line in LINES]
    for n, seed, name in ((5, 1, "a"), (12, 1, "b"), (12, 2, "c")):
        args = ("--from", "lines.txt", "--n", n, "--seed", seed, "--out", f"{name}.json")
        assert command("gsm8k", *args)[0] == 0
    a, b, c = (read_examples(f"{name}.json") for name in "abc")
    assert a == b[:5] and b != c  # more rows begin with the same ones
    assert len({row["question"] for row in b}) == 12 and all(row in rows for row in b + c)
    code, out, err = command("gsm8k", "--stats", "all.json")
    assert (code, err) == (0, "") and shown(out)["steps 1"] == ["1.000", "0.052"]


def test_gsm8k_rows_come_from_the_hub_with_their_commit(command, monkeypatch):
    asked = []

    def from_hub(split, name, revision, skipped):
        asked.append((split, name, revision))
        skipped.append("row 3: bad")
        return [GOOD], "c0ffee"

    monkeypatch.setattr(gsm8k, "from_hub", from_hub)
    args = ("--split=test", "--revision=v1", "--out=hub.json", "--skip_bad_rows")
    code, out, err = command("gsm8k", *args)
    assert (code, err) == (0, "") and asked == [("test", gsm8k.HUB[0], "v1")]
    assert read_examples("hub.json") == [GOOD]
    assert "1 of 2 rows skipped, the first: row 3: bad" in out and "c0ffee" in out


def test_any_format_is_converted(command):
    assert command("convert", "lines.txt", "--out", "a.json")[0] == 0
    assert read_examples("a.json") == read_examples("lines.txt")
    assert isinstance(json.loads(open("a.json").read()), list)
    code, out, err = command("convert", "mixed.jsonl", "--out", "b.json", "--skip_bad_rows")
    assert (code, err) == (0, "") and read_examples("b.json") == [GOOD]
    assert "2 of 3 rows skipped, the first: mixed.jsonl, line 2: not JSON" in out


def test_raw_prontoqa_is_converted(command, released):
    prontoqa = pytest.importorskip("nanococonut.data.prontoqa")
    raw = released / "prontoqa_raw_5hop_sample.json"
    assert command("convert", raw, "--out", "raw.json")[0] == 0
    assert read_examples("raw.json") == prontoqa.rows_of_raw(json.loads(raw.read_text()))


def test_help_lists_every_task(command):
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
        (("prosqa", "--out", "a", "--stats", "b"), "One of the two"),
        (("prosqa", "--stats", "no.json"), "no.json cannot be read"),
        (("prosqa", "--stats", "lines.txt"), "does not hold its graph"),
        (("prosqa", "--out", "there.json"), "there.json exists already"),
        (("prosqa", "--out", "no/x", "--n", "many"), "--n"),
        (("prosqa", "--out", "no/x", "--n", "0"), "--n 0"),
        (("prosqa", "--out", "no/x", "--seed", "-1"), "--seed -1"),
        (("prosqa", "--out", "no/x", "--n", "5"), "no/x cannot be written"),
        (("prosqa", "--out", "no/x", "--min_hops", "9"), "max_hops=6"),
        (("prosqa", "--out", "x", "--from", "lines.txt"), "--from"),
        (("gsm8k", "--from", "lines.txt", "--out", "x", "--n", "31"), "has 30 rows"),
        (("gsm8k", "--from", "lines.txt", "--out", "x", "--n", "-1"), "--n -1"),
        (("gsm8k", "--from", "lines.txt", "--out", "x", "--split", "test"), "Give one of them"),
        (("gsm8k", "--from", "mixed.jsonl", "--out", "x"), "mixed.jsonl, line 2: not JSON"),
        (("gsm8k", "--from", "lines.txt", "--out", "there.json"), "there.json exists already"),
        (("gsm8k", "--out", "x", "--split", "valid"), "invalid choice"),
        (("convert",), "IN"),
        (("convert", "lines.txt"), "--out"),
        (("convert", "lines.txt", "--out", "there.json"), "there.json exists already"),
        (("convert", "there.json", "--out", "x"), "there.json holds no rows"),
        (("convert", "mixed.jsonl", "--out", "x"), "line 2: not JSON"),
    ],
)
def test_a_wrong_command_is_one_error_and_code_2(command, tmp_path, args, complaint):
    code, out, err = command(*args)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and complaint in err and 1 <= err.count("\n") <= 2
    assert not (tmp_path / "x").exists() and (tmp_path / "there.json").read_text() == "[]"
