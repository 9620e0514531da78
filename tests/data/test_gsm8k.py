"""GSM8k-Aug: what a line says, what the hub's copies hold, what the rows are like."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from nanococonut.data import gsm8k
from nanococonut.data.files import read_examples
from nanococonut.runtime.errors import UserError

LINES = {
    "How many?||<<16-3-4=9>> <<9*2=18>> #### 18": ("How many?", ["<<16-3-4=9>>", "<<9*2=18>>"]),
    " No step? || #### 2,125\r\n": ("No step?", []),
    "Two  spaces.  In it?||<<1=1>>  <<2=2>>  ####-0.5": (
        "Two  spaces.  In it?",
        ["<<1=1>>", "<<2=2>>"],
    ),
}


def test_a_line_is_question_steps_and_answer():
    rows = [gsm8k.row_of_line(line) for line in LINES]
    assert [(row["question"], row["steps"]) for row in rows] == list(LINES.values())
    assert [row["answer"] for row in rows] == ["18", "2,125", "-0.5"]


def test_any_row_survives_being_a_line():
    for _ in range(50):
        steps = [f"<<{random.random()}={i}>>" for i in range(random.randint(0, 9))]
        row = {"question": f"{random.random()}?", "steps": steps, "answer": f"{random.random()}"}
        line = f"{row['question']}||{' '.join(steps)} #### {row['answer']}"
        assert gsm8k.row_of_line(line) == row


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("How many? <<1+1=2>> #### 2", r"no \|\|"),
        ("How many?||<<1+1=2>> 2", "no ####"),
        ("||<<1+1=2>> #### 2", "'question' is blank"),
        ("How many?||<<1+1=2>> #### ", "'answer' is blank"),
        ("", r"no \|\|"),
    ],
)
def test_a_broken_line_is_refused_with_the_reason(line, complaint):
    with pytest.raises(ValueError, match=complaint):
        gsm8k.row_of_line(line)


def test_statistics_count_what_they_say():
    lines = [
        "a b c?||<<1+1=2>> <<2+2=4.0>> #### 4",
        "a?||<<500*2=1000>> #### 1,000",
        "a b?|| #### -3",
        "a b?||<<1=1>> <<1=1>> <<1=1>> <<1/2=.5>> #### 0.50",
        "a b?||<<1=1>> #### two",
    ]
    found = gsm8k.statistics([gsm8k.row_of_line(line) for line in lines])
    shares = {"steps 0": 1, "steps 1": 2, "steps 2": 1, "steps >3": 1}
    shares |= {"answer has comma": 1, "answer negative": 1, "answer decimal": 1}
    shares |= {"answer no number": 1, "last is answer": 3, "steps": 8, "words of question": 10}
    assert found == pytest.approx({key: n / 5 for key, n in shares.items()})
    with pytest.raises(UserError, match="no rows"):
        gsm8k.statistics([])


def test_the_released_rows_have_the_recorded_statistics(released):
    rows = read_examples(released / "gsm8k_valid.txt")
    assert len(rows) == 500 and sum(not row["steps"] for row in rows) == 6
    assert all("" not in row["steps"] for row in rows)
    assert sum("," in row["answer"] for row in rows) == 4
    assert gsm8k.statistics(rows) == pytest.approx(gsm8k.RELEASED, abs=1e-9)


# -- the hub's copies; only the download itself is not the real thing

STEPS = [["<<1+1=2>>", "<<2+2=4>>"], [], ["<<3*3=9>>"]]
ONE = {"question": ["a?", " b? ", "c?"], "steps": STEPS, "answer": ["4", "1,000 ", "9"]}
OTHER = {**{k: v for k, v in ONE.items() if k != "steps"}, "cot": [" ".join(s) for s in STEPS]}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """hub(columns, kind): snapshot_download gives a folder with them, as parquet or JSON lines."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "c0ffee"

    def put(columns, kind="parquet"):
        (folder / "data").mkdir(parents=True)
        table = datasets.Dataset.from_dict(columns)
        getattr(table, f"to_{kind}")(folder / "data" / f"validation-00000-of-00001.{kind}")

    def download(name, repo_type, revision):
        assert (name in gsm8k.HUB, repo_type, revision) == (True, "dataset", "main")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return put


EMPTY = {**ONE, "steps": [STEPS[0], [""], STEPS[2]]}


@pytest.mark.parametrize("columns, kind", [(ONE, "parquet"), (EMPTY, "parquet"), (OTHER, "json")])
def test_both_copies_columns_give_the_same_rows_and_the_commit(hub, columns, kind):
    hub(columns, kind)
    rows, commit = gsm8k.from_hub("validation", gsm8k.HUB[kind == "json"])
    assert commit == "c0ffee"
    assert [row["steps"] for row in rows] == STEPS
    assert [(row["question"], row["answer"]) for row in rows] == [
        ("a?", "4"),
        ("b?", "1,000"),
        ("c?", "9"),
    ]
    assert all(set(row) == {"question", "steps", "answer"} for row in rows)


@pytest.mark.parametrize(
    "columns, complaint",
    [
        ({"question": ["a?"], "answer": ["1"]}, "row 0: the columns are question, answer; wanted"),
        ({**ONE, "note": [1, 2, 3]}, "row 0: the columns are question, steps, answer, note"),
        ({**ONE, "answer": ["4", None, "9"]}, "row 1: 'answer' is a null"),
        ({**ONE, "question": ["a?", "b?", " "]}, "row 2: 'question' is blank"),
        ({**ONE, "answer": [4, 5, 6]}, "row 0: 'answer' is a number"),
        ({**OTHER, "cot": [None] * 3}, "row 0: the columns are"),
    ],
)
def test_other_columns_and_bad_rows_are_refused(hub, columns, complaint):
    hub(columns)
    with pytest.raises(UserError, match=complaint) as e:
        gsm8k.from_hub("validation")
    assert str(e.value).count("\n") == 1 and gsm8k.HUB[0] in str(e.value)


def test_bad_rows_of_a_copy_are_left_out_when_told_to(hub):
    hub({**ONE, "answer": ["4", None, "9"]})
    skipped: list[str] = []
    rows, _ = gsm8k.from_hub("validation", skipped=skipped)
    assert [row["answer"] for row in rows] == ["4", "9"]
    assert skipped == [
        f"{gsm8k.HUB[0]} validation, row 1: 'answer' is a null, where a text is wanted"
    ]


def test_a_split_or_a_file_that_is_not_there_is_said(hub):
    hub(ONE)
    with pytest.raises(UserError, match="split test: cannot be read") as e:
        gsm8k.from_hub("test")
    assert str(e.value).count("\n") == 1


def test_without_internet_the_ways_on_are_said(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="neither in the Hugging Face cache nor") as e:
        gsm8k.from_hub("train")
    said = str(e.value)
    assert said.count("\n") == 1
    for way in (gsm8k.HUB[0], "HF_HUB_OFFLINE", "--from FILE", "gsm_icot.bash"):
        assert way in said


def test_importing_it_imports_no_datasets():
    code = "import sys; from nanococonut.data import gsm8k; print('datasets' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.network
@pytest.mark.parametrize("name", gsm8k.HUB)
def test_the_copy_on_the_hub_holds_the_released_rows(name, released):
    split = "validation" if name == gsm8k.HUB[0] else "test"
    rows, commit = gsm8k.from_hub(split, name)
    assert len(commit) == 40 and len(rows) == {"validation": 500, "test": 1319}[split]
    if split == "validation":
        assert rows == read_examples(released / "gsm8k_valid.txt")
