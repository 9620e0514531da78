"""bench/rows.py measures every split of every task, and files beside them."""

import json

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
