"""bench/data.py prints one row with a rate for each kind of row."""

import json
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_row_with_every_kind(monkeypatch, capsys, tmp_path):
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["data.py", "--n=20", "--repeats=2", f"--out={out}"])
    runpy.run_path(str(ROOT / "bench/data.py"), run_name="__main__")
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row == json.loads(out.read_text()) and len(row["min_median_max"]) == 4
    for figures in row["min_median_max"].values():
        for low, median, high in figures.values():
            assert 0 < low <= median <= high
