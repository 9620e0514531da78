"""Pictures of committed rows, one function each. Used by plot.py; nothing is measured here.

Colours are Okabe and Ito's, which everybody can tell apart; lines also differ in their markers.
"""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from bench.common.results import bounds
from bench.common.tables import Run, select
from nanococonut.curriculum import METHODS

BLUE, RED, GREEN, YELLOW, SKY, GREY = "#0072B2 #D55E00 #009E73 #E69F00 #56B4E9 #7F7F7F".split()
PATHS = {  # path -> name, colour, marker
    "thoughts": ("6 thoughts", BLUE, "o"),
    "chain": ("written chain", RED, "s"),
    "direct": ("direct answer", GREEN, "^"),
}
Rows = Sequence[dict[str, Any]]

plt.rcParams.update(
    {"legend.fontsize": 8, "legend.frameon": False, "font.size": 9, "figure.dpi": 110}
)


def _save(figure: Figure, title: str, path: Path) -> None:
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _log(axis: Any, ticks: Iterable[float] = ()) -> None:
    """Label a logarithmic axis in plain numbers: these ticks, or 1, 2, 5, 10, ..."""
    low, high = axis.get_view_interval()
    if ticks:
        axis.set_major_locator(FixedLocator(sorted(ticks)))
    else:
        axis.set_major_locator(MaxNLocator(6) if high < 10 * low else LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))


def _legend(axes: Axes) -> None:
    """Put the legend above the axes, where it hides nothing."""
    n = len(axes.get_legend_handles_labels()[1])
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=n)


def answers(run: Run, path: Path) -> None:
    """Draw the time of whole answers, split into the question (prefill) and the rest."""
    tasks = run.tasks()
    figure, axes = plt.subplots(figsize=(8, 1 + 0.9 * len(tasks)))
    times = [run.value("answer", task=t, path=p) for t in tasks for p in PATHS]
    longest = max(times)
    scale, unit = (1, "ms") if longest < 2000 else (1e-3, "seconds")
    for i, task in enumerate(tasks):
        for j, (kind, (name, colour, _)) in enumerate(PATHS.items()):
            whole = scale * run.value("answer", task=task, path=kind)
            rest = scale * run.value("answer_after_prefill", task=task, path=kind)
            y = i + (j - 1) * 0.27
            axes.barh(y, whole - rest, 0.24, color="0.8", label=None if i or j else "question")
            axes.barh(y, rest, 0.24, left=whole - rest, color=colour, label=None if i else name)
            axes.text(whole + 0.01 * scale * longest, y, f"{whole:,.3g}", va="center", fontsize=8)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * scale * longest)
    axes.set_xlabel(f"{unit} an answer, batch 1")
    _legend(axes)
    _save(figure, f"whole answers, {run.title}", path)


def baselines(run: Run, path: Path) -> None:
    """Draw how much longer other implementations take."""
    bars = {
        "latent_step": (BLUE, "thought"),
        "token_step": (RED, "further token"),
        "answer": (GREEN, "whole ProsQA answer, 6 thoughts"),
    }
    ratios = run.ratios()
    figure, axes = plt.subplots(figsize=(8, 1.3 + 0.7 * len(ratios)))
    for i, values in enumerate(ratios.values()):
        for j, (metric, (colour, name)) in enumerate(bars.items()):
            if metric in values:
                y, ratio = i + (j - 1) * 0.27, values[metric]
                axes.barh(y, ratio - 1, 0.24, left=1, color=colour, label=None if i else name)
                axes.text(max(ratio, 1), y, f" {ratio:.3g}x", va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    all_ratios = [ratio for values in ratios.values() for ratio in values.values()]
    axes.set_xlim(min(0.7, 0.9 * min(all_ratios)), 1.6 * max(all_ratios))
    _log(axes.xaxis)
    axes.set_yticks(range(len(ratios)), ratios)
    axes.invert_yaxis()
    axes.set_xlabel("time relative to nanococonut (logarithmic)")
    _legend(axes)
    _save(figure, f"other implementations, batch 1, {run.title}", path)


def throughput(run: Run, path: Path) -> None:
    """Draw questions per second against batch size."""
    figure, axes = plt.subplots(figsize=(8, 3.6))
    ticks: set[int] = set()
    for kind, (name, colour, marker) in PATHS.items():
        rows = select(run.rows, path=kind)
        batches = [row["shape"]["batch"] for row in rows]
        ticks |= set(batches)
        values = [row["value"] for row in rows]
        axes.plot(batches, values, marker + "-", color=colour, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _log(axes.xaxis, ticks)
    _log(axes.yaxis)
    axes.set_xlabel("batch size")
    axes.set_ylabel("questions per second")
    axes.grid(axis="y", color="0.9")
    axes.legend()
    _save(figure, f"{run.rows[0]['labels']['task']} throughput, {run.title}", path)


def training(rows: Rows, path: Path) -> None:
    """Draw examples per second of ours and of the released code, the newest run of each size, and
    how a step of the newest --sweep grows with thoughts and context."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), width_ratios=(3, 2))
    shown = _compared(rows, left) + _swept(rows, right)
    commits = ", ".join(dict.fromkeys(row["commit"] for row in shown))
    _save(figure, f"training, {shown[-1]['device']}, commits {commits}", path)


def _compared(rows: Rows, axes: Axes) -> list[dict[str, Any]]:
    pairs: dict[tuple, dict[str, dict[str, Any]]] = {}  # case -> provider -> newest row
    for row in rows:
        if row["metric"] == "examples_per_s" and "context" not in row["shape"]:
            case = row["labels"]["config"], row["shape"]["batch"], row["dtype"]
            pairs.setdefault(case, {})[row["provider"]] = row
    pairs = {case: pair for case, pair in pairs.items() if "released" in pair}
    names = []
    for i, ((config, batch, _), pair) in enumerate(pairs.items()):
        shape = pair["released"]["shape"]
        size = f"{shape['n_layer']} x {shape['n_embd']}"
        names.append(f"{Path(config).stem},\n{size}, batch {batch}")
        for j, provider in enumerate(("nanococonut", "released")):
            row = pair[provider]
            low, high = bounds(row)
            y, error = i + (j - 0.5) * 0.36, [[row["value"] - low], [high - row["value"]]]
            axes.barh(y, row["value"], 0.32, xerr=error, color=(BLUE, YELLOW)[j], capsize=3,
                      label=None if i else provider)  # fmt: skip
            axes.text(1.08 * high, y, f"{row['value']:,.3g}", va="center", fontsize=8)
    axes.set_xscale("log")
    _log(axes.xaxis, [0.1, 1, 10, 100, 1000])
    axes.set_xlim(0.1, 3000)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("examples per second, 6 thoughts\n(logarithmic, with spread)")
    _legend(axes)
    return [pair["nanococonut"] for pair in pairs.values()]


def _swept(rows: Rows, axes: Axes) -> list[dict[str, Any]]:
    times: dict[int, dict[int, dict[str, Any]]] = {}  # context -> thoughts -> newest row
    for row in rows:
        if (row["metric"], row["provider"], row["unit"]) == ("step", "nanococonut", "ms"):
            if "context" in row["shape"]:
                by_thoughts = times.setdefault(row["shape"]["context"], {})
                by_thoughts[row["shape"]["thoughts"]] = row
    styles = zip((GREEN, RED, SKY, GREY), "osD^", strict=True)
    for (context, cells), (colour, marker) in zip(sorted(times.items()), styles, strict=False):
        values = [row["value"] for row in cells.values()]
        axes.plot(list(cells), values, f"{marker}-", color=colour, label=f"{context:,} tokens")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("thoughts, by length of the question\n(prosqa_small's size, batch 8)")
    axes.set_ylabel("ms per step")
    axes.grid(axis="y", color="0.9")
    axes.legend()
    return [row for cells in times.values() for row in cells.values()]


def curve(row: dict[str, Any], path: Path) -> None:
    """Draw a run's loss and accuracies, with a band for each stage."""
    step, stage, loss, exact = zip(*row["points"]["rows"], strict=True)
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 5.6), sharex=True)
    above.plot(step, loss, color=BLUE)
    above.set_yscale("log")
    above.set_ylabel("loss, nats per label")
    below.plot(step, exact, color=BLUE, label="training examples with every token correct")
    validations = row["validations"]
    for key, colour, marker, name in (
        ("valid_accuracy", RED, "o", "validation accuracy"),
        ("matched_accuracy", GREEN, "s", "validation accuracy without the depth shortcut"),
    ):
        points = [(v["step"], v[key]) for v in validations if v[key] is not None]
        if points:
            below.plot(*zip(*points, strict=True), marker + "-", color=colour, label=name)
    below.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    below.set_ylim(0, 1)
    below.set_ylabel("fraction")
    below.set_xlabel(f"optimizer steps, batch {row['batch_size']}")
    below.legend(loc="lower right")
    starts = [0] + [i for i in range(1, len(step)) if stage[i] != stage[i - 1]]
    for n, i in enumerate(starts):
        left = step[i - 1] if i else 0
        end = step[starts[n + 1] - 1] if n + 1 < len(starts) else step[-1]
        for axes in (above, below) if n % 2 else ():
            axes.axvspan(left, end, color="0.94", zorder=0)
        name = f"stage {stage[i]}" if n == 0 or end - left > step[-1] / 9 else stage[i]
        where = above.get_xaxis_transform()
        above.text((left + end) / 2, 1.02, name, ha="center", fontsize=8, transform=where)
    threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
    run = f"{row['name']}: {row['method']}, seed {row['seed']}"
    _save(figure, f"{run}, {row['minutes']:.0f} minutes on {row['device']} ({threads})", path)


def methods(rows: Rows, path: Path) -> None:
    """Draw the small models' Table 1: every method with the data's shortcut and without it."""
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
            a, b = (100 * statistics.fmean(row["value"] for row in cells) for cells in own)
            axes.plot([a, b], [y, y], color="0.8", linewidth=3, zorder=0)
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
    seeds = {row["detail"]["trained"]["seed"] for row in rows}
    commits = ", ".join(dict.fromkeys(row["detail"]["trained"]["commit"] for row in rows))
    title = f"small models, at most {len(seeds)} seeds, {rows[0]['device'].upper()}, "
    _save(figure, f"{title}trained at {commits}\n", path)  # the legend takes the second line
