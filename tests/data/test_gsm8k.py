"""GSM8k-Aug: text files and the copy on the hub."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from nanococonut.data import gsm8k
from nanococonut.data.files import parse_gsm8k_line, parse_row, read_examples
from nanococonut.runtime.errors import UserError

LINES = {
    "How many?||<<16-3-4=9>> <<9*2=18>> #### 18": ("How many?", ["<<16-3-4=9>>", "<<9*2=18>>"]),
    " No step? || #### 2,125\r\n": ("No step?", []),
    "Two  spaces.  In it?||<<1=1>>  <<2=2>>  ####-0.5": (
        "Two  spaces.  In it?",
        ["<<1=1>>", "<<2=2>>"],
    ),
}


def test_parse_gsm8k_line():
    """Double spaces, missing steps and line ends must be parsed."""
    examples = [parse_gsm8k_line(line) for line in LINES]
    assert [(example["question"], example["steps"]) for example in examples] == list(LINES.values())
    assert [example["answer"] for example in examples] == ["18", "2,125", "-0.5"]


@pytest.mark.parametrize("bars", ["A || B: which? ||", "||x||| is? ||", "|| #### ||? || "])
def test_question_may_hold_bars(bars):
    """The question was silently cut at its first ||, and the rest became steps."""
    example = parse_gsm8k_line(f"{bars}<<1+1=2>> #### 2")
    question = bars.strip().removesuffix("||").strip()
    assert example == {"question": question, "steps": ["<<1+1=2>>"], "answer": "2"}


SOLVED = {"question": "Eggs?", "steps": ["<<4*6=24>>", "<<24-3=21>>"], "answer": "1,021"}
TEXT = {"question": "Pens?", "steps": ["Two cost 3 each.", "So it is 6."], "answer": "6"}
ROWS = {  # SOLVED and TEXT in the formats of other data sets
    "openai/gsm8k": [
        {
            "question": "Eggs?",
            "answer": "There are 4*6=<<4*6=24>>24.\nSo 24-3=<<24-3=21>>21 are.\n#### 1,021",
        },
        {"question": "Pens?", "answer": "Two cost 3 each.\n\nSo it is 6.\n#### 6"},
    ],
    "CODI": [
        {"question": "Eggs?", "cot": "<<4*6=24>> <<24-3=21>>", "answer": "1,021"},
        {"question": "Pens?", "cot": "Two cost 3 each.\nSo it is 6.", "answer": "6", "id": 3},
    ],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_others_rows_are_read(tmp_path, rows):
    """GSM8k's own files were refused: "'steps' is missing"."""
    path = tmp_path / "rows"
    for text in ("\n".join(map(json.dumps, rows)), json.dumps(rows, indent=1)):
        path.write_text(text)
        assert read_examples(path) == [SOLVED, TEXT]
    path.write_text(json.dumps(rows[0]))  # a file of one line
    assert read_examples(path) == [SOLVED]


@pytest.mark.parametrize(
    "row, complaint",
    [
        ({"question": "Eggs?", "answer": "24"}, "'steps' is missing"),
        ({"question": "Eggs?", "answer": "<<4*6=24>> ####"}, "'answer' is blank"),
        ({"answer": "<<4*6=24>> #### 24"}, "'question' is missing"),
        ({"question": "Eggs?", "cot": "<<4*6=24>>"}, "'answer': expected a string, got NoneType"),
        ({"question": "Eggs?", "cot": None, "answer": "#### 24"}, "'steps' is missing"),
        ({"question": "Eggs?", "cot": "\ud800", "answer": "24"}, "half of a surrogate pair"),
    ],
)
def test_others_broken_rows_are_refused(row, complaint):
    """A row without one of its keys must not become an example without steps."""
    with pytest.raises(ValueError, match=complaint):
        parse_row(row)


def test_any_example_survives_as_a_line():
    """Digits and dots must not be taken for marks."""
    for _ in range(50):
        steps = [f"<<{random.random()}={i}>>" for i in range(random.randint(0, 9))]
        example = {
            "question": f"{random.random()}?",
            "steps": steps,
            "answer": f"{random.random()}",
        }
        line = f"{example['question']}||{' '.join(steps)} #### {example['answer']}"
        assert parse_gsm8k_line(line) == example


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
    """A line without a mark must not become an empty answer."""
    with pytest.raises(ValueError, match=complaint):
        parse_gsm8k_line(line)


def test_released_lines_are_read_whole(released):
    """Examples without a step, or with a comma in the answer, could be lost."""
    examples = read_examples(released / "gsm8k_valid.txt")
    assert len(examples) == 500 and sum(not example["steps"] for example in examples) == 6
    assert all("" not in example["steps"] for example in examples)
    assert sum("," in example["answer"] for example in examples) == 4


# ---- copies from the hub; only the download is faked

STEPS = [["<<1+1=2>>", "<<2+2=4>>"], [], ["<<3*3=9>>"]]
ONE = {"question": ["a?", " b? ", "c?"], "steps": STEPS, "answer": ["4", "1,000 ", "9"]}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Return hub(columns, kind): snapshot_download then returns a folder with these columns."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "c0ffee"

    def put(columns, kind="parquet"):
        (folder / "data").mkdir(parents=True)
        table = datasets.Dataset.from_dict(columns)
        getattr(table, f"to_{kind}")(folder / "data" / f"validation-00000-of-00001.{kind}")

    def download(name, repo_type, revision):
        assert (name, repo_type, revision) == (gsm8k.HUB, "dataset", "main")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return put


EMPTY = {**ONE, "steps": [STEPS[0], [""], STEPS[2]]}


@pytest.mark.parametrize("columns, kind", [(ONE, "parquet"), (EMPTY, "parquet"), (ONE, "json")])
def test_the_copy_gives_the_examples(hub, columns, kind):
    """Empty steps are dropped."""
    hub(columns, kind)
    examples, commit = gsm8k.from_hub("validation")
    assert commit == "c0ffee"
    assert [example["steps"] for example in examples] == STEPS
    assert [(example["question"], example["answer"]) for example in examples] == [
        ("a?", "4"),
        ("b?", "1,000"),
        ("c?", "9"),
    ]
    assert all(set(example) == {"question", "steps", "answer"} for example in examples)


@pytest.mark.parametrize(
    "columns, complaint",
    [
        ({"question": ["a?"], "answer": ["1"]}, "example 0: 'steps' is missing"),
        (
            {**ONE, "answer": ["4", None, "9"]},
            "example 1: 'answer': expected a string, got NoneType",
        ),
        ({**ONE, "question": ["a?", "b?", " "]}, "example 2: 'question' is blank"),
        ({**ONE, "answer": [4, 5, 6]}, "example 0: 'answer': expected a string, got int"),
    ],
)
def test_other_columns_and_bad_examples_are_refused(hub, columns, complaint):
    """Another data set could be read as if it were GSM8k-Aug."""
    hub(columns)
    with pytest.raises(UserError, match=complaint) as e:
        gsm8k.from_hub("validation")
    assert str(e.value).count("\n") == 1 and gsm8k.HUB in str(e.value)


def test_bad_examples_of_a_copy_are_skipped(hub):
    """--skip_bad_rows must apply to the hub as to files."""
    hub({**ONE, "answer": ["4", None, "9"]})
    skipped: list[str] = []
    examples, _ = gsm8k.from_hub("validation", skipped=skipped)
    assert [example["answer"] for example in examples] == ["4", "9"]
    assert skipped == [
        f"{gsm8k.HUB} validation, example 1: 'answer': expected a string, got NoneType"
    ]


def test_a_missing_split_is_an_error(hub):
    """The library datasets raises many types of errors."""
    hub(ONE)
    with pytest.raises(UserError, match="gsm8k-aug test .main. is not in") as e:
        gsm8k.from_hub("test")
    assert str(e.value).count("\n") == 1


def test_offline_the_error_lists_what_to_do(monkeypatch, tmp_path):
    """The error of huggingface_hub does not say what the user can do."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="not in the Hugging Face cache and cannot") as e:
        gsm8k.from_hub("train")
    message = str(e.value)
    assert message.count("\n") == 1
    for way in (gsm8k.HUB, "HF_HUB_OFFLINE", "--data", "gsm_icot.bash"):
        assert way in message


def test_import_does_not_load_datasets():
    """The import takes a second and the library is optional."""
    code = "import sys; from nanococonut.data import gsm8k; print('datasets' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.network
def test_the_hub_has_the_released_examples(released):
    """The owner of the copy could change it."""
    examples, commit = gsm8k.from_hub("validation")
    assert len(commit) == 40 and examples == read_examples(released / "gsm8k_valid.txt")
