"""bench/table1.py: runs, stops and goes on; the tables say "not run" where nothing was."""

import json
from pathlib import Path

import pytest
import tables

from nanococonut.curriculum import METHODS
from nanococonut.data.tasks import TASKS

ROOT = Path(__file__).parents[2]

TINY = "--set=epochs=2,train_examples=64,val_examples=10,advance_at=0,max_new_tokens=4"


def test_a_stopped_table_goes_on_where_it_was(script):
    argv = [
        "--task=prontoqa",
        "--methods=no_cot",
        TINY,
        "--n=20",
        "--out=rows.jsonl",
        "--runs=runs",
    ]
    code, out, err = script(*argv, "--minutes=0.0001", script="bench/table1.py")
    assert (code, err) == (0, "") and json.loads(out.splitlines()[-1])["left"] == 1
    code, out, err = script(*argv, script="bench/table1.py")
    assert (code, err) == (0, "") and json.loads(out.splitlines()[-1])["left"] == 0
    rows = tables.read_jsonl(Path("rows.jsonl"))
    assert [r["data"] for r in rows] == list(TASKS["prontoqa"].splits)
    assert all(r["method"] == "no_cot" and r["trained"]["steps"] == 2 for r in rows)
    table = Path("table1_prontoqa_small.md").read_text()
    assert f"no_cot {TINY[6:]}" in table and table in out
    assert script(*argv, script="bench/table1.py")[0] == 0  # all is done: nothing is run again
    assert tables.read_jsonl(Path("rows.jsonl")) == rows
    code, _, err = script(*argv[:3], "--n=21", *argv[4:], script="bench/table1.py")
    assert code == 2 and "by 20 rows" in err


def test_a_run_that_fails_is_told_and_the_table_still_made(script):
    """A folder that is a checkpoint already cannot take a run."""
    place = Path("runs/prontoqa_small") / f"no_cot_{TINY[6:]}_s0"
    place.mkdir(parents=True)
    (place / "manifest.json").write_text("{}")
    argv = ["--task=prontoqa", "--methods=no_cot", TINY, "--out=rows.jsonl", "--runs=runs"]
    code, out, err = script(*argv, script="bench/table1.py")
    assert code == 2 and "1 runs failed" in err and "is a checkpoint" in err
    assert "| no_cot |" in out and json.loads(out.splitlines()[-1])["left"] == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--methods=coconutt"], "coconutt"),
        (["--task=gsm8k"], "no small preset"),
        (["--sweep=c_thought"], "no values"),
        (["--set=epochs"], "no value"),
        (["--sweep=c_thout=0,1"], "Did you mean --c_thought"),
        (["--set=epochs=0"], "at least 1"),
        (["--seeds=0"], "at least 1"),
        (["--methods="], "names none"),
        (["--sweep=method=cot,coconut"], "'method'"),
        (["--set=out_dir=x"], "'out_dir'"),
        (["--data=nope.json"], "that are there"),
        (["--out=."], "cannot be"),
    ],
)
def test_bad_input_is_refused_before_any_run(script, argv, words):
    code, out, err = script(*argv, script="bench/table1.py")
    assert code == 2 and words in err and err.count("\n") <= 3 and "Traceback" not in err
    assert not Path("out").exists()


def row(method, seed, accuracy, data="prosqa", setting=""):
    return {
        "method": method,
        "accuracy": accuracy,
        "generated_tokens": 8.0 + seed,
        "data": data,
        "heuristics": {"deeper": 0.875},
        "trained": {"seed": seed},
        "table1": {"task": "prosqa", "preset": "small", "setting": setting},
    }


def test_a_cell_is_mean_and_deviation_or_not_run():
    rows = [row("coconut", s, a) for s, a in enumerate((0.98, 0.96, 0.97))]
    rows += [row("cot", 0, 0.5), row("coconut", 0, 0.25, setting="c_thought=2")]
    table = tables.table1(rows, "prosqa", "small")
    assert "| coconut | 97.0 ± 0.3 / 14.2 | 97.0 ± 1.0 / 9.0 | 0, 1, 2 |" in table
    assert "| cot | 77.5 ± 1.9 / 49.4 | 50.0 / 8.0 | 0 |" in table
    assert "| no_cot | 76.7 ± 1.0 / 8.2 | not run | not run |" in table
    assert "| coconut c_thought=2 |  | 25.0 / 8.0 | 0 |" in table
    assert "| no model: deeper | | 87.5 | |" in table
    rows += [row("coconut", 0, 0.5, data="rows.json") | {"heuristics": {}}]  # no rules known
    assert "| no model: deeper | | 87.5 |  | |" in tables.table1(rows, "prosqa", "small")
    gpt2 = [row("coconut", 0, a, data=d) for d, a in (("prosqa", 0.97), ("prosqa_long", 0.4))]
    for r in gpt2:
        r["table1"] = r["table1"] | {"preset": "gpt2"}
    assert "; 97.0 / 8.0 |" in tables.paper_cells(gpt2)  # the task's own rows alone
    cells = tables.paper_cells(rows)
    assert cells.count("not run") == 3 * len(METHODS)  # small models do not count as GPT-2's


def test_every_method_stands_in_its_table():
    table = tables.methods_table()
    for name, method in METHODS.items():
        assert f"| {name} |" in table and (method.paper or "not there") in table
    for figures in tables.PAPER.values():
        assert figures.keys() == {m.paper for m in METHODS.values() if m.paper}


@pytest.mark.slow
def test_what_train_py_refuses_twice_is_not_tried_again(script):
    argv = ("--methods=coconut,cot,no_cot,icot", "--set=graph=on,epochs=1", "--out=rows.jsonl")
    code, out, err = script(*argv, "--runs=runs", script="bench/table1.py")
    assert code == 2 and "2 runs failed" in err and "--graph=on cannot run here" in err
    assert sorted(p.name for p in Path("runs").rglob("train.log")) == ["train.log"] * 2
