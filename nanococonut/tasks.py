"""The tasks, an entry each: where rows come from, how they are written, rules to score beside.

Another task is another entry. Rows of one's own need none: --data=FILE trains on any.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType
from typing import Any

from nanococonut.config import TrainConfig
from nanococonut.data import Row, gsm8k, prontoqa, prosqa

# what rows of a generator are like: its GraphConfig or OntologyConfig, of a model's TrainConfig
Kind = Callable[[TrainConfig], Any]


@dataclass(frozen=True)
class Task:
    """What the loop, the sampler and the benches know of a task.

    module     its rows: generate, solve, heuristics, compact_row, ... (data/prosqa.py has all)
    splits     name -> kind of generated rows; the first is the task itself, the second, where there
               is one, its rows without shortcut. Empty: rows are read, never generated
    shorter    kinds of rows with fewer steps than the task's own, from which search starts
    read       (split of the hub, revision, skipped) -> (its rows, their commit), where they are had
    """

    module: ModuleType
    splits: Mapping[str, Kind] = field(default_factory=dict)
    shorter: Callable[[TrainConfig], Sequence[Any]] = lambda config: ()
    read: Callable[[str, str, list[str] | None], tuple[list[Row], str]] | None = None

    def words(self) -> list[str]:
        """What a word-level vocabulary has to hold beside the words of the rows in a file."""
        return getattr(self.module, "VOCABULARY", ["###"])

    def solve(self, question: str) -> str | None:
        """The right answer by search; None where that cannot be."""
        return self.module.solve(question) if self.splits else None

    def expand(self, text: str, question: str) -> str:
        """All that a model says to a question, compact: " Tom a a b### b" -> a line for each step
        and "### Tom is a b."; what is no such text is left as it is."""
        steps, mark, said = text.rpartition("###")
        if not mark:
            return "\n".join(self.module.expand_steps(text, question))
        lines = self.module.expand_steps(steps, question)
        return "\n".join([*lines, f"### {self.module.expand_answer(said, question)}"])

    def heuristics(self, rows: Sequence[Row]) -> dict[str, float]:
        """Share right by rules that never search. UserError where rows are not the task's."""
        return self.module.heuristics(rows) if self.splits else {}


def _graphs(config: TrainConfig) -> prosqa.GraphConfig:
    return prosqa.GraphConfig(
        n_nodes=config.n_nodes, min_hops=config.min_hops, max_hops=config.max_hops
    )


def _ontology(config: TrainConfig, matched: bool = False) -> prontoqa.OntologyConfig:
    return prontoqa.OntologyConfig(config.max_hops, matched)


TASKS: dict[str, Task] = {
    "prosqa": Task(
        prosqa,
        splits={
            name: partial(lambda name, config: prosqa.split(name, _graphs(config)), name)
            for name in prosqa.SPLITS
        },
        shorter=lambda config: [
            replace(_graphs(config), min_hops=1, max_hops=most)
            for most in (config.min_hops - 1,)
            if most
        ],
    ),
    "prontoqa": Task(
        prontoqa,
        splits={"prontoqa": _ontology, "prontoqa_matched": partial(_ontology, matched=True)},
        shorter=lambda config: [
            prontoqa.OntologyConfig(hops, matched=True) for hops in range(1, config.max_hops)
        ],
    ),
    "gsm8k": Task(
        gsm8k,
        read=lambda split, revision, skipped: gsm8k.from_hub(
            split, revision=revision, skipped=skipped
        ),
    ),
}


def generated(name: str, n: int, seed: int, config: TrainConfig) -> list[Row] | None:
    """n rows of a split of the config's task, scaled to it; None where there is no such split."""
    task = TASKS[config.task]
    kind = task.splits.get(name)
    return task.module.generate(n, seed, kind(config)) if kind else None
