"""Pictures of committed rows, one function each; used by plot.py. Nothing is measured here.

Colours are Okabe and Ito's, which all can tell apart, and lines differ in their marks too. Width: a
README's. Every title says on what machine and when.
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
from tables import Run

from nanococonut.curriculum import METHODS

BLUE, RED, GREEN, YELLOW, SKY, GREY = "#0072B2 #D55E00 #009E73 #E69F00 #56B4E9 #7F7F7F".split()
SIZE, DPI = (8, 3.6), 110


def _save(figure: Figure, title: str, to: Path) -> None:
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(to, dpi=DPI)
    plt.close(figure)


def _log(axis: Any, ticks: Iterable[float] = ()) -> None:
    """Ticks of a logarithmic axis, in plain numbers: just these, or 1, 2, 5, 10, ..., and more of
    them where the axis is short."""
    low, high = axis.get_view_interval()
    if ticks:
        axis.set_major_locator(FixedLocator(sorted(ticks)))
    elif high < 10 * low:
        axis.set_major_locator(MaxNLocator(6))
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))


def _legend(axes: Axes) -> None:
    """Above the axes, where it hides nothing."""
    names = len(axes.get_legend_handles_labels()[1])
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=names, fontsize=8, frameon=False
    )


def answers(run: Run, to: Path) -> None:
    """Whole answers, split into reading the question and the rest."""
    ways = {"6 thoughts": BLUE, "written chain": RED, "direct": GREEN}
    found = {
        (row["what"], way): row["value"]
        for row in run.rows
        for way in ways
        if row["variant"] == "ours" and row["what"].endswith(f", {way}")
    }
    tasks = list(dict.fromkeys(what.split()[0] for what, _ in found))
    figure, axes = plt.subplots(figsize=(8, 1 + 0.9 * len(tasks)))
    longest = max(found.values())
    scale, unit = (1, "ms") if longest < 2000 else (1e-3, "seconds")
    for i, task in enumerate(tasks):
        for j, (way, colour) in enumerate(ways.items()):
            whole = scale * found[f"{task} answer, {way}", way]
            rest = scale * found[f"{task} answer after prefill, {way}", way]
            y = i + (j - 1) * 0.27
            axes.barh(y, whole - rest, 0.24, color="0.8", label=None if i or j else "the question")
            then = {"6 thoughts": "6 thoughts and answer", "written chain": "chain and answer"}
            label = None if i else f"then {then.get(way, 'the answer at once')}"
            axes.barh(y, rest, 0.24, left=whole - rest, color=colour, label=label)
            axes.text(whole + 0.01 * scale * longest, y, f"{whole:,.3g}", va="center", fontsize=8)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * scale * longest)
    axes.set_xlabel(f"{unit} an answer, one row")
    _legend(axes)
    _save(figure, f"whole answers, {run.title}", to)


def peers(run: Run, to: Path) -> None:
    """How many times longer others take, of what was measured in turns with ours."""
    kinds = {
        "latent step": (BLUE, "a thought"),
        "token step": (RED, "a further word"),
        "prosqa answer, 6 thoughts": (GREEN, "a ProsQA answer, 6 thoughts"),
    }
    ratios = run.peers(list(kinds))
    figure, axes = plt.subplots(figsize=(8, 1.3 + 0.7 * len(ratios)))
    for i, values in enumerate(ratios.values()):
        for j, (what, (colour, label)) in enumerate(kinds.items()):
            if what in values:
                y = i + (j - 1) * 0.27
                times = values[what]
                axes.barh(y, times - 1, 0.24, left=1, color=colour, label=None if i else label)
                axes.text(max(times, 1), y, f" {times:.3g}x", va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    most = [times for values in ratios.values() for times in values.values()]
    axes.set_xlim(min(0.7, 0.9 * min(most)), 1.6 * max(most))
    _log(axes.xaxis)
    axes.set_yticks(range(len(ratios)), [name.replace(", ", ",\n") for name in ratios])
    axes.invert_yaxis()
    axes.set_xlabel("times as long as ours (logarithmic)")
    _legend(axes)
    _save(figure, f"others against ours, one row, {run.title}", to)


def throughput(run: Run, to: Path) -> None:
    """Questions per second against batch."""
    looks = {"6 thoughts": (BLUE, "o"), "written chain": (RED, "s"), "direct": (GREEN, "^")}
    figure, axes = plt.subplots(figsize=SIZE)
    ticks: set[int] = set()
    [task] = {row["what"].split()[0] for row in run.rows}
    for way, (colour, mark) in looks.items():
        rows = [row for row in run.rows if row["variant"] == way]
        batches = [row["shapes"]["batch"] for row in rows]
        ticks |= set(batches)
        axes.plot(batches, [row["value"] for row in rows], mark + "-", color=colour, label=way)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _log(axes.xaxis, ticks)
    _log(axes.yaxis)
    axes.set_xlabel("rows at once")
    axes.set_ylabel("questions a second")
    axes.grid(axis="y", color="0.9")
    axes.legend(fontsize=8)
    _save(figure, f"{task} throughput, {run.title}", to)


def training(rows: Sequence[dict[str, Any]], to: Path) -> None:
    """Rows per second of bench/training.py beside the released code's, the newest run of each size;
    and how the newest --sweep's step grows with thoughts and context."""
    compared = {
        (row["config"], row["batch_size"], row["dtype"]): row for row in rows if row["released"]
    }
    swept: dict[int, dict[int, float]] = {}  # context -> thoughts -> ms
    for row in rows:
        if row.get("context"):
            swept.setdefault(row["context"], {})[row["latent"]] = row["step_ms"]["median"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), width_ratios=(3, 2))
    names = []
    for i, ((config, batch_size, _), row) in enumerate(compared.items()):
        layers = f"{row['n_layer']} x {row['n_embd']}"
        names.append(f"{Path(config).stem},\n{layers}, {batch_size} rows")
        for j, (who, found) in enumerate((("ours", row), ("released", row["released"]))):
            rate = found["rows_per_s"]
            spread = [[rate["median"] - rate["min"]], [rate["max"] - rate["median"]]]
            y, label = i + (j - 0.5) * 0.36, None if i else who
            left.barh(y, rate["median"], 0.32, xerr=spread, color=(BLUE, YELLOW)[j], label=label,
                      capsize=3)  # fmt: skip
            left.text(1.08 * rate["max"], y, f"{rate['median']:,.3g}", va="center", fontsize=8)
    left.set_xscale("log")
    _log(left.xaxis, [0.1, 1, 10, 100, 1000])
    left.set_xlim(0.1, 3000)
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.invert_yaxis()
    left.set_xlabel("rows trained a second, 6 thoughts\n(logarithmic; least to most)")
    _legend(left)
    looks = zip((GREEN, RED, SKY, GREY), "osD^", strict=True)
    for (context, by), (colour, mark) in zip(sorted(swept.items()), looks, strict=False):
        label = f"{context:,} tokens"
        right.plot(list(by), list(by.values()), f"{mark}-", color=colour, label=label)
    right.set_ylim(bottom=0)
    right.set_xlabel("thoughts, by length of the question\n(prosqa_small's size, 8 rows)")
    right.set_ylabel("ms a step")
    right.grid(axis="y", color="0.9")
    right.legend(fontsize=8, frameon=False)
    row = rows[-1]
    machine = f"{row['device']} {row['hardware']}, {row['threads']} threads"
    shown = [r for r in rows if r in compared.values() or r.get("context")]
    commits = ", ".join(dict.fromkeys(r["commit"] for r in shown))
    _save(figure, f"training, {machine}, commits {commits}", to)


def curve(row: dict[str, Any], to: Path) -> None:
    """Loss above, shares right below, a band for each stage."""
    step, stage, loss, right = zip(*row["points"]["rows"], strict=True)
    figure, (above, lower) = plt.subplots(2, 1, figsize=(8, 5.6), sharex=True)
    above.plot(step, loss, color=BLUE)
    above.set_yscale("log")
    above.set_ylabel("loss, nats a label")
    lower.plot(step, right, color=BLUE, label="training rows all right, every word")
    validated = row["validations"]
    at = [v["step"] for v in validated]
    for key, colour, mark, label in (
        ("valid_accuracy", RED, "o", "validation, answer right"),
        ("matched_accuracy", GREEN, "s", "validation, no depth shortcut"),
    ):
        if validated and validated[0][key] is not None:
            lower.plot(at, [v[key] for v in validated], mark + "-", color=colour, label=label)
    lower.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    lower.set_ylim(0, 1)
    lower.set_ylabel("share")
    lower.set_xlabel(f"optimizer steps of {row['batch_size']} rows")
    lower.legend(loc="lower right", fontsize=8)
    begins = [0] + [i for i in range(1, len(step)) if stage[i] != stage[i - 1]]
    for n, i in enumerate(begins):
        left = step[i - 1] if i else 0
        end = step[begins[n + 1] - 1] if n + 1 < len(begins) else step[-1]
        for axis in (above, lower):
            if n % 2:
                axis.axvspan(left, end, color="0.94", zorder=0)
        middle = (left + end) / 2
        above.text(
            middle, 1.02, f"stage {stage[i]}" if n == 0 or end - left > step[-1] / 9 else stage[i],
            ha="center", fontsize=8, transform=above.get_xaxis_transform(),
        )  # fmt: skip
    _save(
        figure,
        f"{row['name']}: {row['method']}, seed {row['seed']}, {row['minutes']:.0f} minutes on "
        f"{row['device']} ({row['threads']} thread{'s' * (row['threads'] > 1)})",
        to,
    )


def methods(rows: Sequence[dict[str, Any]], to: Path) -> None:
    """Table 1, small models: every method on rows with the shortcut and on rows without it."""
    tasks = {
        "ProsQA": ("prosqa", "prosqa_balanced"),
        "ProntoQA": ("prontoqa", "prontoqa_matched"),
    }
    found: dict[tuple[str, str], list[float]] = {}  # (method, split) -> of each seed
    for row in rows:
        if row["table1"]["preset"] == "small" and not row["table1"]["setting"]:
            found.setdefault((row["method"], row["data"]), []).append(100 * row["accuracy"])
    names = list(METHODS)
    figure, both = plt.subplots(1, 2, figsize=(8, 4.2), sharey=True)
    for axes, (task, (plain, without)) in zip(both, tasks.items(), strict=True):
        axes.axvline(50, color="black", linewidth=0.8, linestyle=":", label="guessing")
        for y, name in enumerate(names):
            if (name, plain) not in found:
                axes.text(50, y, " not run", va="center", fontsize=8, color=GREY)
                continue
            a, b = (statistics.fmean(found[name, split]) for split in (plain, without))
            axes.plot([a, b], [y, y], color="0.8", linewidth=3, zorder=0)
            shown = ("rows as they are", "no shortcut (prosqa_balanced, prontoqa_matched)")
            labels = shown if not y else (None, None)
            axes.plot(a, y, "o", mfc="white", color=RED, label=labels[0])
            axes.plot(b, y, "D", color=BLUE, markersize=6, label=labels[1])
        axes.set_xlim(44, 102)
        axes.set_xticks(range(50, 101, 10))
        axes.set_xlabel(f"{task}: right answers, %")
        axes.grid(axis="x", color="0.92")
    both[0].set_yticks(range(len(names)), names)
    both[0].invert_yaxis()
    legend = figure.legend(
        *both[0].get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.55, 0.95),
        ncol=3, fontsize=8, frameon=False,
    )  # fmt: skip
    legend.set_in_layout(False)
    seeds = max(map(len, found.values()))
    commits = ", ".join(dict.fromkeys(row["trained"]["commit"] for row in rows))
    where = f"{rows[0]['device'].upper()}, trained at {commits}"
    # a line more, where the legend stands
    _save(figure, f"small models, {seeds} seed{'s at most' * (seeds > 1)}, {where}\n", to)
