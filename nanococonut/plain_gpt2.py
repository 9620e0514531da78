"""Check that a model is still the GPT-2 that the kernels compute, after an edit of model.py.

PyTorch follows any edit. The kernels do not: they would ignore a rotary embedding or an adapter.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from nanococonut.model import GPT
from nanococonut.packed import one_layer, share


@torch.no_grad()
def difference(model: GPT) -> str:
    """Return how a model differs from GPT-2 with its smear and thoughts; "" if it does not.

    Each layer is compared alone and on random weights, because an addition that starts at zero has
    no effect on a new model.
    """
    if type(model) is not GPT:
        return "it is a subclass of GPT"
    small, device = one_layer(model), model.wte.weight.device
    layers = share(model).eval().h
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, p in small.named_parameters():
        # far from the identity, and far from saturation, where GELU would look like ReLU
        std = 0.5 if p.dim() < 2 else min(0.5, 3 / p.shape[-1] ** 0.5)
        weights[name] = std * torch.randn(p.shape, generator=generator).to(device)
    ids = torch.arange(min(8, len(model.wte.weight), model.config.block_size), device=device)[None]
    try:
        with torch.autocast(device.type, enabled=False):
            expected = gpt2_logits(weights, ids, model.config.n_head)
            for i in range(model.config.n_layer):
                small.h = layers[i : i + 1]
                if {name for name, _ in small.named_parameters()} != weights.keys():
                    return f"its layers 0 and {i} have different parameters"
                actual = torch.func.functional_call(small, weights, (ids,))
                error = float((actual - expected).norm() / expected.norm())
                if not error <= 1e-2:  # NaN too; TF32 has 1e-3
                    return f"on random weights, layer {i} gives logits that differ by {error:.0%}"
    except KeyError as e:
        return f"it has no parameter {e}"
    except RuntimeError as e:
        return f"it cannot run with random weights: {str(e).splitlines()[0]}"
    if model.config.thought == "hidden" and model.thought_embedding(expected) is not expected:
        return "its thoughts are not the hidden states"
    return ""


def gpt2_logits(weights: dict[str, Tensor], ids: Tensor, n_head: int) -> Tensor:
    """Return the logits (1, T, V) of a GPT-2 with one layer for token ids (1, T).

    weights: the model's parameters by name. Raise KeyError if one is missing.
    """

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    x = weights["wte.weight"][ids]  # (1, T, C)
    if "smear.weight" in weights:
        x = x + F.linear(F.pad(x[:, :-1], (0, 0, 1, 0)), weights["smear.weight"])
    x = x + weights["wpe.weight"][: ids.shape[1]]
    qkv = linear(norm(x, "h.0.ln_1"), "h.0.attn.c_attn")  # (1, T, 3 * C)
    q, k, v = qkv.unflatten(2, (3 * n_head, -1)).transpose(1, 2).chunk(3, dim=1)  # (1, nh, T, hs)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    x = x + linear(y, "h.0.attn.c_proj")
    h = F.gelu(linear(norm(x, "h.0.ln_2"), "h.0.mlp.c_fc"), approximate="tanh")
    x = x + linear(h, "h.0.mlp.c_proj")
    return F.linear(norm(x, "ln_f"), weights["wte.weight"])
