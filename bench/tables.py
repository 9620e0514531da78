"""Markdown tables made of what is in the repository: the methods, and committed rows beside the
paper's Table 1. Used by table1.py and plot.py; prints nothing and measures nothing."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanococonut.curriculum import METHODS
from nanococonut.runtime.errors import UserError

# Table 1 of the paper (arXiv 2412.06769): accuracy in %, its deviation, generated tokens
PAPER: dict[str, dict[str, tuple[float, float | None, float]]] = {
    "gsm8k": {
        "CoT": (42.9, 0.2, 25.0),
        "No-CoT": (16.5, 0.5, 2.2),
        "iCoT": (30.0, None, 2.2),
        "Pause token": (16.4, 1.8, 2.2),
        "Coconut": (34.1, 1.5, 8.2),
        "w/o curriculum": (14.4, 0.8, 8.2),
        "w/o thought": (21.6, 0.5, 2.3),
        "pause as thought": (24.1, 0.7, 2.2),
    },
    "prontoqa": {
        "CoT": (98.8, 0.8, 92.5),
        "No-CoT": (93.8, 0.7, 3.0),
        "iCoT": (99.8, 0.3, 3.0),
        "Pause token": (77.7, 21.0, 3.0),
        "Coconut": (99.8, 0.2, 9.0),
        "w/o curriculum": (52.4, 0.4, 9.0),
        "w/o thought": (99.9, 0.1, 3.0),
        "pause as thought": (100.0, 0.1, 3.0),
    },
    "prosqa": {
        "CoT": (77.5, 1.9, 49.4),
        "No-CoT": (76.7, 1.0, 8.2),
        "iCoT": (98.2, 0.3, 8.2),
        "Pause token": (75.9, 0.7, 8.2),
        "Coconut": (97.0, 0.3, 14.2),
        "w/o curriculum": (76.1, 0.2, 14.2),
        "w/o thought": (95.5, 1.1, 8.2),
        "pause as thought": (96.6, 0.8, 8.2),
    },
}

_DROPS = {
    "none": "nothing",
    "stage": "the first s steps at stage s",
    "all": "all steps",
    "tokens": "the chain's first tokens, more at every epoch",
}
_SLOTS = {
    "hidden": "thoughts: the last hidden state",
    "soft": "thoughts: the token embeddings' mean by probability",
    "projected": "thoughts: a learned map of the hidden state",
    "pause": "<pause> tokens, read at once",
}
_COUNTS = {"stage": "s · c_thought", "all": "as in the final stage"}
_MOVES = {"stages": "stage by stage", "epochs": "epoch by epoch", "never": "never"}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file; none where it is not there. UserError names a bad line."""
    if not path.is_file():
        return []
    rows = []
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows += [json.loads(line)] if line else []
        except ValueError:
            raise UserError(
                f"{path}, line {i}: no JSON row.\nGive another file, or mend this one."
            ) from None
    return rows


def methods_table() -> str:
    """The entries of curriculum.METHODS."""
    lines = [
        "| `--method=` | dropped | inserted | moves on | markers | in the paper |",
        "|---|---|---|---|---|---|",
    ]
    for name, m in METHODS.items():
        slots = (
            f"{_SLOTS[m.thought_type]}, {_COUNTS[m.n_thoughts_rule]}"
            if m.thought_type
            else "nothing"
        )
        markers = "yes" if m.markers else "no"
        cells = (_DROPS[m.drop_rule], slots, _MOVES[m.advance_by], markers, m.paper or "not there")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _figure(mean: float, deviation: float | None, tokens: float | None = None) -> str:
    text = f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"
    return text if tokens is None else f"{text} / {tokens:.1f}"


def _ours(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracy in % and generated tokens over seeds: mean ± standard deviation."""
    if not rows:
        return "not run"
    shares = [100 * row["accuracy"] for row in rows]
    deviation = statistics.stdev(shares) if len(shares) > 1 else None
    tokens = statistics.mean(row["generated_tokens"] for row in rows)
    return _figure(statistics.mean(shares), deviation, tokens)


def table1(rows: Sequence[dict[str, Any]], task: str, preset: str) -> str:
    """Accuracy % / generated tokens of every method beside the paper's; one column a split.

    rows: those of bench/table1.py, of any task and preset; sweeps have lines of their own.
    """
    mine = [r for r in rows if (r["table1"]["task"], r["table1"]["preset"]) == (task, preset)]
    splits = list(dict.fromkeys(r["data"] for r in mine))
    lines = [
        "| method | paper (GPT-2 124M) | " + "".join(f"{s} | " for s in splits) + "seeds |",
        "|---|---|" + "---|" * len(splits) + "---|",
    ]
    kinds = [(m, "") for m in METHODS]
    kinds += sorted({(r["method"], r["table1"]["setting"]) for r in mine} - set(kinds))
    for method, setting in kinds:
        here = [r for r in mine if (r["method"], r["table1"]["setting"]) == (method, setting)]
        known = None if setting else PAPER[task].get(METHODS[method].paper)
        cells = [f"{method} {setting}".strip(), _figure(*known) if known else ""]
        cells += [_ours([r for r in here if r["data"] == split]) for split in splits]
        seeds = sorted({r["trained"]["seed"] for r in here})
        lines.append(f"| {' | '.join(cells)} | {', '.join(map(str, seeds)) or 'not run'} |")
    for rule in dict.fromkeys(rule for r in mine for rule in r["heuristics"]):
        best = {r["data"]: r["heuristics"][rule] for r in mine if rule in r["heuristics"]}
        cells = [f"{100 * best[split]:.1f}" if split in best else "" for split in splits]
        lines.append(f"| no model: {rule} | | {' | '.join(cells)} | |")
    return "\n".join(lines)


def paper_cells(rows: Sequence[dict[str, Any]]) -> str:
    """Every (method, task) cell: the paper's figure, and ours with GPT-2 or "not run"."""
    lines = ["| method | " + " | ".join(PAPER) + " |", "|---|" + "---|" * len(PAPER)]
    for method, entry in METHODS.items():
        cells = []
        for task, known in PAPER.items():
            here = [
                r
                for r in rows
                if (r["table1"]["task"], r["table1"]["preset"]) == (task, "gpt2")
                and r["method"] == method
                and r["data"] == (task if task != "gsm8k" else r["data"])
                and not r["table1"]["setting"]
            ]
            paper = _figure(*known[entry.paper]) if entry.paper else "-"
            cells.append(f"{paper}; {_ours(here)}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Run:
    """Rows of bench/schema.py that one command made."""

    rows: list[dict[str, Any]]

    @property
    def title(self) -> str:
        """The machine, the model's size, and the day."""
        row = self.rows[0]
        size = row["shapes"].get("parameters")
        model = f"{size / 1e6:,.0f} M parameters, " if size else ""
        return f"{model}{row['device']}, {row['dtype']}, {row['date'][:10]}"

    @property
    def slug(self) -> str:
        """Of the device, for a file's name."""
        device = self.rows[0]["device"].lower()
        return "cpu" if device.startswith("cpu") else device.replace(" ", "_")

    def value(self, what: str, variant: str, **shapes: int) -> float | None:
        """The median; None where it was not measured."""
        for row in self.rows:
            if (row["what"], row["variant"]) == (what, variant):
                if shapes.items() <= row["shapes"].items():
                    return row["value"]
        return None

    def points(self) -> list[tuple[int, int]]:
        """(batch, context) of the steps measured, but for those of whole answers, in order."""

        def of(what: str) -> set[tuple[int, int]]:
            rows = [r["shapes"] for r in self.rows if what in r["what"] and r["variant"] == "ours"]
            return {(s["batch"], s["context"]) for s in rows if "context" in s}

        return sorted(of("latent step") - of("answer"))

    def peers(self, whats: Sequence[str]) -> dict[str, dict[str, float]]:
        """Name of another -> what -> its time by ours, pair by pair, where the two took turns over
        whole answers of one row."""
        turns = [r["shapes"] for r in self.rows if r["what"].endswith("thoughts, by ours")]
        found: dict[str, dict[str, float]] = {}
        for row in self.rows:
            what = row["what"].removesuffix(", by ours")
            if what in whats and what != row["what"] and row["shapes"] in turns:
                found.setdefault(row["variant"], {})[what] = row["value"]
        return found


def runs(rows: Sequence[dict[str, Any]], of: str) -> list[Run]:
    """The newest run of bench/<of>.py on each device, in each dtype, of each size of model."""
    newest: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        if f"bench/{of}.py" not in row["command"]:
            continue
        key = (row["device"], row["dtype"], row["shapes"].get("parameters"))
        kept = newest.setdefault(key, [])
        if kept and row["date"] > kept[0]["date"]:
            kept.clear()
        if not kept or row["date"] == kept[0]["date"]:
            kept.append(row)
    return [Run(kept) for kept in newest.values()]


def _ms(value: float | None) -> str:
    if value is None:
        return "not run"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def latency(rows: Sequence[dict[str, Any]]) -> str:
    """Of bench/latency.py's rows: whole answers, single steps and others beside ours, for each
    machine. Milliseconds, medians, one row."""
    found = runs(rows, "latency")
    if not found:
        return "Not run."
    text = []
    for run in found:
        whats = [row["what"] for row in run.rows if row["variant"] == "ours"]
        tasks = [w.split()[0] for w in whats if w.endswith("answer, 6 thoughts")]
        lines = [
            f"{run.title}, commit {run.rows[0]['commit']}; ms, one row:",
            "",
            "| answer | 6 thoughts | written chain | direct | chain / thoughts | no prefill |",
            "|---|---|---|---|---|---|",
        ]
        for task in tasks:
            ways = ("6 thoughts", "written chain", "direct")
            whole = [run.value(f"{task} answer, {way}", "ours") for way in ways]
            behind = [
                run.value(f"{task} answer{rest}, written chain by 6 thoughts", "ours")
                for rest in ("", " after prefill")
            ]
            cells = [*map(_ms, whole), *(f"{times:.1f}x" for times in behind)]
            lines.append(f"| {task} | {' | '.join(cells)} |")
        lines += [
            "",
            "| batch | context | a thought | its floor | a word | its floor | word / thought | of "
            "their bytes |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for batch, context in run.points():
            at = dict(batch=batch, context=context)
            steps = [
                run.value(what, who, **at)
                for what in ("latent step", "token step")
                for who in ("ours", "floor")
            ]
            times = run.value("token step by latent step", "ours", **at)
            cells = [*map(_ms, steps), f"{times:.2f}x", f"{steps[3] / steps[1]:.2f}x"]
            lines.append(f"| {batch} | {context} | {' | '.join(cells)} |")
        kinds = {
            "latent step": "a thought",
            "token step": "a further word",
            "prosqa answer, 6 thoughts": "a ProsQA answer",
        }
        others = run.peers(list(kinds))
        if others:
            heads = " | ".join(kinds.values())
            lines += [
                "",
                f"| times as long as ours (transformers) | {heads} |",
                "|---|---|---|---|",
            ]
            for name, ratios in others.items():
                cells = [f"{ratios[w]:.2g}x" if w in ratios else "not run" for w in kinds]
                with_ = next(r["versions"] for r in run.rows if r["variant"] == name)
                about = f" ({with_['transformers']})" if "transformers" in with_ else ""
                lines.append(f"| {name}{about} | {' | '.join(cells)} |")
        text.append("\n".join(lines))
    return "\n\n".join(text)
