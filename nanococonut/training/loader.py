"""Rows for training: made or read, tokenised, an epoch ahead of the loop.

What an epoch holds depends on the seed and its number only, never on timing or on what came before
it, so a run resumed in any epoch sees the same rows in the same order.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import numpy as np

from nanococonut.batch import TokenizedExample, max_length, tokenize
from nanococonut.config import TrainConfig
from nanococonut.curriculum import Curriculum
from nanococonut.data.examples import Example
from nanococonut.data.seeds import ORDER, TRAIN
from nanococonut.data.tasks import TASKS, test_hashes
from nanococonut.runtime.errors import UserError
from nanococonut.tokenizer import Tokenizer

POOL = 16  # batches among which rows of like length are put together


class TrainLoader:
    """The training rows of every epoch, tokenised; the next one is made in a worker thread.

    rows: those to train on; None: generated ones. held_out: rows that generated ones must never
    repeat (by graph, whatever the names in it).
    Raises UserError where a row would not fit into block_size at some stage; with a list `skipped`
    such rows are left out and it is told.
    """

    def __init__(
        self,
        config: TrainConfig,
        curriculum: Curriculum,
        tokenizer: Tokenizer,
        rows: list[Example] | None,
        held_out: list[Example],
        skipped: list[str] | None = None,
    ) -> None:
        self.config, self.curriculum, self.tokenizer = config, curriculum, tokenizer
        # generated rows that do not fit are the settings' fault, not the rows'
        self.task, self.skipped = TASKS[config.task], skipped if rows is not None else None
        self.exclude = frozenset()
        if rows is None:
            self.exclude = self._signatures(held_out) | test_hashes(config)
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="rows")
        self.ahead: tuple[int, Future[list[TokenizedExample]]] | None = None
        self.fixed: list[TokenizedExample] | None = None
        if rows is not None:
            self.fixed = self.encode(rows)
        elif not config.regenerate_each_epoch:
            self.fixed = self.encode(self._generate(0))
        self.n_rows = len(self.fixed) if self.fixed else config.train_examples

    def __call__(self, epoch: int) -> list[TokenizedExample]:
        """The epoch's rows in their order."""
        if self.ahead and self.ahead[0] == epoch:
            rows = self.ahead[1].result()
        else:
            rows = self._make(epoch)
        self.ahead = (epoch + 1, self.worker.submit(self._make, epoch + 1))
        return rows

    def close(self) -> None:
        self.worker.shutdown(wait=False, cancel_futures=True)

    def _make(self, epoch: int) -> list[TokenizedExample]:
        rows = self.fixed or self.encode(self._generate(epoch))
        rng = np.random.default_rng((self.config.seed, ORDER, epoch))
        rows = [rows[i] for i in rng.permutation(len(rows))]
        return self._pooled(rows, rng) if self.config.regenerate_each_epoch else rows

    def _pooled(
        self, rows: list[TokenizedExample], rng: np.random.Generator
    ) -> list[TokenizedExample]:
        """The same rows with those of like length in one batch, so that less is padding: sorted
        within pools of POOL batches, and the pool's batches shuffled."""
        size, pool = self.config.batch_size, self.config.batch_size * POOL
        batches = []
        for start in range(0, len(rows), pool):
            part = sorted(rows[start : start + pool], key=lambda row: len(row.question))
            parts = [part[i : i + size] for i in range(0, len(part), size)]
            full = [p for p in parts if len(p) == size]  # a short one stays last
            batches += [full[i] for i in rng.permutation(len(full))] + parts[len(full) :]
        return [row for batch in batches for row in batch]

    def _signatures(self, rows: list[Example]) -> frozenset[bytes]:
        """Of those rows that are the task's: a file to validate on may hold any."""
        found = set()
        for row in rows:
            with suppress(UserError):
                found.add(self.task.module.graph_hash(row))
        return frozenset(found)

    def _generate(self, epoch: int) -> list[Example]:
        """train_examples rows: plain ones, without the shortcut, and with fewer steps."""
        c = self.config
        plain, matched, *_ = self.task.splits.values()
        n_matched = round(c.matched_fraction * c.train_examples)
        shorter = self.task.easier_configs(c)
        n_short = round(c.short_fraction * c.train_examples) if shorter else 0
        n_each = [len(part) for part in np.array_split(range(n_short), max(1, len(shorter)))]
        kinds = [
            (c.train_examples - n_matched - n_short, plain(c)),
            (n_matched, matched(c)),
            *zip(n_each, shorter, strict=False),
        ]
        rows: list[Example] = []
        for i, (n, kind) in enumerate(kinds):
            if n:
                seed = (c.seed, TRAIN, epoch, i)
                rows += self.task.module.generate(n, seed, kind, self.exclude)
        return rows

    def encode(self, rows: list[Example]) -> list[TokenizedExample]:
        """Rows in tokens. UserError names the first that does not fit into block_size."""
        return [row for _, row in self._fitting(rows)]

    def drop_too_long(self, rows: list[Example]) -> list[Example]:
        """Those rows that fit into block_size; see encode."""
        return [row for row, _ in self._fitting(rows)]

    def _fitting(self, rows: list[Example]) -> list[tuple[Example, TokenizedExample]]:
        fit, wrong = [], ""
        for i, row in enumerate(self.task.render(rows, self.config.render)):
            try:
                encoded = tokenize(self.tokenizer, row)
                need = max_length(self.curriculum, encoded, self.tokenizer)
                if need <= self.config.block_size:
                    fit.append((rows[i], encoded))
                    continue
                wrong = (
                    f"row {i} needs {need} positions with its thoughts, "
                    f"block_size={self.config.block_size}: {rows[i]['question'][:30]!r}...\n"
                    "Use a longer --block_size or shorter rows."
                )
            except UserError as e:  # a special token written out
                wrong = f"row {i}, {rows[i]['question'][:30]!r}...: {e}"
            if self.skipped is None:
                raise UserError(wrong)
            self.skipped.append(wrong.split("\n")[0])
        if not fit:
            raise UserError(f"no row can be used, the last: {wrong}")
        return fit
