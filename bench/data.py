"""How fast ProsQA rows are made, on one thread: generated, and generated + rendered + tokenised.

    python bench/data.py [--out FILE]

Training wants to be the slower of the two (bench/training.py). The last line is JSON.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout works uninstalled too

from nanococonut import checkpoint
from nanococonut.config import TrainConfig, build, check_values, opt, parse_cli
from nanococonut.curriculum import encode_row
from nanococonut.data import prosqa
from nanococonut.errors import main_guard
from nanococonut.loader import rendered, task_tokenizer

KINDS = {
    "released size": prosqa.GraphConfig(),
    "released size, matched": prosqa.GraphConfig(matched=True),
    "small": prosqa.GraphConfig(13, 2, 3),
    "small, matched": prosqa.GraphConfig(13, 2, 3, matched=True),
}


@dataclass(frozen=True)
class DataConfig:
    n: int = opt(4000, "rows of a measurement", at_least=1)
    repeats: int = opt(5, "measurements", at_least=1)
    out: str | None = opt(None, "append the JSON row to this file")

    def __post_init__(self) -> None:
        check_values(self)


def main() -> None:
    given, _ = parse_cli(DataConfig, sys.argv[1:], __doc__.split("\n")[0])
    config = build(DataConfig, given)
    compact = build(TrainConfig, {"tokenizer": "words", "render": "compact"})
    tokenizer = task_tokenizer(compact, None)
    figures = {}
    for name, graphs in KINDS.items():
        made, ready = [], []
        for repeat in range(config.repeats + 1):
            began = time.perf_counter()
            rows = prosqa.generate(config.n, repeat, graphs)
            generated = time.perf_counter()
            for row in rendered(compact, rows):
                encode_row(tokenizer, row)
            if repeat:  # the first one warms up
                made.append(config.n / (generated - began))
                ready.append(config.n / (time.perf_counter() - began))
        figures[name] = {
            "generated_rows_per_s": [round(f(made)) for f in (min, statistics.median, max)],
            "tokenised_rows_per_s": [round(f(ready)) for f in (min, statistics.median, max)],
        }
        low, median, high = figures[name]["generated_rows_per_s"]
        done = figures[name]["tokenised_rows_per_s"][1]
        print(f"{name:<24}{median:>8,} rows/s ({low:,}..{high:,}), tokenised {done:,} rows/s")
    row = {"bench": "data", "rows": config.n, "repeats": config.repeats, "min_median_max": figures}
    row |= checkpoint.provenance()
    print(json.dumps(row))
    if config.out:
        checkpoint.append_row(Path(config.out), row)


if __name__ == "__main__":
    main_guard(main)
