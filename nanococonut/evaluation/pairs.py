"""Counterfactual pairs for the tests of insight.py: questions and twins, generated or from files.

A twin is a question that differs in one thing, so that another answer is correct.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from nanococonut.config import TrainConfig
from nanococonut.data import prosqa
from nanococonut.data.examples import Example
from nanococonut.data.files import read_examples
from nanococonut.data.tasks import TASKS
from nanococonut.evaluation.accuracy import held_out_examples, note_training_file
from nanococonut.evaluation.interchange import EXTRA, NOUNS, Figures, interchange, kind_of, n_slots
from nanococonut.inference.engine import Engine
from nanococonut.runtime.errors import UserError

MIN_PAIRS = 100  # with fewer, the intervals are too wide for a verdict
MAX_ANSWERS = 50  # candidate answers of a question without a twin


@dataclass
class Pairs:
    """Questions and their twins, one entry each."""

    examples: list[Example] = field(default_factory=list)
    twins: list[Example] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)  # number of steps; 0: as in training
    twinned: bool = True  # False: twins are just questions with equally many steps, other answers

    def take(self, index: Sequence[int]) -> "Pairs":
        """Return the pairs with these indices."""
        sides = ([side[i] for i in index] for side in (self.examples, self.twins, self.groups))
        return Pairs(*sides, self.twinned)

    def questions(self) -> tuple[list[str], list[str]]:
        """Return the texts of the questions and of their twins."""
        return [x["question"] for x in self.examples], [x["question"] for x in self.twins]

    def candidates(self, engine: Engine) -> list[tuple[str, ...]]:
        """Return (its answer, the twin's answer) of each question, as the model writes them.

        Without twins, the most frequent other answers follow, equally many for each question.
        """
        task, style = TASKS[engine.config.task], engine.config.render
        own, twin = (task.render(side, style) for side in (self.examples, self.twins))
        answers = [(x["answer"], t["answer"]) for x, t in zip(own, twin, strict=True)]
        if self.twinned:
            return answers
        frequent = [answer for answer, _ in Counter(a for a, _ in answers).most_common(MAX_ANSWERS)]
        others = [[a for a in frequent if a not in pair] for pair in answers]
        n = max(0, len(frequent) - 2)
        return [(*pair, *other[:n]) for pair, other in zip(answers, others, strict=True)]

    @property
    def is_prosqa(self) -> bool:
        try:
            return bool(prosqa.parse_question(self.examples[0]["question"]))
        except UserError:
            return False

    def figures(self, engine: Engine) -> Figures:
        """Run the interchange interventions and return their statistics."""
        pairs, donors = list(zip(self.examples, self.twins, strict=True)), {}
        if self.twinned and kind_of(engine) in ("thought", "pause"):
            reworded = [tuple(map(TASKS[engine.config.task].reworded, pair)) for pair in pairs]
            for i, name in enumerate(("same_other", "other_other")):
                donors[name] = [texts[i] if all(texts) else None for texts in reworded]
            if self.is_prosqa:
                donors["renamed"] = [prosqa.renamed(*pair) for pair in pairs]
                donors["retargeted"] = [prosqa.retargeted(x) for x in self.examples]
        outcomes = interchange(
            engine, *self.questions(), self.candidates(engine), donors=donors, groups=self.groups
        )
        deep = torch.tensor([min(len(x["steps"]), len(t["steps"])) > 1 for x, t in pairs])
        f = Figures(outcomes, torch.tensor(self.groups), deep)
        if not self.twinned:
            answers = Counter(x["answer"] for x in self.examples)
            f.chance = max(answers.values()) / len(self.examples)  # always the most frequent one
        return f


def generated_pairs(config: TrainConfig, rows: int, seed: int) -> tuple[Pairs, Pairs]:
    """Return (pairs as in training, `rows` pairs without shortcuts for each number of hops)."""
    task, pairs = TASKS[config.task], Pairs()
    plain = next(iter(task.splits.values()))(config)
    for h, c in task.module.configs_by_hops(config).items():
        n = rows // 2 if h > config.max_hops + 1 else rows  # the longest chains are rare
        pairs.examples += task.module.generate(n, seed, c)
        pairs.groups += [h] * n
    pairs.twins = [task.twin(x) for x in pairs.examples]
    trained = Pairs(task.module.generate(max(500, 5 * rows // 2), seed, plain))
    # ProntoQA as in training has no twins: the same question with the other candidate answer
    other = {"True": "False", "False": "True"}
    trained.twins = [task.twin(x) or x | {"answer": other[x["answer"]]} for x in trained.examples]
    trained.groups = [0] * len(trained.examples)
    return trained, pairs


def own_pairs(task: str, examples: list[Example], twins: list[Example] | None) -> Pairs:
    """Return the pairs of a user's examples. Raise UserError if one is invalid or they are too few.

    twins  the twin of each example (None: stored in it or made by the task; failing that, any
           example with the same number of steps and another answer)
    """
    if twins is not None:
        if len(twins) != len(examples):
            raise UserError(
                f"{len(twins)} twins of {len(examples)} examples.\n"
                "Give one for each: example i of --twins is the twin of example i of --data."
            )
        examples = [x | {"twin": twin} for x, twin in zip(examples, twins, strict=True)]
    pairs = []
    for i, x in enumerate(examples):
        try:
            twin = TASKS[task].twin(x)
        except ValueError as e:
            raise UserError(
                f"the twin of example {i} is invalid: {e}.\nGive its question, steps and answer."
            ) from None
        if twin and twin["answer"].strip() == x["answer"].strip():
            raise UserError(
                f"the twin of example {i} has the same answer, {x['answer']!r}.\n"
                "Give twins whose correct answer differs."
            )
        pairs += [(x, twin)] if twin else []
    twinned = len(pairs) >= MIN_PAIRS
    if not twinned:
        pairs = _unpaired(examples)
    elif len(pairs) < len(examples):
        print(f"note: examples without a twin are left out: {len(examples) - len(pairs)}")
    if len(pairs) < MIN_PAIRS:
        raise UserError(
            f"only {len(pairs)} pairs of questions with different answers.\n"
            f"Give at least {MIN_PAIRS} examples with twins, or more with the same number of steps."
        )
    sides = [list(side) for side in zip(*pairs, strict=True)]
    return Pairs(*sides, [len(x["steps"]) for x, _ in pairs], twinned)


def _unpaired(examples: list[Example]) -> list[tuple[Example, Example]]:
    """Return pairs of examples with equally many steps but different answers, in both orders."""
    unpaired: dict[int, list[Example]] = defaultdict(list)  # by number of steps
    pairs = []
    for x in sorted(examples, key=lambda x: len(x["question"])):  # pairs of similar length
        others = unpaired[len(x["steps"])]
        if other := next((y for y in others if y["answer"].strip() != x["answer"].strip()), None):
            others.remove(other)
            pairs += [(x, other), (other, x)]
        else:
            others.append(x)
    return pairs


def check_lengths(engine: Engine, pairs: Pairs) -> Pairs:
    """Return the pairs that fit in block_size. Raise UserError if under half or MIN_PAIRS do."""
    n, block_size = n_slots(engine), engine.model.config.block_size
    answers, keep = pairs.candidates(engine), []
    for i, questions in enumerate(zip(*pairs.questions(), strict=True)):
        texts = [f"{engine.render(q)}### {a}" for q in questions for a in answers[i]]
        longest = max(len(engine.tokenizer.encode(text)) for text in texts)
        if longest + n + EXTRA + 2 <= block_size:  # 2: <bot> and <eot>
            keep.append(i)
    n_long = len(answers) - len(keep)
    if len(keep) < max(MIN_PAIRS, len(answers) / 2):
        slots = NOUNS[kind := kind_of(engine)]
        slots = f"a {slots} of up to {n} tokens" if kind == "chain" else f"{n} {slots}"
        raise UserError(
            f"{n_long} of {len(answers)} pairs do not fit in block_size={block_size} with {slots}."
            "\nGive shorter questions."
        )
    if n_long:
        print(f"note: {n_long} pairs do not fit in block_size and are left out")
    return pairs.take(keep)


def load_pairs(
    engine: Engine, rows: int, seed: int, data: str | None = None, twins: str | None = None
) -> tuple[Pairs | None, Pairs]:
    """Return (pairs as in training or None, pairs to measure on), all short enough for the model.

    rows, seed   for generated pairs, see generated_pairs
    data, twins  files of examples and of their twins (None: what the run held out from its file;
                 generated pairs if it had none)
    """
    config, plain = engine.config, None
    if bad := [k for k, p in engine.model.named_parameters() if not p.isfinite().all()]:
        raise UserError(f"{bad[0]} has NaN or infinite values.\nUse another checkpoint.")
    if twins and not data:
        raise UserError(f"--twins={twins} without --data.\nGive --data too.")
    if data:
        note_training_file(engine, data)
        own_twins = read_examples(twins) if twins else None
        pairs = own_pairs(config.task, read_examples(data), own_twins)
    elif held_out := held_out_examples(engine, "Give --data: a file of its examples."):
        pairs = own_pairs(config.task, held_out, None)
    elif not hasattr(TASKS[config.task].module, "configs_by_hops"):
        raise UserError(f"a model of {config.task} needs --data.\nGive a file of its examples.")
    else:
        plain, pairs = generated_pairs(config, rows, seed)
    return plain and check_lengths(engine, plain), check_lengths(engine, pairs)
