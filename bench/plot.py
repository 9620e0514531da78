"""Pictures and README tables, from committed rows only.

python bench/plot.py                      draw docs/*.png from bench/results/*.jsonl
python bench/plot.py --readme             rewrite the marked tables of README.md
python bench/plot.py --readme --check     say whether they are in step, and change nothing
python bench/plot.py --curve out/RUN      first add a run's learning curve to the results
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanococonut.runtime.provenance import provenance

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout works uninstalled too

import schema
import tables

from nanococonut.runtime.cli import make_config, option, parse_cli
from nanococonut.runtime.errors import UserError, run_main
from nanococonut.weights import checkpoint

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results"
STEPS_A_POINT = 50
GPT2 = 100e6  # parameters: pictures are of models at least about as large as the paper's


@dataclass(frozen=True)
class PlotConfig:
    readme: bool = option(False, "rewrite the marked tables instead of drawing")
    check: bool = option(False, "with --readme: only compare, exit code 1 where they differ")
    curve: str | None = option(
        None, "a run, or runs with commas, whose curves to add to the results"
    )


def bench_rows(name: str) -> list[dict[str, Any]]:
    """Rows of bench/schema.py, each of them checked."""
    rows = tables.read_jsonl(RESULTS / f"{name}.jsonl")
    for row in rows:
        schema.check(row)
    return rows


def sections() -> dict[str, dict[str, str]]:
    """Document -> name of a marked section in it -> the section's Markdown."""
    rows = tables.read_jsonl(RESULTS / "table1.jsonl")
    return {
        "README.md": {
            "methods": tables.methods_table(),
            "table1": tables.paper_cells(rows),
            "table1_prosqa_small": tables.table1(rows, "prosqa", "small"),
            "table1_prontoqa_small": tables.table1(rows, "prontoqa", "small"),
            "latency": tables.latency(bench_rows("latency")),
        },
    }


def with_sections(name: str, text: str) -> str:
    """A document with all its marked sections as they should be. UserError where a mark is of no
    section, or is not closed."""
    made = sections()[name]
    for section in re.findall(r"^<!-- (\w+) -->$", text, re.MULTILINE):
        marked = re.compile(rf"(<!-- {section} -->\n).*?(\n<!-- /{section} -->)", re.DOTALL)
        if section not in made or not marked.search(text):
            raise UserError(
                f"{name} has no whole section <!-- {section} --> ... <!-- /{section} -->.\n"
                f"There are {', '.join(made)}."
            )
        text = marked.sub(lambda m, table=made[section]: m[1] + table + m[2], text)
    return text


def add_curve(run: str) -> None:
    """One row of a run's metrics, a point for every STEPS_A_POINT steps."""
    folder = checkpoint.resolve(run)
    manifest = checkpoint.read_manifest(folder)
    logged = tables.read_jsonl(folder.parent / "metrics.jsonl")
    steps = [r for r in logged if "loss" in r]
    points = []
    for start in range(0, len(steps), STEPS_A_POINT):
        part = steps[start : start + STEPS_A_POINT]
        loss = sum(r["loss"] for r in part) / len(part)
        last = part[-1]
        points.append([last["step"], last["stage"], round(loss, 4), round(last["accuracy"], 4)])
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
        **provenance(),
    }
    checkpoint.append_row(RESULTS / "curves.jsonl", row)


def newest(name: str) -> list[tables.Run]:
    """The newest run of a bench on each kind of device; runs of a small model of one's own aside.
    Threads and dtypes have no picture each."""
    found: dict[str, tables.Run] = {}
    for run in tables.runs(bench_rows(name), name):
        old = found.get(run.slug)
        large = run.rows[0]["shapes"]["parameters"] >= GPT2
        if large and (old is None or run.rows[0]["date"] > old.rows[0]["date"]):
            found[run.slug] = run
    return list(found.values())


def draw(docs: Path) -> list[Path]:
    """Every picture for which there are rows -> where they are."""
    import pictures  # matplotlib, which nothing else needs

    drawn = []

    def to(name: str) -> Path:
        drawn.append(docs / f"{name}.png")
        return drawn[-1]

    curves = tables.read_jsonl(RESULTS / "curves.jsonl")
    for row in curves:
        pictures.curve(row, to(f"curve_{row['name']}"))
    table1 = tables.read_jsonl(RESULTS / "table1.jsonl")
    if table1:
        pictures.methods(table1, to("methods"))
    trained = tables.read_jsonl(RESULTS / "training.jsonl")
    for device in dict.fromkeys(row["device"] for row in trained):
        rows = [row for row in trained if row["device"] == device]
        pictures.training(rows, to(f"training_{device}"))
    for run in newest("latency"):
        pictures.answers(run, to(f"answers_{run.slug}"))
        if run.peers(["latent step"]):
            pictures.peers(run, to(f"peers_{run.slug}"))
    for run in newest("throughput"):
        pictures.throughput(run, to(f"throughput_{run.slug}"))
    return drawn


def main() -> None:
    given, _ = parse_cli(PlotConfig, sys.argv[1:], __doc__.split("\n")[0])
    config = make_config(PlotConfig, given)
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
    for path in draw(ROOT / "docs"):
        print(f"drew {path.relative_to(ROOT)}")


if __name__ == "__main__":
    run_main(main)
