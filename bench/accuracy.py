"""Evaluate a checkpoint on unseen examples, and compare it with rules that never search.

    python bench/accuracy.py --checkpoint out/RUN                 the run's held-out examples
    python bench/accuracy.py --checkpoint out/RUN --data FILE     a file of examples
    python bench/accuracy.py --checkpoint out/RUN --data prosqa_matched
    python bench/accuracy.py --checkpoint out/RUN --data prosqa_balanced --sweep
    python bench/accuracy.py --checkpoint FILE --method coconut --latent 6 --data FILE

The last form is for a released checkpoint, or any other GPT-2 weights without a run folder.

Answers are generated greedily, with as many thoughts as in training, or --latent. --sweep uses 0,
1, ... up to that many thoughts, then stops each example once the head's best token repeats.
Generated splits have graphs of the size that the checkpoint was trained on. ProsQA answers are also
sorted into the paper's categories (evaluation/paper.py). --out appends one result per number of
thoughts. The last line of the output is JSON, unless stdout is a terminal.
"""

import sys
from collections import Counter
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
from nanococonut.data.tasks import TASK_OF, TASKS, Task, generated
from nanococonut.evaluation.accuracy import (
    held_out_examples,
    is_capped,
    note_training_file,
    score,
    thoughts_as_trained,
    thoughts_until_repeat,
    wilson,
    wrote_steps,
)
from nanococonut.evaluation.paper import category_fractions
from nanococonut.inference.engine import Engine
from nanococonut.runtime.cli import Options, option, suggestion
from nanococonut.runtime.device import select_device
from nanococonut.runtime.errors import UserError, run_main
from nanococonut.tokenizer import Tokenizer
from nanococonut.weights import checkpoint
from nanococonut.weights.pretrained import CONFIG_NAME, load_pretrained


@dataclass(frozen=True)
class AccuracyConfig(Options):
    checkpoint: str | None = option(
        None, "a run, one of its checkpoints, or, with --method, a file (None: the bundled model)"
    )
    data: str | None = option(
        None,
        "a file of examples or a generated split (None: the run's held-out examples): "
        + ", ".join(TASK_OF),
    )
    n: int = option(1000, "generated examples", ge=1)
    seed: int = option(TEST_SEED, "seed of generated examples (not used in training)", ge=0)
    latent: int | None = option(None, "thoughts (None: as in training)", ge=0)
    sweep: bool = option(False, "evaluate with 0, 1, ..., --latent thoughts")
    batch_size: int = option(100, "examples in a batch", ge=1)
    max_new_tokens: int | None = option(None, "maximum length of an answer (None: the run's)", ge=1)
    out: str | None = option(None, "append the results to this file")
    device: str = option("auto", "auto, cpu, cuda, mps")
    dtype: str = option("float32", "dtype of the weights", choices=("float32", "bfloat16"))
    method: str | None = option(
        None, "how weights without a run were trained", choices=tuple(METHODS)
    )


def load_engine(config: AccuracyConfig) -> Engine:
    """Return the engine of a run or checkpoint, or of weights without a run. Raise UserError if
    --method is given for a run, which records it."""
    path = Path(config.checkpoint or checkpoint.BUNDLED)
    if path.is_file() and (path.parent / checkpoint.MANIFEST).is_file():
        path = path.parent  # a weights file of one of our checkpoints
    is_run = checkpoint.is_run(path)
    if is_run and config.method:
        raise UserError(f"{path} records its method.\nLeave --method out.")
    has_weights = path.is_file() or (path / CONFIG_NAME).is_file()
    if not is_run and (config.method or has_weights):
        return load_without_run(config, path)
    return nanococonut.load(path, config.device, dtype=getattr(torch, config.dtype))


def load_without_run(config: AccuracyConfig, path: Path) -> Engine:
    """Return the engine of GPT-2 weights trained by --method. Raise UserError if --method, --data
    or --latent is missing, or if the weights do not fit the method."""
    method = METHODS[config.method] if config.method else None
    needs_latent = method and method.n_thoughts_rule != "none"
    if not method or not config.data or (needs_latent and config.latent is None):
        raise UserError(
            f"{path} belongs to no run.\nGive --method, --data and --latent, such as "
            "--method=coconut --data=FILE --latent=6."
        )
    model, tokenizer = load_pretrained(str(path)), Tokenizer.gpt2()
    n_tokens = tokenizer.vocab_size if method.markers else tokenizer.eos + 1
    vocab_size, thought = model.config.vocab_size, model.config.thought
    if vocab_size < n_tokens or method.feeds_back and method.thought_type != thought:
        raise UserError(
            f"{path} has {vocab_size} tokens and {thought} thoughts, but --method={config.method} "
            f"needs {n_tokens} and {method.thought_type or 'no'} thoughts.\n"
            "Give weights that were trained by this method."
        )
    trained = TrainConfig(task=find_task(config.data), data=config.data, method=config.method)
    model = model.to(select_device(config.device), getattr(torch, config.dtype)).eval()
    engine = Engine.from_config(model, tokenizer, trained)
    engine.manifest = {"method": config.method, "n_thoughts": config.latent or 0}
    return engine


def find_task(data: str) -> str:
    """Return the task of a split or of a file's examples; free text counts as gsm8k."""
    if data in TASK_OF:
        return TASK_OF[data]
    examples = read_examples(data)
    fitting = (name for name, task in TASKS.items() if shortcut_accuracies(task, examples))
    return next(fitting, "gsm8k")


def shortcut_accuracies(task: Task, examples: list[Example]) -> dict[str, float]:
    """Return rule -> accuracy of the task's shortcut rules; {} for examples of another task."""
    try:
        return task.shortcuts(examples)
    except UserError:
        return {}


def choose_examples(
    config: AccuracyConfig, engine: Engine
) -> tuple[list[Example], str, int | None]:
    """Return (examples, their name, the seed that generated them or None).

    Without --data, they are what the run held out, or its task's first split. Raise UserError if
    --data is another task's split.
    """
    trained, splits = engine.config, TASKS[engine.config.task].splits
    held_out = [] if config.data else held_out_examples(engine, "Give --data: a file of examples.")
    if held_out:
        source = trained.valid_data or trained.data or trained.task
        return held_out, f"{Path(source).name}, held out", None
    name = config.data or next(iter(splits))
    examples = generated(name, config.n, config.seed, trained)
    if examples is not None:
        return examples, name, config.seed
    if name in TASK_OF:
        raise UserError(
            f"the checkpoint is of {trained.task}, --data is {name}.\n"
            f"Give --data: {', '.join((*splits, 'a file of its examples'))}."
        )
    if not Path(name).exists():
        raise UserError(
            f"--data={name} is neither a file nor a split.{suggestion(name, splits)}\n"
            f"Give a file of examples or one of: {', '.join(splits)}."
        )
    note_training_file(engine, name)
    return read_examples(name), Path(name).name, None


def choose_thoughts(
    config: AccuracyConfig, engine: Engine, examples: list[Example]
) -> list[tuple[int, list[int], dict[str, str]]]:
    """Return (maximum, thoughts of each example, extra labels of the result) per evaluation."""
    maximum = engine.manifest["n_thoughts"] if config.latent is None else config.latent
    rules = engine.curriculum.rules
    if rules.n_thoughts_rule == "none" and maximum:
        print(f"note: {engine.manifest['method']} has no thoughts in training")
    counts = [maximum] * len(examples)
    if config.latent is None and is_capped(engine):
        counts = thoughts_as_trained(engine, engine.manifest["stage"], examples)
        print("note: as in training, examples with fewer steps have fewer thoughts")
    if not config.sweep:
        return [(maximum, counts, {})]
    evaluations = [(n, [min(n, count) for count in counts], {}) for n in range(maximum + 1)]
    # the rule needs hidden states that are fed back; a stop classifier would decide instead of it
    if rules.feeds_back and not engine.model.config.stop and min(counts) == maximum > 0:
        counts = thoughts_until_repeat(engine, examples, maximum, config.batch_size)
        evaluations.append((maximum, counts, {"stop": "the readout repeats"}))
    return evaluations


def by_steps(examples: list[Example], correct: list[bool]) -> dict[str, list[int]]:
    """Return number of written steps -> [correct examples, examples]."""
    n_steps = [len(example["steps"]) for example in examples]
    n_examples, n_correct = Counter(n_steps), Counter(compress(n_steps, correct))
    return {str(n): [n_correct[n], n_examples[n]] for n in sorted(n_examples)}


def training_record(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return how the checkpoint was trained, for its results; {} if it belongs to no run."""
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
    """Evaluate a checkpoint once per number of thoughts, and print each result."""
    engine = load_engine(config)
    trained, manifest, weights = engine.config, engine.manifest, engine.model.wte.weight
    examples, data, seed = choose_examples(config, engine)
    name = Path(config.checkpoint).resolve().name if config.checkpoint else "bundled"
    step = f", step {manifest['step']}" if "step" in manifest else ""
    print(f"{name}: {manifest['method']}{step}, {manifest['n_thoughts']} thoughts")
    print(f"{data}: {len(examples)} examples, kernels: {engine.kernels} ({engine.reason})")

    shortcuts = shortcut_accuracies(TASKS[trained.task], examples)
    max_new_tokens = config.max_new_tokens or trained.max_new_tokens
    labels = {"method": manifest["method"], "task": trained.task, "data": data, "checkpoint": name}
    results = ResultWriter("accuracy", config, weights.device, weights.dtype, **labels)
    shared = {"trained": training_record(manifest), "shortcuts": shortcuts}
    shared |= {"max_new_tokens": max_new_tokens, "kernels": engine.kernels}
    shared |= {"graph": engine.graph, "generated_seed": seed}
    for n, counts, extra in choose_thoughts(config, engine, examples):
        s = score(engine, examples, counts, config.batch_size, max_new_tokens)
        wrote = sum(map(wrote_steps, s.texts)) / s.n
        detail = {
            "generated_tokens": round(s.generated_tokens, 2),
            "thoughts_taken": round(s.thoughts, 2),  # fewer than n if a classifier stops them
            "wrote_steps": round(wrote, 4),
            "by_steps": by_steps(examples, s.correct),
            "released_accuracy": round(s.released_accuracy, 5),
        }
        fractions = {}
        if shortcuts and trained.task == "prosqa":
            fractions = category_fractions(examples, s.texts, n, trained.render)
            detail["categories"] = fractions
        low, high = wilson(s.accuracy, s.n)
        results.add(
            "accuracy", "nanococonut", [s.accuracy], "fraction", detail=detail | shared,
            spread={"ci_low": round(low, 4), "ci_high": round(high, 4)},
            examples=len(examples), thoughts=n, **extra,
        )  # fmt: skip
        print(
            f"  {s.generated_tokens:.1f} generated tokens, {s.thoughts:.1f} of them thoughts; "
            f"{wrote:.1%} write steps before the answer"
        )
        if s.released_accuracy != s.accuracy:
            label = 'by the released code\'s rule (after the last "#", without commas)'
            print(f"  {s.released_accuracy:6.1%} {label}")
        if fractions:
            print(f"  {', '.join(f'{name} {p:.1%}' for name, p in fractions.items() if p)}")
    for rule, fraction in shortcuts.items():
        print(f"no model, {rule}: {fraction:.1%}")
    return results


def main() -> None:
    evaluate(AccuracyConfig.from_cli(__doc__)).print_summary()


if __name__ == "__main__":
    run_main(main)
