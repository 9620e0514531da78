"""bench/rows.py measures every split of every task, and files beside them."""

import json
import runpy

from conftest import ROOT

from nanococonut.data import prontoqa
from nanococonut.data.files import write_rows
from nanococonut.tasks import TASKS


def test_every_split_and_a_file(script, tmp_path):
    write_rows(tmp_path / "mine.json", prontoqa.generate(20, 1))
    argv = ["--n=30", "--files=prontoqa=mine.json", "--out=rows.jsonl"]
    code, out, err = script(*argv, script="bench/rows.py")
    assert (code, err) == (0, "")
    row = json.loads(out.splitlines()[-1])
    assert row == json.loads((tmp_path / "rows.jsonl").read_text())
    splits = {split for task in TASKS.values() for split in task.splits}
    small = {f"{split} (small)" for split in splits}
    assert row["found"].keys() == splits | small | {"prontoqa: mine.json"}
    assert row["found"]["prontoqa: mine.json"]["heuristics"]["leads on"] == 1
    for split in ("prontoqa_matched", "prosqa_balanced"):
        assert max(row["found"][split]["heuristics"].values()) < 0.8  # 30 rows of a fair coin


def test_a_file_of_no_task_is_refused(script):
    code, _, err = script("--n=5", "--files=prosq=x.json", script="bench/rows.py")
    assert code == 2 and "no task=FILE" in err


def test_tables_say_not_run_for_what_no_row_has(script, tmp_path, monkeypatch):
    """Rows of bench/rows.py without files, or none: the sections are still made."""
    names = runpy.run_path(str(ROOT / "bench/plot.py"), run_name="bench")
    monkeypatch.setitem(names["sections"].__globals__, "RESULTS", tmp_path)
    nothing = names["sections"]()["docs/DATA.md"]
    assert nothing["gsm8k_rows"].startswith("| | gsm8k: gsm8k_valid.txt (not run) |")
    assert script("--n=30", "--out=rows.jsonl", script="bench/rows.py")[0] == 0
    made = names["sections"]()["docs/DATA.md"]
    assert made.keys() == nothing.keys() and made["gsm8k_rows"] == nothing["gsm8k_rows"]
    head, _, *lines = made["prosqa_rules"].splitlines()
    assert "| prosqa (30 rows) |" in head and "| prosqa: prosqa_valid.json (not run) |" in head
    assert {line.count("|") for line in lines} == {len(TASKS["prosqa"].splits) + 3}
    assert any(line.startswith("| random | 50.0 |") and line.endswith("|  |") for line in lines)
