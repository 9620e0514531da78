"""bench/plot.py: pictures and README sections from rows, and nothing else."""

import runpy

import pytest
import schema
import tables
import torch
from helpers import ROOT

from nanococonut.runtime.errors import UserError

WAYS = ("6 thoughts", "written chain", "direct")


def rows_of(command: str, date: str, scale: float = 1.0) -> list[dict]:
    """As bench/latency.py makes them: steps at two batches, two answers, one other side."""
    device, size = torch.device("cpu"), {"parameters": 124_000_000}
    made = schema.Rows(device, torch.float32, f"python bench/{command}.py", None, size)
    made.common["date"] = date

    def add(what, variant, value, unit="ms", **shapes):
        made.add(what, variant, [scale * value if unit == "ms" else value], unit, **shapes)

    if command == "throughput":
        for batch in (1, 2, 4):
            for i, way in enumerate(WAYS):
                shapes = dict(batch=batch)
                made.add("prosqa answers", way, [scale * batch * (3 - i)], "questions/s", **shapes)
        return made.rows
    for batch, context in ((1, 400), (1, 100), (8, 400)):
        for what, value in (("latent step", 20), ("token step", 30)):
            add(what, "ours", value * batch, batch=batch, context=context)
            add(what, "floor", value / 2, batch=batch, context=context)
        at = dict(batch=batch, context=context)
        add("token step by latent step", "ours", 1.5, "times", **at)
    for task, context in (("prosqa", 363), ("gsm8k", 57)):
        for way, value in zip(WAYS, (100, 300, 80), strict=True):
            add(f"{task} answer, {way}", "ours", value, batch=1, context=context)
            add(f"{task} answer after prefill, {way}", "ours", value - 60, batch=1, context=context)
        for rest, value in (("", 3), (" after prefill", 6)):
            what = f"{task} answer{rest}, written chain by 6 thoughts"
            add(what, "ours", value, "times", batch=1, context=context)
    at = dict(batch=1, context=363)
    add("prosqa answer, 6 thoughts", "released", 900, **at)
    add("prosqa answer, 6 thoughts, by ours", "released", 9, "times", **at)
    for what, ours, times in (("latent step", 21, 4), ("token step", 31, 20)):
        add(what, "ours", ours, **at)
        add(what, "floor", ours / 2, **at)
        add(what, "released", ours * times, **at)
        add(f"{what}, by ours", "released", times, "times", **at)
    add("latent step, by ours", "released", 7, "times", batch=1, context=400)  # not of the answers
    return made.rows


def test_the_newest_run_of_a_machine_counts():
    old, new = (rows_of("latency", f"2026-01-0{n}T00:00:00Z", n) for n in (1, 2))
    for order in (old + new, new + old):
        [run] = tables.runs(order, "latency")
        assert run.value("latent step", "ours", batch=8, context=400) == 320
        assert run.points() == [(1, 100), (1, 400), (8, 400)]
    assert run.value("latent step", "ours", batch=9) is None
    other = [row | {"device": "NVIDIA H200"} for row in old]
    assert [r.slug for r in tables.runs(old + other, "latency")] == ["cpu", "nvidia_h200"]
    assert tables.runs(rows_of("throughput", "2026-01-01T00:00:00Z"), "latency") == []


def test_the_section_says_what_the_rows_say():
    text = tables.latency(rows_of("latency", "2026-01-02T00:00:00Z"))
    assert "| prosqa | 100 | 300 | 80 | 3.0x | 6.0x |" in text
    assert "| 8 | 400 | 160 | 10 | 240 | 15 | 1.50x | 1.50x |" in text
    assert "| released | 4x | 20x | 9x |" in text
    assert "124 M parameters, CPU" in text and "2026-01-02" in text
    assert tables.latency([]) == "Not run."


@pytest.fixture
def plot(monkeypatch, tmp_path):
    names = runpy.run_path(str(ROOT / "bench/plot.py"), run_name="bench")
    monkeypatch.setitem(names["sections"].__globals__, "RESULTS", tmp_path)
    return names


def test_every_picture_is_drawn(plot, tmp_path):
    pytest.importorskip("matplotlib")
    assert plot["draw"](tmp_path) == []
    for name in ("latency", "throughput"):
        for row in rows_of(name, "2026-01-02T00:00:00Z"):
            plot["checkpoint"].append_row(tmp_path / f"{name}.jsonl", row)
    trained = ROOT / "bench/results/training.jsonl"
    (tmp_path / "training.jsonl").write_text(trained.read_text())
    drawn = plot["draw"](tmp_path)
    kinds = ["training", "answers", "peers", "throughput"]
    assert [path.name for path in drawn] == [f"{kind}_cpu.png" for kind in kinds]
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_pictures_are_of_the_newest_large_run(plot, tmp_path):
    for day, own in ((3, {}), (1, {"dtype": "bfloat16"}), (4, {"shapes": {"parameters": 1000}})):
        for row in rows_of("latency", f"2026-01-0{day}T00:00:00Z")[:1]:
            plot["checkpoint"].append_row(tmp_path / "latency.jsonl", row | own)
    [run] = plot["newest"]("latency")
    assert run.rows[0]["date"] == "2026-01-03T00:00:00Z"


def test_a_wrong_row_is_no_picture(plot, tmp_path):
    (tmp_path / "latency.jsonl").write_text('{"what": "latent step"}\n')
    with pytest.raises(UserError, match="a row of results is wrong"):
        plot["bench_rows"]("latency")


def test_sections_are_put_between_their_marks(plot):
    text = "a\n<!-- latency -->\nold\n<!-- /latency -->\nb\n"
    made = plot["with_sections"]("README.md", text)
    assert made == "a\n<!-- latency -->\nNot run.\n<!-- /latency -->\nb\n"
    for bad in ("<!-- latency -->\nold\n", "<!-- chess -->\n\n<!-- /chess -->\n"):
        with pytest.raises(UserError, match="no whole section"):
            plot["with_sections"]("README.md", bad)
