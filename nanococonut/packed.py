"""GPT-2 on a CPU at the speed of its memory: packed linear layers, and steps in C.

F.linear reads a row-major weight at two thirds of that speed, and more slowly at batch 8. oneDNN
packs a weight once into blocks that its kernels read in order. A step of up to three sequences is
even faster in C (kernels/cpu_step.c).
"""

import copy
import dataclasses
import itertools
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nanococonut.cache import KVCache
from nanococonut.model import GPT

MIN_PARAMS = 10_000_000  # smaller models stay in the CPU's caches: nothing to gain
MIN_SPEEDUP = 1.05
BLOCK = 127  # prime, so that it fits no row; odd, so that a sum shows that all signs change


class PackedLinear(nn.Module):
    """F.linear with a packed copy of the weight. gelu: apply GPT-2's GELU to the result."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self.bias = bias if bias is None else bias.contiguous()  # oneDNN ignores its strides
        self.activation = ("gelu", [], "tanh") if gelu else ("none", [], "")
        self.nbytes = weight.nbytes  # a packed tensor does not know its size

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, *self.activation)


class PackedGPT(GPT):
    """A GPT for inference that shares all parameters of `model` and has packed copies of the large
    ones. The copies are not updated if the weights change later.

    in_c: run steps of up to CpuStep.MAX_BATCH sequences in C
    """

    def __init__(self, model: GPT, in_c: bool = False) -> None:
        self.__dict__.update(share(model).__dict__)
        for block in self.h:
            attn, mlp = block.attn, block.mlp
            attn.c_attn = PackedLinear(attn.c_attn.weight, attn.c_attn.bias)
            attn.c_proj = PackedLinear(attn.c_proj.weight, attn.c_proj.bias)
            mlp.c_fc = PackedLinear(mlp.c_fc.weight, mlp.c_fc.bias, gelu=True)
            mlp.gelu = nn.Identity()  # c_fc applies it
            mlp.c_proj = PackedLinear(mlp.c_proj.weight, mlp.c_proj.bias)
        self.packed_head = PackedLinear(model.wte.weight)
        self.step = None
        if in_c:
            from kernels.cpu_step import CpuStep  # only here: `kernels` may be another package

            self.step = CpuStep(model.layer_weights(), model.wte.weight, model.config.n_head)

    def append(self, cache: KVCache, emb: Tensor, prev_embedding: Tensor, span: int) -> Tensor:
        if self.step is None or len(emb) > self.step.MAX_BATCH:
            return super().append(cache, emb, prev_embedding, span)
        x = self.block_input(emb[:, None], cache.lengths[:, None], prev_embedding)[:, 0]  # (B, C)
        x = x.float().contiguous()  # an edit may be transposed; C overwrites x, a new tensor
        return self.step(x, cache.data, cache.lengths).to(emb.dtype)

    def head(self, hidden: Tensor) -> Tensor:
        if self.step is None or hidden.dim() != 2 or len(hidden) > self.step.MAX_BATCH:
            return self.packed_head(hidden)
        return self.step.lm_head(hidden.float().contiguous()).to(hidden.dtype)

    @property
    def nbytes(self) -> int:
        """Return the size of the packed copies in bytes."""
        return sum(m.nbytes for m in self.modules() if isinstance(m, PackedLinear))


def share(model: GPT) -> GPT:
    """Return a copy of the modules that shares all parameters and buffers."""
    return copy.deepcopy(
        model, {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    )


def one_layer(model: GPT) -> GPT:
    """Return the model with its first layer and eight tokens only, in eval mode. It shares the
    weights."""
    small = share(model).eval()
    small.config = dataclasses.replace(model.config, n_layer=1)
    small.h, small.wte = small.h[:1], nn.Embedding.from_pretrained(model.wte.weight.detach()[:8])
    return small


def unavailable(model: GPT, kernels: str = "packed") -> str:
    """Return why a backend, "packed" or "c", cannot run a model; "" if it can."""
    w = model.wte.weight
    if w.device.type != "cpu":
        return f"the model is on {w.device}, not on a CPU"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch has no oneDNN"
    if w.dtype not in (torch.float32, torch.bfloat16):
        return f"there is no packed form of {w.dtype}"
    if w.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU has no bfloat16"
    for batch in (1, 4):  # only batch 1 is small enough for C
        try:
            actual = _latent_step(model, kernels, batch)()
        except (ImportError, OSError) as e:
            return f"the step in C cannot be compiled or loaded ({e})"
        expected = _latent_step(model, "torch", batch)()
        error = float((actual - expected).norm() / expected.norm())
        if not error <= (1e-5 if w.dtype == torch.float32 else 2e-2):  # NaN too
            return f"its results differ by {error:.0e} from plain PyTorch's"
    return ""


def fingerprint(weight: Tensor) -> tuple[int, bytes]:
    """Return values that change with the weight. A change through `.data` shows only in its bits.

    The bits are summed as 64-bit integers, which is exact, and about as fast as reading them. Each
    block of BLOCK integers has a sum: one sum of all would stay the same if rows or columns change
    places, or if an even number of weights change their signs.
    """
    version = 0 if weight.is_inference() else weight._version
    data = weight.detach().contiguous().flatten().view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()  # aligned
    n = len(data) // (8 * BLOCK) * 8 * BLOCK
    sums = data[:n].view(torch.int64).view(-1, BLOCK).sum(1)
    return version, sums.numpy().tobytes() + data[n:].numpy().tobytes()


def speedup(model: GPT, kernels: str, repeats: int = 9) -> float:
    """Return how many times faster a backend runs a latent step of one block at batch 1."""
    steps = [_latent_step(model, name) for name in ("torch", kernels)]

    def seconds(step: Callable[[], Tensor]) -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    rounds = [[seconds(step) for step in steps] for _ in range(repeats)]
    plain, fast = map(min, zip(*rounds, strict=True))  # the least disturbed round of each
    return plain / fast


def _latent_step(model: GPT, kernels: str, batch: int = 1) -> Callable[[], Tensor]:
    """Return a function that runs a latent step of the first block and eight rows of the head
    with a backend. The function returns the hidden states and logits, (B, C + 8).

    Raise ImportError or OSError if the step is in C and cannot be compiled or loaded.
    """
    small, w = one_layer(model), model.wte.weight
    if kernels != "torch":
        small = PackedGPT(small, in_c=kernels == "c")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, model.config.n_embd, generator=generator).to(w.dtype)
    cache = small.new_cache(batch, capacity=8)
    cache.data.normal_(generator=generator)
    cache.lengths.fill_(min(7, model.config.block_size - 1))

    @torch.no_grad()
    def run() -> Tensor:
        hidden = small.append(cache, x, x, span=8)
        return torch.cat([hidden, small.head(hidden)], dim=1)

    return run
