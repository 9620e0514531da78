"""Backend selection, and the interface to the kernels that training uses.

    "torch"     plain PyTorch, everywhere
    "triton"    kernels/: fused attention, projections and loss, on a GPU
    "packed"    inference on a CPU: linear layers packed for oneDNN (packed.py)
    "c"         inference on a CPU: like "packed", with steps of up to three sequences in C;
                training on a CPU: all layers of whole sequences in C

There is no silent fallback: "auto" comes with the reason for its choice, and requesting a backend
that cannot run raises UserError.
"""

import importlib.util
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanococonut import packed, plain_gpt2
from nanococonut.model import GPT
from nanococonut.runtime.errors import UserError

if TYPE_CHECKING:  # kernels/ needs triton, which is optional
    from kernels.prefix_attention import PrefixBuffers


BACKENDS = ("auto", "triton", "c", "packed", "torch")  # for inference


def choose_backend(kernels: str, model: GPT) -> tuple[str, str]:
    """Return the inference backend and the reason.

    kernels: one of BACKENDS. "auto" is triton on a GPU if it can run the model. For a large model
    on a CPU, it is the fastest backend in a short measurement. Otherwise it is torch.
    """
    _check_option("kernels", kernels, BACKENDS)
    on_cpu = model.wte.weight.device.type == "cpu"
    if kernels == "auto" and on_cpu and model.n_params() < packed.MIN_PARAMS:
        return "torch", "a small model on a CPU"
    if why := _why_torch(kernels, model):
        return "torch", why
    if kernels in ("c", "packed"):
        if why := packed.unavailable(model, kernels):
            raise UserError(f"--kernels={kernels} cannot run here: {why}.\nUse --kernels=torch.")
        return kernels, "as requested"
    unsupported = "the smear" if model.config.smear else ""
    if model.config.thought != "hidden":
        unsupported = f"{model.config.thought} thoughts"
    name, reason = _choose(kernels, model, unsupported, "a GPU and a plain GPT-2")
    if kernels == "auto" and name == "torch":
        missing = {k: packed.unavailable(model, k) for k in ("c", "packed")}
        speedups = {k: packed.speedup(model, k) for k, why in missing.items() if not why}
        best = max(speedups, key=speedups.get, default="torch")
        if speedups.get(best, 0) >= packed.MIN_SPEEDUP:
            name, reason = best, f"{speedups[best]:.1f}x as fast as plain PyTorch on this CPU"
        if missing["c"] != missing["packed"]:
            reason += f"; {missing['c']}"
    return name, reason


def choose_training_backend(kernels: str, model: GPT, use_bf16: bool = False) -> tuple[str, str]:
    """Return the training backend ("triton", "c" or "torch") of a model, and the reason.

    use_bf16: the forward pass is autocast to bfloat16
    """
    _check_option("kernels", kernels, ("auto", "triton", "c", "torch"))
    if why := _why_torch(kernels, model):
        return "torch", why
    if kernels == "c" or (kernels == "auto" and model.wte.weight.device.type == "cpu"):
        if reason := _no_training_in_c(model, use_bf16):
            if kernels == "c":
                raise UserError(f"--kernels=c cannot run here: {reason}.\nUse --kernels=torch.")
            return "torch", reason
        return "c", "float32 on a CPU, no dropout"
    dropout = model.config.dropout
    unsupported = f"attention with dropout ({dropout})" if dropout else ""
    return _choose(kernels, model, unsupported, "a GPU and no dropout")


def _no_training_in_c(model: GPT, use_bf16: bool) -> str:
    """Return why kernels/cpu_train.c cannot train a model; "" if it can."""
    w, c = model.wte.weight, model.config
    dtype = "bfloat16" if use_bf16 else str(w.dtype).removeprefix("torch.")
    unsupported = {  # feature of the model: whether it has it
        f"{dtype} on {w.device}": (dtype, w.device.type) != ("float32", "cpu"),
        f"{c.thought} thoughts": c.thought != "hidden",
        f"dropout ({c.dropout})": c.dropout > 0,
        f"n_embd={c.n_embd}, only multiples of 32": c.n_embd % 32 > 0,
    }
    if feature := next((name for name, applies in unsupported.items() if applies), ""):
        return f"kernels/cpu_train.c does not support {feature}"
    n = min(8, c.vocab_size, c.block_size)
    first, one, none = torch.tensor([0, n]), torch.tensor([1]), torch.tensor([0])
    ids = torch.arange(n)
    with torch.no_grad():
        emb = model.wte(ids)
        try:
            actual = hidden_states(model, first, one, none, emb, model.wpe(ids))
        except (ImportError, OSError) as e:
            return f"kernels/cpu_train.c cannot be compiled or loaded ({e})"
        expected = model.backbone(emb[None], ids)[0]
    error = float((actual - expected).norm() / expected.norm())
    if not error <= 1e-4:  # NaN too
        return f"its results differ by {error:.0e} from plain PyTorch's"
    return ""


def _why_torch(kernels: str, model: GPT) -> str:
    """Return why only torch may run, or "" if a kernel may. Raise UserError if the requested one
    does not compute this model."""
    if kernels == "torch":
        return "as requested"
    if difference := plain_gpt2.difference(model):
        reason = f"the model is not a plain GPT-2 ({difference})"
        if kernels != "auto":
            raise UserError(f"--kernels={kernels} cannot run here: {reason}.\nUse --kernels=torch.")
        return reason
    return ""


def _choose(kernels: str, model: GPT, unsupported: str, supported: str) -> tuple[str, str]:
    w, head_dim = model.wte.weight, model.config.n_embd // model.config.n_head
    # Triton's interpreter is slow and only for tests, so "auto" never chooses it
    interpreted = kernels == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    reasons = {  # reason why Triton cannot run this model: whether it applies
        "triton is not installed": importlib.util.find_spec("triton") is None,
        f"the model is on {w.device}, not on a GPU": w.device.type != "cuda" and not interpreted,
        "there is no kernel for float64": w.dtype == torch.float64,
        f"there is no kernel for heads of {head_dim} dimensions, only up to 128": head_dim > 128,
        f"there is no kernel for {unsupported}": unsupported != "",
    }
    reason = next((r for r, applies in reasons.items() if applies), "")
    if kernels == "triton" and reason:
        raise UserError(f"--kernels=triton cannot run here: {reason}.\nUse --kernels=torch.")
    return ("torch", reason) if reason else ("triton", supported)


def choose_graph(graph: str, model: GPT) -> bool:
    """Return whether steps are replayed from CUDA graphs. graph: auto, on or off."""
    _check_option("graph", graph, ("auto", "on", "off"))
    device = model.wte.weight.device
    if graph == "on" and device.type != "cuda":
        raise UserError(
            f"--graph=on cannot run here: the model is on {device}, not on a CUDA GPU.\n"
            "Use --graph=off."
        )
    return device.type == "cuda" and graph != "off"


def _check_option(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name}={value!r}: expected one of {', '.join(choices)}.")


def prefix_buffers(k: Tensor) -> "PrefixBuffers":
    """Return the workspace of prefix_attention for a prefix with keys k (B, nh, T, hs)."""
    from kernels.prefix_attention import PrefixBuffers

    return PrefixBuffers(*k.shape, k.device)


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, buffers: "PrefixBuffers"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (out, lse, k, v), see kernels/prefix_attention.py. Triton only."""
    from kernels.prefix_attention import prefix_attention

    return prefix_attention(q, k, v, lengths, buffers)


def linear_cross_entropy(h: Tensor, w: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return (loss sum, correct), see kernels/linear_cross_entropy.py. Triton only."""
    from kernels.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(h, w, labels)


def hidden_states(
    model: GPT, first: Tensor, n_prefix: Tensor, n_thoughts: Tensor, emb: Tensor, pos: Tensor
) -> Tensor:
    """Return the hidden states of whole sequences, see kernels/cpu_train.py. On a CPU only."""
    from kernels.cpu_train import Rows, hidden_states

    rows, weights = Rows(first, n_prefix, n_thoughts), model.layer_weights()
    smear = None if model.smear is None else model.smear.weight
    return hidden_states(rows, emb, pos, weights, model.config.n_head, smear)
