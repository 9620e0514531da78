"""What rows are like: statistics, and rules that answer without searching, for every split.

    python bench/rows.py                                 generated rows of all tasks
    python bench/rows.py --files prosqa=valid.json,prontoqa=rows.json     released ones beside them

Splits are those of the paper's sizes and of the small models. The last line is JSON, one row for
all.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout works uninstalled too

from nanococonut import checkpoint
from nanococonut.config import TrainConfig, build, check_values, opt, parse_cli, read_config_file
from nanococonut.data import Row
from nanococonut.data.files import read_rows
from nanococonut.errors import UserError, main_guard
from nanococonut.tasks import TASKS, generated

CONFIGS = Path(__file__).parent.parent / "config"


@dataclass(frozen=True)
class RowsConfig:
    n: int = opt(4000, "generated rows of a split", at_least=1)
    seed: int = opt(1_000_003, "of generated rows", at_least=0)
    files: str | None = opt(None, "released rows, task=FILE, with commas")
    out: str | None = opt(None, "append the JSON row to this file")

    def __post_init__(self) -> None:
        check_values(self)


def measured(task: str, rows: list[Row]) -> dict[str, Any]:
    """Statistics and heuristics, rounded: {"rows": n, "statistics": {...}, "heuristics": {...}}"""
    found = {
        "statistics": TASKS[task].module.statistics(rows),
        "heuristics": TASKS[task].heuristics(rows),
    }
    short = {kind: {k: round(v, 4) for k, v in part.items()} for kind, part in found.items()}
    return {"rows": len(rows), **short}


def main() -> None:
    given, _ = parse_cli(RowsConfig, sys.argv[1:], __doc__.split("\n")[0])
    config = build(RowsConfig, given)
    found: dict[str, dict[str, Any]] = {}
    for task, entry in TASKS.items():
        for size in ("", "_small") if entry.splits else ():
            settings = read_config_file(CONFIGS / f"{task}{size}.py", TrainConfig)
            trained = build(TrainConfig, settings)
            for split in entry.splits:
                rows = generated(split, config.n, config.seed, trained)
                found[split + (size and " (small)")] = measured(task, rows)
    for pair in filter(None, (config.files or "").split(",")):
        task, _, path = pair.partition("=")
        if task not in TASKS or not path:
            raise UserError(f"--files {pair!r} is no task=FILE.\nTasks: {', '.join(TASKS)}.")
        found[f"{task}: {Path(path).name}"] = measured(task, read_rows(path))
    for name, parts in found.items():
        rules = ", ".join(f"{rule} {share:.1%}" for rule, share in parts["heuristics"].items())
        print(f"{name} ({parts['rows']:,} rows): {rules or 'no rules'}")
    row = {"bench": "rows", "seed": config.seed, "found": found, **checkpoint.provenance()}
    print(json.dumps(row))
    if config.out:
        checkpoint.append_row(Path(config.out), row)


if __name__ == "__main__":
    main_guard(main)
