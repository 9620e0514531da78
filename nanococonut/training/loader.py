"""Examples for training: generated or read, tokenized, and cut into the batches of each step.

What an epoch and a step hold depends on the seed and their numbers only, never on timing or on what
came before, so a run resumed anywhere sees the same examples in the same order.
"""

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from nanococonut.batch import (
    TokenizedExample,
    collate,
    count_labels,
    max_length,
    thought_targets,
    tokenize,
)
from nanococonut.config import TrainConfig
from nanococonut.curriculum import Curriculum
from nanococonut.data import prosqa
from nanococonut.data.examples import Example
from nanococonut.data.generator import ORDER, STAGE_STREAM, TRAIN
from nanococonut.data.isomorphism import graph_keys
from nanococonut.data.tasks import TASKS, Data, GeneratorConfig, test_hashes
from nanococonut.runtime.distributed import Distributed
from nanococonut.runtime.errors import UserError
from nanococonut.tokenizer import Tokenizer
from nanococonut.training.step import MicroBatch

BUCKET_SIZE = 16  # batches whose examples are sorted by length together
Prepare = Callable[..., MicroBatch]  # TrainStep.prepare


class StepBatch(NamedTuple):
    """One optimizer step: the micro-batches of this process, and the examples of all processes."""

    micro_batches: list[MicroBatch]
    n_examples: int


class TrainLoader:
    """The batches of every step; a worker thread makes the next epoch in advance.

    data   train=None: examples are generated, and never repeat a graph of data.val
           skipped: a list gets why examples of files do not fit into block_size, which are dropped
    """

    def __init__(
        self,
        config: TrainConfig,
        curriculum: Curriculum,
        tokenizer: Tokenizer,
        data: Data,
        dist: Distributed | None = None,
    ) -> None:
        self.config, self.curriculum, self.tokenizer = config, curriculum, tokenizer
        self.task, self.dist = TASKS[config.task], dist or Distributed()
        generates = data.train is None
        # a generated example that does not fit is the fault of the settings: always an error
        self.skipped = None if generates else data.skipped
        self.exclude = frozenset()  # graphs that generated examples must not repeat
        if generates:
            held_out = [example for split in data.val.values() for example in split]
            self.exclude = self._graph_keys(held_out) | test_hashes(config)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="epochs")
        self._epochs: dict[int, Future[list[TokenizedExample]]] = {}  # this one and the next
        self._prefetched: dict[tuple[int, int], StepBatch] = {}  # by step and stage, the last one
        self._fixed: list[TokenizedExample] | None = None  # the same examples every epoch
        if not generates:
            self._fixed = [tokenized for _, tokenized in self._fitting(data.train)]
        elif not config.regenerate_each_epoch:
            self._fixed = self._generate(0)
        # an example that does not fit is refused now, not at the first validation
        self.val_splits = {
            name: [example for example, _ in self._fitting(split)]
            for name, split in data.val.items()
        }
        self.n_examples = len(self._fixed) if self._fixed else config.train_examples
        self.steps_per_epoch = -(-self.n_examples // config.batch_size)  # the last may be short

    def get(self, step: int, stage: int, prepare: Prepare) -> StepBatch:
        """Return the batch of a step, prefetched or made now."""
        if (step, stage) not in self._prefetched:
            self.prefetch(step, stage, prepare)
        return self._prefetched[step, stage]

    def prefetch(self, step: int, stage: int, prepare: Prepare) -> None:
        self._prefetched = {(step, stage): self._step_batch(step, stage, prepare)}

    def _step_batch(self, step: int, stage: int, prepare: Prepare) -> StepBatch:
        config, curriculum, tokenizer = self.config, self.curriculum, self.tokenizer
        epoch, i = divmod(step, self.steps_per_epoch)
        examples = self.epoch(epoch)[i * config.batch_size :][: config.batch_size]
        # every process samples the same stages, then takes its shard
        rng = np.random.default_rng((config.seed, STAGE_STREAM, step))
        stages = curriculum.sample_stages(stage, [len(x.steps) for x in examples], rng)
        # of all processes: the loss is a mean over the labels of the whole step
        n_labels = count_labels(curriculum, stages, examples, tokenizer)
        thought_labels = map(partial(thought_targets, curriculum), stages, examples)
        n_thought_labels = sum(bool(ids) for labels in thought_labels for ids in labels)
        counts = n_labels, len(examples), n_thought_labels
        # like lengths share a micro-batch, so that little is padding
        pairs = sorted(zip(stages, examples, strict=True), key=lambda pair: len(pair[1].question))
        pairs, size, micro_batches = self.dist.shard(pairs), config.micro_batch_size, []
        for start in range(0, len(pairs), size):
            own_stages, own_examples = zip(*pairs[start : start + size], strict=True)
            batch = collate(curriculum, own_stages, own_examples, tokenizer)
            # examples sampled at another stage say nothing about this one's accuracy
            counted = [own_stage == stage for own_stage in own_stages]
            micro_batches.append(prepare(batch, counted, counts, curriculum.n_thoughts(stage)))
        return StepBatch(micro_batches, len(examples))

    def epoch(self, epoch: int) -> list[TokenizedExample]:
        """Return the epoch's examples in order; the worker makes the next epoch's meanwhile."""
        self._epochs = {
            n: self._epochs.get(n) or self._worker.submit(self._make_epoch, n)
            for n in (epoch, epoch + 1)
        }
        return self._epochs[epoch].result()

    def close(self, wait: bool = False) -> None:
        self._worker.shutdown(wait=wait, cancel_futures=not wait)

    def _make_epoch(self, epoch: int) -> list[TokenizedExample]:
        examples = self._fixed or self._generate(epoch)
        # a stream per epoch: no random state has to be saved
        rng = np.random.default_rng((self.config.seed, ORDER, epoch))
        examples = [examples[i] for i in rng.permutation(len(examples))]
        # the same examples every epoch get a plain shuffle
        return self._bucketed(examples, rng) if self.config.regenerate_each_epoch else examples

    def _bucketed(
        self, examples: list[TokenizedExample], rng: np.random.Generator
    ) -> list[TokenizedExample]:
        """Return the examples with like lengths in one batch, so that less is padding.

        Buckets of BUCKET_SIZE batches are sorted by length, and each bucket's batches shuffled.
        """
        size, ordered = self.config.batch_size, []
        for start in range(0, len(examples), size * BUCKET_SIZE):
            bucket = examples[start : start + size * BUCKET_SIZE]
            bucket.sort(key=lambda example: len(example.question))
            n_full = len(bucket) // size  # a short batch stays last
            for i in [*rng.permutation(n_full), n_full]:
                ordered += bucket[i * size :][:size]
        return ordered

    def _graph_keys(self, examples: list[Example]) -> frozenset[Hashable]:
        graphs = []
        for example in examples:
            with suppress(UserError):  # a validation file may hold another task's examples
                graphs.append(self.task.module.marked_graph(example))
        return frozenset(graph_keys(graphs))

    def _generate(self, epoch: int) -> list[TokenizedExample]:
        """Return an epoch's examples: plain, without the shortcut, with fewer, with most steps."""
        c, task = self.config, self.task
        if epoch < c.grow_epochs:  # in small graphs steps are cheaper and search is learned sooner
            sizes = ("n_nodes", "min_hops", "max_hops")
            c = replace(c, **{name: (getattr(c, name) + 1) // 2 for name in sizes})
        plain, matched, *_ = task.splits.values()
        kinds = [
            (c.matched_fraction, [matched(c)]),
            (c.short_fraction, task.module.easier_configs(c)),  # these give the search a start
            (c.long_fraction, task.module.longest_configs(c)),
        ]
        parts: list[tuple[int, GeneratorConfig]] = []
        for fraction, configs in kinds:
            n_each = np.array_split(range(round(fraction * c.train_examples)), max(1, len(configs)))
            parts += zip(map(len, n_each), configs, strict=False)
        parts.insert(0, (c.train_examples - sum(n for n, _ in parts), plain(c)))
        examples: list[Example] = []
        for i, (n, generator_config) in enumerate(parts):
            if n:
                seed = (c.seed, TRAIN, epoch, i)  # no two parts share a stream
                examples += task.module.generate(n, seed, generator_config, self.exclude)
        return [tokenized for _, tokenized in self._fitting(examples)]

    def _fitting(self, examples: list[Example]) -> list[tuple[Example, TokenizedExample]]:
        """Return the examples that fit into block_size at every stage, with their tokens.

        Raise UserError if one does not fit and `skipped` is None, or if none fits.
        """
        fitting, error, block_size = [], "", self.config.block_size
        is_frontier = self.config.thought_labels == "frontier"
        all_rendered = self.task.render(examples, self.config.render)
        for i, (example, rendered) in enumerate(zip(examples, all_rendered, strict=True)):
            try:
                labels = prosqa.frontiers(example["question"]) if is_frontier else None
                tokenized = tokenize(self.tokenizer, rendered, labels)
                length = max_length(self.curriculum, tokenized, self.tokenizer)
                if length > block_size:
                    raise UserError(
                        f"it needs {length} positions with its thoughts, but "
                        f"block_size={block_size}.\nUse a longer --block_size, shorter examples or "
                        "fewer thoughts."
                    )
                fitting.append((example, tokenized))
            except UserError as e:  # also of a special token in the text
                error = f"example {i}, {example['question'][:30]!r}...: {e}"
                if self.skipped is None:
                    raise UserError(error) from None
                self.skipped.append(error.split("\n")[0])
        if not fitting:
            raise UserError(f"no example can be used, the last: {error}")
        return fitting
