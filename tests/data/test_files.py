"""Files of rows: what is read and written, and what is said about files that are none."""

import json
import os
import random

import pytest

from nanococonut.data import gsm8k, prosqa
from nanococonut.data.files import read_examples, skipped_summary, write_examples
from nanococonut.runtime.errors import UserError, run_main

GOOD = {"question": "Is it so?", "steps": ["It is.", "So it is."], "answer": "Yes."}


def test_json_and_json_lines_are_read_alike(tmp_path):
    rows = [GOOD, {**GOOD, "steps": [], "idx": 7}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "c.json").write_text("\ufeff" + json.dumps(rows, indent=2), encoding="utf-8")
    for name in ("a.json", "b.jsonl", "c.json"):
        assert read_examples(tmp_path / name) == rows


def test_written_rows_are_read_back(tmp_path):
    rows = prosqa.generate(20, 3) + [{**GOOD, "question": 'Zoë\n"☃"'}]
    write_examples(tmp_path / "rows.json", rows)
    assert read_examples(tmp_path / "rows.json") == rows
    assert os.listdir(tmp_path) == ["rows.json"]  # no temporary file is left


def test_a_file_is_overwritten_only_when_told_to(tmp_path):
    path = tmp_path / "rows.json"
    write_examples(path, [GOOD])
    with pytest.raises(UserError, match=r"rows\.json exists already"):
        write_examples(path, [GOOD, GOOD])
    assert read_examples(path) == [GOOD]
    write_examples(path, [GOOD, GOOD], overwrite=True)
    assert read_examples(path) == [GOOD, GOOD]


def test_where_nothing_can_be_written_that_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "no" / "rows.json", tmp_path / "file" / "rows.json"):
        with pytest.raises(UserError, match="cannot be written"):
            write_examples(path, [GOOD])
    with pytest.raises(UserError, match="cannot be written"):
        write_examples(tmp_path, [GOOD], overwrite=True)
    assert os.listdir(tmp_path) == ["file"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_examples(tmp_path / "rows.json", [GOOD])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        write_examples(tmp_path / "rows.json", [GOOD, GOOD], overwrite=True)
    assert read_examples(tmp_path / "rows.json") == [GOOD]
    assert os.listdir(tmp_path) == ["rows.json"]


def without(key: str) -> dict:
    return {k: v for k, v in GOOD.items() if k != key}


WRONG = {
    "empty": ("", "line 1: not JSON"),
    "broken list": ("[\n" + json.dumps(GOOD) + ",\n{,\n]", "line 3: not JSON"),
    "broken line": (json.dumps(GOOD) + "\n{oh\n", "line 2: not JSON"),
    "too deep": ("[" * 100_000, "not JSON"),
    "broken object": ('{\n"example1": {\n{}', "line 3: not JSON"),
    "plain text": ("Is it so?\nYes.", "line 1: not JSON"),
    "long number": ("[" + "7" * 5000 + "]", "line 1"),
    "a number": ("3", "a JSON number, where a list of rows"),
    "another object": (json.dumps({"rows": [GOOD]}, indent=1), "row 0: 'question' is missing"),
    "no rows": ("[]", "holds no rows"),
    "row is a list": (json.dumps([GOOD, [GOOD]]), "row 1: a JSON list, where an object"),
    "line is a text": (json.dumps(GOOD) + '\n"x"', "line 2: a JSON text, where an object"),
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
        read_examples(tmp_path / "bad.json")
    lines = str(e.value).split("\n")
    assert len(lines) == 2 and "bad.json" in lines[0] and len(lines[1]) > 20


LINE = "How many?||<<1+1=2>> #### 2"
# rows left out -> (what is in the file, complaints about them); GOOD or LINE stays in each
SKIPPED = {
    "list": (json.dumps([3, GOOD, without("steps")]), ["row 0: a JSON number", "row 2: 'steps'"]),
    "lines": (
        f'{{oh\n\n{json.dumps(GOOD)}\n{{"question": "a\udce9"}}\nno\n[]',
        ["line 1: not JSON", "line 4: not UTF-8", "line 5: not JSON", "line 6: a JSON list"],
    ),
    "gsm8k": (
        f"Two #### 2\n||1 #### 1\r\n\nAn\udce9||1 #### 1\n{LINE}\r\nThree?||3",
        ["line 1: no ||", "line 2: 'question' is blank", "line 4: not UTF-8", "line 6: no ####"],
    ),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_bad_rows_are_left_out_when_told_to_and_said(tmp_path, name):
    path = tmp_path / "mixed"
    text, complaints = SKIPPED[name]
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as e:
        read_examples(path)
    assert complaints[0] in str(e.value)
    skipped: list[str] = []
    rows = read_examples(path, skipped)
    assert rows == [GOOD if name != "gsm8k" else gsm8k.row_of_line(LINE)]
    assert len(skipped) == len(complaints)
    for said, complaint in zip(skipped, complaints, strict=True):
        assert said.startswith(f"{path}, {complaint}") and "\n" not in said
    n = len(complaints)
    said = skipped_summary(1, skipped)
    assert said.startswith(f"{n} of {n + 1} rows skipped, the first: {path}, {complaints[0]}")


def test_any_broken_lines_among_good_ones_are_counted(tmp_path):
    rows = [{**GOOD, "question": f"{i}?"} for i in range(40)]
    lines = [json.dumps(row) for row in rows]
    bad = set(random.sample(range(40), random.randint(1, 30)))
    for i in bad:
        lines[i] = lines[i][: random.randint(1, len(lines[i]) - 1)]
    (tmp_path / "cut.jsonl").write_text("\n".join(lines))
    skipped: list[str] = []
    good = [row for i, row in enumerate(rows) if i not in bad]
    assert read_examples(tmp_path / "cut.jsonl", skipped) == good
    assert [int(said.split("line ")[1].split(":")[0]) - 1 for said in skipped] == sorted(bad)


@pytest.mark.parametrize("text", [f"[{json.dumps(GOOD)},\n3", "[]", "7", "", "{\n", "no rows"])
def test_a_file_that_is_broken_as_a_whole_is_refused_all_the_same(tmp_path, text):
    (tmp_path / "bad").write_text(text)
    with pytest.raises(UserError):
        read_examples(tmp_path / "bad", [])


def test_a_file_of_bad_rows_only_is_refused_and_none_is_reported(tmp_path):
    (tmp_path / "bad").write_text(json.dumps([1, 2]))
    skipped: list[str] = []
    with pytest.raises(UserError, match="all 2 rows are bad, the first: .*row 0: a JSON number"):
        read_examples(tmp_path / "bad", skipped)
    assert skipped == []


def test_gsm8k_lines_are_told_apart_from_json(tmp_path):
    lines = [LINE, "Half of {it}? [or all]||<<4/2=2>> <<2-1=1>> #### 1,000"]
    (tmp_path / "any.name").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    assert read_examples(tmp_path / "any.name") == [gsm8k.row_of_line(line) for line in lines]


def test_one_object_is_json_lines_of_one_line(tmp_path):
    for indent in (None, 1):
        (tmp_path / "one.jsonl").write_text(json.dumps(GOOD, indent=indent))
        assert read_examples(tmp_path / "one.jsonl") == [GOOD]


def test_lines_end_at_newlines_only(tmp_path):
    row = {**GOOD, "question": "a\u2028b\x85c?"}
    text = json.dumps(row, ensure_ascii=False)
    (tmp_path / "odd.jsonl").write_text(f"{text}\n{text}", encoding="utf-8")
    assert read_examples(tmp_path / "odd.jsonl") == [row, row]


def test_raw_prontoqa_is_converted_example_by_example(tmp_path, released):
    prontoqa = pytest.importorskip("nanococonut.data.prontoqa")
    path = released / "prontoqa_raw_5hop_sample.json"
    raw = json.loads(path.read_text())
    rows = read_examples(path)
    assert rows == prontoqa.rows_of_raw(raw) and len(rows) == len(raw) > 2
    last = list(raw)[-1]
    del raw[last]["test_example"]["answer"]
    for indent in (None, 1):  # over many lines as well as in one
        (tmp_path / "raw.json").write_text(json.dumps(raw, indent=indent))
        with pytest.raises(UserError, match=f"raw.json, {last}: "):
            read_examples(tmp_path / "raw.json")
        skipped: list[str] = []
        assert read_examples(tmp_path / "raw.json", skipped) == rows[:-1]
        assert len(skipped) == 1 and last in skipped[0]


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "latin.json").write_bytes(b'["cafe",\n"caf\xe9"]')
    for path, complaint in (
        (tmp_path / "none.json", "No such file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "latin.json", "latin.json, line 2: not UTF-8 text"),
        ("a\0b", "cannot be read"),
    ):
        with pytest.raises(UserError, match=complaint):
            read_examples(path)


def test_the_released_rows_are_read(released):
    rows = read_examples(released / "prosqa_valid.json")
    assert len(rows) == 300
    assert set(rows[0]) == set(prosqa.generate(1, 0)[0])


def test_a_users_mistake_ends_a_script_with_its_message_and_code_2(capsys):
    def main():
        raise UserError("this is wrong.\nDo that.")

    with pytest.raises(SystemExit) as e:
        run_main(main)
    assert e.value.code == 2
    assert capsys.readouterr().err == "error: this is wrong.\nDo that.\n"
