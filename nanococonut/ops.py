"""The one door to the kernels: which kind runs inference and training, how, and why.

    "torch"    plain PyTorch, everywhere
    "triton"   kernels/: five launches a layer, the keys and values stored by the projection itself

and whether steps are replayed from CUDA graphs. There is no silent fallback: `choose_backend` and
`choose_graph` say what "auto" came to, and what is asked for where it cannot run is an error.
"""

import importlib.util
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanococonut.model import GPT
from nanococonut.runtime.errors import UserError

if TYPE_CHECKING:  # kernels/ needs triton, which is optional
    from kernels.prefix_attention import PrefixBuffers


def choose_backend(kernels: str, model: GPT) -> tuple[str, str]:
    """--kernels=auto|triton|torch -> ("triton" or "torch", the reason, for the user to read).

    UserError for "triton" where it cannot run.
    """
    if kernels == "torch":
        return "torch", "as asked for"
    # Triton's interpreter is for tests: slow, and never taken unasked
    interpreted = kernels == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    why_not = _unsupported_reason(model, interpreted)
    if kernels == "triton" and why_not:
        raise UserError(f"--kernels=triton cannot run here: {why_not}.\nUse --kernels=torch.")
    return ("torch", why_not) if why_not else ("triton", "a GPU and a plain GPT-2")


def choose_graph(graph: str, model: GPT) -> bool:
    """--graph=auto|on|off -> whether steps are replayed from CUDA graphs. UserError for "on" where
    there is no CUDA GPU."""
    on_gpu = model.wte.weight.device.type == "cuda"
    if graph == "on" and not on_gpu:
        raise UserError(
            f"--graph=on cannot run here: the model is on {model.wte.weight.device}, and CUDA "
            "graphs are a GPU's.\nUse --graph=off."
        )
    return on_gpu and graph != "off"


def _unsupported_reason(model: GPT, interpreted: bool) -> str:
    """What keeps Triton's kernels from running this model where it is; "" where nothing does."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if model.wte.weight.device.type != "cuda" and not interpreted:
        return f"the model is on {model.wte.weight.device}, not on a GPU"
    if model.wte.weight.dtype == torch.float64:
        return "there is no kernel for float64"
    if model.config.n_embd // model.config.n_head > 128:
        return "there is no kernel for heads of more than 128 dimensions"
    if model.config.smear:
        return "there is no kernel for the smear"
    if model.config.thought != "hidden":
        return f"there is no kernel for {model.config.thought} thoughts"
    return ""


def choose_training_backend(kernels: str, model: GPT) -> tuple[str, str]:
    """As `choose_backend`, for training: what a thought's attention over the prefix and the head's
    cross-entropy run by. Triton's interpreter is for tests, which ask for "triton"."""
    if kernels == "torch":
        return "torch", "as asked for"
    device, heads = model.wte.weight.device.type, model.config.n_embd // model.config.n_head
    why_not = ""
    if importlib.util.find_spec("triton") is None:
        why_not = "triton is not installed"
    elif device != "cuda" and (kernels == "auto" or os.environ.get("TRITON_INTERPRET") != "1"):
        why_not = f"the model is on {model.wte.weight.device}, not on a GPU"
    elif model.config.dropout:
        why_not = f"there is no kernel for attention with dropout, which is {model.config.dropout}"
    elif heads > 128 or model.wte.weight.dtype == torch.float64:
        why_not = f"there is no kernel for heads of {heads} in {model.wte.weight.dtype}"
    if kernels == "triton" and why_not:
        raise UserError(f"--kernels=triton cannot run here: {why_not}.\nUse --kernels=torch.")
    return ("torch", why_not) if why_not else ("triton", "a GPU and no dropout")


def prefix_buffers(B: int, nh: int, T: int, hs: int, device: torch.device) -> "PrefixBuffers":
    """Return the memory that prefix_attention needs for one prefix (B, nh, T, hs)."""
    from kernels.latent_attention import SplitWorkspace
    from kernels.prefix_attention import PrefixBuffers

    return PrefixBuffers(SplitWorkspace.allocate(B, nh, T, hs, device))


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, buffers: "PrefixBuffers"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (out, lse, k, v) of one query per sequence over its prefix, by Triton. The next reader
    of the prefix takes the k and v returned here (kernels/prefix_attention.py)."""
    from kernels.prefix_attention import prefix_attention

    return prefix_attention(q, k, v, lengths, buffers)


def head_cross_entropy(
    h: Tensor, w: Tensor, targets: Tensor, n_labels: int
) -> tuple[Tensor, Tensor]:
    """The head w (V, C) and its cross-entropy on the n_labels of h (N, C) that have a target (N,),
    by Triton (kernels/linear_cross_entropy.py): the sum, and right (N,)."""
    from kernels.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(h, w, targets, n_labels)
