"""What the speed benches run (a model, prompts, realistic lengths), and the memory bandwidth."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nanococonut.inference.engine import Request
from nanococonut.model import GPT, GPTConfig
from nanococonut.runtime.cli import Options, option
from nanococonut.runtime.device import now, select_device
from nanococonut.runtime.errors import UserError

THOUGHTS = 6  # in the paper, on all three tasks
GPT2 = GPTConfig()  # 124M
SPECIAL = ("eos", "bot", "eot", "latent")  # the last ids of the vocabulary

PATHS = ("thoughts", "chain", "direct")  # ways to an answer: Coconut, CoT, No-CoT

# Tokens in a question, <bot> included, and tokens generated on each path, without thoughts and eos.
# Questions: mean lengths in GPT-2 tokens (362.0 and 56.3 on the released ProsQA and GSM8k
# validation sets, 204.9 on ProntoQA examples from the public generator). Generated tokens: CoT and
# No-CoT in the paper's Table 1: 49.4 / 8.2, 92.5 / 3.0, 25.0 / 2.2.
TASK_LENGTHS = {
    "prosqa": {"question": 363, "thoughts": 8, "chain": 49, "direct": 8},
    "prontoqa": {"question": 206, "thoughts": 3, "chain": 92, "direct": 3},
    "gsm8k": {"question": 57, "thoughts": 2, "chain": 25, "direct": 2},
}
BUFFER_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}  # larger than most caches


@dataclass(frozen=True)
class WorkloadOptions(Options):
    """Options shared by the scripts that time inference."""

    device: str = option("auto", "where to run", choices=("auto", "cpu", "cuda"))
    dtype: str = option(
        "auto", "auto is float32 on a CPU, else bfloat16", choices=("auto", "float32", "bfloat16")
    )
    out: str | None = option(None, "append the results to this file")


class Workload:
    """GPT-2 124M with random weights, which is as fast as a trained one.

    model    float32; the script converts it once the providers have been compared
    dtype    dtype of the measurement
    special  name of a special token -> its id
    """

    def __init__(self, options: WorkloadOptions) -> None:
        self.device = select_device(options.device)
        auto = "float32" if self.device.type == "cpu" else "bfloat16"
        self.dtype = getattr(torch, auto if options.dtype == "auto" else options.dtype)
        torch.manual_seed(0)
        model = GPT(GPT2)
        with torch.no_grad():  # at initialization, thoughts and positions hardly affect tokens
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.3 * GPT2.n_embd**-0.5)
        self.model = model.to(self.device).eval()
        self.n_words = GPT2.vocab_size - len(SPECIAL)
        self.special = {name: self.n_words + i for i, name in enumerate(SPECIAL)}

    def prompts(self, batch: int, length: int, seed: int) -> list[list[int]]:
        """Return prompts of random ordinary tokens."""
        rng = random.Random(seed)
        return [rng.choices(range(self.n_words), k=length) for _ in range(batch)]

    def request(self, prompts: list[list[int]], path: str, n_tokens: int) -> Request:
        """Return a request for exactly n_tokens after each prompt: no token ends a sequence."""
        is_latent = path == "thoughts"
        forced = [self.special["eot"]] if is_latent else []
        return Request(prompts, THOUGHTS * is_latent, forced, -1, n_tokens)

    def step_bytes(self, batch: int, context: int, with_head: bool) -> int:
        """Return the minimum number of bytes that a step reads: the layers' weights, the keys and
        values it attends to, and, if it predicts a token, the head's weights."""
        c, w = self.model.config, self.model.wte.weight
        n_weights = sum(p.numel() for p in self.model.h.parameters())
        n_weights += w.numel() if with_head else 0
        n_cached = batch * context * 2 * c.n_layer * c.n_embd
        return n_weights * w.element_size() + n_cached * self.model.cache_dtype.itemsize


def model_shape(model: GPT) -> dict[str, int]:
    """Return the model's sizes as fields of a result's shape."""
    shape = {k: getattr(model.config, k) for k in ("n_layer", "n_embd", "vocab_size")}
    return shape | {"parameters": model.n_params()}


def parse_ints(flag: str, text: str) -> list[int]:
    """Return the sorted numbers of an option such as --batches=1,8,64."""
    pieces = text.split(",")
    if not all(p.strip().isdigit() and int(p) for p in pieces):
        raise UserError(f"{flag}={text}: expected positive whole numbers, such as 1,8,64.")
    return sorted({int(p) for p in pieces})


def out_of_memory(work: Callable[[], object]) -> bool:
    """Do the work and return False, or free the memory and return True if it ran out."""
    try:
        work()
        return False
    except (MemoryError, torch.OutOfMemoryError):
        pass
    except RuntimeError as e:
        # only CUDA's caching allocator has its own error class, and a graph's capture hides it
        in_capture = isinstance(e.__context__, torch.OutOfMemoryError)
        texts = "can't allocate memory", "CUDA error: out of memory", "ALLOC_FAILED"
        if not in_capture and not any(text in str(e) for text in texts):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # here, because the caught error holds on to tensors
    return True


# ---- the roofline


class Bandwidth:
    """The memory bandwidth in GB/s: of a sum, or of a copy if that is faster on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.a = torch.ones(BUFFER_BYTES[device.type] // 4, device=device)
        # no copy on a CPU: it also reads what it overwrites, so it gives no bound for a step
        self.b = torch.ones_like(self.a) if device.type == "cuda" else None
        self.measure()  # touch every page

    def measure(self) -> float:
        read = self._rate(self.a.sum, self.a.nbytes)
        if self.b is None:
            return read
        return max(read, self._rate(lambda: self.b.copy_(self.a), 2 * self.a.nbytes))

    def _rate(self, work: Callable[[], object], n_bytes: int) -> float:
        repeats = 8 if self.device.type == "cuda" else 1  # to amortize the synchronization
        began = now(self.device)
        for _ in range(repeats):
            work()
        return repeats * n_bytes / (now(self.device) - began) / 1e9
