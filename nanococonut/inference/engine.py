"""Inference: a question is read once, n thoughts are appended to its cache, words come out.

All rows are kept in one right-padded batch (steps.py), in memory that is kept from batch to batch
and never moves: so on a GPU reading a question, its whole chain of thoughts and every further word
are each one CUDA graph.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import le

import torch
from torch import Tensor

from nanococonut.batch import build_prompt
from nanococonut.curriculum import Curriculum
from nanococonut.inference.buffers import BatchView, StaticBuffers
from nanococonut.model import GPT
from nanococonut.ops import choose_backend, choose_graph
from nanococonut.runtime.errors import UserError
from nanococonut.runtime.graphs import GraphCache, round_up
from nanococonut.tokenizer import Tokenizer


@dataclass
class Generation:
    """tokens: of each row, without eos; text: the same in words (Engine.generate). thoughts: (B, n,
    C), the hidden states that were fed back; n_thoughts: how many of them each row had (all n, or
    until its classifier said enough). Times in seconds; seconds_first: from the start to the first
    word."""

    tokens: list[list[int]]
    thoughts: Tensor
    n_thoughts: list[int]
    seconds_prefill: float
    seconds_thoughts: float
    seconds_first: float
    seconds_decode: float
    text: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.seconds_first + self.seconds_decode


class Engine:
    """A model that answers, batch after batch.

        engine = Engine(model, tokenizer)
        out = engine.generate(["Tom is a ..."], latent=6)
        out.text, out.tokens, out.thoughts, out.seconds

    curriculum: the method's layout of a question (default: Coconut's). kernels, graph: "auto", or
    what is asked for, as ops.choose and ops.choose_graph say (UserError where it cannot run).
    max_graphs: CUDA graphs kept, of all batch sizes and lengths.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer | None = None,
        curriculum: Curriculum | None = None,
        kernels: str = "auto",
        graph: str = "auto",
        max_graphs: int = 24,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.curriculum = curriculum or Curriculum("coconut")
        self.kernels, self.reason = choose_backend(kernels, model)
        self.graphs = GraphCache(max_graphs) if choose_graph(graph, model) else None
        self._forget()

    def _forget(self) -> None:
        self._memory: StaticBuffers | None = None
        self._slots: dict[tuple[int, int], BatchView] = {}
        if self.graphs is not None:
            self.graphs = type(self.graphs)(self.graphs.max_graphs)
        self._weights = self._where()

    @property
    def graph(self) -> bool:
        """Whether steps are replayed from CUDA graphs."""
        return self.graphs is not None

    def _where(self) -> tuple:
        return tuple((p.data_ptr(), p.dtype) for p in self.model.parameters())

    def memory(self) -> dict[str, int]:
        """Bytes: of the cache and what else steps write to, and of captured graphs beside it."""
        return {
            "cache": self._memory.cache.nbytes if self._memory else 0,
            "buffers": self._memory.bytes - self._memory.cache.nbytes if self._memory else 0,
            "graphs": len(self.graphs.graphs) if self.graphs else 0,
            "graph_bytes": self.graphs.bytes if self.graphs else 0,
        }

    def generate(
        self,
        questions: Sequence[str],
        latent: int,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Generation:
        """Answers to a batch of rendered questions, in the layout the method was trained in:
        greedy, or drawn at a temperature by the seed.

        latent: thoughts (or pauses). A model with a classifier that stops them has no more than
        these. max_new_tokens is cut to what block_size leaves. UserError where it leaves nothing.
        """
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise ValueError("generate needs Engine(model, tokenizer); run takes tokens")
        if isinstance(questions, str) or not questions:
            raise ValueError("generate needs a list of at least one question")
        asked = [
            build_prompt(self.curriculum, tokenizer.encode(q), latent, tokenizer) for q in questions
        ]
        prefixes, (n_thoughts, *_), (opening, *_) = (list(x) for x in zip(*asked, strict=True))
        longest = max(map(len, prefixes))
        room = self.model.config.block_size - longest - n_thoughts - len(opening)
        if room < 1:
            raise UserError(
                f"a question of {longest} tokens with {n_thoughts} thoughts does not fit into the "
                f"model's block_size={self.model.config.block_size}.\nAsk a shorter question or "
                "use fewer thoughts."
            )
        most = min(max_new_tokens, room)
        stop = self.model.config.stop
        out = self.run(prefixes, n_thoughts, opening, tokenizer.eos, most, stop, temperature, seed)
        out.text = [tokenizer.decode(tokens) for tokens in out.tokens]
        return out

    @torch.no_grad()
    def run(
        self,
        prefixes: list[list[int]],
        n_thoughts: int,
        opening: list[int],
        eos: int,
        max_new_tokens: int,
        stop: bool = False,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Generation:
        """Answers to a batch of token prefixes, greedy or (temperature > 0) sampled.

        stop: a row has no further thought once the model's classifier says enough (n_thoughts at
        most). seed: of a generator of this call's own. Rows that have said eos leave the batch once
        they are half of it, so they cost nothing more. opening: tokens put behind the thoughts
        before the first word is asked for ([<eot>] or []). Raises ValueError, before any work,
        where a row would not fit into block_size.
        """
        model, longest = self.model, max(map(len, prefixes))
        block_size = model.config.block_size
        capacity = longest + n_thoughts + len(opening) + max_new_tokens
        if min(map(len, prefixes)) == 0 or n_thoughts < 0 or max_new_tokens < 1:
            raise ValueError("prefixes must not be empty, n_thoughts >= 0, max_new_tokens >= 1")
        if not temperature >= 0:
            raise ValueError(f"temperature={temperature} has to be 0 (greedy) or more")
        if capacity > block_size:
            raise ValueError(
                f"{longest} tokens + {n_thoughts} thoughts + {len(opening)} + {max_new_tokens} new "
                f"tokens do not fit into block_size={block_size}"
            )
        if self._where() != self._weights:  # moved: what was captured reads the old ones
            self._forget()
        training = model.training
        model.eval()
        try:
            return self._answer(
                prefixes,
                capacity,
                n_thoughts,
                opening,
                eos,
                max_new_tokens,
                stop,
                temperature,
                seed,
            )
        finally:
            model.train(training)

    def _answer(
        self,
        prefixes: list[list[int]],
        capacity: int,
        n_thoughts: int,
        opening: list[int],
        eos: int,
        max_new_tokens: int,
        stop: bool,
        temperature: float,
        seed: int,
    ) -> Generation:
        model, device = self.model, self.model.wte.weight.device
        block_size = model.config.block_size
        B, longest = len(prefixes), max(map(len, prefixes))
        rows, width = B, longest
        if self.graph:  # few shapes, so few graphs
            rows = 1 << (B - 1).bit_length()
            width, capacity = (
                min(round_up(n, m), block_size) for n, m in ((longest, 64), (capacity, 128))
            )

        def now() -> float:
            if device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter()

        start = now()
        self._make_room(rows, capacity, width, n_thoughts)
        m, slots = self._memory, self._at(rows, capacity)
        # rows that only fill up the graph's batch: one token, no thoughts, done at once
        filled = [p + [0] * (width - len(p)) for p in prefixes] + [[0] * width] * (rows - B)
        idx = m.idx[: rows * width].view(rows, width)
        idx.copy_(torch.tensor(filled))
        slots.cache.lengths.copy_(torch.tensor([*map(len, prefixes), *[1] * (rows - B)]))
        real = torch.arange(rows, device=device) < B
        slots.active.copy_(real)
        slots.done.copy_(~real)
        slots.had.zero_()
        slots.words.fill_(eos)
        m.column.zero_()
        m.temperature.fill_(temperature or 1.0)
        self._play(("read", rows, capacity, width), partial(slots.read, idx))

        prefilled = now()
        if self.graph and n_thoughts:

            def chain() -> None:
                for i in range(n_thoughts):
                    slots.think(i, stop)

            self._play(("think", rows, capacity, n_thoughts, stop), chain)
            thoughts = n_thoughts
        else:
            thoughts = 0
            while thoughts < n_thoughts:
                if stop and not (slots.active & (model.stop_logit(slots.hidden) <= 0)).any():
                    break
                slots.think(thoughts, stop)
                thoughts += 1
        kept = m.thoughts[:thoughts, :B].transpose(0, 1).clone()
        had = slots.had[:B].tolist()

        thought = now()
        sampled, draw = temperature > 0, torch.Generator(device).manual_seed(seed)

        def word(slots: BatchView, taken: bool = True) -> None:
            """Say the next word; taken: the last one is read first."""

            def both() -> None:
                if taken:
                    slots.take()
                slots.pick(eos, sampled)

            if sampled:
                slots.noise.exponential_(generator=draw)
            self._play(("word", slots.rows, capacity, taken, eos, sampled), both)

        for i, token in enumerate(opening):
            slots.token.fill_(token)
            if i < len(opening) - 1:
                slots.take()
        word(slots, taken=bool(opening))
        first = now()
        words = torch.full((B, max_new_tokens), eos, device=device)
        left = torch.arange(B, device=device)  # of each row in the batch, which it is
        every = 4 if device.type == "cuda" else 1  # tokens between two looks at who is done
        for i in range(1, max_new_tokens):
            if (i - 1) % every == 0:
                alive = (~slots.done).nonzero()[:, 0]
                if not len(alive):
                    break
                fewer = 1 << (len(alive) - 1).bit_length() if self.graph else len(alive)
                if 2 * fewer <= slots.rows:
                    words[left] = slots.words[: len(left), :max_new_tokens]
                    left = left[alive]
                    slots = self._shrink(slots, alive, fewer, capacity)
            word(slots)
        words[left] = slots.words[: len(left), :max_new_tokens]
        end = now()

        tokens = [row[: row.index(eos)] if eos in row else row for row in words.tolist()]
        times = (prefilled - start, thought - prefilled, first - start, end - first)
        return Generation(tokens, kept, had, *times)

    def _make_room(self, rows: int, capacity: int, width: int, thoughts: int) -> None:
        """Grow the static buffers to fit this batch. Growing invalidates every captured graph."""
        c = self.model.config
        need = (rows, rows * capacity * 2 * c.n_layer * c.n_embd, rows * width, thoughts)
        if self._memory is not None:
            have = self._memory.size
            if all(map(le, need, have)):
                return
            need = tuple(map(max, need, have))
            self._forget()  # the old memory goes before the new one comes
        self._memory = StaticBuffers(self.model, *need)

    def _at(self, rows: int, capacity: int) -> BatchView:
        """The batch of this shape. Where shapes are not rounded up they are not kept either."""
        key = (rows, capacity)
        if key in self._slots:
            return self._slots[key]
        span = capacity - 1 if self.graph else None
        slots = BatchView(self.model, self._memory, rows, capacity, self.kernels, span)
        if self.graph:
            self._slots[key] = slots
        return slots

    def _shrink(self, old: BatchView, alive: Tensor, rows: int, capacity: int) -> BatchView:
        """Go on with the rows alive (n,) only, as the first of a batch of so many."""
        new, n = self._at(rows, capacity), len(alive)
        # indexing copies, and it has to: the old and the new rows lie in the same memory
        kept = old.cache.data[:, :, alive]
        new.cache.data[:, :, :n] = kept
        for t in ("hidden", "prev", "token", "words", "done"):
            getattr(new, t)[:n] = getattr(old, t)[alive]
        new.cache.lengths[:n] = old.cache.lengths[alive]
        new.done[n:] = True
        new.cache.lengths[n:] = 1
        new.span = old.span
        return new

    def _play(self, key: tuple, work: Callable[[], None]) -> None:
        """Do the work: as it is, or by its CUDA graph."""
        if self.graphs is None:
            work()
        else:
            self.graphs.run(key, work, self._memory.small())
