"""Evaluate a checkpoint on unseen examples, next to rules that never search.

    python bench/accuracy.py --checkpoint out/RUN --data FILE     a JSON file of examples
    python bench/accuracy.py --checkpoint out/RUN --data prosqa_matched
    python bench/accuracy.py --checkpoint out/RUN --data prosqa_balanced --sweep

Answers are generated greedily. The number of thoughts is the checkpoint's own, or --latent; --sweep
evaluates with 0, 1, ... up to it. Generated splits have graphs of the size that the checkpoint was
trained on. ProsQA's texts are also sorted into the paper's categories (evaluation/categories.py).
--out appends a result for each number of thoughts; the last line is JSON.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs without installation

import nanococonut
from bench.common.results import ResultWriter
from nanococonut.config import TrainConfig
from nanococonut.data.examples import Example
from nanococonut.data.files import read_examples
from nanococonut.data.seeds import TEST_SEED
from nanococonut.data.tasks import TASKS, generated
from nanococonut.evaluation.accuracy import score
from nanococonut.evaluation.categories import category_fractions
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
        "a file of examples, or a split of the checkpoint's task (None: its first): "
        + ", ".join(name for task in TASKS.values() for name in task.splits),
    )
    n: int = option(1000, "generated examples", ge=1)
    seed: int = option(TEST_SEED, "of generated examples (training never uses it)", ge=0)
    latent: int | None = option(None, "thoughts (None: as trained)", ge=0)
    sweep: bool = option(False, "evaluate with 0, 1, ... up to that many thoughts")
    batch_size: int = option(100, "examples in a batch", ge=1)
    max_new_tokens: int | None = option(None, "longest answer (None: the run's own)", ge=1)
    out: str | None = option(None, "append the results to this file")
    device: str = option("auto", "auto, cpu, cuda, mps")
    kernels: str = option("auto", "what runs a step", choices=("auto", "triton", "torch"))
    graph: str = option("auto", "steps by CUDA graphs", choices=("auto", "on", "off"))

    def __post_init__(self) -> None:
        validate(self)


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


def by_steps(examples: list[Example], correct: list[bool]) -> dict[str, list[int]]:
    """Return number of written steps -> [correct, examples]."""
    counts: dict[int, list[int]] = {}
    for example, is_correct in zip(examples, correct, strict=True):
        count = counts.setdefault(len(example["steps"]), [0, 0])
        count[0] += is_correct
        count[1] += 1
    return {str(n): counts[n] for n in sorted(counts)}


def about_run(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return how the checkpoint was trained, as results hold it."""
    return {
        "seed": manifest["config"]["seed"],
        "steps": manifest["step"],
        "minutes": round(manifest["minutes"], 1),
        "device": manifest["device"],
        "threads": manifest["threads"],
        "commit": manifest.get("trained_with", manifest)["commit"],
        "thought_loss": (loss := manifest["config"].get("thought_loss", 0.0)),
        "thought_labels": manifest["config"].get("thought_labels", "path") if loss else None,
    }


def evaluate(config: AccuracyConfig) -> ResultWriter:
    """Evaluate a checkpoint, once for each number of thoughts, and print what it is next to."""
    path = config.checkpoint or checkpoint.BUNDLED
    engine = nanococonut.load(path, config.device, config.kernels, config.graph)
    trained, manifest, method = engine.config, engine.manifest, engine.manifest["method"]
    task, data = TASKS[trained.task], data_name(config, trained)
    drawn = generated(data, config.n, config.seed, trained)
    examples = read_examples(data) if drawn is None else drawn
    try:
        shortcuts = task.shortcuts(examples)
    except UserError:  # examples of another kind
        shortcuts = {}
    n_thoughts = manifest["n_thoughts"] if config.latent is None else config.latent
    name = Path(config.checkpoint).resolve().name if config.checkpoint else "bundled"
    print(f"{name}: {method}, step {manifest['step']}, {manifest['n_thoughts']} thoughts")
    if engine.curriculum.rules.n_thoughts_rule == "none" and n_thoughts:
        print(f"note: {method} has no thoughts in training")
    print(f"{data}: {len(examples)} examples, kernels: {engine.kernels} ({engine.reason})")

    longest, weights = config.max_new_tokens or trained.max_new_tokens, engine.model.wte.weight
    labels = {"method": method, "task": trained.task, "data": Path(data).name, "checkpoint": name}
    results = ResultWriter("accuracy", config, weights.device, weights.dtype, labels)
    detail = {"trained": about_run(manifest), "shortcuts": shortcuts, "max_new_tokens": longest}
    detail |= {"kernels": engine.kernels, "graph": engine.graph}
    detail |= {"generated_seed": None if drawn is None else config.seed}
    for n in range(n_thoughts + 1) if config.sweep else [n_thoughts]:
        s = score(engine, examples, n, config.batch_size, longest)
        own = {"generated_tokens": round(s.generated_tokens, 2)}
        own["thoughts_taken"] = round(s.thoughts, 2)  # fewer than n if a classifier stops them
        own["by_steps"] = by_steps(examples, s.correct)
        if shortcuts and trained.task == "prosqa":
            texts = s.texts
            if trained.render == "compact":
                pairs = zip(texts, examples, strict=True)
                texts = [task.expand(text, example["question"]) for text, example in pairs]
            own["categories"] = category_fractions(examples, texts, n)
        low, high = s.interval
        results.add(
            "accuracy", "nanococonut", [s.accuracy], "fraction", detail=own | detail,
            spread={"ci_low": round(low, 4), "ci_high": round(high, 4)},
            examples=len(examples), thoughts=n,
        )  # fmt: skip
        print(f"  {s.generated_tokens:.1f} generated tokens, {s.thoughts:.1f} of them thoughts")
        for category, fraction in own.get("categories", {}).items():
            print(f"  {fraction:6.1%} {category}")
    for rule, fraction in shortcuts.items():
        print(f"no model, {rule}: {fraction:.1%}")
    return results


def main() -> None:
    given, _ = parse_cli(AccuracyConfig, sys.argv[1:], __doc__.split("\n")[0])
    print(evaluate(make_config(AccuracyConfig, given)).summary())


if __name__ == "__main__":
    run_main(main)
