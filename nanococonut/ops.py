"""The one door to the kernels: which kind runs a step of inference or of training, and why.

    "torch"    plain PyTorch, everywhere
    "triton"   kernels/: five launches a layer, the keys and values stored by the projection itself

There is no silent fallback: `choose` says what "auto" came to, and "triton" where it cannot run is
an error.
"""

import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor

from nanococonut.cache import KVCache
from nanococonut.errors import UserError
from nanococonut.model import GPT

# (input embeddings e (B, C), hidden states (B, C), active (B,) or None) -> hidden states (B, C);
# appends to the cache and moves its lengths
Step = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def choose(kernels: str, model: GPT) -> tuple[str, str]:
    """--kernels=auto|triton|torch -> ("triton" or "torch", the reason, for the user to read).

    UserError for "triton" where it cannot run.
    """
    if kernels == "torch":
        return "torch", "as asked for"
    why_not = _why_not(model)
    if kernels == "triton" and why_not:
        raise UserError(f"--kernels=triton cannot run here: {why_not}.\nUse --kernels=torch.")
    return ("torch", why_not) if why_not else ("triton", "a GPU and a plain GPT-2")


def _why_not(model: GPT) -> str:
    """What keeps Triton's kernels from running this model where it is; "" where nothing does."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if model.wte.weight.device.type != "cuda" and not interpreted:
        return f"the model is on {model.wte.weight.device}, not on a GPU"
    if model.config.smear:
        return "there is no kernel for the smear"
    if model.config.thought != "hidden":
        return f"there is no kernel for {model.config.thought} thoughts"
    return ""


def choose_training(kernels: str, model: GPT) -> tuple[str, str]:
    """As `choose`, for training: what a thought's attention over the prefix and the head's
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


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One query per row over its prefix, by Triton (kernels/latent_attention.py): out, lse, and the
    k and v for whatever reads them next."""
    from kernels.latent_attention import latent_attention_pass

    return latent_attention_pass(q, k, v, lengths)


def head_loss(h: Tensor, w: Tensor, targets: Tensor, n_labels: int) -> tuple[Tensor, Tensor]:
    """The head w (V, C) and its cross-entropy on the n_labels of h (N, C) that have a target (N,),
    by Triton (kernels/linear_cross_entropy.py): the sum, and right (N,)."""
    from kernels.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(h, w, targets, kernel=True, n_labels=n_labels)


def triton_step(model: GPT, cache: KVCache) -> Step:
    """One step of a plain GPT-2 by the kernels. For one batch size; nothing asks the device."""
    from kernels.append import append
    from kernels.feedback import feedback
    from kernels.latent_attention import latent_attention, latent_attention_scratch
    from kernels.linear_residual import linear_residual
    from kernels.ln_linear_gelu import ln_linear_gelu

    _, _, B, nh, T, hs = cache.data.shape
    scratch = latent_attention_scratch(B, nh, T, hs, cache.data.device)

    @torch.no_grad()
    def step(e: Tensor, hidden: Tensor, active: Tensor | None) -> Tensor:
        x = e + model.wpe(cache.lengths)  # (B, C), the residual stream, written in place below
        for layer, block in enumerate(model.h):
            k, v = cache.data[layer]
            ln, qkv = block.ln_1, block.attn.c_attn
            q = append(
                x, ln.weight, ln.bias, qkv.weight, qkv.bias, k, v, cache.lengths, active, ln.eps
            )
            y = latent_attention(q, k, v, cache.lengths, extra=1, scratch=scratch)
            out = block.attn.c_proj
            linear_residual(y.view(B, nh * hs), out.weight, out.bias, x)
            ln, up, down = block.ln_2, block.mlp.c_fc, block.mlp.c_proj
            h = ln_linear_gelu(x, ln.weight, ln.bias, up.weight, up.bias, ln.eps)
            linear_residual(h, down.weight, down.bias, x)
        hidden = hidden.clone()  # an inactive row keeps its own
        ln = model.ln_f
        feedback(x, ln.weight, ln.bias, model.wpe.weight, cache.lengths, hidden, active, ln.eps)
        return hidden

    return step
