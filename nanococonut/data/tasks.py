"""The tasks, one entry each: how examples are made or read, and written.

Another task is another entry. A file of your own needs none: --data=FILE trains on any.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, islice
from types import ModuleType
from typing import Any

import numpy as np

from nanococonut.config import TrainConfig
from nanococonut.data import gsm8k, prontoqa, prosqa, shortcuts
from nanococonut.data.examples import Example, parse_object
from nanococonut.data.files import read_examples
from nanococonut.data.generator import MATCHED, N_TEST, TEST_SEED, VALID, sample_batches
from nanococonut.data.isomorphism import graph_keys
from nanococonut.runtime.errors import UserError

GeneratorConfig = prosqa.GraphConfig | prontoqa.OntologyConfig
MAX_TEST_BATCHES = 100  # with rarer examples, a run would start minutes later


@dataclass(frozen=True)
class Task:
    """What the loop, the sampler and the benches know of a task.

    module      SPLITS, VOCABULARY; generate, solve, marked_graph, compact_example, ... of a task
                with splits; from_hub(split, revision, skipped) -> (examples, commit) of any other
    shortcuts   examples -> fraction correct of rules that never search; UserError if the examples
                are not of this task
    """

    module: ModuleType
    shortcuts: Callable[[Sequence[Example]], dict[str, float]] = lambda examples: {}

    @property
    def splits(self) -> dict[str, Callable[[TrainConfig], GeneratorConfig]]:
        """Map names to settings for a model's TrainConfig; empty if nothing is generated.

        The first is the training split, the second its variant without shortcuts.
        """
        return self.module.SPLITS

    def solve(self, question: str) -> str | None:
        """Return the correct answer by search, or None if there is none."""
        return self.module.solve(question) if self.splits else None

    def twin(self, example: Example) -> Example | None:
        """Return a question that differs in one thing, so that its answer does; None if unknown.

        An example of a user's file may hold it as "twin": an object like the example. A ValueError
        says what is wrong with it.
        """
        return parse_object(example["twin"]) if "twin" in example else self._try("twin", example)

    def reworded(self, example: Example) -> str | None:
        """Return a question that needs the same search and has another answer; None if unknown."""
        return self._try("reworded", example)

    def _try(self, name: str, example: Example) -> Any:
        """Return what a function of the module makes of an example of this task, else None."""
        try:
            return getattr(self.module, name)(example) if self.splits else None
        except UserError:  # an example of another kind
            return None

    def render_question(self, question: str, style: str) -> str:
        """Return the question as a model reads it: "sentences" and a newline, or "compact"."""
        return self.module.compact_question(question) if style == "compact" else question + "\n"

    def render(self, examples: Sequence[Example], style: str) -> list[Example]:
        """Return examples as a model reads them.

        sentences   a newline after the question and after each step, as in the released code
        compact     the task's own short form; UserError if an example is not of this task
        """
        if style == "sentences":
            return [
                {**x, "question": x["question"] + "\n", "steps": [s + "\n" for s in x["steps"]]}
                for x in examples
            ]
        rendered = []
        for i, example in enumerate(examples):
            try:
                rendered.append(self.module.compact_example(example))
            except UserError as e:
                raise UserError(
                    f"example {i} has no compact form: {str(e).splitlines()[0]}\n"
                    "Use --render=sentences for examples of your own."
                ) from None
        return rendered

    def expand(self, text: str, question: str, style: str = "compact") -> str:
        """Return a compact completion as sentences: " Tom a a b### b" -> a line for each step, and
        "### Tom is a b."; text that is not compact, or of another style, is kept as it is."""
        if style != "compact":
            return text
        steps, *answer = text.rsplit("###", 1)
        lines = self.module.expand_steps(steps, question)
        # an answer without a compact form is the same word in both styles
        expand = getattr(self.module, "expand_answer", lambda text, question: text.strip())
        return "\n".join([*lines, *(f"### {expand(text, question)}" for text in answer)])


TASKS: dict[str, Task] = {
    "prosqa": Task(prosqa, shortcuts.prosqa_shortcuts),
    "prontoqa": Task(prontoqa, shortcuts.prontoqa_shortcuts),
    "gsm8k": Task(gsm8k),
}


def generated(name: str, n: int, seed: int, config: TrainConfig) -> list[Example] | None:
    """Return n examples of a split of config.task, scaled to the config; None if it has no such
    split."""
    task = TASKS[config.task]
    split = task.splits.get(name)
    return task.module.generate(n, seed, split(config)) if split else None


def test_hashes(config: TrainConfig) -> frozenset[Hashable]:
    """Return the graph key of every test example that a run could generate."""
    # training cannot generate longer chains than its own, and they are slow to make
    splits = {k: v for k, v in TASKS[config.task].splits.items() if k != "prosqa_long"}
    return frozenset().union(
        *(_test_hashes(config.task, split(config)) for split in splits.values())
    )


@cache  # a second, which further runs in the same process save
def _test_hashes(task: str, config: GeneratorConfig) -> frozenset[Hashable]:
    """Return the keys of the first N_TEST examples, or of fewer if one is hardly ever drawn."""
    module = TASKS[task].module
    batches = islice(sample_batches(module.sample_batch, TEST_SEED, config), MAX_TEST_BATCHES)
    examples = islice(chain.from_iterable(batches), N_TEST)
    return frozenset(graph_keys(map(module.marked_graph, examples)))


@dataclass(frozen=True)
class Data:
    """What a run trains and validates on.

    train    None: generated, see training/loader
    val      name of the split -> examples
    commit   of the data set on the hub, None for files and generated examples
    skipped  with skip_bad_rows: why each bad example was dropped; None: a bad one is an error
    """

    train: list[Example] | None
    val: dict[str, list[Example]]
    commit: str | None = None
    skipped: list[str] | None = None


def load_data(config: TrainConfig) -> Data:
    """Read or generate the data of a run.

    A file without valid_data loses a tenth, at most val_examples, to validation. Generated
    validation examples come with a split without shortcuts.
    """
    task = TASKS[config.task]
    train = commit = None
    skipped: list[str] | None = [] if config.skip_bad_rows else None
    if config.data:
        train = read_examples(config.data, skipped)
    elif not task.splits:
        load_split = partial(task.module.from_hub, skipped=skipped)
        train, commit = load_split("train", revision=config.hub_revision)
    if config.valid_data:
        return Data(train, {"valid": read_examples(config.valid_data, skipped)}, commit, skipped)
    if commit:
        return Data(train, {"valid": load_split("validation", revision=commit)[0]}, commit, skipped)
    if train is not None:
        if len(train) < 2:
            raise UserError(
                f"{config.data} holds one example, so none can be held out for validation.\n"
                "Give more examples, or a --valid_data file."
            )
        n = min(config.val_examples, max(1, len(train) // 10))
        order = np.random.default_rng((config.seed, VALID)).permutation(len(train))
        train, valid = ([train[i] for i in part] for part in (order[n:], order[:n]))
        return Data(train, {"valid": valid}, skipped=skipped)
    plain, matched, *_ = task.splits.values()
    n, generate = config.val_examples, task.module.generate
    val = {
        "valid": generate(n, (config.seed, VALID), plain(config)),
        "matched": generate(n, (config.seed, MATCHED), matched(config)),
    }
    return Data(None, val)
