"""bench/plot.py: figures and Markdown tables from result rows."""

import statistics

import pytest
import torch
from helpers import ROOT

from bench import plot
from bench.common import tables
from bench.common.results import ResultWriter, read_results
from bench.common.workload import WorkloadOptions
from nanococonut.curriculum import METHODS
from nanococonut.runtime.errors import UserError
from nanococonut.weights import checkpoint

OURS = "nanococonut"


def rows_of(bench: str, date: str, scale: float = 1.0) -> list[dict]:
    """Return rows as bench/latency.py and bench/throughput.py write them."""
    cpu, size = torch.device("cpu"), {"parameters": 124_000_000}
    made = ResultWriter(bench, WorkloadOptions(), cpu, torch.float32, **size)
    made.common["date"] = date

    def add(metric, provider, value, unit="ms", labels=None, **shape):
        value *= scale if unit == "ms" else 1
        made.add(metric, provider, [value], unit, **(labels or {}), **shape)

    if bench == "throughput":
        for batch in (1, 2, 4):
            for i, path in enumerate(("thoughts", "chain", "direct")):
                labels = {"task": "prosqa", "path": path}
                add("throughput", OURS, batch * (3 - i), "questions/s", labels, batch=batch)
        return made.rows
    for batch, context in ((1, 400), (1, 100), (8, 400), (1, 363)):
        at = dict(batch=batch, context=context)
        for metric, value in (("latent_step", 20), ("token_step", 30)):
            add(metric, OURS, value * batch, **at)
            add(metric, "roofline", value / 2, **at)
        add("token_step", OURS, 1.5, "x", {"relative_to": "latent_step"}, **at)
    for task, context in (("prosqa", 363), ("gsm8k", 57)):
        at = dict(batch=1, context=context)
        for path, value in (("thoughts", 100), ("chain", 300), ("direct", 80)):
            labels = {"task": task, "path": path}
            add("answer", OURS, value, labels=labels, **at)
            add("answer_after_prefill", OURS, value - 60, labels=labels, **at)
        labels = {"task": task, "path": "chain", "relative_to": "thoughts"}
        add("answer", OURS, 3, "x", labels, **at)
        add("answer_after_prefill", OURS, 6, "x", labels, **at)
    at, ratio = dict(batch=1, context=363), {"relative_to": OURS}
    labels = {"task": "prosqa", "path": "thoughts"}
    add("answer", "released", 900, labels=labels, **at)
    add("answer", "released", 9, "x", labels | ratio, **at)
    for metric, value in (("latent_step", 4), ("token_step", 20)):
        add(metric, "released", 21 * value, **at)
        add(metric, "released", value, "x", ratio, **at)
    add("latent_step", "released", 7, "x", ratio, batch=1, context=400)  # no answer's context
    return made.rows


def test_newest_run_of_a_machine_counts():
    old, new = (rows_of("latency", f"2026-01-0{n}T00:00:00Z", n) for n in (1, 2))
    for order in (old + new, new + old):
        [run] = tables.newest_runs(order)
        assert tables.value(run, "latent_step", batch=8, context=400) == 320
        assert tables.points(run) == [(1, 100), (1, 400), (8, 400)]
    assert tables.value(run, "latent_step", batch=9) is None
    assert tables.value(run, "token_step", relative_to="latent_step", batch=8) == 1.5
    other = [row | {"device": "NVIDIA H200"} for row in old]
    runs = tables.newest_runs(old + other)
    assert [run[0]["device"] for run in runs][1:] == ["NVIDIA H200"]
    assert tables.newest_runs(rows_of("throughput", "2026-01-01T00:00:00Z")) == []


def test_latency_table_agrees_with_the_rows():
    text = tables.latency(rows_of("latency", "2026-01-02T00:00:00Z"))
    assert "| prosqa | 100 | 300 | 80 | 3.0x | 6.0x |" in text
    assert "| 8 | 400 | 160 | 10 | 240 | 15 | 1.50x | 1.50x |" in text
    assert "| released | 4x | 20x | 9x |" in text
    assert "124 M parameters, CPU" in text and "2026-01-02" in text
    assert tables.latency([]) == "Not run."


def test_readme_speed_has_a_line_per_device():
    rows = rows_of("latency", "2026-01-02T00:00:00Z")
    rows += [row | {"device": "NVIDIA H200", "dtype": "bfloat16"} for row in rows]
    steps = read_results(ROOT / "bench/results/training.jsonl")
    text = tables.answer_speed(rows) + tables.step_speed(steps)
    assert "| NVIDIA H200, bfloat16 | 100 ms | 300 ms | 80 ms | - | 9x |" in text
    assert text.count("| 100 ms |") == 2
    small = [r for r in steps if r["labels"]["config"] == "prosqa_small.py"]
    ratio = [r["value"] for r in small if r["unit"] == "x"][-1]
    ms = [r["value"] for r in small if r["provider"] == "nanococonut" and r["unit"] == "ms"][-1]
    assert f"| CPU x86_64 AVX512, 2 threads, float32 | {ms:.1f} ms | {ratio:.2g}x |" in text
    assert text.count("| prosqa_small.py |") == 1  # the newest


def accuracy(method, seed, value, data="prosqa", **labels):
    own = {"method": method, "data": data, "task": "prosqa", "preset": "small", "setting": ""}
    detail = {"generated_tokens": 8.0 + seed, "trained": {"seed": seed}}
    return {
        "labels": own | labels,
        "shape": {},
        "value": value,
        "detail": detail | {"shortcuts": {"deeper": 0.875 if data == "prosqa" else 0.5}},
    }


def test_cell_is_mean_and_deviation_or_not_run():
    rows = [accuracy("coconut", s, a) for s, a in enumerate((0.98, 0.96, 0.97))]
    rows += [accuracy("cot", 0, 0.5), accuracy("coconut", 0, 0.25, setting="c_thought=2")]
    table = tables.table1(rows, "prosqa", "small")
    assert "| coconut | 97.0 ± 0.3 / 14.2 | 97.0 ± 1.0 / 9.0 | 0, 1, 2 |" in table
    assert "| cot | 77.5 ± 1.9 / 49.4 | 50.0 / 8.0 | 0 |" in table
    assert "| no_cot | 76.7 ± 1.0 / 8.2 | not run | not run |" in table
    assert "| coconut c_thought=2 |  | 25.0 / 8.0 | 0 |" in table
    assert "| no model: deeper |  | 87.5 |  |" in table
    own_file = accuracy("coconut", 0, 0.5, data="rows.json")
    own_file["detail"]["shortcuts"] = {}
    assert "| no model: deeper |  | 87.5 |  |  |" in tables.table1(
        [*rows, own_file], "prosqa", "small"
    )


def test_main_results_separate_accuracy_and_tokens():
    rows = [accuracy("coconut", s, a) for s, a in enumerate((0.98, 0.96, 0.97))]
    rows += [accuracy("coconut", 0, 0.9, data="prosqa_matched")]
    table = tables.main_results(rows).splitlines()
    assert "| coconut | 97.0 ± 1.0 | 90.0 | not run | 9.0 | 0, 1, 2 |" in table
    assert table[-1] == "| best shortcut rule, no model | 87.5 | 50.0 | 0.0 | 0 | - |"


def test_every_method_is_documented():
    """docs/RESULTS.md must say what each entry of METHODS drops and inserts."""
    text = (ROOT / "docs/RESULTS.md").read_text()
    for name, method in METHODS.items():
        [line] = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        assert (method.paper or "-") in line
    for cells in tables.PAPER.values():
        assert cells.keys() == {m.paper for m in METHODS.values() if m.paper}


def test_committed_results_give_the_published_numbers():
    """Recompute mean and deviation over seeds from the rows."""
    rows = read_results(ROOT / "bench/results/table1.jsonl")
    cells = tables.select(rows, method="coconut", data="prosqa", setting="", preset="small")
    percent = [100 * row["value"] for row in cells]
    text = f"{statistics.mean(percent):.1f} ± {statistics.stdev(percent):.1f}"
    assert f"| coconut | {text} |" in tables.main_results(rows)


@pytest.fixture
def results(monkeypatch, tmp_path):
    """Return an empty folder that plot.py reads results from."""
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    return tmp_path


def write(path, rows):
    for row in rows:
        checkpoint.append_row(path, row)


def test_every_figure_is_drawn(results):
    pytest.importorskip("matplotlib")
    assert plot.draw(results) == []
    write(results / "latency.jsonl", rows_of("latency", "2026-01-02T00:00:00Z"))
    text = (ROOT / "bench/results/table1.jsonl").read_text()
    (results / "table1.jsonl").write_text(text)
    drawn = plot.draw(results)
    assert [path.stem for path in drawn] == ["methods", "answers_cpu"]
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_figures_show_the_newest_run(results, monkeypatch):
    figures = pytest.importorskip("bench.common.figures")
    drawn = []
    monkeypatch.setattr(figures, "answers", lambda run, path: drawn.append(run[0]["date"]))
    for day, own in ((3, {}), (1, {"dtype": "bfloat16"}), (2, {})):
        rows = rows_of("latency", f"2026-01-0{day}T00:00:00Z")
        write(results / "latency.jsonl", [row | own for row in rows])
    steps = rows_of("latency", "2026-01-04T00:00:00Z")[:1]  # a run without answers
    write(results / "latency.jsonl", [row | {"dtype": "bfloat16"} for row in steps])
    assert [path.name for path in plot.draw(results)] == ["answers_cpu.png"]
    assert drawn == ["2026-01-03T00:00:00Z"]


def test_invalid_row_is_not_drawn(results):
    (results / "latency.jsonl").write_text('{"metric": "latent_step"}\n')
    with pytest.raises(UserError, match="not a valid result"):
        plot.draw(results)


def test_sections_are_put_between_their_marks(results):
    text = "a\n<!-- latency -->\nold\n<!-- /latency -->\nb\n"
    filled = plot.replace_sections("README.md", text)
    assert filled == "a\n<!-- latency -->\nNot run.\n<!-- /latency -->\nb\n"
    empty = "a\n<!-- latency -->\n<!-- /latency -->\nb\n"
    assert plot.replace_sections("README.md", empty) == filled
    for bad in ("<!-- latency -->\nold\n", "<!-- chess -->\n\n<!-- /chess -->\n"):
        with pytest.raises(UserError, match="README.md: expected"):
            plot.replace_sections("README.md", bad)


def test_curve_of_a_run_touches_nothing_committed(script, tmp_path):
    """--curve RUN --out FILE writes only FILE."""
    pytest.importorskip("matplotlib")
    model, tokenizer, manifest = checkpoint.load(checkpoint.BUNDLED)
    checkpoint.save(tmp_path / "run", manifest["step"], checkpoint.gather_tensors(model), manifest)
    logged = [{"step": i, "stage": i // 60, "loss": 2.0, "accuracy": 0.5} for i in range(1, 120)]
    logged.append({"step": 119, "stage": 1, "minutes": 1.0, "valid_accuracy": 0.9})
    write(tmp_path / "run" / "metrics.jsonl", logged)
    code, text, err = script("--curve=run", "--out=curve.png", script="bench/plot.py")
    assert (code, err, text) == (0, "", "run -> curve.png\n")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    row = plot.curve_of("run")
    assert row["name"] == "run" and row["validations"][0]["valid_accuracy"] == 0.9
    assert [point[0] for point in row["points"]][-3:] == [108, 114, 119]
    for n in (1, 7):  # a single point drew an empty figure
        (tmp_path / "run" / "metrics.jsonl").unlink()
        write(tmp_path / "run" / "metrics.jsonl", logged[:n])
        assert [point[0] for point in plot.curve_of("run")["points"]] == list(range(1, n + 1))
        code, _, err = script("--curve=run", f"--out=short{n}.png", script="bench/plot.py")
        assert (code, err) == (0, "")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    code, _, err = script("--curve=run", "--out=none.png", script="bench/plot.py")
    assert code == 2 and "no steps to draw" in err and not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--curve=run"], "go together"),
        (["--curve=run", "--out=curve.txt"], "expected a .png"),
        (["--curve=run", "--out=x.png"], "run"),
    ],
)
def test_mistakes_take_two_lines(script, argv, message):
    code, _, err = script(*argv, script="bench/plot.py")
    assert code == 2 and message in err and len(err.splitlines()) <= 2


def test_insight_table_has_a_line_for_each_method():
    """A missing finding counted as zero, or a mean mixed the runs of several methods."""

    def row(method, value, verdict, *findings):
        detail = {"verdict": verdict, "findings": list(findings)}
        return {"labels": {"method": method}, "shape": {}, "value": value, "detail": detail}

    pairs = {"id": "pairs", "figures": [{"value": 0.9}, {"value": 0.8}, {"value": 0.2}]}
    needed = {"id": "needed", "figures": [{"value": 0.9}, {"value": 0.5}]}
    rows = [row("coconut", 0.9, "needed", pairs, needed), row("coconut", 0.8, "needed")]
    rows.append(row("cot", 1, "?"))
    assert tables.insight(rows).splitlines()[2:] == [
        "| coconut | 85.0 | 80.0 | 90.0 → 50.0 | - | needed (2) |",
        "| cot | 100.0 | - | - | - | ? (1) |",
    ]
