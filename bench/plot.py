"""Draw the figures and write the Markdown tables from committed result rows.

python bench/plot.py                     draw docs/methods.png and docs/answers_*.png
python bench/plot.py --readme            rewrite the marked tables in README.md, docs/RESULTS.md
python bench/plot.py --readme --check    only check that they match the rows
python bench/plot.py --curve out/RUN --out curve.png     draw a run's learning curve
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs without installation

import nanococonut  # isort: skip  # noqa: F401  # first: sets how OpenMP waits
from bench.common import tables
from bench.common.results import read_jsonl, read_results
from nanococonut.runtime.cli import Options, option
from nanococonut.runtime.errors import UserError, run_main
from nanococonut.weights import checkpoint

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results"
DOCS = ("README.md", "docs/RESULTS.md")
STEPS_PER_POINT, MIN_POINTS = 50, 20  # of a curve; a point of a short run averages fewer steps


@dataclass(frozen=True)
class PlotConfig(Options):
    readme: bool = option(False, "rewrite the marked tables instead of drawing")
    check: bool = option(False, "only compare the tables; exit with 1 if they differ")
    curve: str | None = option(None, "draw this run's learning curve only")
    out: str | None = option(None, "with --curve: the .png to draw")

    def validate(self) -> None:
        if (self.curve is None) != (self.out is None):
            raise UserError("--curve and --out go together: --curve out/RUN --out curve.png")
        if self.out and Path(self.out).suffix != ".png":
            raise UserError(f"--out {self.out}: expected a .png file.")


# ---- tables


def sections() -> dict[str, str]:
    """Return the Markdown of every marked section, by name."""
    names = ("table1", "latency", "training", "insight")
    accuracy, latency, training, insight = (
        read_results(RESULTS / f"{name}.jsonl") for name in names
    )
    return {
        "results": tables.main_results(accuracy),
        "insight": tables.insight(insight, tables.SHOWN),
        "insight_all": tables.insight(insight),
        "speed": f"{tables.answer_speed(latency)}\n\n{tables.step_speed(training)}",
        "table1_prosqa_small": tables.table1(accuracy, "prosqa", "small"),
        "table1_prontoqa_small": tables.table1(accuracy, "prontoqa", "small"),
        "latency": tables.latency(latency),
    }


def replace_sections(doc: str, text: str) -> str:
    """Return a document's text with every marked section filled in. Raise UserError if a mark is
    unknown or not closed."""
    by_name = sections()
    for name in re.findall(r"^<!-- (\w+) -->$", text, re.MULTILINE):
        marked = re.compile(rf"(<!-- {name} -->\n).*?(\n?<!-- /{name} -->)", re.DOTALL)
        if name not in by_name or not marked.search(text):
            raise UserError(
                f"{doc}: expected <!-- {name} --> ... <!-- /{name} -->, a known section.\n"
                f"Sections: {', '.join(by_name)}."
            )
        text = marked.sub(lambda m, table=by_name[name]: m[1] + table + "\n" + m[2].strip(), text)
    return text


def update_docs(check: bool) -> None:
    """Fill in the marked sections, or with `check` exit with code 1 if they would change."""
    changed = []
    for doc in DOCS:
        old = (ROOT / doc).read_text(encoding="utf-8")
        new = replace_sections(doc, old)
        if new != old:
            changed.append(doc)
            if not check:
                checkpoint.replace_text(ROOT / doc, new)
    print(json.dumps({"bench": "readme", "changed": changed}))
    if check and changed:
        print(f"{changed[0]} does not match the rows. Run: python bench/plot.py --readme")
        sys.exit(1)


# ---- figures


def curve_of(run: str) -> dict[str, Any]:
    """Return a run's settings, validations and points: means over up to STEPS_PER_POINT steps."""
    folder = checkpoint.resolve(run)
    manifest = checkpoint.read_manifest(folder)
    logged = read_jsonl(folder.parent / "metrics.jsonl")
    steps = [r for r in logged if "loss" in r]
    if not steps:
        raise UserError(
            f"{folder.parent / 'metrics.jsonl'} has no steps to draw.\nGive the folder of a run."
        )
    points, size = [], min(STEPS_PER_POINT, -(-len(steps) // MIN_POINTS))
    for start in range(0, len(steps), size):
        chunk = steps[start : start + size]
        loss, last = sum(r["loss"] for r in chunk) / len(chunk), chunk[-1]
        points.append([last["step"], last["stage"], loss, last["accuracy"]])
    validations = [r for r in logged if "valid_accuracy" in r]
    curve = {"name": Path(run).resolve().name, "points": points, "validations": validations}
    return manifest["config"] | manifest | curve


def draw(docs: Path) -> list[Path]:
    """Draw every figure that has rows and return their paths."""
    from bench.common import figures  # imports matplotlib, which nothing else needs

    drawn = []
    if accuracy := read_results(RESULTS / "table1.jsonl"):
        drawn.append(docs / "methods.png")
        figures.methods(accuracy, drawn[-1])
    runs = tables.newest_runs(read_results(RESULTS / "latency.jsonl"))
    runs = [run for run in runs if tables.tasks(run)]  # those that measured answers
    runs.sort(key=lambda run: (len(tables.tasks(run)), run[0]["date"]))  # most tasks, then newest
    newest = {run[0]["device"]: run for run in runs}
    for device, run in newest.items():
        name = "cpu" if device.startswith("CPU") else device.replace(" ", "_")
        drawn.append(docs / f"answers_{name}.png")
        figures.answers(run, drawn[-1])
    return drawn


def main() -> None:
    config = PlotConfig.from_cli(__doc__)
    if config.readme or config.check:
        update_docs(config.check)
    elif config.curve:
        row = curve_of(config.curve)  # before matplotlib, which takes seconds to import
        from bench.common import figures

        figures.curve(row, Path(config.out))
        print(f"{config.curve} -> {config.out}")
    else:
        for path in draw(ROOT / "docs"):
            print(f"drew {path.relative_to(ROOT)}")


if __name__ == "__main__":
    run_main(main)
