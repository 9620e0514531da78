"""bench/common/results.py: the contents of a row; committed rows follow the schema."""

import json
import re
from dataclasses import dataclass

import pytest
import torch
from helpers import ROOT

from bench.common import results
from nanococonut.runtime.cli import option
from nanococonut.runtime.errors import UserError


@dataclass(frozen=True)
class Config:
    released: str | None = option(None, "a clone")
    rounds: float = option(3.0, "rounds")
    out: str | None = option(None, "file")


def writer(path=None):
    cpu = torch.device("cpu")
    return results.ResultWriter("latency", Config(out=path), cpu, torch.float32, n_layer=2)


def row(**own):
    values, labels = [3.0, 1.0, 2.0], {"path": "thoughts"}
    return writer().add("answer", "nanococonut", values, "ms", **labels, batch=4) | own


def test_row_holds_median_and_spread():
    good = row()
    results.validate_row(good)
    assert good["value"] == 2 and good["spread"] == {"p10": 1.2, "p90": 2.8}
    assert (good["repeats"], good["shape"]) == (3, {"n_layer": 2, "batch": 4})
    assert good["labels"] == {"path": "thoughts"} and good["detail"] == {}
    assert good["device"].startswith("CPU ") and good["dtype"] == "float32"
    assert json.loads(json.dumps(good)) == good


@pytest.mark.parametrize(
    "own, message",
    [
        ({"note": "x"}, "note is 'x'"),
        ({"value": "2"}, "value is '2'"),
        ({"repeats": None}, "repeats is None"),
        ({"shape": 4}, "shape is 4"),
    ],
)
def test_invalid_row_is_refused(own, message):
    with pytest.raises(UserError, match=message):
        results.validate_row(row() | own)
    short = row()
    short.pop("commit")
    with pytest.raises(UserError, match="commit is 'missing'"):
        results.validate_row(short)


def test_rows_are_appended_at_once(tmp_path):
    """A run that was killed lost the cases it had finished."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row()) + "\n")
    made = writer(str(path)).add("answer", "released", [9.0], "ms")
    assert results.read_results(path)[1] == made
    assert results.read_results(tmp_path / "none.jsonl") == []
    path.write_text("{\n")
    with pytest.raises(UserError, match="line 1: not JSON"):
        results.read_results(path)


def test_summary_has_shared_fields_once(capsys):
    made = writer()
    made.add("latent_step", "nanococonut", [1.0], "ms", batch=1)
    made.add("latent_step", "released", [9.0], "ms", versions={"torch": "1"}, batch=1)
    made.print_summary(seconds=3)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (line["bench"], line["dtype"], line["seconds"]) == ("latency", "float32", 3)
    for row, full in zip(line["rows"], made.rows, strict=True):
        assert {k: v for k, v in line.items() if k in full} | row == full


def test_command_has_no_local_path(tmp_path):
    config = Config(released=str(tmp_path), rounds=5.0, out="rows.jsonl")
    command = results.command_line(config, "bench/latency.py")
    assert command == "python bench/latency.py --released=RELEASED --rounds=5.0"


FILES = sorted(p.stem for p in (ROOT / "bench/results").glob("*.jsonl"))
UNITS = "ms us GB/s questions/s examples/s fraction x".split()
SPREADS = ((), ("p10", "p90"), ("ci_low", "ci_high"), ("min", "max"))


@pytest.mark.parametrize("name", [name for name in FILES if name != "curves"])
def test_committed_rows_follow_the_schema(name):
    rows = results.read_results(ROOT / f"bench/results/{name}.jsonl")
    assert rows
    for r in rows:
        assert not r["commit"].endswith("-dirty")
        assert "/" not in r["command"].partition("py ")[2]
        assert not r["detail"].get("trained", {"commit": ""})["commit"].endswith("-dirty")
        assert tuple(r["spread"]) in SPREADS and r["repeats"] >= 1 and "torch" in r["versions"]
        assert r["unit"] in UNITS and (r["unit"] == "x") == ("relative_to" in r["labels"])
        low, high = list(r["spread"].values()) or [r["value"]] * 2
        assert 0 <= low <= r["value"] <= high
        assert all(type(n) is int for n in r["shape"].values())
        assert all(type(text) is str for text in r["labels"].values())
        assert re.fullmatch(r"unknown|\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", r["date"])
        assert all(r[key] for key in ("bench", "metric", "provider", "device", "dtype"))
    keys = {str([r[k] for k in results.FIELDS if k != "detail"]) for r in rows}
    assert len(keys) == len(rows)  # no duplicates
