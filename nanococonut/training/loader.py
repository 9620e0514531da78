"""Training examples: generate or read them, tokenize them, and split them into batches.

The examples of a step depend only on the seed, the epoch and the step, so a resumed run sees the
same examples in the same order.
"""

import itertools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from nanococonut.batch import TokenizedExample, build_sequence, max_length, tokenize
from nanococonut.config import TrainConfig
from nanococonut.curriculum import Curriculum
from nanococonut.data import prosqa
from nanococonut.data.examples import Example
from nanococonut.data.generator import ORDER, STAGE_STREAM, TRAIN
from nanococonut.data.graph import graph_keys
from nanococonut.data.tasks import TASKS, Data, GeneratorConfig, test_hashes
from nanococonut.runtime.distributed import Distributed
from nanococonut.runtime.errors import UserError
from nanococonut.tokenizer import Tokenizer
from nanococonut.training.step import MicroBatch

BUCKET_SIZE = 16  # batches whose examples are sorted by length together
Prepare = Callable[..., MicroBatch]  # TrainStep.prepare


class StepBatch(NamedTuple):
    """The micro-batches of this process in a step, and the number of examples of all processes."""

    micro_batches: list[MicroBatch]
    n_examples: int


class TrainLoader:
    """The batches of every step. A worker thread prepares the next epoch.

    data  with train=None, examples are generated, and never repeat a graph of data.val. If
          data.skipped is a list, examples of files that do not fit into block_size are dropped and
          the reasons are appended to it.
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
        # a generated example that does not fit is always an error: the settings are wrong
        self.skipped = None if generates else data.skipped
        self.exclude = frozenset()  # keys of graphs that must not be generated
        if generates:
            graphs = []
            for example in itertools.chain(*data.val.values()):
                with suppress(UserError):  # a validation file may have examples of another task
                    graphs.append(self.task.module.marked_graph(example))
            self.exclude = frozenset(graph_keys(graphs)) | test_hashes(config)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="epochs")
        self._epochs: dict[int, Future[list[TokenizedExample]]] = {}  # the current and the next
        # one batch, by step, stage and what prepares it
        self._prefetched: dict[tuple[int, int, Prepare], StepBatch] = {}
        self._fixed: list[TokenizedExample] | None = None  # used in every epoch, if not None
        if not generates:
            source = config.data or config.task
            self._fixed = [tokenized for _, tokenized in self._fitting(data.train, source)]
        elif not config.regenerate_each_epoch:
            self._fixed = self._generate(0)
        # checked now, so that a validation example that does not fit fails before training
        source = config.valid_data or config.data or "validation"
        self.val_splits = {
            name: [example for example, _ in self._fitting(split, source)]
            for name, split in data.val.items()
        }
        self.n_examples = len(self._fixed) if self._fixed else config.train_examples
        self.steps_per_epoch = -(-self.n_examples // config.batch_size)  # the last may be short

    def get(self, step: int, stage: int, prepare: Prepare) -> StepBatch:
        """Return the batch of a step, from the prefetch if there was one."""
        key = step, stage, prepare
        if key not in self._prefetched:
            self.prefetch(*key)
        return self._prefetched[key]

    def prefetch(self, step: int, stage: int, prepare: Prepare) -> None:
        self._prefetched = {(step, stage, prepare): self._step_batch(step, stage, prepare)}

    def _step_batch(self, step: int, stage: int, prepare: Prepare) -> StepBatch:
        config, curriculum, tokenizer = self.config, self.curriculum, self.tokenizer
        epoch, i = divmod(step, self.steps_per_epoch)
        examples = self.epoch(epoch)[i * config.batch_size :][: config.batch_size]
        # every process samples the same stages, then takes its shard
        rng = np.random.default_rng((config.seed, STAGE_STREAM, step))
        stages = curriculum.sample_stages(stage, [len(x.steps) for x in examples], rng)
        # similar lengths share a micro-batch, so that there is little padding
        pairs = sorted(zip(stages, examples, strict=True), key=lambda pair: len(pair[1].question))
        sequences = [build_sequence(curriculum, *pair, tokenizer) for pair in pairs]
        # over all processes, because the losses are means over the targets of the whole step
        n_targets = sum(s.n_targets for s in sequences)
        n_thought_labels = sum(bool(ids) for s in sequences for ids in s.thought_labels)
        n_states = sum(s.n_thoughts + 1 for s in sequences)  # inputs of the stop classifier
        counts = n_targets, n_states, n_thought_labels
        # only examples of the current stage count towards its accuracy
        counted = [own_stage == stage for own_stage, _ in pairs]
        sequences, counted = self.dist.shard(sequences), self.dist.shard(counted)
        size = config.micro_batch_size
        n_thoughts = curriculum.n_latent_steps(curriculum.n_thoughts(stage))
        micro_batches = [
            prepare(sequences[j : j + size], counted[j : j + size], counts, n_thoughts)
            for j in range(0, len(sequences), size)
        ]
        return StepBatch(micro_batches, len(examples))

    def epoch(self, epoch: int) -> list[TokenizedExample]:
        """Return the examples of an epoch in order, and let the worker prepare the next epoch."""
        self._epochs = {
            n: self._epochs.get(n) or self._worker.submit(self._make_epoch, n)
            for n in sorted({epoch, min(epoch + 1, self.config.epochs - 1)})
        }
        return self._epochs[epoch].result()

    def close(self, wait: bool = False) -> None:
        self._worker.shutdown(wait=wait, cancel_futures=not wait)

    def _make_epoch(self, epoch: int) -> list[TokenizedExample]:
        examples = self._fixed or self._generate(epoch)
        # one random stream per epoch, so that no random state has to be saved
        rng = np.random.default_rng((self.config.seed, ORDER, epoch))
        examples = [examples[i] for i in rng.permutation(len(examples))]
        # fixed examples are only shuffled
        return self._bucketed(examples, rng) if self.config.regenerate_each_epoch else examples

    def _bucketed(
        self, examples: list[TokenizedExample], rng: np.random.Generator
    ) -> list[TokenizedExample]:
        """Return the examples with similar lengths in each batch, to reduce padding.

        Sort each bucket of BUCKET_SIZE batches by length, then shuffle its batches.
        """
        size, ordered = self.config.batch_size, []
        for start in range(0, len(examples), size * BUCKET_SIZE):
            bucket = examples[start : start + size * BUCKET_SIZE]
            bucket.sort(key=lambda example: len(example.question))
            n_full = len(bucket) // size  # a short batch stays last
            for i in [*rng.permutation(n_full), n_full]:
                ordered += bucket[i * size :][:size]
        return ordered

    def _generate(self, epoch: int) -> list[TokenizedExample]:
        """Return the examples of an epoch: plain ones, then those of the other fractions."""
        c, task = self.config, self.task
        if epoch < c.grow_epochs:  # small graphs train faster, and search is learned earlier
            sizes = ("n_nodes", "min_hops", "max_hops")
            c = replace(c, **{name: (getattr(c, name) + 1) // 2 for name in sizes})
        plain, matched, *_ = task.splits.values()
        kinds = [
            (c.matched_fraction, [matched(c)]),
            (c.short_fraction, task.module.easier_configs(c)),  # learned first
            (c.long_fraction, task.module.longest_configs(c)),
        ]
        pieces: list[tuple[int, GeneratorConfig]] = []
        for fraction, configs in kinds:
            for i, generator_config in enumerate(configs):  # as equally as possible
                n_each, n_extra = divmod(round(fraction * c.train_examples), len(configs))
                pieces.append((n_each + (i < n_extra), generator_config))
        pieces.insert(0, (c.train_examples - sum(n for n, _ in pieces), plain(c)))
        examples: list[Example] = []
        for i, (n, generator_config) in enumerate(pieces):
            if n > 0:  # rounding can leave -1 plain examples
                seed = (c.seed, TRAIN, epoch, i)  # one random stream per piece
                examples += task.module.generate(n, seed, generator_config, self.exclude)
        return [tokenized for _, tokenized in self._fitting(examples)]

    def _fitting(
        self, examples: list[Example], source: str = "generated"
    ) -> list[tuple[Example, TokenizedExample]]:
        """Return (example, tokens) for the examples that fit into block_size at every stage.

        source: where the examples come from, for errors. Raise UserError if none fits, or if one
        does not fit and `skipped` is None.
        """
        fitting, error, block_size = [], "", self.config.block_size
        lengths: dict[tuple[int, ...], int] = {}
        is_frontier = self.config.thought_labels == "frontier"
        all_rendered = self.task.render(examples, self.config.render)
        for example, rendered in zip(examples, all_rendered, strict=True):
            try:
                labels = prosqa.frontiers(example["question"]) if is_frontier else None
                tokenized = tokenize(self.tokenizer, rendered, labels)
                # many examples have the same lengths, which are all that matters here
                key = tuple(map(len, (tokenized.question, tokenized.answer, *tokenized.steps)))
                if key not in lengths:
                    lengths[key] = max_length(self.curriculum, tokenized, self.tokenizer)
                if (length := lengths[key]) > block_size:
                    raise UserError(
                        f"it needs {length} positions with its thoughts, but "
                        f"block_size={block_size}.\nUse a larger --block_size, shorter examples or "
                        "fewer thoughts."
                    )
                fitting.append((example, tokenized))
            except UserError as e:  # also if the text contains a special token
                # name it by its text, since a file is shuffled before examples are held out
                error = f"{source}, the example {example['question'][:50]!r}...: {e}"
                if self.skipped is None:
                    raise UserError(error) from None
                self.skipped.append(error.split("\n")[0])
        if not fitting:
            raise UserError(f"no example can be used. The last error: {error}")
        return fitting
