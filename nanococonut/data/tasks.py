"""The tasks: how their examples are generated or read, and rendered for the model.

A new task is an entry in TASKS and a choice of `task` in config.py. Your own file needs none:
--data=FILE trains on any examples.
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
from nanococonut.data.graph import graph_keys
from nanococonut.runtime.errors import UserError

GeneratorConfig = prosqa.GraphConfig | prontoqa.OntologyConfig
MAX_TEST_BATCHES = 100  # if examples are rare, do not delay the start of a run by minutes


@dataclass(frozen=True)
class Task:
    """What training, sampling and benchmarks need to know about a task.

    module      defines
                  SPLITS, VOCABULARY (the words of --tokenizer=words)
                  without splits: from_hub(split, revision, skipped) -> (examples, commit)
                  with splits: generate, sample_batch, easier_configs, longest_configs, and
                    marked_graph, whose keys identify test examples
                  for --render=compact: compact_question, compact_example, expand_steps
                  optional: solve, twin, reworded, expand_answer, configs_by_hops
    shortcuts   examples -> accuracy of each shortcut rule; UserError for those of another task
    """

    module: ModuleType
    shortcuts: Callable[[Sequence[Example]], dict[str, float]] = lambda examples: {}

    @property
    def splits(self) -> dict[str, Callable[[TrainConfig], GeneratorConfig]]:
        """Map each split to a function TrainConfig -> its settings; {} if nothing is generated.

        The first is the training split. The second is its variant without shortcuts (the same
        split if there are no shortcuts).
        """
        return self.module.SPLITS

    def solve(self, question: str) -> str | None:
        """Return the answer found by search, or None if there is none."""
        return self._try("solve", question)

    def twin(self, example: Example) -> Example | None:
        """Return the counterfactual, which differs in one thing and has another answer, or None.

        A user's example may store its own counterfactual under "twin", also as an example. Raise
        ValueError if that is invalid.
        """
        return parse_object(example["twin"]) if "twin" in example else self._try("twin", example)

    def reworded(self, example: Example) -> str | None:
        """Return a question with the same search but another answer, or None if there is none."""
        return self._try("reworded", example)

    def _try(self, name: str, arg: Example | str) -> Any:
        """Return the result of the module's function, or None if it has none or refuses arg."""
        fn = getattr(self.module, name, None)
        try:
            return fn(arg) if fn else None
        except UserError:
            return None

    def render_question(self, question: str, style: str) -> str:
        """Return the question as the model reads it; see render."""
        return self.module.compact_question(question) if style == "compact" else question + "\n"

    def render(self, examples: Sequence[Example], style: str) -> list[Example]:
        """Return examples as the model reads them.

        sentences   a newline after the question and after each step, as in the released code
        compact     a short form of the task; UserError if an example is not of this task
        """
        if style == "sentences":
            return [
                {**x, "question": x["question"] + "\n", "steps": [s + "\n" for s in x["steps"]]}
                for x in examples
            ]
        rendered = []
        for example in examples:
            try:
                rendered.append(self.module.compact_example(example))
            except UserError as e:
                reason = str(e).splitlines()[0]
                raise UserError(
                    f"{example['question'][:50]!r}... has no compact form: {reason}\n"
                    "To train on your own examples, use --render=sentences."
                ) from None
        return rendered

    def expand(self, text: str, question: str, style: str = "compact") -> str:
        """Return a compact completion as sentences; other text is unchanged.

        For example, " Tom a a b### b" becomes one line per step, then "### Tom is a b."
        """
        if style != "compact":
            return text
        steps, *answer = text.rsplit("###", 1)
        lines = self.module.expand_steps(steps, question)
        # without expand_answer, the answer is the same in both styles
        expand = getattr(self.module, "expand_answer", lambda text, question: text.strip())
        return "\n".join([*lines, *(f"### {expand(text, question)}" for text in answer)])


TASKS: dict[str, Task] = {
    "prosqa": Task(prosqa, shortcuts.prosqa_shortcuts),
    "prontoqa": Task(prontoqa, shortcuts.prontoqa_shortcuts),
    "gsm8k": Task(gsm8k),
}
TASK_OF = {split: name for name, task in TASKS.items() for split in task.splits}  # generated splits


def generated(name: str, n: int, seed: int, config: TrainConfig) -> list[Example] | None:
    """Return n examples of a split of config.task, scaled to config, or None for another name."""
    task = TASKS[config.task]
    split = task.splits.get(name)
    return task.module.generate(n, seed, split(config)) if split else None


def test_hashes(config: TrainConfig) -> frozenset[Hashable]:
    """Return the graph keys of the test examples that training could also generate."""
    # training generates no chains as long as those of prosqa_long, which are slow to generate
    splits = {k: v for k, v in TASKS[config.task].splits.items() if k != "prosqa_long"}
    return frozenset().union(
        *(_test_hashes(config.task, split(config)) for split in splits.values())
    )


@cache  # takes a second
def _test_hashes(task: str, config: GeneratorConfig) -> frozenset[Hashable]:
    """Return the graph keys of the first N_TEST examples; fewer if the settings rarely fit."""
    module = TASKS[task].module
    batches = islice(sample_batches(module.sample_batch, TEST_SEED, config), MAX_TEST_BATCHES)
    examples = islice(chain.from_iterable(batches), N_TEST)
    return frozenset(graph_keys(map(module.marked_graph, examples)))


@dataclass(frozen=True)
class Data:
    """Training and validation examples of a run.

    train    None: generated, see training/loader.py
    val      split -> examples
    commit   of the data set on the hub; None for files and generated examples
    skipped  with skip_bad_rows, the error of each skipped example (None: invalid ones are errors)
    """

    train: list[Example] | None
    val: dict[str, list[Example]]
    commit: str | None = None
    skipped: list[str] | None = None


def load_data(config: TrainConfig, revision: str = "main") -> Data:
    """Read or generate the data of a run.

    Without valid_data, a tenth of a file is held out for validation, but at most val_examples.
    Generated validation examples come with a second split without shortcuts. `revision` is a commit
    or branch on the hub, for GSM8k without files.
    """
    task = TASKS[config.task]
    train = commit = None
    skipped: list[str] | None = [] if config.skip_bad_rows else None
    if config.data:
        train = read_examples(config.data, skipped)
    elif not task.splits:
        load_split = partial(task.module.from_hub, skipped=skipped)
        train, commit = load_split("train", revision=revision)
    if config.valid_data:
        return Data(train, {"valid": read_examples(config.valid_data, skipped)}, commit, skipped)
    if commit:
        return Data(train, {"valid": load_split("validation", revision=commit)[0]}, commit, skipped)
    if train is not None:
        if len(train) < 2:
            raise UserError(
                f"{config.data} has only one example, so none can be held out for validation.\n"
                "Give more examples, or a --valid_data file."
            )
        n = min(config.val_examples, max(1, len(train) // 10))
        # the same for every seed, so that a run can continue another's weights on unseen examples
        order = np.random.default_rng((0, VALID)).permutation(len(train))
        valid = [train[i] for i in order[:n]]
        train = [train[i] for i in order[n:]]
        return Data(train, {"valid": valid}, skipped=skipped)
    plain, matched, *_ = task.splits.values()
    n, generate = config.val_examples, task.module.generate
    val = {
        "valid": generate(n, (config.seed, VALID), plain(config)),
        "matched": generate(n, (config.seed, MATCHED), matched(config)),
    }
    return Data(None, val)
