"""Batched inference: prefill the prompts, append n thoughts to the KV cache, generate tokens.

The steps are those of steps.py, in place over static memory. On a GPU the prefill, the whole chain
of thoughts and each token are one CUDA graph each.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import le
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanococonut.batch import build_prompt
from nanococonut.config import TrainConfig
from nanococonut.curriculum import Curriculum
from nanococonut.data.tasks import TASKS
from nanococonut.inference.branch import Branch
from nanococonut.inference.buffers import BatchView, StaticBuffers
from nanococonut.inference.steps import Edit
from nanococonut.model import GPT
from nanococonut.ops import choose_backend, choose_graph
from nanococonut.packed import PackedGPT
from nanococonut.runtime.cli import make_config
from nanococonut.runtime.device import select_device
from nanococonut.runtime.errors import UserError
from nanococonut.runtime.graphs import GraphCache, round_up
from nanococonut.tokenizer import Tokenizer
from nanococonut.weights import checkpoint

MIN_TEMPERATURE = 1e-6  # greedy below
MAX_GRAPHS = 24  # over all batch sizes and lengths


@dataclass
class Generation:
    """What was generated for a batch of B prompts.

    tokens         of each, without eos
    thoughts       (B, n, C) hidden states before model.thought_embedding
    inputs         (B, n, C) what was fed back: model.thought_embedding of them, after any edit
    n_thoughts     of each: n, or fewer if the stop classifier ended them
    seconds_first  from the start to the first token, prefill and thoughts included
    text           the tokens as text (only from Engine.generate)
    """

    tokens: list[list[int]]
    thoughts: Tensor
    inputs: Tensor
    n_thoughts: list[int]
    seconds_prefill: float
    seconds_thoughts: float
    seconds_first: float
    seconds_decode: float
    text: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.seconds_first + self.seconds_decode


@dataclass(frozen=True)
class Request:
    """A batch of B prompts for Engine.run. Raise ValueError if it makes no sense.

    prefixes        tokens of each prompt
    n_thoughts      of each sequence; with `stop`, at most these many
    forced_tokens   appended after the thoughts, before the first generated token
    eos             ends a sequence (-1: nothing does)
    stop            a sequence takes no further thought once the stop classifier says so
    temperature     below MIN_TEMPERATURE: greedy; else tokens are sampled by `seed`
    edit            as in Engine.generate; only without kernels and graph
    """

    prefixes: list[list[int]]
    n_thoughts: int
    forced_tokens: list[int]
    eos: int
    max_new_tokens: int
    stop: bool = False
    temperature: float = 0.0
    seed: int = 0
    edit: Edit | None = None

    def __post_init__(self) -> None:
        if not self.prefixes or not all(self.prefixes):
            raise ValueError("prefixes: expected at least one, none of them empty")
        if self.n_thoughts < 0 or self.max_new_tokens < 1:
            raise ValueError("expected n_thoughts >= 0 and max_new_tokens >= 1")
        if not self.temperature >= 0:  # NaN too
            raise ValueError(f"temperature: expected 0 (greedy) or more, got {self.temperature}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE  # logits over it would overflow

    def size(self) -> tuple[int, int, int]:
        """Return (sequences, tokens of the longest prefix, positions of the longest sequence)."""
        longest = max(map(len, self.prefixes))
        n_new = self.n_thoughts + len(self.forced_tokens) + self.max_new_tokens
        return len(self.prefixes), longest, longest + n_new


class Engine:
    """A model ready to generate. It keeps its memory and CUDA graphs from call to call.

    Several threads may call it: a lock makes them take turns.

    curriculum  decides the token layout of a prompt (None: Coconut's)
    kernels     "auto", "triton", "packed" or "torch", see ops.choose_backend
    graph       "auto", "on" or "off", see ops.choose_graph
    render      question -> prompt text as in training (None: questions are prompts already)
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer | None = None,
        curriculum: Curriculum | None = None,
        kernels: str = "auto",
        graph: str = "auto",
        render: Callable[[str], str] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.render = model, tokenizer, render
        self.curriculum = curriculum or Curriculum("coconut")
        self.config: TrainConfig | None = None  # of the run that trained the model
        self.manifest: dict[str, Any] = {}  # of its checkpoint
        self.kernels, self.reason = choose_backend(kernels, model)
        self.graphs = GraphCache(MAX_GRAPHS if choose_graph(graph, model) else 0)
        self._packed: PackedGPT | None = None
        self._buffers: StaticBuffers | None = None
        self._views: dict[tuple[int, int], BatchView] = {}
        self._captured_weights: list[tuple] = []  # address, dtype and version of each
        self._generator = torch.Generator()  # of the call that holds the lock
        self._lock, self._holder = threading.Lock(), 0  # the holder is a thread's number

    @classmethod
    def from_config(
        cls, model: GPT, tokenizer: Tokenizer, config: TrainConfig, **kwargs: Any
    ) -> "Engine":
        """Return an Engine that writes its prompts as the run with this config does."""
        render = partial(TASKS[config.task].render_question, style=config.render)
        curriculum = Curriculum.from_config(config)
        engine = cls(model, tokenizer, curriculum, render=render, **kwargs)
        engine.config = config
        return engine

    @property
    def graph(self) -> bool:
        """Whether steps are replayed from CUDA graphs."""
        return self.graphs.max_graphs > 0

    def memory(self) -> dict[str, int]:
        """Return the number of graphs, and the bytes of them, of all buffers and packed weights."""
        buffers = self._buffers
        return {
            "cache": buffers.cache.nbytes if buffers else 0,
            "buffers": buffers.bytes - buffers.cache.nbytes if buffers else 0,
            "graphs": len(self.graphs.graphs),
            "graph_bytes": self.graphs.bytes,
            "packed": self._packed.nbytes if self._packed else 0,
        }

    def generate(
        self,
        questions: Sequence[str],
        latent: int,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        edit: Edit | None = None,
    ) -> Generation:
        """Answer a batch of questions. Raise UserError if one does not fit in block_size.

        latent          thoughts (or pauses) of each; with a stop classifier, at most these many
        max_new_tokens  reduced to what fits in block_size
        temperature     0: greedy; otherwise tokens are sampled by `seed`
        edit            (i, fed) -> the (B, C) to use in place of `fed`, the input that is thought
                        i of each question, in their order. Steps are then plain torch, no graph
        """
        if edit is not None:
            self._check_editable(latent)
            if self.graph or self.kernels != "torch":
                plain = Engine(self.model, self.tokenizer, self.curriculum, "torch", "off",
                               self.render)  # fmt: skip
                return plain.generate(questions, latent, max_new_tokens, temperature, seed, edit)
        prefixes, n_thoughts, forced = self._prompts(questions, latent)
        available = self._available(prefixes, forced, n_thoughts)
        tokenizer = self.tokenizer
        request = Request(
            prefixes, n_thoughts, forced, tokenizer.eos, min(max_new_tokens, available),
            self.model.config.stop, temperature, seed, edit,
        )  # fmt: skip
        out = self.run(request)
        out.text = [tokenizer.decode(tokens) for tokens in out.tokens]
        return out

    def choose(
        self,
        questions: Sequence[str],
        candidates: Sequence[Sequence[str]],
        latent: int,
        edit: Edit | None = None,
        mark: str = "###",
    ) -> Tensor:
        """Return the log-probability of each candidate answer, (B, m): the answer is forced.

        The mark and the candidate follow the thoughts at once; no step is written between. A stop
        classifier is not asked.

        candidates  m answers of each question, as the model writes them
        latent      thoughts (or pauses) of each
        edit        as in generate
        """
        if edit is not None:
            self._check_editable(latent)
        with self._eval_mode():
            branch = self.branch(questions, candidates, latent, mark)
            branch.think(latent, edit)
            return branch.answer()

    def branch(
        self,
        questions: Sequence[str],
        candidates: Sequence[Sequence[str]],
        n_slots: int,
        mark: str = "###",
    ) -> Branch:
        """Return a Branch that has read the questions; the model must be in eval mode.

        candidates, mark  as in choose
        n_slots     most thoughts (or pauses, or other tokens) between question and answer
        """
        prefixes, _, forced = self._prompts(questions, 0)
        tokenizer, marked = self.tokenizer, self.tokenizer.encode(mark)
        answers = [
            [tokenizer.encode(f"{mark} {answer}")[len(marked) :] for answer in row]
            for row in candidates
        ]
        forced = [*forced, *marked]
        longest = max(len(tokens) for row in answers for tokens in row)
        self._available(prefixes, forced, n_slots + longest - 1)
        pause = tokenizer.latent if self.curriculum.rules.thought_type == "pause" else None
        return Branch(self.model, prefixes, n_slots, forced, answers, pause)

    def _prompts(
        self, questions: Sequence[str], latent: int
    ) -> tuple[list[list[int]], int, list[int]]:
        """Return (prefixes, latent steps of each, tokens forced after them)."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise ValueError("generate needs Engine(model, tokenizer); run takes tokens")
        if isinstance(questions, str) or not questions:
            raise ValueError("generate needs a list of at least one question")
        prompts = [
            build_prompt(self.curriculum, tokenizer.encode(text), latent, tokenizer)
            for text in (map(self.render, questions) if self.render else questions)
        ]
        prefixes, (n_thoughts, *_), (forced, *_) = (list(x) for x in zip(*prompts, strict=True))
        return prefixes, n_thoughts, forced

    def _available(self, prefixes: list[list[int]], forced: list[int], n_thoughts: int) -> int:
        """Return how many tokens can follow thoughts and forced tokens. UserError if none can, or
        if the model has no special tokens: on a GPU, the process would die."""
        block_size, longest = self.model.config.block_size, max(map(len, prefixes))
        # special tokens end a prefix or are forced
        if max(p[-1] for p in [*prefixes, forced or [0]]) >= self.model.config.vocab_size:
            raise UserError(
                "the model has no tokens for thoughts, as its method uses none.\n"
                "Ask it by the method it was trained by, or give a run trained with thoughts."
            )
        n_forced = n_thoughts + len(forced)
        if block_size - longest - n_forced < 1:
            raise UserError(
                f"a question of {longest} tokens with {n_forced} thoughts and marks does not fit "
                f"into the model's block_size={block_size}.\n"
                "Ask a shorter question or use fewer thoughts."
            )
        return block_size - longest - n_forced

    def _check_editable(self, latent: int) -> None:
        """Raise UserError if there is no thought that `edit` could change."""
        if latent < 1 or self.curriculum.rules.thought_type == "pause":
            raise UserError(
                "edit: there are no thoughts to edit; pauses are tokens.\n"
                "Use latent=1 or more. For pauses: Engine.branch, whose slots can be exchanged."
            )

    @contextmanager
    def _eval_mode(self) -> Iterator[None]:
        """Hold the lock and keep the model in eval mode: calls share both."""
        if self._holder == threading.get_ident():  # it would wait for itself
            raise UserError("edit: it asks the engine that calls it.\nGive it one of its own.")
        with self._lock:
            training, self._holder = self.model.training, threading.get_ident()
            self.model.eval()
            try:
                yield
            finally:
                self._holder = 0
                self.model.train(training)

    @torch.no_grad()
    def run(self, request: Request) -> Generation:
        """Generate from tokens. Raise ValueError or UserError before any work that cannot fit."""
        available = self._available(request.prefixes, request.forced_tokens, request.n_thoughts)
        if request.max_new_tokens > available:
            raise ValueError(
                f"max_new_tokens={request.max_new_tokens}, but block_size="
                f"{self.model.config.block_size} leaves room for {available}"
            )
        if request.edit is not None and (self.graph or self.kernels != "torch"):
            raise ValueError("edit needs Engine(kernels='torch', graph='off'), or generate")
        with self._eval_mode():  # calls share the buffers, too
            is_packed = self.kernels == "packed"  # only copies care for changes in place
            weights = self.model.parameters()
            key = [(p.data_ptr(), p.dtype, p._version if is_packed else 0) for p in weights]
            if key != self._captured_weights:
                self._reset()  # weights changed: graphs and packed copies hold the old ones
                self._captured_weights = key
                self._packed = PackedGPT(self.model) if is_packed else None
            return self._generate(request)

    def _generate(self, request: Request) -> Generation:
        self._generator = torch.Generator(self.model.wte.weight.device).manual_seed(request.seed)
        start = self._now()
        view = self._prefill(request)
        prefilled = self._now()
        thoughts, inputs = self._append_thoughts(view, request)
        n_thoughts = view.n_taken[: len(thoughts)].tolist()
        thought = self._now()
        for i, token in enumerate(request.forced_tokens):
            if i:
                view.decode_step()
            view.token.fill_(token)
        self._next_token(view, request, decode=bool(request.forced_tokens))
        first = self._now()
        self._other_tokens(view, request)
        times = (prefilled - start, thought - prefilled, first - start, self._now() - first)
        eos, B = request.eos, len(request.prefixes)
        tokens = self._buffers.tokens[:B, : request.max_new_tokens].tolist()
        tokens = [ids[: ids.index(eos)] if eos in ids else ids for ids in tokens]
        return Generation(tokens, thoughts, inputs, n_thoughts, *times)

    def _now(self) -> float:
        if self.model.wte.weight.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _prefill(self, request: Request) -> BatchView:
        """Return a batch with the prefixes in its cache and no thoughts yet."""
        block_size, (B, width, capacity) = self.model.config.block_size, request.size()
        batch = self._batch_size(B)
        if self.graph:
            width, capacity = (
                min(round_up(n, m), block_size) for n, m in ((width, 64), (capacity, 128))
            )
        view = self._view(batch, capacity, width, request.n_thoughts)
        buffers, extra = self._buffers, batch - B
        # extra sequences fill the batch: one token, no thoughts, done from the start
        padded = [p + [0] * (width - len(p)) for p in request.prefixes] + [[0] * width] * extra
        idx = buffers.idx[: batch * width].view(batch, width)
        idx.copy_(torch.tensor(padded))
        view.cache.lengths.copy_(torch.tensor([*map(len, request.prefixes), *[1] * extra]))
        view.active.copy_(torch.arange(batch, device=idx.device) < B)
        view.done.copy_(~view.active)
        view.n_taken.zero_()
        view.place.copy_(torch.arange(batch, device=idx.device))
        buffers.tokens.fill_(request.eos)
        buffers.n_tokens.zero_()
        buffers.temperature.fill_(1.0 if request.is_greedy else request.temperature)
        self.graphs.run(("prefill", batch, capacity, width), partial(view.prefill, idx))
        return view

    def _append_thoughts(self, view: BatchView, request: Request) -> tuple[Tensor, Tensor]:
        """Append the thoughts. Return (their hidden states, what was fed back), (B, n, C) each."""
        n, stop, model = request.n_thoughts, request.stop, self.model
        edited: list[Tensor] = []

        def chain() -> None:
            for i in range(n):
                view.latent_step(i, stop)

        if n and self.graph:
            self.graphs.run(("thoughts", view.batch, view.capacity, n, stop), chain)
        else:
            for i in range(n):
                # without a graph the chain ends as soon as every sequence has stopped
                if stop and not (view.active & (model.stop_logit(view.hidden) <= 0)).any():
                    n = i
                    break
                view.latent_step(i, stop, request.edit)
                if request.edit:
                    edited.append(view.prev_embedding.clone())
        thoughts = self._buffers.thoughts[:n, : len(request.prefixes)].transpose(0, 1).clone()
        return thoughts, torch.stack(edited, 1) if edited else model.thought_embedding(thoughts)

    def _next_token(self, view: BatchView, request: Request, decode: bool = True) -> None:
        """Append the last token (if `decode`), then choose the next one."""
        eos, greedy = request.eos, request.is_greedy

        def step() -> None:
            if decode:
                view.decode_step()
            view.sample(eos, greedy)

        if not greedy:  # drawn outside of the graph
            view.noise.exponential_(generator=self._generator)
        self.graphs.run(("token", view.batch, view.capacity, decode, eos, greedy), step)

    def _other_tokens(self, view: BatchView, request: Request) -> None:
        """Generate the rest. Once half of the batch is finished, the others go on alone."""
        interval = 4 if view.done.device.type == "cuda" else 1  # tokens between checks, which sync
        for i in range(request.max_new_tokens - 1):
            if i % interval == 0:
                n_unfinished = int((~view.done).sum())
                if n_unfinished == 0:
                    return
                batch = self._batch_size(n_unfinished)
                if 2 * batch <= view.batch:
                    view = self._shrink(view, batch)
            self._next_token(view, request)

    def _shrink(self, old: BatchView, batch: int) -> BatchView:
        """Return a smaller batch of all unfinished sequences, filled up with finished ones."""
        new, order = self._view(batch, old.capacity), old.done.int().argsort(stable=True)[:batch]
        # indexing copies, since old and new share their memory
        new.cache.data.copy_(old.cache.data[:, :, order])
        new.cache.lengths.copy_(old.cache.lengths[order])
        for name in ("hidden", "prev_embedding", "token", "place", "done"):
            getattr(new, name).copy_(getattr(old, name)[order])
        new.span = old.span
        return new

    def _batch_size(self, n: int) -> int:
        """Return the sequences of a batch that holds n: graphs need few shapes."""
        return 1 << (n - 1).bit_length() if self.graph else n

    def _view(self, batch: int, capacity: int, width: int = 0, n_thoughts: int = 0) -> BatchView:
        """Return the view of this shape. Growing the buffers invalidates every captured graph."""
        c = self.model.config
        size = (batch, batch * capacity * 2 * c.n_layer * c.n_embd, batch * width, n_thoughts)
        old_size = self._buffers.size if self._buffers else (0, 0, 0, 0)
        if not all(map(le, size, old_size)):
            self._reset()  # frees the old buffers before the new ones are allocated
            self._buffers = StaticBuffers(self.model, *map(max, size, old_size))
        shape = (batch, capacity)
        if shape in self._views:
            return self._views[shape]
        model = self._packed or self.model
        view = BatchView(model, self._buffers, shape, self.kernels, static=self.graph)
        if self.graph:  # rounded shapes are few
            self._views[shape] = view
        return view

    def _reset(self) -> None:
        """Drop buffers, views and graphs."""
        self._buffers, self._views = None, {}
        self.graphs.clear()


def load(
    path: str | Path = checkpoint.BUNDLED,
    device: str = "auto",
    kernels: str = "auto",
    graph: str = "auto",
    dtype: torch.dtype = torch.float32,
) -> Engine:
    """Return an Engine for a checkpoint, or for the best one of a run.

    It renders its own prompts. Its .config and .manifest are those of the run.
    """
    model, tokenizer, manifest = checkpoint.load(path, select_device(device))
    model = model.to(dtype)
    config = make_config(TrainConfig, manifest["config"])
    engine = Engine.from_config(model, tokenizer, config, kernels=kernels, graph=graph)
    engine.manifest = manifest
    return engine
