"""Files of rows: what is read and written, and what is said about files that are none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanococonut.data import prosqa, read_rows, write_rows
from nanococonut.errors import UserError, main_guard

ROOT = Path(__file__).parents[1]
GOOD = {"question": "Is it so?", "steps": ["It is.", "So it is."], "answer": "Yes."}


def test_json_and_json_lines_are_read_alike(tmp_path):
    rows = [GOOD, {**GOOD, "steps": [], "idx": 7}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "c.json").write_text("\ufeff" + json.dumps(rows, indent=2), encoding="utf-8")
    for name in ("a.json", "b.jsonl", "c.json"):
        assert read_rows(tmp_path / name) == rows


def test_written_rows_are_read_back(tmp_path):
    rows = prosqa.generate(20, 3) + [{**GOOD, "question": 'Zoë\n"☃"'}]
    write_rows(tmp_path / "rows.json", rows)
    assert read_rows(tmp_path / "rows.json") == rows
    assert os.listdir(tmp_path) == ["rows.json"]  # no temporary file is left


def test_a_file_is_overwritten_only_when_told_to(tmp_path):
    path = tmp_path / "rows.json"
    write_rows(path, [GOOD])
    with pytest.raises(UserError, match=r"rows\.json exists already"):
        write_rows(path, [GOOD, GOOD])
    assert read_rows(path) == [GOOD]
    write_rows(path, [GOOD, GOOD], overwrite=True)
    assert read_rows(path) == [GOOD, GOOD]


def test_where_nothing_can_be_written_that_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "no" / "rows.json", tmp_path / "file" / "rows.json"):
        with pytest.raises(UserError, match="cannot be written"):
            write_rows(path, [GOOD])
    with pytest.raises(UserError, match="cannot be written"):
        write_rows(tmp_path, [GOOD], overwrite=True)
    assert os.listdir(tmp_path) == ["file"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_rows(tmp_path / "rows.json", [GOOD])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        write_rows(tmp_path / "rows.json", [GOOD, GOOD], overwrite=True)
    assert read_rows(tmp_path / "rows.json") == [GOOD]
    assert os.listdir(tmp_path) == ["rows.json"]


def without(key: str) -> dict:
    return {k: v for k, v in GOOD.items() if k != key}


WRONG = {
    "empty": ("", "line 1: not JSON"),
    "broken list": ("[\n" + json.dumps(GOOD) + ",\n{,\n]", "line 3: not JSON"),
    "broken line": (json.dumps(GOOD) + "\n{oh\n", "line 2: not JSON"),
    "too deep": ("[" * 100_000, "not JSON"),
    "a number": ("3", "a JSON number, where a list of rows"),
    "one object": (json.dumps(GOOD, indent=1), "a JSON object, where a list of rows"),
    "no rows": ("[]", "holds no rows"),
    "row is a list": (json.dumps([GOOD, [GOOD]]), "row 1: a JSON list, where an object"),
    "line is a text": (json.dumps(GOOD) + '\n"x"', "row 1: a JSON text, where an object"),
    "no question": (json.dumps([without("question")]), "row 0: 'question' is missing"),
    "no steps": (json.dumps([GOOD, GOOD, without("steps")]), "row 2: 'steps' is missing"),
    "no answer": (json.dumps([without("answer")]), "row 0: 'answer' is missing"),
    "number asked": (json.dumps([GOOD | {"question": 3}]), "'question' is a number"),
    "true answer": (json.dumps([GOOD | {"answer": True}]), "'answer' is a truth value"),
    "blank question": (json.dumps([GOOD | {"question": " \n"}]), "row 0: 'question' is blank"),
    "empty answer": (json.dumps([GOOD | {"answer": ""}]), "row 0: 'answer' is blank"),
    "steps in one": (json.dumps([GOOD | {"steps": "a. b."}]), "'steps' is a text, where a list"),
    "no text in steps": (json.dumps([GOOD | {"steps": ["a", None]}]), r"'steps'\[1\] is a null"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_is_none_is_refused_with_file_and_place(tmp_path, name):
    text, complaint = WRONG[name]
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(UserError, match=complaint) as e:
        read_rows(tmp_path / "bad.json")
    lines = str(e.value).split("\n")
    assert len(lines) == 2 and "bad.json" in lines[0] and len(lines[1]) > 20


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "latin.json").write_bytes(b'["caf\xe9"]')
    for path, complaint in (
        (tmp_path / "none.json", "No such file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "latin.json", "not UTF-8 text .byte 5"),
        ("a\0b", "cannot be read"),
    ):
        with pytest.raises(UserError, match=complaint):
            read_rows(path)


def test_the_released_rows_are_read(released):
    rows = read_rows(released / "prosqa_valid.json")
    assert len(rows) == 300
    assert set(rows[0]) == set(prosqa.generate(1, 0)[0])


def test_a_users_mistake_ends_a_script_with_its_message_and_code_2(capsys):
    def main():
        raise UserError("this is wrong.\nDo that.")

    with pytest.raises(SystemExit) as e:
        main_guard(main)
    assert e.value.code == 2
    assert capsys.readouterr().err == "error: this is wrong.\nDo that.\n"


def run(*args: str) -> subprocess.CompletedProcess:
    """The command line, from the checkout."""
    command = [sys.executable, "-m", "nanococonut.data", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_command_writes_rows_and_shows_their_statistics(tmp_path):
    out = str(tmp_path / "mini.json")
    size = ["--n_nodes", "13", "--min_hops", "2", "--max_hops", "3"]
    done = run("prosqa", "--n", "50", "--seed", "4", "--out", out, "--matched", *size)
    assert (done.returncode, done.stderr) == (0, "")
    mini = prosqa.GraphConfig(n_nodes=13, min_hops=2, max_hops=3, matched=True)
    assert read_rows(out) == prosqa.generate(50, 4, mini)
    done = run("prosqa", "--stats", out)
    assert (done.returncode, done.stderr) == (0, "")
    shown = {line[:18].strip(): line[18:].split() for line in done.stdout.splitlines()[2:]}
    assert shown["deeper"] == ["0.500", "0.925"]
    assert shown["nodes"][1] == "22.800" and 9 < float(shown["nodes"][0]) < 13
    assert float(shown["hops 2"][0]) + float(shown["hops 3"][0]) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize(
    "args, complaint",
    [
        ((), "task"),
        (("prosqa",), "--out FILE"),
        (("prosqa", "--stats", "no.json"), "no.json cannot be read"),
        (("prosqa", "--out", "pyproject.toml"), "pyproject.toml exists already"),
        (("prosqa", "--out", "no/x", "--n", "many"), "--n"),
        (("prosqa", "--out", "no/x", "--n", "0"), "--n 0"),
        (("prosqa", "--out", "no/x", "--n", "5"), "no/x cannot be written"),
        (("prosqa", "--out", "no/x", "--min_hops", "9"), "max_hops=6"),
    ],
)
def test_a_wrong_command_is_one_error_and_code_2(tmp_path, args, complaint):
    done = run(*args)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and complaint in done.stderr
    assert 1 <= done.stderr.count("\n") <= 2 and done.stdout == ""
