"""GPT-2 weights from the Hugging Face hub's cache or a local folder, without transformers."""

import json
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load_file

from nanococonut.errors import UserError
from nanococonut.model import GPT, GPTConfig

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
# GPT-2 on the hub keeps these as (in, out): its Conv1D is a transposed Linear
_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def find_weights(name: str) -> Path | None:
    """The folder that holds config.json and model.safetensors of `name`, if it is on this disk.

    name: one of NAMES (looked up in the hub's cache; nothing is downloaded) or a folder.
    """
    if name not in NAMES:
        folder = Path(name)
        return folder if (folder / "model.safetensors").is_file() else None
    found = [
        try_to_load_from_cache(f"openai-community/{name}", file)
        for file in ("config.json", "model.safetensors")
    ]
    return Path(found[1]).parent if all(isinstance(f, str) for f in found) else None


def load_gpt2(folder: Path, vocab_size: int, dropout: float) -> GPT:
    """A GPT with the weights in `folder`; token rows beyond GPT-2's start as the one of "<<"."""
    wanted = "Give a folder with a GPT-2's config.json and model.safetensors."
    try:
        c = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = GPTConfig(
            vocab_size=vocab_size,
            block_size=c["n_positions"],
            n_layer=c["n_layer"],
            n_head=c["n_head"],
            n_embd=c["n_embd"],
            dropout=dropout,
        )
        model = GPT(config)
        tensors = load_file(folder / "model.safetensors")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as e:
        raise UserError(f"{folder} holds no GPT-2: {e}.\n{wanted}") from None
    own = model.state_dict()
    read = set()
    for key, tensor in tensors.items():
        key = key.removeprefix("transformer.")
        if key.endswith((".attn.bias", ".attn.masked_bias")) or key == "lm_head.weight":
            continue  # causal masks, and the head, which is tied
        if key.endswith(_TRANSPOSED):
            tensor = tensor.t()
        if key == "wte.weight":
            new = tensor[_like_row(tensor)].expand(max(0, vocab_size - len(tensor)), -1)
            tensor = torch.cat([tensor, new])
        if key not in own or own[key].shape != tensor.shape:
            raise UserError(
                f"{folder}: tensor {key} {tuple(tensor.shape)} is not one of this GPT-2.\n{wanted}"
            )
        own[key].copy_(tensor)
        read.add(key)
    if missing := own.keys() - read:
        raise UserError(
            f"{folder}: {len(missing)} tensors are missing, {min(missing)} among them.\n{wanted}"
        )
    return model


def _like_row(wte: torch.Tensor) -> int:
    """GPT-2's "<<" (released code: new rows start there); the last row of a smaller vocabulary."""
    return min(16791, len(wte) - 1)
