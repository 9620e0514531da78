"""The figures of plot.py, one function each, drawn from result rows.

The colours are Okabe and Ito's palette for colour-blind readers; lines also differ by marker.
"""

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from bench.common import tables
from bench.common.results import OURS, fmt
from bench.common.tables import Rows, select
from nanococonut.curriculum import METHODS

BLUE, RED, GREEN, GREY = "#0072B2 #D55E00 #009E73 #7F7F7F".split()
PATHS = {"thoughts": BLUE, "chain": RED, "direct": GREEN}
NAMES = {"thoughts": "6 thoughts", "chain": "written chain", "direct": "direct answer"}

plt.rcParams.update(
    {"legend.fontsize": 8, "legend.frameon": False, "font.size": 9, "figure.dpi": 110}
)


def _save(figure: Figure, title: str, path: Path) -> None:
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def answers(run: Rows, path: Path) -> None:
    """Draw the time to a whole answer, split into prefill and the rest."""
    tasks = tables.tasks(run)
    figure, axes = plt.subplots(figsize=(8, 1 + 0.9 * len(tasks)))
    longest = max(r["value"] for r in select(run, metric="answer", provider=OURS, unit="ms"))
    scale, unit = (1, "ms") if longest < 2000 else (1e-3, "seconds")
    for i, task in enumerate(tasks):
        for j, (kind, colour) in enumerate(PATHS.items()):
            whole = scale * tables.value(run, "answer", task=task, path=kind)
            rest = scale * tables.value(run, "answer_after_prefill", task=task, path=kind)
            y = i + (j - 1) * 0.27
            axes.barh(y, whole - rest, 0.24, color="0.8", label=None if i or j else "question")
            name = None if i else NAMES[kind]
            axes.barh(y, rest, 0.24, left=whole - rest, color=colour, label=name)
            axes.text(whole + 0.01 * scale * longest, y, fmt(whole), va="center", fontsize=8)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * scale * longest)
    axes.set_xlabel(f"{unit} per answer, batch 1")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=4)  # above the bars
    _save(figure, f"Time to a whole answer: {tables.title(run)}", path)


def curve(row: dict[str, Any], path: Path) -> None:
    """Draw a run's loss and accuracies over its stages."""
    step, stage, loss, exact = zip(*row["points"], strict=True)
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 5.6), sharex=True)
    marker = "." if len(step) < 20 else ""  # a single point draws no line
    above.plot(step, loss, marker=marker, color=BLUE)
    above.set_yscale("log")
    above.set_ylabel("loss, nats per label")
    below.plot(
        step, exact, marker=marker, color=BLUE, label="training examples with every token correct"
    )
    for key, colour, marker, name in (
        ("valid_accuracy", RED, "o", "validation accuracy"),
        ("matched_accuracy", GREEN, "s", "validation accuracy without the depth shortcut"),
    ):
        points = [(v["step"], v[key]) for v in row["validations"] if v.get(key) is not None]
        if points:
            below.plot(*zip(*points, strict=True), marker + "-", color=colour, label=name)
    below.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    below.set_xlim(left=0)  # where the first stage starts
    below.set_ylim(0, 1)
    below.set_ylabel("fraction")
    below.set_xlabel(f"optimizer steps, batch {row['batch_size']}")
    below.legend(loc="lower right")
    left = 0
    last_steps = dict(zip(stage, step, strict=True))  # of each stage
    for n, (name, end) in enumerate(last_steps.items()):
        for axes in (above, below) if n % 2 else ():
            axes.axvspan(left, end, color="0.94", zorder=0)
        label = f"stage {name}" if n == 0 or end - left > step[-1] / 9 else name
        where = above.get_xaxis_transform()
        above.text((left + end) / 2, 1.02, label, ha="center", fontsize=8, transform=where)
        left = end
    threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
    run = f"{row['name']}: {row['method']}, seed {row['seed']}"
    _save(figure, f"{run}, {row['minutes']:.0f} minutes on {row['device']} ({threads})", path)


def methods(rows: Rows, path: Path) -> None:
    """Draw the accuracy of every small model with the data's shortcut and without it."""
    rows = select(rows, preset="small", setting="")
    tasks = {
        "ProsQA": ("prosqa", "prosqa_balanced"),
        "ProntoQA": ("prontoqa", "prontoqa_matched"),
    }
    figure, both = plt.subplots(1, 2, figsize=(8, 4.2), sharey=True)
    for axes, (task, splits) in zip(both, tasks.items(), strict=True):
        axes.axvline(50, color="black", linewidth=0.8, linestyle=":", label="guessing")
        for y, name in enumerate(METHODS):
            own = [select(rows, method=name, data=split) for split in splits]
            if not all(own):
                axes.text(50, y, " not run", va="center", fontsize=8, color=GREY)
                continue
            seeds = [[100 * row["value"] for row in cells] for cells in own]
            a, b = map(statistics.fmean, seeds)
            axes.plot([a, b], [y, y], color="0.8", linewidth=3, zorder=0)
            for values, color in zip(seeds, (RED, BLUE), strict=True):
                axes.plot(values, [y] * len(values), "|", color=color, markersize=9)
            labels = (None, None) if y else ("with the data's shortcut", "without a shortcut")
            axes.plot(a, y, "o", mfc="white", color=RED, label=labels[0])
            axes.plot(b, y, "D", color=BLUE, markersize=6, label=labels[1])
        axes.set_xlim(44, 102)
        axes.set_xticks(range(50, 101, 10))
        axes.set_xlabel(f"{task}, accuracy in %\n({', '.join(splits)})")
        axes.grid(axis="x", color="0.92")
    both[0].set_yticks(range(len(METHODS)), METHODS)
    both[0].invert_yaxis()
    handles = both[0].get_legend_handles_labels()
    legend = figure.legend(*handles, loc="upper center", bbox_to_anchor=(0.55, 0.95), ncol=3)
    legend.set_in_layout(False)
    title = f"Small models, mean (and bars: every seed), {rows[0]['device']}"
    _save(figure, f"{title}\n", path)  # the legend takes the second line
