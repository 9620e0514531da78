"""bench/schema.py: what a row has to hold, and that the committed ones do."""

import json
from dataclasses import dataclass

import pytest
import schema
import tables
import torch
from helpers import ROOT

from nanococonut.runtime.cli import option
from nanococonut.runtime.errors import UserError


def row(**own):
    made = schema.Rows(
        torch.device("cpu"), torch.float32, "python bench/x.py", None, {"n_layer": 2}
    )
    return made.add("latent step", "ours", [3.0, 1.0, 2.0], "ms", batch=4) | own


def test_a_row_holds_the_median_and_the_spread():
    good = row()
    schema.check(good)
    assert good["value"] == 2 and good["spread"] == {"p10": 1.2, "p90": 2.8}
    assert (good["repeats"], good["shapes"]) == (3, {"n_layer": 2, "batch": 4})
    assert good["device"].startswith("CPU ") and good["dtype"] == "float32"
    assert json.loads(json.dumps(good)) == good


@pytest.mark.parametrize(
    "own, said",
    [
        ({"note": "x"}, "note"),
        ({"value": "2"}, "value is '2'"),
        ({"value": float("nan")}, "value is nan"),
        ({"value": -1.0}, "value is -1.0"),
        ({"value": 5.0}, "not between 1.2 and 2.8"),
        ({"unit": "furlongs"}, "furlongs"),
        ({"what": ""}, "what is empty"),
        ({"shapes": {"batch": "4"}}, "no"),
        ({"spread": {"min": 1.0}}, "not p10 and p90"),
        ({"repeats": 0}, "repeats=0"),
        ({"repeats": True}, "repeats is True"),
        ({"versions": {}}, "versions"),
        ({"date": "yesterday"}, "yesterday"),
    ],
)
def test_a_wrong_row_is_named(own, said):
    with pytest.raises(UserError, match=said):
        schema.check(row(**own))
    short = row()
    short.pop("commit")
    with pytest.raises(UserError, match="commit"):
        schema.check(short)


def test_the_json_line_says_what_is_shared_once():
    made = schema.Rows(torch.device("cpu"), torch.float32, "c", None, {"n_layer": 2})
    made.add("latent step", "ours", [1.0], "ms", batch=1)
    made.add("latent step", "released", [9.0], "ms", {"torch": "1"}, batch=1)
    line = json.loads(made.line("latency", seconds=3))
    assert (line["bench"], line["shapes"], line["seconds"]) == ("latency", {"n_layer": 2}, 3)
    ours, theirs = line["rows"]
    assert ours["shapes"] == {"batch": 1} and "versions" not in ours
    assert theirs["versions"] == {"torch": "1"}


def test_a_command_names_no_path(tmp_path):
    @dataclass(frozen=True)
    class Config:
        released: str | None = option(None, "a clone")
        minutes: float = option(3.0, "minutes")
        out: str | None = option(None, "file")

    config = Config(released=str(tmp_path), minutes=5.0, out="rows.jsonl")
    command = schema.command_of(config, "bench/latency.py")
    assert command == "python bench/latency.py --released=RELEASED --minutes=5.0"


@pytest.mark.parametrize("name", ["latency", "throughput", "kernels"])
def test_committed_rows_are_right(name):
    rows = tables.read_jsonl(ROOT / f"bench/results/{name}.jsonl")
    for r in rows:
        schema.check(r)
        assert not r["commit"].endswith("-dirty") and "/" not in r["command"].split("py ", 1)[-1]
