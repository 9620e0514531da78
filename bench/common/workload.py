"""What latency.py and throughput.py measure: a model, prompts, and the lengths of real answers."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from nanococonut.model import GPT, GPTConfig
from nanococonut.runtime.cli import option, validate
from nanococonut.runtime.device import select_device
from nanococonut.runtime.errors import UserError
from nanococonut.weights import checkpoint

THOUGHTS = 6  # the paper's, on all three tasks
GPT2 = GPTConfig()  # 124M

PATHS = ("thoughts", "chain", "direct")  # ways to an answer

# Tokens of a task's question with <bot>, and those generated on each path, thoughts and eos not
# counted. Questions: mean lengths in GPT-2's tokens (362.0 and 56.3 on the released ProsQA and
# GSM8k validation sets, 204.9 on ProntoQA examples of the public generator). Generated tokens: the
# paper's Table 1, CoT and No-CoT: 49.4 / 8.2, 92.5 / 3.0, 25.0 / 2.2.
TASK_LENGTHS = {
    "prosqa": {"question": 363, "thoughts": 8, "chain": 49, "direct": 8},
    "prontoqa": {"question": 206, "thoughts": 3, "chain": 92, "direct": 3},
    "gsm8k": {"question": 57, "thoughts": 2, "chain": 25, "direct": 2},
}


@dataclass(frozen=True)
class WorkloadOptions:
    """Options of every script that measures inference."""

    checkpoint: str = option("random", "a run or checkpoint, or random: a GPT-2 124M")
    device: str = option("auto", "where to run", choices=("auto", "cpu", "cuda"))
    dtype: str = option(
        "auto", "auto is float32 on a CPU, else bfloat16", choices=("auto", "float32", "bfloat16")
    )
    out: str | None = option(None, "append the results to this file")

    def __post_init__(self) -> None:
        validate(self)


@dataclass
class Workload:
    """A model and the ids of its special tokens.

    dtype  of the measurement; the model is in float32 until its providers are compared
    name   where the weights come from
    """

    model: GPT
    dtype: torch.dtype
    name: str
    eos: int
    bot: int
    eot: int
    latent: int

    @property
    def device(self) -> torch.device:
        return self.model.wte.weight.device

    def shape(self) -> dict[str, int]:
        """Return the model's sizes, as results hold them."""
        shape = {k: getattr(self.model.config, k) for k in ("n_layer", "n_embd", "vocab_size")}
        return shape | {"parameters": self.model.n_params()}

    def prompts(self, batch: int, length: int, seed: int) -> list[list[int]]:
        """Return prompts of random tokens, none of them special."""
        rng, special = random.Random(seed), {self.eos, self.bot, self.eot, self.latent}
        tokens = [t for t in range(self.model.config.vocab_size) if t not in special]
        return [rng.choices(tokens, k=length) for _ in range(batch)]

    def request(self, path: str, n_tokens: int) -> tuple[int, list[int], int]:
        """Return n_thoughts, forced_tokens and n_tokens, as a provider's generate takes them."""
        return (THOUGHTS, [self.eot], n_tokens) if path == "thoughts" else (0, [], n_tokens)

    def step_bytes(self, batch: int, context: int, with_head: bool) -> int:
        """Return what a step has to read at least: weights of the layers, of the head if a token is
        predicted, and the keys and values that it attends to."""
        w = self.model.wte.weight
        numbers = sum(p.numel() for p in self.model.h.parameters())
        numbers += w.numel() if with_head else 0
        return numbers * w.element_size() + self.cache_bytes(batch, context)

    def cache_bytes(self, batch: int, length: int) -> int:
        """Return the size of the keys and values of so many tokens."""
        c, w = self.model.config, self.model.wte.weight
        return batch * length * 2 * c.n_layer * c.n_embd * w.element_size()


def load_model(options: WorkloadOptions) -> Workload:
    """Load options.checkpoint, or make random weights, which are as fast as trained ones."""
    device = select_device(options.device)
    auto = "float32" if device.type == "cpu" else "bfloat16"
    dtype = getattr(torch, auto if options.dtype == "auto" else options.dtype)
    if options.checkpoint != "random":
        model, tokenizer, manifest = checkpoint.load(options.checkpoint, device)
        name = f"{Path(options.checkpoint).resolve().name} (step {manifest['step']})"
        special = (tokenizer.eos, tokenizer.bot, tokenizer.eot, tokenizer.latent)
        return Workload(model, dtype, name, *special)
    torch.manual_seed(0)
    model = GPT(GPT2)
    with torch.no_grad():  # with initial weights, thoughts and positions hardly change the tokens
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3 * GPT2.n_embd**-0.5)
    special = range(GPT2.vocab_size - 4, GPT2.vocab_size)
    return Workload(model.to(device).eval(), dtype, "random weights, GPT-2 124M", *special)


def parse_ints(flag: str, text: str) -> list[int]:
    """Return the numbers of an option such as --batches=1,8,64, sorted."""
    pieces = text.split(",")
    if not all(p.strip().isdigit() and int(p) for p in pieces):
        raise UserError(f"{flag}={text} is no list of numbers, as in 1,8,64.")
    return sorted({int(p) for p in pieces})


@contextmanager
def catch_oom(device: torch.device) -> Iterator[list[bool]]:
    """Catch running out of memory: `with catch_oom(device) as failed:` leaves `failed` non-empty,
    and the memory is free again."""
    failed: list[bool] = []
    try:
        yield failed
    except (MemoryError, RuntimeError) as e:  # the CPU's allocator raises a plain RuntimeError
        known = isinstance(e, MemoryError | torch.OutOfMemoryError)
        if not known and "can't allocate memory" not in str(e):
            raise
        failed.append(True)
    if failed and device.type == "cuda":
        torch.cuda.empty_cache()
