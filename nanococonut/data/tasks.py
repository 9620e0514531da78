"""The tasks, one entry each: how examples are made or read, and written.

Another task is another entry. A file of your own needs none: --data=FILE trains on any.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import chain, islice
from types import ModuleType

import numpy as np

from nanococonut.config import TrainConfig
from nanococonut.data import gsm8k, prontoqa, prosqa, shortcuts
from nanococonut.data.examples import Example, parse_object
from nanococonut.data.files import read_examples
from nanococonut.data.seeds import MATCHED, N_TEST, TEST_SEED, VALID
from nanococonut.runtime.errors import UserError

GeneratorConfig = prosqa.GraphConfig | prontoqa.OntologyConfig
MAX_TEST_BATCHES = 100  # with rarer examples, a run would start minutes later


@dataclass(frozen=True)
class Task:
    """What the loop, the sampler and the benches know of a task.

    description      a line for --help
    module           generate, solve, graph_hash, compact_example, ... of a generated task;
                     from_hub(split, revision, skipped) -> (examples, commit) of any other
    shortcuts        examples -> fraction correct of rules that never search; UserError if the
                     examples are not of this task
    splits           name -> settings for a model's TrainConfig. The first is the training split,
                     the second its variant without shortcuts. Empty: never generated
    easier_configs   settings with fewer steps than the task's own, to start the search from
    longest_config   settings with the most steps, which are rare in the first split (None: alike)
    """

    description: str
    module: ModuleType
    shortcuts: Callable[[Sequence[Example]], dict[str, float]] = lambda examples: {}
    splits: Mapping[str, Callable[[TrainConfig], GeneratorConfig]] = field(default_factory=dict)
    easier_configs: Callable[[TrainConfig], Sequence[GeneratorConfig]] = lambda config: ()
    longest_config: Callable[[TrainConfig], GeneratorConfig] | None = None

    def words(self) -> list[str]:
        """Return the words that a word-level vocabulary needs in addition to those of a file."""
        return getattr(self.module, "VOCABULARY", ["###"])

    def solve(self, question: str) -> str | None:
        """Return the correct answer by search, or None if there is none."""
        return self.module.solve(question) if self.splits else None

    def twin(self, example: Example) -> Example | None:
        """Return a question that differs in one thing, so that its answer does; None if unknown.

        An example of a user's file may hold it as "twin": an object like the example. A ValueError
        says what is wrong with it.
        """
        if "twin" in example:
            return parse_object(example["twin"])
        try:
            return self.module.twin(example) if self.splits else None
        except UserError:  # an example of another kind
            return None

    def reworded(self, example: Example) -> str | None:
        """Return a question that needs the same search and has another answer; None if unknown."""
        try:
            return self.module.reworded(example) if self.splits else None
        except UserError:
            return None

    def render_question(self, question: str, style: str) -> str:
        """Return the question as a model reads it: "sentences" and a newline, or "compact"."""
        return self.module.compact_question(question) if style == "compact" else question + "\n"

    def render(self, examples: Sequence[Example], style: str) -> list[Example]:
        """Return examples as a model reads them.

        sentences   a newline after the question and after each step, as in the released code
        compact     the task's own short form; UserError if an example is not of this task
        """
        rendered = []
        for i, example in enumerate(examples):
            if style == "sentences":
                texts = {"question": self.render_question(example["question"], style)}
                texts["steps"] = [step + "\n" for step in example["steps"]]
                rendered.append(example | texts)
                continue
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


def _graphs(config: TrainConfig) -> prosqa.GraphConfig:
    return prosqa.GraphConfig(
        n_nodes=config.n_nodes, min_hops=config.min_hops, max_hops=config.max_hops
    )


TASKS: dict[str, Task] = {
    "prosqa": Task(
        "which of two concepts does a chain of facts lead to?",
        prosqa,
        shortcuts.prosqa_shortcuts,
        splits={
            name: partial(lambda name, config: prosqa.split_config(name, _graphs(config)), name)
            for name in prosqa.SPLITS
        },
        easier_configs=lambda c: (
            [replace(_graphs(c), min_hops=1, max_hops=c.min_hops - 1)] if c.min_hops > 1 else []
        ),
        # the graphs of the split of longer chains, with the nodes and hops of training
        longest_config=lambda c: replace(
            prosqa.split_config("prosqa_long", _graphs(c)),
            n_nodes=c.n_nodes,
            min_hops=max(c.min_hops, c.max_hops - 1),
            max_hops=c.max_hops,
        ),
    ),
    "prontoqa": Task(
        "does a statement follow from a chain of rules?",
        prontoqa,
        shortcuts.prontoqa_shortcuts,
        splits={
            "prontoqa": lambda c: prontoqa.OntologyConfig(c.max_hops),
            "prontoqa_matched": lambda c: prontoqa.OntologyConfig(c.max_hops, matched=True),
        },
        easier_configs=lambda c: [
            prontoqa.OntologyConfig(hops, matched=True) for hops in range(1, c.max_hops)
        ],
    ),
    "gsm8k": Task(
        "what number answers a question of grade-school mathematics?",
        gsm8k,
    ),
}


def generated(name: str, n: int, seed: int, config: TrainConfig) -> list[Example] | None:
    """Return n examples of a split of config.task, scaled to the config; None if it has no such
    split."""
    task = TASKS[config.task]
    split = task.splits.get(name)
    return task.module.generate(n, seed, split(config)) if split else None


def test_hashes(config: TrainConfig) -> frozenset[Hashable]:
    """Return the graph_hash of every test example that a run could generate."""
    hashes = [_test_hashes(config.task, c) for c in _test_configs(config).values()]
    return frozenset().union(*hashes)


def _test_configs(config: TrainConfig) -> dict[str, GeneratorConfig]:
    """Return the splits, without chains that are too long for training to generate (slow, too)."""
    configs = {name: split(config) for name, split in TASKS[config.task].splits.items()}
    return {n: c for n, c in configs.items() if getattr(c, "min_hops", 0) <= config.max_hops}


def _test_examples(task: str, config: GeneratorConfig) -> list[Example]:
    """Return the first N_TEST examples, or fewer if the settings hardly ever give one."""
    batches = TASKS[task].module.sample_batches(TEST_SEED, config)
    return list(islice(chain.from_iterable(islice(batches, MAX_TEST_BATCHES)), N_TEST))


@cache  # a second, which further runs in the same process save
def _test_hashes(task: str, config: GeneratorConfig) -> frozenset[Hashable]:
    return frozenset(TASKS[task].module.graph_hashes(_test_examples(task, config)))


@dataclass(frozen=True)
class Data:
    """What a run trains and validates on.

    train    None: generated, see training/loader
    val      name of the split -> examples
    commit   of the data set on the hub, None for files and generated examples
    """

    train: list[Example] | None
    val: dict[str, list[Example]]
    commit: str | None = None


def load_data(config: TrainConfig, skipped: list[str] | None = None) -> Data:
    """Read or generate the data of a run; skipped: as in read_examples.

    A file without valid_data loses a tenth, at most val_examples, to validation. Generated
    validation examples come with a split without shortcuts.
    """
    task = TASKS[config.task]
    train = commit = None
    if config.data:
        train = read_examples(config.data, skipped)
    elif not task.splits:
        load_split = partial(task.module.from_hub, skipped=skipped)
        train, commit = load_split("train", revision=config.hub_revision)
    if config.valid_data:
        return Data(train, {"valid": read_examples(config.valid_data, skipped)}, commit)
    if commit:
        return Data(train, {"valid": load_split("validation", revision=commit)[0]}, commit)
    if train is not None:
        if len(train) < 2:
            raise UserError(
                f"{config.data} holds one example, so none can be held out for validation.\n"
                "Give more examples, or a --valid_data file."
            )
        n = min(config.val_examples, max(1, len(train) // 10))
        order = np.random.default_rng((config.seed, VALID)).permutation(len(train))
        return Data([train[i] for i in order[n:]], {"valid": [train[i] for i in order[:n]]})
    plain, matched, *_ = task.splits.values()
    n, generate = config.val_examples, task.module.generate
    val = {
        "valid": generate(n, (config.seed, VALID), plain(config)),
        "matched": generate(n, (config.seed, MATCHED), matched(config)),
    }
    return Data(None, val)
