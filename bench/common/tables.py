"""Markdown tables from result rows, for plot.py and table1.py."""

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.common.results import OURS, Row, fmt
from bench.common.workload import PATHS
from nanococonut.curriculum import METHODS

Rows = Sequence[Row]

# Table 1 of the paper (arXiv 2412.06769): task -> method -> accuracy in %, its standard deviation
# or None, generated tokens
PAPER = json.loads((Path(__file__).parent.parent / "results/paper_table1.json").read_text())
SHOWN = ("coconut", "cot", "no_cot", "pause_as_thought")  # in the README


def _table(*rows: Sequence[str]) -> str:
    """Format cells as Markdown; the first row is the header."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def select(rows: Rows, **where: Any) -> list[Row]:
    """Return the rows whose fields, labels and sizes include all of `where`."""
    return [r for r in rows if where.items() <= (r | r["labels"] | r["shape"]).items()]


# ---- accuracy


def _accuracy(rows: Rows) -> str:
    """Return the mean in %, with ± the standard deviation if there are several rows."""
    if not rows:
        return "not run"
    values = [100 * row["value"] for row in rows]
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def _tokens(rows: Rows) -> str:
    n = [row["detail"]["generated_tokens"] for row in rows]
    return f"{statistics.mean(n):.1f}" if n else "-"


def _seeds(rows: Rows) -> str:
    return ", ".join(map(str, sorted({r["detail"]["trained"]["seed"] for r in rows})))


def _shortcuts(rows: Rows) -> dict[str, dict[str, float]]:
    """Return shortcut rule -> split -> its accuracy, from 0 to 1."""
    rules: dict[str, dict[str, float]] = {}
    for row in rows:
        for rule, accuracy in row["detail"]["shortcuts"].items():
            rules.setdefault(rule, {})[row["labels"]["data"]] = accuracy
    return rules


def table1(rows: Rows, task: str, preset: str) -> str:
    """Return accuracy in % / generated tokens of every method on every split, with the paper's.

    A method has a separate line for each other setting that it was run with.
    """
    rows = select(rows, task=task, preset=preset)
    splits = list(dict.fromkeys(r["labels"]["data"] for r in rows))
    lines = [("method", "paper (GPT-2 124M)", *splits, "seeds")]
    runs = [(m, "") for m in METHODS]
    runs += sorted({(r["labels"]["method"], r["labels"]["setting"]) for r in rows} - set(runs))
    for method, setting in runs:
        own = select(rows, method=method, setting=setting)
        cells = [f"{method} {setting}".strip(), ""]
        if not setting and (paper := PAPER[task].get(METHODS[method].paper)):
            accuracy, deviation, tokens = paper
            spread = "" if deviation is None else f" ± {deviation:.1f}"
            cells[1] = f"{accuracy:.1f}{spread} / {tokens:.1f}"
        for split in splits:
            cell = select(own, data=split)
            cells.append(f"{_accuracy(cell)} / {_tokens(cell)}" if cell else "not run")
        lines.append((*cells, _seeds(own) or "not run"))
    for rule, by_split in _shortcuts(rows).items():
        cells = [f"{100 * by_split[split]:.1f}" if split in by_split else "" for split in splits]
        lines.append((f"no model: {rule}", "", *cells, ""))
    return _table(*lines)


def main_results(rows: Rows) -> str:
    """Return the README's table of small ProsQA models, with tokens in a column of their own."""
    rows = select(rows, task="prosqa", preset="small", setting="")
    splits = ("prosqa", "prosqa_matched", "prosqa_balanced")
    lines = [("method", "ProsQA", "depth-matched", "balanced", "generated tokens", "seeds")]
    for method in SHOWN:
        own = select(rows, method=method)
        cells = [_accuracy(select(own, data=split)) for split in splits]
        lines.append((method, *cells, _tokens(select(own, data="prosqa")), _seeds(own) or "-"))
    rules = _shortcuts(rows).values()
    best = [max((rule.get(split, 0) for rule in rules), default=0) for split in splits]
    lines.append(("best shortcut rule, no model", *(f"{100 * b:.1f}" for b in best), "0", "-"))
    return _table(*lines)


def insight(rows: Rows, methods: Sequence[str] = tuple(METHODS)) -> str:
    """Return what bench/insight.py found for each of the methods: means over runs, in %."""
    header = "method|accuracy|both twins correct|averaged thoughts|swapped|verdict (runs)"
    lines = [header.split("|")]
    for method in methods:
        own = select(rows, method=method)
        if not own:
            continue
        cells = [f"{100 * statistics.mean(row['value'] for row in own):.1f}"]
        for name, *indices in (("pairs", 1), ("needed", 0, 1), ("carried", 0)):
            figures = [
                f["figures"] for row in own for f in row["detail"]["findings"] if f["id"] == name
            ]
            means = [statistics.mean(f[i]["value"] for f in figures) for i in indices if figures]
            cells.append(" → ".join(f"{100 * x:.1f}" for x in means) or "-")
        whole = "the search, not the answer"  # commas separate verdicts
        short = [row["detail"]["verdict"].replace(whole, "hold the search") for row in own]
        verdicts = Counter(text.replace("part of the", "hold part of the") for text in short)
        lines.append((method, *cells, "<br>".join(f"{text} ({n})" for text, n in verdicts.items())))
    return _table(*lines)


# ---- speed: a run is all rows that one command wrote


def newest_runs(rows: Rows) -> list[Rows]:
    """Return the newest run of latency.py for each device and dtype."""
    runs: dict[tuple, list[Row]] = defaultdict(list)
    for row in select(rows, bench="latency"):
        runs[row["device"], row["dtype"]].append(row)
    return [select(run, date=max(row["date"] for row in run)) for run in runs.values()]


def title(run: Rows) -> str:
    """Return the run's model size, device, dtype and day."""
    row = run[0]
    model = f"{row['shape']['parameters'] / 1e6:,.0f} M parameters"
    return f"{model}, {row['device']}, {row['dtype']}, {row['date'][:10]}"


def value(
    run: Rows, metric: str, provider: str = OURS, relative_to: str | None = None, **where: Any
) -> float | None:
    """Return the median of the row with these labels and sizes, or None if not measured."""
    rows = select(run, metric=metric, provider=provider, **where)
    values = [r["value"] for r in rows if r["labels"].get("relative_to") == relative_to]
    return values[0] if values else None


def tasks(run: Rows) -> list[str]:
    """Return the tasks whose whole answers were measured."""
    return list(dict.fromkeys(r["labels"]["task"] for r in select(run, metric="answer")))


def points(run: Rows) -> list[tuple[int, int]]:
    """Return the sorted (batch, context) of single steps, without those of whole answers."""
    steps, answers = (
        {(r["shape"]["batch"], r["shape"]["context"]) for r in select(run, metric=metric)}
        for metric in ("latent_step", "answer")
    )
    return sorted(steps - answers)


def latency(rows: Rows) -> str:
    """Return the tables of each machine: whole answers, single steps, other providers."""
    texts = []
    for run in newest_runs(rows):
        texts.append(f"{title(run)}, commit {run[0]['commit']}; ms, batch 1:")
        texts += [_answers(run)] if tasks(run) else []
        texts.append(_steps(run))
        texts += [_others(run)] if select(run, metric="answer", relative_to=OURS) else []
    return "\n\n".join(texts) or "Not run."


def _answers(run: Rows) -> str:
    header = "answer|6 thoughts|written chain|direct|chain / thoughts|after prefill"
    lines = [header.split("|")]
    for task in tasks(run):
        times = [value(run, "answer", task=task, path=path) for path in PATHS]
        chain = {"task": task, "path": "chain", "relative_to": "thoughts"}
        faster = [value(run, metric, **chain) for metric in ("answer", "answer_after_prefill")]
        lines.append((task, *map(fmt, times), *(f"{x:.1f}x" for x in faster)))
    return _table(*lines)


def _steps(run: Rows) -> str:
    header = "batch|context|thought|roofline|token|roofline|token / thought|roofline ratio"
    lines = [header.split("|")]
    for batch, context in points(run):
        where = {"batch": batch, "context": context}
        times = [
            value(run, metric, provider, **where)
            for metric in ("latent_step", "token_step")
            for provider in (OURS, "roofline")
        ]
        slower = value(run, "token_step", relative_to="latent_step", **where), times[3] / times[1]
        lines.append((str(batch), str(context), *map(fmt, times), *(f"{x:.2f}x" for x in slower)))
    return _table(*lines)


def _others(run: Rows) -> str:
    """Return times relative to ours, measured with thoughts on the first task's answers."""
    metrics = {"latent_step": "thought", "token_step": "token", "answer": "ProsQA answer"}
    lines = [("time relative to ours (transformers version)", *metrics.values())]
    for row in select(run, metric="answer", relative_to=OURS):
        where = {"relative_to": OURS, "context": row["shape"]["context"]}
        slower = [value(run, metric, row["provider"], **where) for metric in metrics]
        version = row["versions"].get("transformers")
        name = f"{row['provider']} ({version})" if version else row["provider"]
        lines.append((name, *(f"{x:.2g}x" if x else "not run" for x in slower)))
    return _table(*lines)


def answer_speed(rows: Rows) -> str:
    """Return times of a ProsQA answer; others relative to ours with six thoughts."""
    peers = "transformers' time", "released code's"
    lines = [("ProsQA answer", "6 thoughts", "written chain", "direct", *peers)]
    where = {"task": "prosqa", "relative_to": OURS}
    for run in newest_runs(rows):
        times = [value(run, "answer", task="prosqa", path=path) for path in PATHS]
        ratios = [value(run, "answer", name, **where) for name in ("transformers", "released")]
        if None not in times:
            cells = [f"{fmt(t)} ms" for t in times]
            cells += [f"{x:.2g}x" if x else "-" for x in ratios]
            lines.append((f"{run[0]['device']}, {run[0]['dtype']}", *cells))
    return _table(*lines)


def step_speed(rows: Rows) -> str:
    """Return times of a training step, and the released code's relative to ours."""
    ours, released = {}, {}  # config, batch and device -> the newest time, and ratio
    for row in select(rows, metric="step"):
        key = row["labels"]["config"], row["shape"]["batch"], f"{row['device']}, {row['dtype']}"
        if row["unit"] == "x":
            released[key] = row["value"]
        elif row["provider"] == OURS:
            ours[key] = row["value"]
    lines = {}  # per config and kind of device, prefer a time that has a ratio
    for key, ms in ours.items():
        config, batch, device = key
        place = config, device.startswith("CPU")
        if key in released or place not in lines:
            ratio = f"{released[key]:.2g}x" if key in released else "-"
            lines[place] = config, str(batch), device, f"{fmt(ms)} ms", ratio
    return _table(("training step", "batch", "device", "time", "released code's"), *lines.values())
