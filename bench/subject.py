"""What latency.py and throughput.py measure: a model, prompts for it, and how long the real answers
are."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from nanococonut.model import GPT, GPTConfig
from nanococonut.runtime.errors import UserError
from nanococonut.weights import checkpoint

THOUGHTS = 6  # the paper's, on all three tasks
SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


@dataclass(frozen=True)
class Lengths:
    """Tokens of a task's question (with <bot>), of its written chain with the answer, and of the
    answer alone. Eos is in none of them."""

    question: int
    chain: int
    answer: int


# Questions: means of the rows with GPT-2's tokens (362.0 and 56.3 on the released ProsQA and GSM8k
# validation rows, 204.9 on ProntoQA rows of the public generator), and <bot>. Generated tokens: the
# paper's Table 1, CoT and No-CoT: 49.4 / 8.2, 92.5 / 3.0, 25.0 / 2.2.
TASKS = {
    "prosqa": Lengths(363, 49, 8),
    "prontoqa": Lengths(206, 92, 3),
    "gsm8k": Lengths(57, 25, 2),
}


@dataclass
class Subject:
    """A model and the ids of its special tokens. name: where it comes from, for the reader."""

    model: GPT
    name: str
    eos: int
    bot: int
    eot: int
    latent: int

    @property
    def opening(self) -> list[int]:
        return [self.eot]

    def sizes(self) -> dict[str, int]:
        """What rows say of the model (bench/schema.py: shapes)."""
        sizes = {k: getattr(self.model.config, k) for k in ("n_layer", "n_embd", "vocab_size")}
        return sizes | {"parameters": self.model.n_params()}

    def prompts(self, batch: int, length: int, seed: int) -> list[list[int]]:
        """So many rows of random words, of one length, all else than special tokens."""
        draw, special = random.Random(seed), {self.eos, self.bot, self.eot, self.latent}
        words = [t for t in range(self.model.config.vocab_size) if t not in special]
        return [draw.choices(words, k=length) for _ in range(batch)]

    def step_bytes(self, batch: int, context: int, head: bool) -> int:
        """What a step has to read at least: the layers' weights, the head's if it is a word's, and
        the keys and values that it attends to."""
        c, w = self.model.config, self.model.wte.weight
        layers = sum(p.numel() for p in self.model.h.parameters())
        numbers = layers + batch * context * 2 * c.n_layer * c.n_embd + head * w.numel()
        return numbers * w.element_size()

    def cache_bytes(self, batch: int, length: int) -> int:
        c, w = self.model.config, self.model.wte.weight
        return batch * length * 2 * c.n_layer * c.n_embd * w.element_size()


def find(given: str | None, shape: dict[str, int], device: torch.device) -> Subject:
    """given: a run or checkpoint, "random", or None: the newest run in out/ if there is one. Random
    weights are as fast as trained ones; shape: their size, where it is not GPT-2 124M's."""
    if given is None and not shape:
        runs = [run for run in Path("out").glob("*") if checkpoint.list_checkpoints(run)]
        given = str(
            max(runs, key=lambda r: checkpoint.list_checkpoints(r)[-1].stat().st_mtime, default="")
        )
        given = given if runs else None
    if given not in (None, "random"):
        if shape:
            raise UserError(f"--{next(iter(shape))} is for random weights.\nGive no --checkpoint.")
        model, tokenizer, manifest = checkpoint.load(given, device)
        name = f"{Path(given).resolve().name} (step {manifest['step']})"
        special = {n: getattr(tokenizer, n) for n in ("eos", "bot", "eot", "latent")}
        return Subject(model, name, **special)
    torch.manual_seed(0)
    try:
        model = GPT(GPTConfig(**shape))
    except ValueError as e:
        raise UserError(f"{e}.\nGive another --n_embd or --n_head.") from None
    with torch.no_grad():  # initial weights let thoughts and positions hardly touch the words
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3 * model.config.n_embd**-0.5)
    last = model.config.vocab_size - 4
    name = "random weights, GPT-2 124M" if not shape else "random weights"
    return Subject(model.to(device).eval(), name, last, last + 1, last + 2, last + 3)


def dtype_of(given: str, device: torch.device) -> torch.dtype:
    """--dtype; auto is float32 on a CPU, else bfloat16."""
    auto = "float32" if device.type == "cpu" else "bfloat16"
    return getattr(torch, auto if given == "auto" else given)


@contextmanager
def out_of_memory(device: torch.device) -> Iterator[list[bool]]:
    """`with out_of_memory(device) as failed:` -> failed is not empty where memory was not enough;
    what was taken has been given back."""
    failed: list[bool] = []
    try:
        yield failed
    except (torch.OutOfMemoryError, MemoryError):
        failed.append(True)
    except RuntimeError as e:  # the CPU's allocator says it in words
        if "can't allocate memory" not in str(e):
            raise
        failed.append(True)
    if failed and device.type == "cuda":
        torch.cuda.empty_cache()
