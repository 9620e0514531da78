"""Evaluate a checkpoint on unseen examples, next to rules that never search.

    python bench/accuracy.py --checkpoint out/RUN                 its own held-out examples
    python bench/accuracy.py --checkpoint out/RUN --data FILE     a file of examples
    python bench/accuracy.py --checkpoint out/RUN --data prosqa_matched
    python bench/accuracy.py --checkpoint out/RUN --data prosqa_balanced --sweep
    python bench/accuracy.py --checkpoint FILE --method coconut --latent 6 --data FILE

The last form is for a released checkpoint, or any other GPT-2's weights without a run.
Answers are generated greedily. The number of thoughts is the checkpoint's own, or --latent; --sweep
evaluates with 0, 1, ... up to it, then lets each example stop once the head's best token repeats.
Generated splits have graphs of the size that the checkpoint was trained on. ProsQA's texts are also
sorted into the paper's categories (evaluation/paper.py).
evaluates with 0, 1, ... up to it. Generated splits have graphs of the size that the checkpoint was
trained on. ProsQA's texts are also sorted into the paper's categories (evaluation/paper.py).
--out appends a result for each number of thoughts; the last line is JSON.
"""

import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs without installation

import nanococonut  # isort: skip  # first: sets how OpenMP waits
import torch

from bench.common.results import ResultWriter
from nanococonut.config import TrainConfig
from nanococonut.curriculum import METHODS
from nanococonut.data.examples import Example
from nanococonut.data.files import read_examples
from nanococonut.data.generator import TEST_SEED
from nanococonut.data.tasks import TASKS, generated
from nanococonut.evaluation.accuracy import (
    held_out_examples,
    is_capped,
    score,
    thoughts_as_trained,
    thoughts_until_repeat,
    wilson,
)
from nanococonut.evaluation.paper import category_fractions
from nanococonut.inference.engine import Engine
from nanococonut.runtime.cli import make_config, option, parse_cli, validate
from nanococonut.runtime.device import select_device
from nanococonut.runtime.errors import UserError, run_main
from nanococonut.tokenizer import Tokenizer
from nanococonut.weights import checkpoint
from nanococonut.weights.pretrained import CONFIG_NAME, load_pretrained


@dataclass(frozen=True)
class AccuracyConfig:
    checkpoint: str | None = option(
        None, "a run's folder, one checkpoint's, or None: the bundled one; with --method, a file"
    )
    data: str | None = option(
        None,
        "a file of examples, or a split of the task (None: the run's own held-out examples): "
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
    dtype: str = option("float32", "of weights and steps", choices=("float32", "bfloat16"))
    method: str | None = option(
        None, "of weights without a run, such as the released ones", choices=tuple(METHODS)
    )

    def __post_init__(self) -> None:
        validate(self)


def load_engine(config: AccuracyConfig) -> Engine:
    """Return the engine of a run; with --method, of weights that have none, as the released ones.

    Raise UserError if one of --method, --data, --latent is missing, or --method is not needed.
    """
    path, dtype = Path(config.checkpoint or checkpoint.BUNDLED), getattr(torch, config.dtype)
    if path.is_file() and (path.parent / checkpoint.MANIFEST).is_file():
        path = path.parent  # the weights of a checkpoint of ours
    is_run = checkpoint.is_run(path)
    if is_run and config.method:
        raise UserError(f"{path} knows its method.\nLeave --method out.")
    has_weights = path.is_file() or (path / CONFIG_NAME).is_file()
    if is_run or not (config.method or has_weights):
        return nanococonut.load(path, config.device, dtype=dtype)
    has_thoughts = config.method and METHODS[config.method].n_thoughts_rule != "none"
    if not config.method or not config.data or (has_thoughts and config.latent is None):
        raise UserError(
            f"{path} belongs to no run, so it does not say how it was trained.\nGive --method, "
            "--data and --latent, such as --method=coconut --data=FILE --latent=6."
        )
    method = METHODS[config.method]
    model, tokenizer = load_pretrained(str(path)), Tokenizer.gpt2()
    n_tokens = tokenizer.vocab_size if method.markers else tokenizer.eos + 1
    own = model.config
    if own.vocab_size < n_tokens or method.thought_type not in ("", "pause", own.thought):
        raise UserError(
            f"{path} has {own.vocab_size} tokens and {own.thought} thoughts, --method="
            f"{config.method} needs {n_tokens} and {method.thought_type or 'no'} ones.\n"
            "Give the run or the weights that were trained by it."
        )
    trained = TrainConfig(task=find_task(config.data), data=config.data, method=config.method)
    model = model.to(select_device(config.device), dtype).eval()
    engine = Engine.from_config(model, tokenizer, trained)
    engine.manifest = {"method": config.method, "n_thoughts": config.latent or 0}
    return engine


def find_task(data: str) -> str:
    """Return the task of a split or of a file's examples; free text counts as gsm8k."""
    for name, task in TASKS.items():
        if data in task.splits:
            return name
    examples = read_examples(data)
    for name, task in TASKS.items():
        with suppress(UserError):  # examples of another kind
            if task.shortcuts(examples):
                return name
    return "gsm8k"


def choose_examples(
    config: AccuracyConfig, engine: Engine
) -> tuple[list[Example], str, int | None]:
    """Return (examples, their name, the seed that generated them or None).

    Without --data they are the run's own: held out from its file, or its task's first split. Raise
    UserError if --data is another task's split.
    """
    trained, splits = engine.config, TASKS[engine.config.task].splits
    held_out = [] if config.data else held_out_examples(engine, "Give --data: a file of examples.")
    if held_out:
        source = trained.valid_data or trained.data or trained.task
        return held_out, f"{Path(source).name}, held out", None
    name = config.data or next(iter(splits))
    drawn = generated(name, config.n, config.seed, trained)
    if drawn is not None:
        return drawn, name, config.seed
    if any(name in other.splits for other in TASKS.values()):
        raise UserError(
            f"the checkpoint is of {trained.task}, --data is {name}.\n"
            f"Give --data: {', '.join((*splits, 'a file of its examples'))}."
        )
    return read_examples(name), Path(name).name, None


def by_steps(examples: list[Example], correct: list[bool]) -> dict[str, list[int]]:
    """Return number of written steps -> [correct, examples]."""
    n_steps = [len(example["steps"]) for example in examples]
    n_examples, n_correct = Counter(n_steps), Counter(compress(n_steps, correct))
    return {str(n): [n_correct[n], n_examples[n]] for n in sorted(n_examples)}


def about_run(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return how the checkpoint was trained, as results hold it; {} if it belongs to no run."""
    if "config" not in manifest:
        return {}
    return {
        "seed": manifest["config"]["seed"],
        "steps": manifest["step"],
        "minutes": round(manifest["minutes"], 1),
        "device": manifest["device"],
        "threads": manifest["threads"],
        "commit": manifest.get("trained_with", manifest)["commit"],
        "thought_labels": manifest["config"]["thought_labels"],
    }


def evaluate(config: AccuracyConfig) -> ResultWriter:
    """Evaluate a checkpoint, once for each number of thoughts, and print what it is next to."""
    engine = load_engine(config)
    trained, manifest, method = engine.config, engine.manifest, engine.manifest["method"]
    task, (examples, data, seed) = TASKS[trained.task], choose_examples(config, engine)
    shortcuts: dict[str, float] = {}
    with suppress(UserError):  # examples of another kind
        shortcuts = task.shortcuts(examples)
    n_thoughts = manifest["n_thoughts"] if config.latent is None else config.latent
    name = Path(config.checkpoint).resolve().name if config.checkpoint else "bundled"
    step = f", step {manifest['step']}" if "step" in manifest else ""
    print(f"{name}: {method}{step}, {manifest['n_thoughts']} thoughts")
    if engine.curriculum.rules.n_thoughts_rule == "none" and n_thoughts:
        print(f"note: {method} has no thoughts in training")
    print(f"{data}: {len(examples)} examples, kernels: {engine.kernels} ({engine.reason})")

    longest, weights = config.max_new_tokens or trained.max_new_tokens, engine.model.wte.weight
    labels = {"method": method, "task": trained.task, "data": data, "checkpoint": name}
    results = ResultWriter("accuracy", config, weights.device, weights.dtype, **labels)
    detail = {"trained": about_run(manifest), "shortcuts": shortcuts, "max_new_tokens": longest}
    detail |= {"kernels": engine.kernels, "graph": engine.graph, "generated_seed": seed}
    counts = [n_thoughts] * len(examples)
    if config.latent is None and is_capped(engine):
        counts = thoughts_as_trained(engine, manifest["stage"], examples)
        print("note: as in training, examples with fewer steps have fewer thoughts")
    numbers = range(n_thoughts + 1) if config.sweep else [n_thoughts]
    runs = [(n, [min(n, count) for count in counts], {}) for n in numbers]
    # the rule reads thoughts that are fed back; a stop classifier decides by itself
    can_stop = not engine.model.config.stop and min(counts) == n_thoughts > 0
    can_stop &= engine.curriculum.rules.thought_type not in ("", "pause")
    if config.sweep and can_stop:
        counts = thoughts_until_repeat(engine, examples, n_thoughts, config.batch_size)
        runs.append((n_thoughts, counts, {"stop": "the readout repeats"}))
    for n, counts, rule in runs:
        s = score(engine, examples, counts, config.batch_size, longest)
        own = {"generated_tokens": round(s.generated_tokens, 2)}
        own["thoughts_taken"] = round(s.thoughts, 2)  # fewer than n if a classifier stops them
        own["by_steps"] = by_steps(examples, s.correct)
        own["released_accuracy"] = round(s.released_accuracy, 5)
        if shortcuts and trained.task == "prosqa":
            own["categories"] = category_fractions(examples, s.texts, n, trained.render)
        low, high = wilson(s.accuracy, s.n)
        results.add(
            "accuracy", "nanococonut", [s.accuracy], "fraction", detail=own | detail,
            spread={"ci_low": round(low, 4), "ci_high": round(high, 4)},
            examples=len(examples), thoughts=n, **rule,
        )  # fmt: skip
        print(f"  {s.generated_tokens:.1f} generated tokens, {s.thoughts:.1f} of them thoughts")
        fractions = own.get("categories", {})
        if s.released_accuracy != s.accuracy:
            label = 'by the released code\'s rule (after the last "#", without commas)'
            fractions = {label: s.released_accuracy} | fractions
        for label, fraction in fractions.items():
            print(f"  {fraction:6.1%} {label}")
    for rule, fraction in shortcuts.items():
        print(f"no model, {rule}: {fraction:.1%}")
    return results


def main() -> None:
    given, _ = parse_cli(AccuracyConfig, sys.argv[1:], __doc__)
    print(evaluate(make_config(AccuracyConfig, given)).summary())


if __name__ == "__main__":
    run_main(main)
