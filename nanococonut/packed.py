"""Linear layers packed for oneDNN, so that a CPU reads the weights at the speed of its memory.

F.linear on a row-major weight reaches two thirds of that at batch 1, less at batch 8. oneDNN packs
a weight once into blocks that its kernels read in order. A single row of float32 is faster still in
loops compiled by torch.compile, after some seconds of compilation.
"""

import copy
import itertools
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanococonut.model import GPT, Block, BlockAttend

MIN_PARAMS = 10_000_000  # smaller models stay in the CPU's caches: nothing to gain
MIN_SPEEDUP = 1.05


class PackedLinear(nn.Module):
    """F.linear with a packed copy of the weight. gelu: apply GPT-2's GELU to the result."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self.bias = bias
        self.activation = ("gelu", [], "tanh") if gelu else ("none", [], "")
        self.nbytes = weight.nbytes  # a packed tensor has no storage to ask

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, *self.activation)


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """Return layer(x) as a product and a sum, which torch.compile fuses into one loop."""
    return (layer.weight * x[..., None, :]).sum(-1) + layer.bias


def _qkv(block: Block, x: Tensor) -> Tensor:
    return _linear(block.ln_1(x), block.attn.c_attn)


def _after_attention(block: Block, x: Tensor, y: Tensor) -> Tensor:
    x = x + _linear(y, block.attn.c_proj)
    return x + _linear(block.mlp.gelu(_linear(block.ln_2(x), block.mlp.c_fc)), block.mlp.c_proj)


class OneRowBlock(nn.Module):
    """A packed block that runs a single row, such as a latent step of batch 1, in compiled loops.

    block   the block with plain linear layers
    packed  the same block with packed ones, for more rows
    fns     compiled _qkv and _after_attention
    """

    def __init__(self, block: Block, packed: Block, fns: tuple[Callable, Callable]) -> None:
        super().__init__()
        self.block, self.packed = block, packed
        self.qkv, self.after_attention = fns

    def forward(self, x: Tensor, attend: BlockAttend, last_pos: Tensor | None = None) -> Tensor:
        if x.shape[:2] != (1, 1) or last_pos is not None:
            return self.packed(x, attend, last_pos)
        qkv = self.qkv(self.block, x).view(1, 1, 3, self.block.attn.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (1, nh, 1, hs) each
        return self.after_attention(self.block, x, attend(q, k, v).transpose(1, 2).flatten(2))


class PackedGPT(GPT):
    """A GPT for inference that shares all parameters of `model` and has packed copies of the large
    ones. The copies do not follow later changes of the weights.

    compiled: run a single row in compiled loops
    """

    def __init__(self, model: GPT, compiled: bool = False) -> None:
        shared = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
        self.__dict__.update(copy.deepcopy(model, shared).__dict__)  # new modules, same tensors
        for block in self.h:
            attn, mlp = block.attn, block.mlp
            attn.c_attn = PackedLinear(attn.c_attn.weight, attn.c_attn.bias)
            attn.c_proj = PackedLinear(attn.c_proj.weight, attn.c_proj.bias)
            mlp.c_fc = PackedLinear(mlp.c_fc.weight, mlp.c_fc.bias, gelu=True)
            mlp.gelu = nn.Identity()  # c_fc applies it
            mlp.c_proj = PackedLinear(mlp.c_proj.weight, mlp.c_proj.bias)
        if compiled:  # here and not on import, because torch.compile imports triton
            fns = torch.compile(_qkv), torch.compile(_after_attention)
            pairs = zip(model.h, self.h, strict=True)
            self.h = nn.ModuleList([OneRowBlock(*pair, fns) for pair in pairs])
        self.packed_head = PackedLinear(model.wte.weight)

    def head(self, hidden: Tensor) -> Tensor:
        return self.packed_head(hidden)

    @property
    def nbytes(self) -> int:
        """The bytes of the packed copies."""
        return sum(m.nbytes for m in self.modules() if isinstance(m, PackedLinear))


def unavailable(model: GPT) -> str:
    """Return why the linear layers of a model cannot be packed; "" if they can."""
    w = model.wte.weight
    if type(model) is not GPT:
        return "the model is a subclass of GPT"
    if w.device.type != "cpu":
        return f"the model is on {w.device}, not on a CPU"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch has no oneDNN"
    if w.dtype not in (torch.float32, torch.bfloat16):
        return f"there is no packed form of {w.dtype}"
    if w.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU has no bfloat16"
    if (error := _relative_error(model)) > (1e-6 if w.dtype == torch.float32 else 1e-2):
        return f"packed layers differ by {error:.0e} from plain ones"
    return ""


def compile_error() -> str:
    """Return why torch.compile cannot run here, such as a missing C++ compiler; "" if it can."""
    try:
        compiled = torch.compile(lambda x: x + torch.compiler.is_compiling())(torch.zeros(1))
    except Exception as e:
        first = str(e).strip().split("\n")[0]
        return f"torch.compile failed ({first})"
    return "" if compiled else "torch.compile is turned off (TORCHDYNAMO_DISABLE or the like)"


def fingerprint(weight: Tensor) -> tuple[int, float]:
    """Return values that change with the weight: a change through `.data` changes only the sum."""
    version = 0 if weight.is_inference() else weight._version
    return version, weight.detach().sum(dtype=torch.float32).item()


@torch.no_grad()
def speedup(model: GPT, repeats: int = 9) -> float:
    """Return how many times faster the layers of one block are at batch 1 if packed."""
    linears = [m for m in model.h[0].modules() if isinstance(m, nn.Linear)]
    packed = [PackedLinear(m.weight, m.bias) for m in linears]
    inputs = [m.weight.new_ones(1, 1, m.in_features) for m in linears]

    def seconds(layers: list) -> float:
        start = time.perf_counter()
        for layer, x in zip(layers, inputs, strict=True):
            layer(x)
        return time.perf_counter() - start

    rounds = [(seconds(linears), seconds(packed)) for _ in range(repeats)]
    plain, fast = map(min, zip(*rounds, strict=True))  # the least disturbed round of each
    return plain / fast


@torch.no_grad()
def _relative_error(model: GPT) -> float:
    linear = model.h[0].mlp.c_fc
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, linear.in_features, generator=generator).to(linear.weight.dtype)
    plain = F.linear(x, linear.weight, linear.bias)
    packed = PackedLinear(linear.weight, linear.bias)(x)
    return float((packed - plain).norm() / plain.norm())
