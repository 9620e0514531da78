"""bench/common/results.py: what a row holds, and that committed rows follow the schema."""

import json
from dataclasses import dataclass
from pathlib import Path

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
    cpu, shape = torch.device("cpu"), {"n_layer": 2}
    return results.ResultWriter("latency", Config(out=path), cpu, torch.float32, shape=shape)


def row(**own):
    labels = {"path": "thoughts"}
    return (
        writer().add("answer", "nanococonut", [3.0, 1.0, 2.0], "ms", labels=labels, batch=4) | own
    )


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
        ({"note": "x"}, "note"),
        ({"value": "2"}, "value is '2'"),
        ({"value": float("nan")}, "value is nan"),
        ({"value": -1.0}, "value is -1.0"),
        ({"value": 5.0}, "not between 1.2 and 2.8"),
        ({"unit": "furlongs"}, "furlongs"),
        ({"unit": "x"}, "relative_to"),
        ({"labels": {"relative_to": "chain"}}, "relative_to"),
        ({"labels": {"path": 6}}, "expected text"),
        ({"metric": ""}, "metric is empty"),
        ({"shape": {"batch": "4"}}, "expected whole numbers"),
        ({"spread": {"least": 1.0}}, "expected p10 and p90"),
        ({"repeats": 0}, "repeats=0"),
        ({"repeats": True}, "repeats is True"),
        ({"versions": {}}, "versions"),
        ({"date": "yesterday"}, "yesterday"),
    ],
)
def test_invalid_row_is_refused(own, message):
    with pytest.raises(UserError, match=message):
        results.validate_row(row() | own)
    short = row()
    short.pop("commit")
    with pytest.raises(UserError, match="commit"):
        results.validate_row(short)


def test_rows_are_appended_at_once(tmp_path):
    """A run that is killed keeps every case that it finished."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row()) + "\n")
    made = writer(str(path)).add("answer", "released", [9.0], "ms")
    assert results.read_results(path)[1] == made
    assert results.read_results(tmp_path / "none.jsonl") == []
    path.write_text("{\n")
    with pytest.raises(UserError, match="line 1: not JSON"):
        results.read_results(path)


def test_summary_holds_what_is_shared_once():
    made = writer()
    made.add("latent_step", "nanococonut", [1.0], "ms", batch=1)
    made.add("latent_step", "released", [9.0], "ms", versions={"torch": "1"}, batch=1)
    line = json.loads(made.summary(seconds=3))
    assert (line["bench"], line["dtype"], line["seconds"]) == ("latency", "float32", 3)
    for row, full in zip(line["rows"], made.rows, strict=True):
        assert {k: v for k, v in line.items() if k in full} | row == full


def test_command_has_no_local_path(tmp_path):
    config = Config(released=str(tmp_path), rounds=5.0, out="rows.jsonl")
    command = results.command_line(config, "bench/latency.py")
    assert command == "python bench/latency.py --released=RELEASED --rounds=5.0"


FILES = sorted(p.stem for p in (ROOT / "bench/results").glob("*.jsonl"))
UNREAD = ("curves", "drift", "loss", "throughput")  # old rows, for people only


@pytest.mark.parametrize("name", [name for name in FILES if name not in UNREAD])
def test_committed_rows_follow_the_schema(name):
    rows = results.read_results(ROOT / f"bench/results/{name}.jsonl")
    assert rows
    for r in rows:
        assert not r["commit"].endswith("-dirty")
        assert "/" not in r["command"].split("py ", 1)[-1]
        assert not r["detail"].get("trained", {"commit": ""})["commit"].endswith("-dirty")


def test_old_rows_keep_their_values():
    """The adapter renames; it must not round or merge a measurement."""
    folder: Path = ROOT / "bench/results"
    path = folder / "latency.jsonl"
    old, new = results.read_jsonl(path), results.read_results(path)
    for a, b in zip(old, new, strict=False):  # new rows follow the old ones
        assert "metric" in a or all(a[k] == b[k] for k in ("value", "spread", "repeats"))
    keys = {(r["metric"], r["provider"], *map(str, (r["labels"], r["shape"], r["date"])))
            for r in new}  # fmt: skip
    assert len(keys) == len(new)
    old = results.read_jsonl(folder / "training.jsonl")[2]
    [released] = results.from_old(old)
    assert (released["metric"], released["provider"], released["unit"]) == ("step", "released", "x")
    assert released["value"] == old["released"]["ours_times_faster"]["median"]
    assert released["spread"]["max"] == old["released"]["ours_times_faster"]["max"]
    with pytest.raises(UserError, match="not a valid result"):
        results.from_old({"loss": 1.0})
