"""Markdown tables of committed rows. Used by plot.py and table1.py; nothing is measured here."""

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common.results import fmt
from bench.common.workload import PATHS
from nanococonut.curriculum import METHODS

Rows = Sequence[dict[str, Any]]


# Table 1 of the paper (arXiv 2412.06769): task -> method -> accuracy in %, its standard deviation
# or null, generated tokens
PAPER = json.loads((Path(__file__).parent.parent / "results/paper_table1.json").read_text())
_SHOWN = ("coconut", "cot", "no_cot", "pause_as_thought")  # in the README


def _table(*rows: Sequence[str]) -> str:
    """Format cells as Markdown; the first row is the header."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


# ---- accuracy


def _cell(mean: float, deviation: float | None, tokens: float | None = None) -> str:
    text = f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"
    return text if tokens is None else f"{text} / {tokens:.1f}"


def _over_seeds(rows: Rows, with_tokens: bool = True) -> str:
    """Return accuracy in % (mean ± standard deviation) and generated tokens."""
    if not rows:
        return "not run"
    accuracies = [100 * row["value"] for row in rows]
    deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else None
    tokens = statistics.mean(row["detail"]["generated_tokens"] for row in rows)
    return _cell(statistics.mean(accuracies), deviation, tokens if with_tokens else None)


def select(rows: Rows, **labels: str) -> list[dict[str, Any]]:
    """Return the rows that have all of these labels."""
    return [row for row in rows if labels.items() <= row["labels"].items()]


def _seeds(rows: Rows) -> str:
    return ", ".join(map(str, sorted({r["detail"]["trained"]["seed"] for r in rows})))


def _shortcuts(rows: Rows) -> dict[str, dict[str, float]]:
    """Return rule -> split -> accuracy of that rule, from 0 to 1."""
    rules: dict[str, dict[str, float]] = {}
    for row in rows:
        for rule, accuracy in row["detail"]["shortcuts"].items():
            rules.setdefault(rule, {})[row["labels"]["data"]] = accuracy
    return rules


def table1(rows: Rows, task: str, preset: str) -> str:
    """Return accuracy % / generated tokens of every method on every split, with the paper's. Runs
    of a sweep have their own lines."""
    rows = select(rows, task=task, preset=preset)
    splits = list(dict.fromkeys(r["labels"]["data"] for r in rows))
    lines = [("method", "paper (GPT-2 124M)", *splits, "seeds")]
    runs = [(m, "") for m in METHODS]
    runs += sorted({(r["labels"]["method"], r["labels"]["setting"]) for r in rows} - set(runs))
    for method, setting in runs:
        own = select(rows, method=method, setting=setting)
        known = None if setting else PAPER[task].get(METHODS[method].paper)
        cells = [f"{method} {setting}".strip(), _cell(*known) if known else ""]
        cells += [_over_seeds(select(own, data=split)) for split in splits]
        lines.append((*cells, _seeds(own) or "not run"))
    for rule, by_split in _shortcuts(rows).items():
        cells = [f"{100 * by_split[split]:.1f}" if split in by_split else "" for split in splits]
        lines.append((f"no model: {rule}", "", *cells, ""))
    return _table(*lines)


def insight(rows: Rows) -> str:
    """Return a line for each method: what bench/insight.py found, means over runs, in %."""
    header = "method|accuracy|twins both right|averaged thoughts|swapped|verdict (runs)"
    lines = [tuple(header.split("|"))]
    for method in METHODS:
        own = select(rows, method=method)
        if not own:
            continue
        cells = [_mean([row["value"] for row in own])]
        for name, index in (("pairs", 1), ("needed", 1), ("carried", 0)):
            findings = [f for row in own for f in row["detail"]["findings"] if f["id"] == name]
            cells.append(_mean([f["figures"][index]["value"] for f in findings]))
        verdicts = Counter(row["detail"]["verdict"] for row in own)
        verdict = "; ".join(f"{text} ({n})" for text, n in verdicts.items())
        lines.append((method, *cells, verdict))
    return _table(*lines)


def _mean(fractions: Sequence[float]) -> str:
    return f"{100 * statistics.mean(fractions):.1f}" if fractions else "-"


def main_results(rows: Rows) -> str:
    """Return the README's table: small ProsQA models, accuracy and tokens in their own columns."""
    rows = select(rows, task="prosqa", preset="small", setting="")
    splits = ("prosqa", "prosqa_matched", "prosqa_balanced")
    lines = [("method", "ProsQA", "depth-matched", "balanced", "generated tokens", "seeds")]
    for method in _SHOWN:
        own = select(rows, method=method)
        cells = [_over_seeds(select(own, data=split), with_tokens=False) for split in splits]
        tokens = [r["detail"]["generated_tokens"] for r in select(own, data="prosqa")]
        count = f"{statistics.mean(tokens):.1f}" if tokens else "-"
        lines.append((method, *cells, count, _seeds(own) or "-"))
    rules = _shortcuts(rows)
    best = [max((rule.get(split, 0) for rule in rules.values()), default=0) for split in splits]
    lines.append(("best shortcut rule, no model", *(f"{100 * b:.1f}" for b in best), "0", "-"))
    return _table(*lines)


# ---- speed


@dataclass(frozen=True)
class Run:
    """The rows that one command wrote."""

    rows: list[dict[str, Any]]

    @property
    def title(self) -> str:
        """Size of the model, machine and day."""
        row = self.rows[0]
        size = row["shape"].get("parameters")
        model = f"{size / 1e6:,.0f} M parameters, " if size else ""
        return f"{model}{row['device']}, {row['dtype']}, {row['date'][:10]}"

    def value(self, metric: str, provider: str = "nanococonut", **where: Any) -> float | None:
        """Return the median of the row with these labels and sizes, None if not measured. A ratio
        is found only if relative_to is given."""
        where |= {"relative_to": where.get("relative_to"), "metric": metric, "provider": provider}
        for row in self.rows:
            if (
                where.items()
                <= ({"relative_to": None} | row | row["labels"] | row["shape"]).items()
            ):
                return row["value"]
        return None

    def points(self) -> list[tuple[int, int]]:
        """Return (batch, context) of the measured steps, except those of whole answers, sorted."""
        steps, answers = (
            {(r["shape"]["batch"], r["shape"]["context"]) for r in self.rows if r["metric"] == name}
            for name in ("latent_step", "answer")
        )
        return sorted(steps - answers)

    def ratios(self) -> dict[str, dict[str, float]]:
        """Return provider -> metric -> its time relative to ours, measured in turns on the answers
        of the first task. answer: with thoughts."""
        rows = [r for r in self.rows if r["labels"].get("relative_to") == "nanococonut"]
        contexts = {r["shape"]["context"] for r in rows if r["metric"] == "answer"}
        ratios: dict[str, dict[str, float]] = {}
        for row in rows:
            if row["shape"]["context"] in contexts:
                ratios.setdefault(row["provider"], {})[row["metric"]] = row["value"]
        return ratios

    def tasks(self) -> list[str]:
        """Return the tasks whose whole answers were measured."""
        answers = (row for row in self.rows if row["metric"] == "answer")
        return list(dict.fromkeys(row["labels"]["task"] for row in answers))


def newest_runs(rows: Rows, bench: str) -> list[Run]:
    """Return the newest run of a script for each device, dtype and size of model."""
    by_kind: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["bench"] == bench:
            by_kind[row["device"], row["dtype"], row["shape"].get("parameters")].append(row)
    newest = {kind: max(row["date"] for row in own) for kind, own in by_kind.items()}
    return [Run([r for r in own if r["date"] == newest[kind]]) for kind, own in by_kind.items()]


def latency(rows: Rows) -> str:
    """Return three tables for each machine: whole answers, single steps, other providers."""
    texts = []
    for run in newest_runs(rows, "latency"):
        texts.append(f"{run.title}, commit {run.rows[0]['commit']}; ms, batch 1:")
        texts += [_answers(run), _steps(run)]
        texts += [_others(run)] if run.ratios() else []
    return "\n\n".join(texts) or "Not run."


def _answers(run: Run) -> str:
    header = "answer|6 thoughts|written chain|direct|chain / thoughts|after prefill"
    lines = [header.split("|")]
    for task in run.tasks():
        times = [run.value("answer", task=task, path=path) for path in PATHS]
        chain = {"task": task, "path": "chain", "relative_to": "thoughts"}
        ratios = [run.value(metric, **chain) for metric in ("answer", "answer_after_prefill")]
        lines.append((task, *map(fmt, times), *(f"{x:.1f}x" for x in ratios)))
    return _table(*lines)


def _steps(run: Run) -> str:
    header = "batch|context|thought|roofline|token|roofline|token / thought|of their bytes"
    lines = [header.split("|")]
    for batch, context in run.points():
        where = {"batch": batch, "context": context}
        times = [
            run.value(metric, provider, **where)
            for metric in ("latent_step", "token_step")
            for provider in ("nanococonut", "roofline")
        ]
        ratio = run.value("token_step", relative_to="latent_step", **where)
        ratios = f"{ratio:.2f}x", f"{times[3] / times[1]:.2f}x"
        lines.append((str(batch), str(context), *map(fmt, times), *ratios))
    return _table(*lines)


def _others(run: Run) -> str:
    metrics = {"latent_step": "thought", "token_step": "token", "answer": "ProsQA answer"}
    lines = [("time relative to ours (transformers version)", *metrics.values())]
    for provider, ratios in run.ratios().items():
        cells = [f"{ratios[m]:.2g}x" if m in ratios else "not run" for m in metrics]
        versions = next(r["versions"] for r in run.rows if r["provider"] == provider)
        version = f" ({versions['transformers']})" if "transformers" in versions else ""
        lines.append((provider + version, *cells))
    return _table(*lines)


def speed(rows: Rows) -> str:
    """Return the README's tables: a ProsQA answer (others relative to six thoughts of ours), and a
    training step (the released code relative to ours). rows: of latency.py and training.py."""
    lines = [("ProsQA answer", "6 thoughts", "written chain", "direct", "transformers", "released")]
    for run in newest_runs(rows, "latency"):
        times = [run.value("answer", task="prosqa", path=path) for path in PATHS]
        ratios = [run.ratios().get(name, {}).get("answer") for name in ("transformers", "released")]
        if None not in times:
            cells = [f"{fmt(t)} ms" for t in times]
            cells += [f"{x:.2g}x" if x else "-" for x in ratios]
            lines.append((f"{run.rows[0]['device']}, {run.rows[0]['dtype']}", *cells))
    steps = [("training step", "batch", "device", "time", "released")]
    newest: dict[tuple, dict[str, dict]] = {}  # "ms" of ours and "x", the released code's over it
    for row in rows:
        if row["metric"] == "step" and (row["provider"] == "released") == (row["unit"] == "x"):
            key = row["labels"]["config"], row["shape"]["batch"], f"{row['device']}, {row['dtype']}"
            newest.setdefault(key, {})[row["unit"]] = row
    shown = {}  # one for each config and kind of device: the newest with a ratio, or without
    for (config, batch, device), by_unit in newest.items():
        place = config, device.startswith("CPU")
        if "ms" in by_unit and ("x" in by_unit or place not in shown):
            ratio = f"{by_unit['x']['value']:.2g}x" if "x" in by_unit else "-"
            shown[place] = config, str(batch), device, f"{fmt(by_unit['ms']['value'])} ms", ratio
    steps += shown.values()
    return "\n\n".join((_table(*lines), _table(*steps)))
