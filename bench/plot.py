"""Pictures and README tables, from committed rows only.

python bench/plot.py                      draw docs/*.png from bench/results/*.jsonl
python bench/plot.py --readme             rewrite the marked tables of README.md, docs/DATA.md
python bench/plot.py --readme --check     say whether they are in step, and change nothing
python bench/plot.py --curve out/RUN      first add a run's learning curve to the results
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout works uninstalled too

import tables

from nanococonut import checkpoint
from nanococonut.config import build, opt, parse_cli
from nanococonut.errors import UserError, main_guard
from nanococonut.tasks import TASKS

ROOT = Path(__file__).parent.parent
RESULTS, CURVES = ROOT / "bench/results", ROOT / "bench/results/curves.jsonl"
STEPS_A_POINT = 50


@dataclass(frozen=True)
class PlotConfig:
    readme: bool = opt(False, "rewrite the marked tables instead of drawing")
    check: bool = opt(False, "with --readme: only compare, exit code 1 where they differ")
    curve: str | None = opt(None, "a run, or runs with commas, whose curves to add to the results")


def sections() -> dict[str, dict[str, str]]:
    """Document -> name of a marked section in it -> the section's Markdown."""
    rows = tables.read_jsonl(RESULTS / "table1.jsonl")
    like = [{"found": {}}, *tables.read_jsonl(RESULTS / "rows.jsonl")][-1]
    prosqa = [*TASKS["prosqa"].splits, "prosqa: prosqa_valid.json"]
    prontoqa = ["prontoqa", "prontoqa: prontoqa_valid.json", "prontoqa_matched"]
    return {
        "README.md": {
            "methods": tables.methods_table(),
            "table1": tables.paper_cells(rows),
            "table1_prosqa_small": tables.table1(rows, "prosqa", "small"),
            "table1_prontoqa_small": tables.table1(rows, "prontoqa", "small"),
        },
        "docs/DATA.md": {
            "prosqa_rules": tables.compared(like, "heuristics", prosqa),
            "prosqa_rows": tables.compared(like, "statistics", prosqa),
            "prontoqa_rules": tables.compared(like, "heuristics", prontoqa),
            "prontoqa_rows": tables.compared(like, "statistics", prontoqa),
            "gsm8k_rows": tables.compared(like, "statistics", ["gsm8k: gsm8k_valid.txt"]),
        },
    }


def with_sections(name: str, text: str) -> str:
    """A document with all its marked sections as they should be. UserError where one is missing."""
    for section, table in sections()[name].items():
        marked = re.compile(rf"(<!-- {section} -->\n).*?(\n<!-- /{section} -->)", re.DOTALL)
        if not marked.search(text):
            raise UserError(f"{name} has no section <!-- {section} --> ... <!-- /{section} -->.")
        text = marked.sub(lambda m, table=table: m[1] + table + m[2], text)
    return text


def add_curve(run: str) -> None:
    """One row of a run's metrics, a point for every STEPS_A_POINT steps."""
    folder = checkpoint.find(run)
    manifest = checkpoint.read_manifest(folder)
    logged = tables.read_jsonl(folder.parent / "metrics.jsonl")
    steps = [r for r in logged if "loss" in r]
    points = []
    for start in range(0, len(steps), STEPS_A_POINT):
        part = steps[start : start + STEPS_A_POINT]
        loss = sum(r["loss"] for r in part) / len(part)
        last = part[-1]
        points.append([last["step"], last["stage"], round(loss, 4), round(last["right"], 4)])
    keys = ("step", "stage", "minutes", "valid_accuracy", "matched_accuracy")
    validations = [{k: r.get(k) for k in keys} for r in logged if "valid_accuracy" in r]
    row = {
        "bench": "curve",
        "name": Path(run).resolve().name,
        "method": manifest["method"],
        "seed": manifest["config"]["seed"],
        "task": manifest["config"]["task"],
        "batch_size": manifest["config"]["batch_size"],
        "minutes": round(manifest["minutes"], 1),
        "device": manifest["device"],
        "threads": manifest["threads"],
        "points": {"columns": ["step", "stage", "loss", "right"], "rows": points},
        "validations": validations,
        "trained_commit": manifest["commit"],
        **checkpoint.provenance(),
    }
    checkpoint.append_row(CURVES, row)


def draw_curve(row: dict[str, Any], to: Path) -> None:
    """Loss above, shares right below, a band for each stage."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    step, stage, loss, right = zip(*row["points"]["rows"], strict=True)
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 5.6), sharex=True)
    above.plot(step, loss, color="#0072B2")  # colours of Okabe and Ito, told apart by all
    above.set_yscale("log")
    above.set_ylabel("loss, nats a label")
    below.plot(step, right, color="#0072B2", label="training rows all right, every word")
    validated = row["validations"]
    at = [v["step"] for v in validated]
    for key, colour, mark, label in (
        ("valid_accuracy", "#D55E00", "o", "validation, answer right"),
        ("matched_accuracy", "#009E73", "s", "validation, no depth shortcut"),
    ):
        if validated and validated[0][key] is not None:
            below.plot(at, [v[key] for v in validated], mark + "-", color=colour, label=label)
    below.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    below.set_ylim(0, 1)
    below.set_ylabel("share")
    below.set_xlabel(f"optimizer steps of {row['batch_size']} rows")
    below.legend(loc="lower right", fontsize=8)
    begins = [0] + [i for i in range(1, len(step)) if stage[i] != stage[i - 1]]
    for n, i in enumerate(begins):
        left = step[i - 1] if i else 0
        end = step[begins[n + 1] - 1] if n + 1 < len(begins) else step[-1]
        for axis in (above, below):
            if n % 2:
                axis.axvspan(left, end, color="0.94", zorder=0)
        middle = (left + end) / 2
        above.text(
            middle, 1.02, f"stage {stage[i]}" if n == 0 or end - left > step[-1] / 9 else stage[i],
            ha="center", fontsize=8, transform=above.get_xaxis_transform(),
        )  # fmt: skip
    figure.suptitle(
        f"{row['name']}: {row['method']}, seed {row['seed']}, {row['minutes']:.0f} minutes on "
        f"{row['device']} ({row['threads']} thread{'s' * (row['threads'] > 1)})",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(to, dpi=110)
    plt.close(figure)


def main() -> None:
    given, _ = parse_cli(PlotConfig, sys.argv[1:], __doc__.split("\n")[0])
    config = build(PlotConfig, given)
    if config.check and not config.readme:
        raise UserError("--check compares the marked tables.\nGive it with --readme.")
    if config.readme:
        changed = []
        for name in sections():
            old = (ROOT / name).read_text(encoding="utf-8")
            new = with_sections(name, old)
            changed += [name] * (new != old)
            if not config.check:
                checkpoint.replace_text(ROOT / name, new)
        print(json.dumps({"bench": "readme", "changed": changed}))
        if config.check and changed:
            print(f"{changed[0]} is not in step with the rows: python bench/plot.py --readme")
            sys.exit(1)
        return
    for run in (config.curve or "").split(","):
        if run:
            add_curve(run)
    for row in tables.read_jsonl(CURVES):
        to = ROOT / "docs" / f"curve_{row['name']}.png"
        draw_curve(row, to)
        print(f"drew {to.relative_to(ROOT)}")


if __name__ == "__main__":
    main_guard(main)
