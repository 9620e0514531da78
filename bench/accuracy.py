"""Evaluate a checkpoint on unseen examples, next to rules that never search.

    python bench/accuracy.py --checkpoint out/RUN --data FILE     a JSON file of examples
    python bench/accuracy.py --checkpoint out/RUN --data prosqa_matched
    python bench/accuracy.py --checkpoint out/RUN --data prosqa_balanced --sweep

Answers are generated greedily, in batches. The number of thoughts is the checkpoint's own (its
manifest), or --latent; --sweep evaluates with 0, 1, ... up to it. Generated splits have graphs of
the size that the checkpoint was trained on (nanococonut/data/prosqa.py, split). ProsQA's generated
texts are also sorted into the paper's categories (nanococonut/data/paths.py). --out appends one
result for each number of thoughts; the last line is JSON.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs without installation

from bench.common.results import ResultWriter, command_line
from nanococonut import checkpoint
from nanococonut import device as devices
from nanococonut.config import TrainConfig, build, check_values, opt, parse_cli
from nanococonut.data import Row
from nanococonut.data.files import read_rows
from nanococonut.data.paths import categories
from nanococonut.engine import Engine
from nanococonut.errors import UserError, main_guard
from nanococonut.evaluate import score
from nanococonut.loader import curriculum_of, rendered
from nanococonut.tasks import TASKS, generated


@dataclass(frozen=True)
class AccuracyConfig:
    checkpoint: str | None = opt(None, "a run's folder, one checkpoint's, or None: the bundled one")
    data: str | None = opt(
        None,
        "a file of examples, or a split of the checkpoint's task (None: its first): "
        + ", ".join(name for task in TASKS.values() for name in task.splits),
    )
    n: int = opt(1000, "generated examples", at_least=1)
    seed: int = opt(1_000_003, "of generated examples (training never uses it)", at_least=0)
    latent: int | None = opt(None, "thoughts (None: as trained)", at_least=0)
    sweep: bool = opt(False, "evaluate with 0, 1, ... up to that many thoughts")
    batch_size: int = opt(100, "examples in a batch", at_least=1)
    max_new_tokens: int | None = opt(None, "longest answer (None: the run's own)", at_least=1)
    out: str | None = opt(None, "append the results to this file")
    device: str = opt("auto", "auto, cpu, cuda, mps")
    kernels: str = opt("auto", "what runs a step", choices=("auto", "triton", "torch"))
    graph: str = opt("auto", "steps by CUDA graphs", choices=("auto", "on", "off"))

    def __post_init__(self) -> None:
        check_values(self)


def data_name(config: AccuracyConfig, trained: TrainConfig) -> str:
    """Return --data or the task's first split. Raise UserError for another task's split."""
    task = TASKS[trained.task]
    name = config.data or (None if trained.data else next(iter(task.splits), None))
    if name is None or any(name in other.splits for other in TASKS.values() if other != task):
        raise UserError(
            f"the checkpoint is of {trained.data or trained.task}"
            + (f", --data is {config.data}" if config.data else ", and --data is missing")
            + ".\nGive --data: a file of its examples"
            + (f", or one of {', '.join(task.splits)}." if task.splits else ".")
        )
    return name


def shortcuts_of(trained: TrainConfig, examples: list[Row]) -> dict[str, float]:
    """Return the accuracy of each rule that never searches; {} for examples of another kind."""
    try:
        return TASKS[trained.task].heuristics(examples)
    except UserError:
        return {}


def by_steps(examples: list[Row], correct: list[bool]) -> dict[str, list[int]]:
    """Return number of written steps -> [correct, examples]."""
    counts: dict[int, list[int]] = {}
    for example, is_correct in zip(examples, correct, strict=True):
        count = counts.setdefault(len(example["steps"]), [0, 0])
        count[0] += is_correct
        count[1] += 1
    return {str(n): counts[n] for n in sorted(counts)}


def category_fractions(
    trained: TrainConfig, examples: list[Row], texts: list[str], n_thoughts: int
) -> dict[str, float]:
    """Return the fraction of generated texts in each of the paper's categories."""
    if trained.render == "compact":
        pairs = zip(texts, examples, strict=True)
        texts = [TASKS[trained.task].expand(text, example["question"]) for text, example in pairs]
    fractions = categories(examples, texts, n_thoughts)
    return {name: round(fraction, 4) for name, fraction in fractions.items()}


def about_run(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return how the checkpoint was trained, as results hold it."""
    return {
        "seed": manifest["config"]["seed"],
        "steps": manifest["step"],
        "minutes": round(manifest["minutes"], 1),
        "device": manifest["device"],
        "threads": manifest["threads"],
        "commit": manifest.get("trained_with", manifest)["commit"],
    }


def report(results: ResultWriter) -> None:
    """Print accuracy by written steps, the categories, and the shortcut rules."""
    details = [row["detail"] for row in results.rows]
    print("correct / examples by steps of the written chain:", end="")
    for n, (correct, n_examples) in details[-1]["by_steps"].items():
        print(f"  {n}: {correct} / {n_examples}", end="")
    print()
    if "categories" in details[0]:
        thoughts = [row["shape"]["thoughts"] for row in results.rows]
        print(f"{'thoughts':<16}" + "".join(f"{n:>8}" for n in thoughts))
        for category in details[0]["categories"]:
            columns = [f"{detail['categories'][category]:>8.1%}" for detail in details]
            print(f"{category:<16}" + "".join(columns))
    for rule, fraction in details[0]["shortcuts"].items():
        print(f"no model, {rule}: {fraction:.1%}")


def main() -> None:
    given, _ = parse_cli(AccuracyConfig, sys.argv[1:], __doc__.split("\n")[0])
    config = build(AccuracyConfig, given)

    # ---- checkpoint and examples
    folder = checkpoint.find(config.checkpoint or checkpoint.BUNDLED, best=True)
    model, tokenizer, manifest = checkpoint.load(folder, devices.choose(config.device))
    trained = build(TrainConfig, manifest["config"])
    engine = Engine(model, tokenizer, curriculum_of(trained), config.kernels, config.graph)
    data, method = data_name(config, trained), manifest["method"]
    drawn = generated(data, config.n, config.seed, trained)
    examples = read_rows(data) if drawn is None else drawn
    prompts, shortcuts = rendered(trained, examples), shortcuts_of(trained, examples)
    n_trained = manifest["n_thoughts"]
    n_thoughts = n_trained if config.latent is None else config.latent
    name = Path(config.checkpoint).resolve().name if config.checkpoint else "bundled"
    print(f"{name}: {method}, step {manifest['step']}, trained with {n_trained} thoughts")
    if engine.curriculum.entry.insert == "none" and n_thoughts:
        print(f"note: {method} has no thoughts in training")
    print(f"{data}: {len(examples)} examples, kernels: {engine.kernels} ({engine.reason})")

    # ---- evaluate
    longest = config.max_new_tokens or trained.max_new_tokens
    labels = {"method": method, "task": trained.task, "data": Path(data).name, "checkpoint": name}
    weights, command = model.wte.weight, command_line(config, "bench/accuracy.py")
    results = ResultWriter(
        "accuracy", weights.device, weights.dtype, command, config.out, {}, labels
    )
    detail = {"trained": about_run(manifest), "shortcuts": shortcuts, "max_new_tokens": longest}
    detail |= {"generated_seed": config.seed if drawn is not None else None}
    detail |= {"kernels": engine.kernels, "graph": engine.graph}
    for n in range(n_thoughts + 1) if config.sweep else [n_thoughts]:
        began = time.perf_counter()
        s = score(engine, prompts, n, config.batch_size, longest)
        low, high = s.interval
        own = {
            "generated_tokens": round(s.generated_tokens, 2),
            "thoughts_taken": round(s.thoughts, 2),  # fewer if a classifier stops them
            "by_steps": by_steps(examples, s.right),
            "seconds": round(time.perf_counter() - began, 2),
        }
        if shortcuts and trained.task == "prosqa":
            own["categories"] = category_fractions(trained, examples, s.texts, n)
        results.add(
            "accuracy", "nanococonut", [s.accuracy], "fraction",
            spread={"ci_low": round(low, 4), "ci_high": round(high, 4)}, detail=own | detail,
            examples=len(examples), thoughts=n,
        )  # fmt: skip
        print(f"{s.generated_tokens:.1f} generated tokens, {s.thoughts:.1f} of them thoughts")
    report(results)
    print(results.summary())


if __name__ == "__main__":
    main_guard(main)
