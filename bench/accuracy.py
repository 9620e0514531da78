"""Accuracy of a checkpoint on rows nobody trained on, beside rules that never search.

    python bench/accuracy.py --checkpoint out/RUN --data FILE     a JSON file of rows
    python bench/accuracy.py --checkpoint out/RUN --data prosqa_matched
    python bench/accuracy.py --checkpoint out/RUN --data prosqa_balanced --sweep

Rows are answered by batched greedy generation. The number of thoughts is the checkpoint's own (its
manifest), unless --latent gives another; --sweep asks with 0, 1, ... up to it. Generated splits are
scaled to the graphs the checkpoint was trained on (nanococonut/data/prosqa.py, split). Beside the
accuracy of ProsQA rows stand the categories of what was said (nanococonut/data/paths.py). The last
line is JSON.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from nanococonut.evaluation.categories import category_fractions
from nanococonut.runtime.device import select_device
from nanococonut.runtime.provenance import provenance

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout works uninstalled too

from nanococonut.config import TrainConfig
from nanococonut.curriculum import Curriculum
from nanococonut.data.examples import Example
from nanococonut.data.files import read_examples
from nanococonut.data.tasks import TASKS, generated
from nanococonut.evaluation.accuracy import score
from nanococonut.inference.engine import Engine
from nanococonut.runtime.cli import make_config, option, parse_cli, validate
from nanococonut.runtime.errors import UserError, run_main
from nanococonut.weights import checkpoint


@dataclass(frozen=True)
class AccuracyConfig:
    checkpoint: str | None = option(
        None, "a run's folder, one checkpoint's, or None: the bundled one"
    )
    data: str | None = option(
        None,
        "a file of rows, or a split of the checkpoint's task (None: its first): "
        + ", ".join(name for task in TASKS.values() for name in task.splits),
    )
    n: int = option(1000, "generated rows", ge=1)
    seed: int = option(1_000_003, "of generated rows (training never uses it)", ge=0)
    latent: int | None = option(None, "thoughts (None: as trained)", ge=0)
    sweep: bool = option(False, "ask with 0, 1, ... up to that many thoughts")
    batch_size: int = option(100, "rows answered at once", ge=1)
    max_new_tokens: int | None = option(None, "longest answer (None: the run's own)", ge=1)
    out: str | None = option(None, "append the JSON row to this file")
    device: str = option("auto", "auto, cpu, cuda, mps")
    kernels: str = option("auto", "what runs a step", choices=("auto", "triton", "torch"))
    graph: str = option("auto", "steps by CUDA graphs", choices=("auto", "on", "off"))

    def __post_init__(self) -> None:
        validate(self)


def by_steps(rows: list[Example], right: list[bool]) -> dict[str, list[int]]:
    """Steps of a row's written chain -> [right, rows]."""
    counts: dict[int, list[int]] = {}
    for row, ok in zip(rows, right, strict=True):
        count = counts.setdefault(len(row["steps"]), [0, 0])
        count[0] += ok
        count[1] += 1
    return {str(n): counts[n] for n in sorted(counts)}


def main() -> None:
    given, _ = parse_cli(AccuracyConfig, sys.argv[1:], __doc__.split("\n")[0])
    config = make_config(AccuracyConfig, given)
    folder = checkpoint.resolve(config.checkpoint or checkpoint.BUNDLED, best=True)
    model, tokenizer, manifest = checkpoint.load(folder, select_device(config.device))
    trained = make_config(TrainConfig, manifest["config"])
    engine = Engine(model, tokenizer, Curriculum.from_config(trained), config.kernels, config.graph)
    task = TASKS[trained.task]
    data = config.data or (None if trained.data else next(iter(task.splits), None))
    if data is None or any(data in other.splits for other in TASKS.values() if other != task):
        raise UserError(
            f"the checkpoint is of {trained.data or trained.task}"
            + (f", --data is {config.data}" if config.data else ", and --data is missing")
            + ".\nGive --data: a file of its rows"
            + (f", or one of {', '.join(task.splits)}." if task.splits else ".")
        )
    drawn = generated(data, config.n, config.seed, trained)
    rows = read_examples(data) if drawn is None else drawn
    shown = TASKS[trained.task].render(rows, trained.render)
    try:
        baselines = task.shortcuts(rows)
    except UserError:  # rows of one's own: nothing is known of them
        baselines = {}
    trained_thoughts = manifest["n_thoughts"]
    thoughts = trained_thoughts if config.latent is None else config.latent
    name = Path(config.checkpoint).resolve().name if config.checkpoint else "bundled"
    print(f"{name}: {manifest['method']}, step {manifest['step']}, trained with {trained_thoughts}")
    if engine.curriculum.rules.n_thoughts_rule == "none" and thoughts:
        print(f"note: {manifest['method']} has no thoughts in training")
    print(f"{data}: {len(rows)} rows, kernels: {engine.kernels} ({engine.reason})")
    longest = config.max_new_tokens or trained.max_new_tokens
    results = []
    for k in range(thoughts + 1) if config.sweep else [thoughts]:
        began = time.perf_counter()
        s = score(engine, shown, k, config.batch_size, longest)
        low, high = s.interval
        result = {
            "thoughts": k,  # or pauses; at most, where a classifier stops them
            "thoughts_had": round(s.thoughts, 2),
            "accuracy": s.accuracy,
            "low": round(low, 4),
            "high": round(high, 4),
            "generated_tokens": round(s.generated_tokens, 2),
            "seconds": round(time.perf_counter() - began, 2),
            "by_steps": by_steps(rows, s.correct),
        }
        had = f" at most, {s.thoughts:.1f} had" if model.config.stop else ""
        print(
            f"{k} thoughts{had}: {s.accuracy:.1%} (95 %: {low:.1%} to {high:.1%}), "
            f"{s.generated_tokens:.1f} generated tokens (thoughts + words, without eos)"
        )
        if baselines and trained.task == "prosqa":
            texts = s.texts
            if trained.render == "compact":
                pairs = zip(texts, rows, strict=True)
                texts = [task.expand(text, row["question"]) for text, row in pairs]
            shares = category_fractions(rows, texts, k)
            result["categories"] = {name: round(share, 4) for name, share in shares.items()}
        results.append(result)
    print("by steps of the written chain (right / rows):", end="")
    for n, (right, n_rows) in results[-1]["by_steps"].items():
        print(f"  {n}: {right} / {n_rows}", end="")
    print()
    if "categories" in results[0]:
        print(f"{'thoughts':<16}" + "".join(f"{r['thoughts']:>8}" for r in results))
        for category in results[0]["categories"]:
            columns = [f"{r['categories'][category]:>8.1%}" for r in results]
            print(f"{category:<16}" + "".join(columns))
    for rule, share in baselines.items():
        print(f"no model, {rule}: {share:.1%}")
    row = {
        "bench": "accuracy",
        "checkpoint": name,
        "method": manifest["method"],
        "trained": {
            "seed": trained.seed,
            "steps": manifest["step"],
            "minutes": round(manifest["minutes"], 1),
            "device": manifest["device"],
            "threads": manifest["threads"],
            "commit": manifest.get("trained_with", manifest)["commit"],
        },
        "data": Path(data).name,
        "generated_seed": config.seed if drawn is not None else None,
        "rows": len(rows),
        "max_new_tokens": longest,
        **results[-1],
        "heuristics": baselines,
        "kernels": engine.kernels,
        "graph": engine.graph,
        "device": str(model.wte.weight.device),
        **provenance(),
    }
    if config.sweep:
        row["sweep"] = results
    print(json.dumps(row))
    if config.out:
        checkpoint.append_row(Path(config.out), row)


if __name__ == "__main__":
    run_main(main)
