"""Files of examples: reading, writing, and errors for invalid files."""

import json
import os
import random

import pytest

from nanococonut.data import prosqa
from nanococonut.data.examples import is_correct, is_correct_as_released, split_answer
from nanococonut.data.files import (
    parse_gsm8k_line,
    parse_raw_prontoqa,
    read_examples,
    write_examples,
)
from nanococonut.runtime.errors import UserError, run_main

GOOD = {"question": "Is it so?", "steps": ["It is.", "So it is."], "answer": "Yes."}


def test_json_and_json_lines_are_read_alike(tmp_path):
    """A byte order mark or an empty line must not break reading."""
    examples = [GOOD, {**GOOD, "steps": [], "idx": 7}]
    (tmp_path / "a.json").write_text(json.dumps(examples))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, examples)) + "\n\n")
    (tmp_path / "c.json").write_text("\ufeff" + json.dumps(examples, indent=2), encoding="utf-8")
    for name in ("a.json", "b.jsonl", "c.json"):
        assert read_examples(tmp_path / name) == examples


def test_written_examples_are_read_back(tmp_path):
    """Newlines and non-ASCII text have to survive."""
    examples = prosqa.generate(20, 3) + [{**GOOD, "question": 'Zoë\n"☃"'}]
    write_examples(tmp_path / "examples.json", examples)
    assert read_examples(tmp_path / "examples.json") == examples
    assert os.listdir(tmp_path) == ["examples.json"]  # no temporary file is left


def test_an_existing_file_is_never_overwritten(tmp_path):
    """A data set must not be lost to a wrong --out."""
    path = tmp_path / "examples.json"
    write_examples(path, [GOOD])
    with pytest.raises(UserError, match=r"examples\.json cannot be written: File exists"):
        write_examples(path, [GOOD, GOOD])
    assert read_examples(path) == [GOOD]


def test_an_unwritable_path_is_an_error(tmp_path):
    """Temporary files must not remain."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "no" / "examples.json", tmp_path / "file" / "examples.json"):
        with pytest.raises(UserError, match="cannot be written") as e:
            write_examples(path, [GOOD])
        assert ("its folder does not exist" in str(e.value)) == (path.parent.name == "no")
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    """A partial file would be read as a data set with an error, and block the next attempt."""

    def full(*args, **kwargs):
        file = open(*args, **kwargs)
        file.write = lambda text: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        return file

    monkeypatch.setattr("nanococonut.data.files.open", full, raising=False)
    with pytest.raises(UserError, match="cannot be written: No space left"):
        write_examples(tmp_path / "examples.json", [GOOD])
    assert os.listdir(tmp_path) == []


def without(key: str) -> dict:
    return {k: v for k, v in GOOD.items() if k != key}


WRONG = {
    "empty": ("", "line 1: not JSON"),
    "broken list": ("[\n" + json.dumps(GOOD) + ",\n{,\n]", "line 3: not JSON"),
    "broken line": (json.dumps(GOOD) + "\n{oh\n", "line 2: not JSON"),
    "broken object": ('{\n"example1": {\n{}', "line 3: not JSON"),
    "plain text": ("Is it so?\nYes.", "line 1: not JSON"),
    "long number": ("[" + "7" * 5000 + "]", "line 1"),
    "a number": ("3", "example 0: expected an object, got int"),
    "another object": (
        json.dumps({"examples": [GOOD]}, indent=1),
        "example 0: 'question' is missing",
    ),
    "no examples": ("[]", "holds no valid examples"),
    "example is a list": (
        json.dumps([GOOD, [GOOD]]),
        "example 1: expected an object, got list",
    ),
    "line is a text": (json.dumps(GOOD) + '\n"x"', "line 2: expected an object, got str"),
    "no question": (json.dumps([without("question")]), "example 0: 'question' is missing"),
    "no steps": (json.dumps([GOOD, GOOD, without("steps")]), "example 2: 'steps' is missing"),
    "no answer": (json.dumps([without("answer")]), "example 0: 'answer' is missing"),
    "number as question": (
        json.dumps([GOOD | {"question": 3}]),
        "'question': expected a string, got int",
    ),
    "true answer": (
        json.dumps([GOOD | {"answer": True}]),
        "'answer': expected a string, got bool",
    ),
    "blank question": (json.dumps([GOOD | {"question": " \n"}]), "example 0: 'question' is blank"),
    "empty answer": (json.dumps([GOOD | {"answer": ""}]), "example 0: 'answer' is blank"),
    "steps in one": (
        json.dumps([GOOD | {"steps": "a. b."}]),
        "'steps': expected a list of strings, got str",
    ),
    "no text in steps": (
        json.dumps([GOOD | {"steps": ["a", None]}]),
        r"'steps'\[1\]: expected a string, got NoneType",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_broken_files_are_refused_with_their_place(tmp_path, name):
    """A user cannot fix an error that names neither file nor line."""
    text, complaint = WRONG[name]
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(UserError, match=complaint) as e:
        read_examples(tmp_path / "bad.json")
    lines = str(e.value).split("\n")
    assert len(lines) == 2 and "bad.json" in lines[0] and len(lines[1]) > 20


LINE = "How many?||<<1+1=2>> #### 2"
# format -> (text of the file, errors of its invalid examples); each has GOOD or LINE as well
SKIPPED = {
    "list": (
        json.dumps([3, GOOD, without("steps")]),
        ["example 0: expected an object", "example 2: 'steps'"],
    ),
    "lines": (
        f'{{oh\n\n{json.dumps(GOOD)}\n{json.dumps(GOOD)[:-3]}\udce9"}}\nno\n[]',
        [
            "line 1: not JSON",
            "line 4: 'answer': not UTF-8",
            "line 5: not JSON",
            "line 6: expected an object",
        ],
    ),
    "gsm8k": (
        f"Two #### 2\n||1 #### 1\r\n\nAn\udce9||1 #### 1\n{LINE}\r\nThree?||3",
        [
            "line 1: no ||",
            "line 2: 'question' is blank",
            "line 4: 'question': not UTF-8",
            "line 6: no ####",
        ],
    ),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_bad_examples_are_skipped_and_reported(tmp_path, name):
    """Dropping an example without a report would change results silently."""
    path = tmp_path / "mixed"
    text, complaints = SKIPPED[name]
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as e:
        read_examples(path)
    assert complaints[0] in str(e.value)
    skipped: list[str] = []
    examples = read_examples(path, skipped)
    assert examples == [GOOD if name != "gsm8k" else parse_gsm8k_line(LINE)]
    assert len(skipped) == len(complaints)
    for message, complaint in zip(skipped, complaints, strict=True):
        assert message.startswith(f"{path}, {complaint}") and "\n" not in message


def test_every_broken_line_is_counted(tmp_path):
    """Line numbers could be off after the first error."""
    examples = [{**GOOD, "question": f"{i}?"} for i in range(40)]
    lines = [json.dumps(example) for example in examples]
    bad = set(random.sample(range(40), random.randint(1, 30)))
    for i in bad:
        lines[i] = lines[i][: random.randint(1, len(lines[i]) - 1)]
    (tmp_path / "cut.jsonl").write_text("\n".join(lines))
    skipped: list[str] = []
    good = [example for i, example in enumerate(examples) if i not in bad]
    assert read_examples(tmp_path / "cut.jsonl", skipped) == good
    assert [int(message.split("line ")[1].split(":")[0]) - 1 for message in skipped] == sorted(bad)


@pytest.mark.parametrize("text", [f"[{json.dumps(GOOD)},\n3", "[]", "7", "", "{\n", "no examples"])
def test_a_broken_file_is_an_error_with_skipped_too(tmp_path, text):
    """skip_bad_rows must not turn an unreadable file into an empty data set."""
    (tmp_path / "bad").write_text(text)
    with pytest.raises(UserError):
        read_examples(tmp_path / "bad", [])


def test_a_file_without_valid_examples_is_an_error(tmp_path):
    """An empty training set would fail much later."""
    (tmp_path / "bad").write_text(json.dumps([1, 2]))
    skipped: list[str] = []
    with pytest.raises(
        UserError, match="holds no valid examples, the first: .*example 0: expected an object"
    ):
        read_examples(tmp_path / "bad", skipped)
    assert skipped == []


def test_gsm8k_lines_are_not_taken_for_json(tmp_path):
    """Braces and brackets in a question look like JSON."""
    lines = [LINE, "Half of {it}? [or all]||<<4/2=2>> <<2-1=1>> #### 1,000"]
    (tmp_path / "any.name").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    assert read_examples(tmp_path / "any.name") == [parse_gsm8k_line(line) for line in lines]


def test_one_object_is_a_file_of_one_example(tmp_path):
    """A JSON-lines file with one line is a JSON object."""
    for indent in (None, 1):
        (tmp_path / "one.jsonl").write_text(json.dumps(GOOD, indent=indent))
        assert read_examples(tmp_path / "one.jsonl") == [GOOD]


def test_lines_end_at_newlines_only(tmp_path):
    """str.splitlines() also splits at U+2028."""
    example = {**GOOD, "question": "a\u2028b\x85c?"}
    text = json.dumps(example, ensure_ascii=False)
    (tmp_path / "odd.jsonl").write_text(f"{text}\n{text}", encoding="utf-8")
    assert read_examples(tmp_path / "odd.jsonl") == [example, example]


def test_raw_prontoqa_is_read_example_by_example(tmp_path, released):
    """One broken example must not cost the whole file."""
    path = released / "prontoqa_raw_5hop_sample.json"
    raw = json.loads(path.read_text())
    examples = read_examples(path)
    assert (
        examples == [parse_raw_prontoqa(example) for example in raw.values()]
        and len(examples) == len(raw) > 2
    )
    last = list(raw)[-1]
    del raw[last]["test_example"]["answer"]
    for indent in (None, 1):  # on one line, on many lines
        (tmp_path / "raw.json").write_text(json.dumps(raw, indent=indent))
        with pytest.raises(UserError, match=f"raw.json, {last}: "):
            read_examples(tmp_path / "raw.json")
        skipped: list[str] = []
        assert read_examples(tmp_path / "raw.json", skipped) == examples[:-1]
        assert len(skipped) == 1 and last in skipped[0]


def test_an_unreadable_file_is_an_error(tmp_path):
    """The operating system raises several types of errors here."""
    (tmp_path / "latin.json").write_bytes(
        b'[{"question": "a?", "steps": [],\n"answer": "caf\xe9"}]'
    )
    for path, complaint in (
        (tmp_path / "none.json", "none.json does not exist"),
        (tmp_path, "Is a directory"),
        (tmp_path / "latin.json", "latin.json, example 0: 'answer': not UTF-8 text"),
        ("a\0b", "cannot be read"),
    ):
        with pytest.raises(UserError, match=complaint):
            read_examples(path)


def test_released_examples_are_read(released):
    """Our keys could differ from the released ones."""
    examples = read_examples(released / "prosqa_valid.json")
    assert len(examples) == 300
    assert set(examples[0]) == set(prosqa.generate(1, 0)[0])


def test_a_user_error_exits_with_code_2(capsys):
    """A user's mistake must not print a traceback."""

    def main():
        raise UserError("this is wrong.\nDo that.")

    with pytest.raises(SystemExit) as e:
        run_main(main)
    assert e.value.code == 2
    assert capsys.readouterr().err == "error: this is wrong.\nDo that.\n"


def test_the_answer_follows_the_layouts_mark():
    """An answer with "#", such as C#, was cut there. A known answer may contain the mark itself."""
    assert split_answer("a = 3 # b ### 1,000 \n") == ("a = 3 # b ", "1,000")
    assert split_answer("### C#") == ("", "C#")
    assert split_answer("a\n### see ### 5", "see ### 5") == ("a\n", "see ### 5")
    assert split_answer("a\n### see ### 5", "5") == ("a\n### see ", "5")
    assert split_answer("no mark") == ("no mark", None) and split_answer("### ") == ("", "")


@pytest.mark.parametrize(
    ("text", "known", "correct", "released"),
    [
        ("### C#", "C#", True, False),  # the released rule cuts the generated answer only
        ("### F#", "C#", False, False),
        ("### 12", "1,2", False, True),
        ("### 1,2", "1,2", True, True),
        ("### 1,234", "1234", True, True),
        ("### -$1234.5", "-$1,234.5", True, True),
        ("### a, b", "a b", False, True),
        ("###5", "5", False, True),  # no layout writes this
        ("a ### b ### a ### b", "a ### b", True, False),
        ("1234", "1234", False, False),
        ("", "#", False, False),
    ],
)
def test_what_is_correct_and_what_was(text, known, correct, released):
    """Commas were ignored everywhere, so "1,2" equalled "12". They are ignored in numbers only."""
    assert is_correct(text, known) == correct
    assert is_correct_as_released(text, known) == released
