"""Batched inference: prefill the prompts, append n thoughts to the KV cache, generate tokens.

The steps of steps.py run in place on static buffers (see buffers.py). On a GPU the prefill, the
chain of thoughts and each token step are one CUDA graph each.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanococonut.batch import build_prompt, pad_lists
from nanococonut.config import TrainConfig
from nanococonut.curriculum import Curriculum
from nanococonut.data.tasks import TASKS
from nanococonut.inference.branch import Branch
from nanococonut.inference.buffers import BatchView, StaticBuffers
from nanococonut.inference.steps import Edit, without_grad
from nanococonut.model import GPT
from nanococonut.ops import choose_backend, choose_graph
from nanococonut.packed import PackedGPT, fingerprint
from nanococonut.runtime.cli import make_config
from nanococonut.runtime.device import now, select_device
from nanococonut.runtime.errors import UserError
from nanococonut.runtime.graphs import GraphCache, round_up
from nanococonut.tokenizer import Tokenizer
from nanococonut.weights import checkpoint

MIN_TEMPERATURE = 1e-6  # below: greedy, since logits / temperature would overflow
MAX_GRAPHS = 24  # for all batch sizes and lengths together


@dataclass
class Generation:
    """The output for a batch of B prompts.

    tokens         generated tokens of each prompt, without eos
    thoughts       (B, n, C) hidden states, before model.thought_embedding and any edit
    n_thoughts     thoughts of each prompt: n, or fewer if the stop classifier ended them; the last
                   hidden state is then repeated in `thoughts`
    seconds_first  time from the start of the request to the first token, including prefill and
                   thoughts; prefill includes the check whether the weights have changed
    text           the tokens as text (only from Engine.generate)
    """

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


@dataclass(frozen=True)
class Request:
    """A batch of B tokenized prompts for Engine.run. Raise ValueError if a field is invalid.

    prefixes        tokens of each prompt
    n_thoughts      thoughts of each sequence; with `stop`, their maximum
    forced_tokens   appended after the thoughts, before the first generated token
    eos             token that ends a sequence (-1: none)
    stop            let the stop classifier end the thoughts of each sequence
    temperature     below MIN_TEMPERATURE: greedy; otherwise tokens are sampled with `seed`
    edit            as in Engine.generate
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
            raise ValueError("prefixes: expected at least one prompt, and none of them empty")
        if self.n_thoughts < 0 or self.max_new_tokens < 1:
            raise ValueError("expected n_thoughts >= 0 and max_new_tokens >= 1")
        if not self.temperature >= 0:  # NaN too
            raise ValueError(f"temperature: expected 0 (greedy) or more, got {self.temperature}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE


class Engine:
    """Batched generation with a model. Buffers and CUDA graphs are reused across calls.

    Thread-safe: a lock serializes the calls of one engine. Two engines of the same model must not
    run at once while the model is in training mode, because each call puts it in eval mode.

    Weights may change between calls. Replace modules before the first one: kernels and CUDA graphs
    do not notice a later change without new parameters.

    curriculum  determines the token layout of a prompt (None: Coconut's)
    kernels     one of ops.BACKENDS, see ops.choose_backend; choose and branch always run torch
    graph       "auto", "on" or "off", see ops.choose_graph
    render      question -> prompt text, as in training (None: a question is its own prompt)
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
        self.config: TrainConfig | None = None  # of the model's training run
        self.manifest: dict[str, Any] = {}  # of the model's checkpoint
        self.kernels, self.reason = choose_backend(kernels, model)
        self.graphs = GraphCache(MAX_GRAPHS if choose_graph(graph, model) else 0)
        self._packed: PackedGPT | None = None
        self._buffers: StaticBuffers | None = None
        self._views: dict[tuple[int, int], BatchView] = {}
        self._weights_key: list[tuple] = []  # of the weights of the graphs and packed copies
        self._generator = torch.Generator()  # replaced by every call
        self._lock = threading.Lock()
        self._lock_owner: int | None = None  # thread id

    @classmethod
    def from_config(
        cls, model: GPT, tokenizer: Tokenizer, config: TrainConfig, **kwargs: Any
    ) -> "Engine":
        """Return an Engine that formats its prompts as in the training run with this config."""
        render = partial(TASKS[config.task].render_question, style=config.render)
        curriculum = Curriculum.from_config(config)
        engine = cls(model, tokenizer, curriculum, render=render, **kwargs)
        engine.config = config
        return engine

    @property
    def graph(self) -> bool:
        """Return whether steps are replayed from CUDA graphs."""
        return self.graphs.max_graphs > 0

    def memory(self) -> dict[str, int]:
        """Return the bytes held in addition to the weights, by use."""
        buffers, packed = self._buffers, self._packed
        return {
            "cache": buffers.cache.nbytes if buffers else 0,  # keys and values
            "buffers": buffers.nbytes - buffers.cache.nbytes if buffers else 0,
            "graphs": self.graphs.bytes,
            "packed": packed.nbytes if packed else 0,  # copies of the linear layers, on a CPU
        }

    def generate(
        self,
        questions: Sequence[str],
        latent: int | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        edit: Edit | None = None,
    ) -> Generation:
        """Answer a batch of questions. Raise UserError if one does not fit in block_size.

        latent          thoughts (or pauses) per question; with a stop classifier, their maximum.
                        None: as in training, but without pad_latent_to_max, questions of few steps
                        had fewer there (evaluation.accuracy.thoughts_as_trained)
        max_new_tokens  reduced to what fits in block_size
        temperature     0: greedy; otherwise tokens are sampled with `seed`
        edit            (i, fed) -> replacement for `fed`, the (B, C) inputs of thought i, one per
                        question. All steps then run without CUDA graphs.
        """
        if latent is None:
            if "n_thoughts" not in self.manifest:
                raise ValueError("latent: expected a number, as this model has no checkpoint")
            latent = self.manifest["n_thoughts"]
        if edit is not None:
            self._check_editable(latent)
        prefixes, n_thoughts, forced = self._prompts(questions, latent)
        n_new = min(max_new_tokens, self._available(prefixes, forced, n_thoughts))
        eos, stop = self.tokenizer.eos, self.model.config.stop
        out = self.run(
            Request(prefixes, n_thoughts, forced, eos, n_new, stop, temperature, seed, edit)
        )
        out.text = [self.tokenizer.decode(tokens) for tokens in out.tokens]
        return out

    def choose(
        self,
        questions: Sequence[str],
        candidates: Sequence[Sequence[str]],
        latent: int,
        edit: Edit | None = None,
        mark: str = "###",
        is_answer: bool = True,
    ) -> Tensor:
        """Return the log-probability (B, m) of each candidate answer.

        The mark is forced right after the thoughts, so the model writes no reasoning steps. Answers
        end with eos, so "3" is not scored as the start of "3.5". A stop classifier is ignored.

        candidates  m answers per question, in the format that the model generates
        latent      thoughts (or pauses) per question
        edit        as in generate
        is_answer   False: a candidate is only the start of what follows the mark, without eos
        """
        if edit is not None:
            self._check_editable(latent)
        with self._eval_mode():
            branch = self.branch(questions, candidates, latent, mark, is_answer)
            branch.think(latent, edit)
            return branch.answer()

    def branch(
        self,
        questions: Sequence[str],
        candidates: Sequence[Sequence[str]],
        n_slots: int,
        mark: str = "###",
        is_answer: bool = True,
    ) -> Branch:
        """Prefill the questions and return their Branch. The model must be in eval mode.

        candidates, mark, is_answer  as in choose
        n_slots                      maximum thoughts (or pauses, or other tokens) before an answer

        Raise ValueError if n_slots < 0, if the questions have different numbers of candidates, or
        if the model has dropout and is in training mode.
        """
        if n_slots < 0:
            raise ValueError(f"thoughts: expected 0 or more, got {n_slots}")
        if self.model.attn_dropout:
            raise ValueError("the model has dropout and is in training mode: call model.eval()")
        prefixes, _, forced = self._prompts(questions, 0)
        n_answers = {0 if isinstance(x, str) else len(x) for x in candidates}
        if len(candidates) != len(questions) or len(n_answers) != 1 or 0 in n_answers:
            raise ValueError(
                "candidates: expected a list of answers for each question, all of one length"
            )
        tokenizer, marked = self.tokenizer, self.tokenizer.encode(mark)
        end = [tokenizer.eos] if is_answer else []
        answers = [
            [tokenizer.encode(f"{mark} {answer}")[len(marked) :] + end for answer in options]
            for options in candidates
        ]
        forced = [*forced, *marked]
        longest = max((tokens for options in answers for tokens in options), key=len)
        self._available(prefixes, [*forced, *longest[:-1]], n_slots)  # raises if too long
        pause = tokenizer.latent if self.curriculum.rules.thought_type == "pause" else None
        return Branch(self.model, prefixes, n_slots, forced, answers, pause)

    def _prompts(
        self, questions: Sequence[str], latent: int
    ) -> tuple[list[list[int]], int, list[int]]:
        """Return (prefixes, latent steps per question, tokens forced after them)."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise ValueError("questions need Engine(model, tokenizer); run() takes token ids")
        if isinstance(questions, str) or not questions:
            raise ValueError("questions: expected a list of at least one question")
        if isinstance(latent, Sequence) or latent < 0:
            raise ValueError(f"latent: expected one number for all, 0 or more, got {latent}")
        prefixes = []
        for text in map(self.render, questions) if self.render else questions:
            ids = tokenizer.encode(text)
            # the latent steps and forced tokens are the same for every question
            prefix, n_thoughts, forced = build_prompt(self.curriculum, ids, latent, tokenizer)
            prefixes.append(prefix)
        return prefixes, n_thoughts, forced

    def _available(self, prefixes: list[list[int]], forced: list[int], n_thoughts: int) -> int:
        """Return how many tokens fit in block_size after the thoughts and forced tokens.

        Raise UserError if none fits, or if the model has no special tokens.
        """
        block_size, longest = self.model.config.block_size, max(map(len, prefixes))
        vocab_size = self.model.config.vocab_size
        largest = max(max(tokens, default=0) for tokens in [*prefixes, forced])
        if largest >= vocab_size:  # on a GPU, a bad index would kill the process
            raise UserError(
                f"token {largest} is not one of the model's {vocab_size}: the model was trained "
                "without thoughts, or with another tokenizer.\n"
                "Use the method it was trained with, or a run trained with thoughts."
            )
        room = block_size - longest - len(forced) - 1  # at least one token is generated
        if n_thoughts > room:
            problem, advice = f"{n_thoughts} thoughts do not fit", "Use fewer thoughts or ask"
            if room < 0:
                problem, advice = "the question does not fit", "Ask"
            raise UserError(
                f"{problem}: a question of {longest} tokens leaves room for {max(0, room)} "
                f"thoughts in the model's block_size={block_size}.\n{advice} a shorter question."
            )
        return room + 1 - n_thoughts

    def _check_editable(self, latent: int) -> None:
        """Raise UserError if there is no thought that `edit` could change."""
        if latent < 1 or self.curriculum.rules.thought_type == "pause":
            raise UserError(
                "edit: there are no thoughts to edit (pauses are tokens).\n"
                "Use latent=1 or more. To change pauses, use Engine.branch."
            )

    def _check_hooks(self) -> None:
        """Raise UserError if the model has forward hooks that this engine would not call."""
        if self.model._forward_hooks or self.model._forward_pre_hooks:
            raise UserError("no engine calls the hooks of a model itself.\nUse its modules' hooks.")
        if self.kernels == "torch" and not self.graph:
            return
        if any(m._forward_hooks or m._forward_pre_hooks for m in self.model.modules()):
            raise UserError(
                f"kernels={self.kernels!r} and CUDA graphs do not call the model's forward hooks.\n"
                'Use kernels="torch" and graph="off", or the argument edit.'
            )

    @contextmanager
    def _eval_mode(self) -> Iterator[None]:
        """Take the lock and put the model in eval mode, which concurrent calls share."""
        thread = threading.get_ident()
        if self._lock_owner == thread:  # waiting for itself would never end
            raise UserError("edit called the engine that runs it.\nUse another Engine in the edit.")
        with self._lock:
            training, self._lock_owner = self.model.training, thread
            self.model.eval()
            try:
                yield
            finally:
                self._lock_owner = None
                self.model.train(training)

    @without_grad
    def run(self, request: Request) -> Generation:
        """Generate from token ids. Raise ValueError or UserError if they cannot fit."""
        self._check_hooks()
        available = self._available(request.prefixes, request.forced_tokens, request.n_thoughts)
        if request.max_new_tokens > available:
            raise ValueError(
                f"max_new_tokens={request.max_new_tokens}, but block_size="
                f"{self.model.config.block_size} leaves room for {available}"
            )
        with self._eval_mode():
            start_time = now(self.model.wte.weight.device)
            is_packed = self.kernels in ("c", "packed")
            # a graph becomes stale if a weight moves, a packed copy also if it changes in place
            key = [
                (p.data_ptr(), p.dtype, fingerprint(p) if is_packed else ())
                for p in self.model.parameters()
            ]
            if key != self._weights_key:
                # raises if the kernels cannot run the model anymore, as with another dtype or layer
                choose_backend(self.kernels, self.model)
                self._reset()
                self._weights_key = key
                self._packed = None
                if is_packed:
                    self._packed = PackedGPT(self.model, in_c=self.kernels == "c")
            return self._generate(request, start_time)

    def _generate(self, request: Request, start_time: float) -> Generation:
        device = self.model.wte.weight.device
        self._generator = torch.Generator(device).manual_seed(request.seed)
        view = self._prefill(request)
        prefill_time = now(device)
        self._append_thoughts(view, request)
        thoughts_time = now(device)
        B = len(request.prefixes)
        lengths = view.cache.lengths.tolist()  # prompts and thoughts so far
        n_thoughts = [n - len(ids) for n, ids in zip(lengths, request.prefixes, strict=False)]
        # a copy, because later calls overwrite the buffer
        thoughts = view.thoughts[: max(n_thoughts), :B].transpose(0, 1).clone()  # (B, n, C)
        for i, token in enumerate(request.forced_tokens):
            if i:
                view.decode_step()
            view.token.fill_(token)  # _next_token appends the last one
        self._next_token(view, request, decode=bool(request.forced_tokens))
        first_time = now(device)
        self._other_tokens(view, request)
        end_time = now(device)
        eos = request.eos
        tokens = self._buffers.tokens[:B, : request.max_new_tokens].tolist()
        return Generation(
            tokens=[ids[: ids.index(eos)] if eos in ids else ids for ids in tokens],
            thoughts=thoughts,
            n_thoughts=n_thoughts,
            seconds_prefill=prefill_time - start_time,
            seconds_thoughts=thoughts_time - prefill_time,
            seconds_first=first_time - start_time,
            seconds_decode=end_time - first_time,
        )

    def _run_graph(self, request: Request, key: tuple, fn: Callable[[], None]) -> None:
        """Run fn as a CUDA graph, or eagerly if there is an edit, whose batch may have any size."""
        if request.edit is None:
            self.graphs.run(key, fn)
        else:
            fn()

    def _prefill(self, request: Request) -> BatchView:
        """Prefill the prompts and return the view of their batch."""
        B, width = len(request.prefixes), max(map(len, request.prefixes))
        n_new = request.n_thoughts + len(request.forced_tokens) + request.max_new_tokens
        capacity, block_size = width + n_new, self.model.config.block_size
        if self.graph:
            width = min(round_up(width, 64), block_size)
            capacity = min(round_up(capacity, 128), block_size)
        batch = B if request.edit is not None else self._batch_size(B)  # edits see no padding
        view = self._view(batch, capacity, width, request.n_thoughts)
        buffers = self._buffers
        # extra sequences fill the batch: one token, no thoughts, done from the start
        prefixes = request.prefixes + [[0]] * (batch - B)
        idx = buffers.idx[: batch * width].view(batch, width).zero_()
        tokens = pad_lists(prefixes)
        idx[:, : tokens.shape[1]] = tokens
        view.cache.lengths.copy_(torch.tensor(list(map(len, prefixes))))
        view.token_row.copy_(torch.arange(batch, device=idx.device))
        view.active.copy_(view.token_row < B)
        view.done.copy_(~view.active)
        buffers.tokens.fill_(request.eos)
        buffers.n_tokens.zero_()
        buffers.temperature.fill_(1.0 if request.is_greedy else request.temperature)
        self._run_graph(request, ("prefill", batch, capacity, width), partial(view.prefill, idx))
        return view

    def _append_thoughts(self, view: BatchView, request: Request) -> None:
        """Append the thoughts. Without a graph, end as soon as every sequence has stopped."""
        n, stop, edit = request.n_thoughts, request.stop, request.edit
        may_end = stop and not (self.graph and edit is None)  # a graph always runs all n steps

        def chain() -> None:
            for i in range(n):
                if may_end and not (view.active & (self.model.stop_logit(view.hidden) <= 0)).any():
                    break
                view.latent_step(i, stop, edit)

        if n:
            self._run_graph(request, ("thoughts", view.batch, view.capacity, n, stop), chain)

    def _next_token(self, view: BatchView, request: Request, decode: bool = True) -> None:
        """Append the last token if `decode` is set, then choose the next one."""
        eos, greedy = request.eos, request.is_greedy

        def step() -> None:
            if decode:
                view.decode_step()
            view.sample(eos, greedy)

        if not greedy:  # drawn outside of the graph
            view.noise.exponential_(generator=self._generator)
        self._run_graph(request, ("token", view.batch, view.capacity, decode, eos, greedy), step)

    def _other_tokens(self, view: BatchView, request: Request) -> None:
        """Generate all tokens after the first. Shrink the batch once half of it is finished."""
        # tokens between two checks, since each check syncs with the GPU
        interval = 4 if view.done.device.type == "cuda" else 1
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
        new = self._view(batch, old.capacity)
        order = old.done.int().argsort(stable=True)[:batch]  # (batch,), unfinished first
        # old and new share their memory; indexing with a tensor makes the copy that this needs
        new.cache.data.copy_(old.cache.data[:, :, order])
        new.cache.lengths.copy_(old.cache.lengths[order])
        for name in ("hidden", "prev_embedding", "token", "token_row", "done"):
            getattr(new, name).copy_(getattr(old, name)[order])
        new.span = old.span
        return new

    def _batch_size(self, n: int) -> int:
        """Return the batch size for n sequences; with graphs, a power of two to capture fewer."""
        return 1 << (n - 1).bit_length() if self.graph else n

    def _view(self, batch: int, capacity: int, width: int = 0, n_thoughts: int = 0) -> BatchView:
        """Return the view of this shape. Grow the buffers if they are too small."""
        old_size = self._buffers.size if self._buffers else (0, 0, 0, 0)
        cache_size = math.prod(self.model.cache_shape(batch, capacity))
        size = tuple(map(max, (batch, cache_size, batch * width, n_thoughts), old_size))
        if size != old_size:
            self._reset()  # frees the old buffers first; graphs have captured their addresses
            self._buffers = StaticBuffers(self.model, *size)
        shape = (batch, capacity)
        if shape in self._views:
            return self._views[shape]
        model = self._packed or self.model
        view = BatchView(model, self._buffers, shape, self.kernels, static=self.graph)
        if self.graph:  # captured graphs hold its tensors
            self._views[shape] = view
        return view

    def _reset(self) -> None:
        """Drop all buffers, views and graphs."""
        self._buffers, self._views = None, {}
        self.graphs.clear()


def load(
    path: str | Path = checkpoint.BUNDLED,
    device: str = "auto",
    kernels: str = "auto",
    graph: str = "auto",
    dtype: torch.dtype = torch.float32,
) -> Engine:
    """Return an Engine for a checkpoint, or for the best checkpoint of a run.

    It renders questions as in training. engine.config and engine.manifest describe the run.
    """
    model, tokenizer, manifest = checkpoint.load(path, select_device(device))
    model = model.to(dtype)
    config = make_config(TrainConfig, manifest["config"])
    engine = Engine.from_config(model, tokenizer, config, kernels=kernels, graph=graph)
    engine.manifest = manifest
    return engine
