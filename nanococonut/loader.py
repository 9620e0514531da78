"""Rows for training: made or read, tokenised, an epoch ahead of the loop.

What an epoch holds depends on the seed and its number only, never on timing or on what came before
it, so a run resumed in any epoch sees the same rows in the same order.
"""

import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import numpy as np

from nanococonut.config import TrainConfig
from nanococonut.curriculum import Curriculum, EncodedRow, encode_row, longest
from nanococonut.data import Row
from nanococonut.data.files import read_rows
from nanococonut.errors import UserError
from nanococonut.tasks import TASKS
from nanococonut.tokenizer import Tokenizer

TRAIN, VALID, MATCHED, ORDER, DRAWS = range(5)  # streams of one seed, kept apart (see PUBLIC)
POOL = 16  # batches among which rows of like length are put together


def curriculum_of(config: TrainConfig) -> Curriculum:
    return Curriculum(
        config.method,
        config.c_thought,
        config.max_latent_stage,
        config.pad_latent_to_max,
        config.uniform_prob,
        config.final_thoughts,
        config.advance_at > 0,
        config.icot_tokens,
    )


def render_question(config: TrainConfig, question: str) -> str:
    """As a model reads it: with a newline behind it, as in the released code, or compact."""
    if config.render == "compact":
        return TASKS[config.task].module.compact_question(question)
    return question + "\n"


def rendered(config: TrainConfig, rows: Sequence[Row]) -> list[Row]:
    """Rows as a model reads them: sentences with a newline behind the question and each step, or
    the task's compact rendering, which has no need of newlines and is for the task's own rows only
    (UserError)."""
    if config.render == "compact":
        compact = []
        for i, row in enumerate(rows):
            try:
                compact.append(TASKS[config.task].module.compact_row(row))
            except UserError as e:
                raise UserError(
                    f"row {i} cannot be written compactly: {str(e).splitlines()[0]}\n"
                    "Use --render=sentences for rows of your own."
                ) from None
        return compact
    return [
        row
        | {
            "question": render_question(config, row["question"]),
            "steps": [step + "\n" for step in row["steps"]],
        }
        for row in rows
    ]


def task_tokenizer(config: TrainConfig, rows: list[Row] | None) -> Tokenizer:
    """GPT-2's, or words: the task's own, and those of the rows that are trained on."""
    if config.tokenizer == "gpt2":
        return Tokenizer.gpt2()
    text = " ".join(" ".join([r["question"], *r["steps"], r["answer"]]) for r in rows or ())
    return Tokenizer.words(
        [*TASKS[config.task].words(), *re.findall(r"[A-Za-z]+|[0-9]+|[^\sA-Za-z0-9]", text)]
    )


def read_data(
    config: TrainConfig, skipped: list[str] | None = None
) -> tuple[list[Row] | None, dict[str, list[Row]], str | None]:
    """(rows to train on, or None where they are generated; name of a split -> validation rows; the
    commit of those from the hub, or None).

    Of a file without valid_data a tenth, at most valid_rows, is held out. Generated validation rows
    come with those without shortcut. skipped: as in data.files.read_rows.
    """
    task = TASKS[config.task]
    rows, commit = read_rows(config.data, skipped) if config.data else None, None
    if rows is None and task.read:
        rows, commit = task.read("train", config.hub_revision, skipped)
        if not config.valid_data:
            return rows, {"valid": task.read("validation", commit, skipped)[0]}, commit
    if config.valid_data:
        return rows, {"valid": read_rows(config.valid_data, skipped)}, commit
    n = config.valid_rows
    if rows is not None:
        if len(rows) < 2:
            raise UserError(
                f"{config.data} holds one row, so none can be held out for validation.\n"
                "Give more rows, or a --valid_data file."
            )
        n = min(n, max(1, len(rows) // 10))
        order = np.random.default_rng((config.seed, VALID)).permutation(len(rows))
        return [rows[i] for i in order[n:]], {"valid": [rows[i] for i in order[:n]]}, None
    plain, matched, *_ = task.splits.values()
    valid = {
        "valid": task.module.generate(n, (config.seed, VALID), plain(config)),
        "matched": task.module.generate(n, (config.seed, MATCHED), matched(config)),
    }
    return None, valid, None


class Epochs:
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
        rows: list[Row] | None,
        held_out: list[Row],
        skipped: list[str] | None = None,
    ) -> None:
        self.config, self.curriculum, self.tokenizer = config, curriculum, tokenizer
        # generated rows that do not fit are the settings' fault, not the rows'
        self.task, self.skipped = TASKS[config.task], skipped if rows is not None else None
        self.exclude = self._signatures(held_out) if rows is None else frozenset()
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="rows")
        self.ahead: tuple[int, Future[list[EncodedRow]]] | None = None
        self.fixed: list[EncodedRow] | None = None
        if rows is not None:
            self.fixed = self.encode(rows)
        elif not config.fresh_rows:
            self.fixed = self.encode(self._generate(0))
        self.n_rows = len(self.fixed) if self.fixed else config.rows_per_epoch

    def __call__(self, epoch: int) -> list[EncodedRow]:
        """The epoch's rows in their order."""
        if self.ahead and self.ahead[0] == epoch:
            rows = self.ahead[1].result()
        else:
            rows = self._make(epoch)
        self.ahead = (epoch + 1, self.worker.submit(self._make, epoch + 1))
        return rows

    def close(self) -> None:
        self.worker.shutdown(wait=False, cancel_futures=True)

    def _make(self, epoch: int) -> list[EncodedRow]:
        rows = self.fixed or self.encode(self._generate(epoch))
        rng = np.random.default_rng((self.config.seed, ORDER, epoch))
        rows = [rows[i] for i in rng.permutation(len(rows))]
        return self._pooled(rows, rng) if self.config.fresh_rows else rows

    def _pooled(self, rows: list[EncodedRow], rng: np.random.Generator) -> list[EncodedRow]:
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

    def _signatures(self, rows: list[Row]) -> frozenset[bytes]:
        """Of those rows that are the task's: a file to validate on may hold any."""
        found = set()
        for row in rows:
            with suppress(UserError):
                found.add(self.task.module.signature(row))
        return frozenset(found)

    def _generate(self, epoch: int) -> list[Row]:
        """rows_per_epoch rows: plain ones, without the shortcut, and with fewer steps."""
        c = self.config
        plain, matched, *_ = self.task.splits.values()
        n_matched = round(c.matched_share * c.rows_per_epoch)
        shorter = self.task.shorter(c)
        n_short = round(c.short_share * c.rows_per_epoch) if shorter else 0
        n_each = [len(part) for part in np.array_split(range(n_short), max(1, len(shorter)))]
        kinds = [
            (c.rows_per_epoch - n_matched - n_short, plain(c)),
            (n_matched, matched(c)),
            *zip(n_each, shorter, strict=False),
        ]
        rows: list[Row] = []
        for i, (n, kind) in enumerate(kinds):
            if n:
                seed = (c.seed, TRAIN, epoch, i)
                rows += self.task.module.generate(n, seed, kind, self.exclude)
        return rows

    def encode(self, rows: list[Row]) -> list[EncodedRow]:
        """Rows in tokens. UserError names the first that does not fit into block_size."""
        return [row for _, row in self._fitting(rows)]

    def fitting(self, rows: list[Row]) -> list[Row]:
        """Those rows that fit into block_size; see encode."""
        return [row for row, _ in self._fitting(rows)]

    def _fitting(self, rows: list[Row]) -> list[tuple[Row, EncodedRow]]:
        fit, wrong = [], ""
        for i, row in enumerate(rendered(self.config, rows)):
            try:
                encoded = encode_row(self.tokenizer, row)
                need = longest(self.curriculum, encoded, self.tokenizer)
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
