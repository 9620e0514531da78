"""GPT-2 weights in, from the hub, a folder, a file or a checkpoint; a Hugging Face folder out.

    python -m nanococonut.hub export out/RUN FOLDER

Nothing here needs transformers, and no file can make this program run code: PyTorch files are read
as plain tensors or not at all.
"""

import json
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nanococonut import checkpoint
from nanococonut.errors import UserError, main_guard
from nanococonut.model import GPT, GPTConfig

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
CONFIG, WEIGHTS = "config.json", "model.safetensors"
N_SPECIAL = 3  # <bot>, <eot>, <latent> behind GPT-2's own tokens
# GPT-2 on the hub keeps these as (in, out): its Conv1D is a transposed Linear
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
SIZES = {"block_size": "n_positions", "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd"}
# what else a config.json may ask for, in the only form that this GPT-2 has
FIXED = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
_PREFIX = re.compile(r"^(module\.)?(base_causallm\.)?(transformer\.)?")
_WANTED = (
    f"Give {', '.join(NAMES)}, a folder with a GPT-2's {CONFIG} and {WEIGHTS}, one such file, "
    "a run of ours, or a released checkpoint."
)


class Unavailable(UserError):
    """Weights of the hub that are neither cached nor to be downloaded: a fallback may be taken."""


def find_weights(init_from: str) -> Path:
    """Where the weights are. One of NAMES is downloaded where the hub's cache has it not.

    init_from: one of NAMES, a folder or a file (a folder called gpt2 is ./gpt2).
    Raises Unavailable where there is no way to the hub, UserError where nothing is at that path.
    """
    if init_from in NAMES:
        return _from_hub(init_from)
    path = Path(init_from)
    if not path.exists():
        raise UserError(f"no weights at {init_from!r}: no such file or folder.\n{_WANTED}")
    if path.is_dir() and not _is_ours(path) and not (path / WEIGHTS).is_file():
        raise UserError(f"no weights in {init_from!r}: it has no {WEIGHTS}.\n{_WANTED}")
    return path


def load_gpt2(
    path: str | Path,
    vocab_size: int | None = None,
    dropout: float = 0.0,
    spec: dict[str, Any] | None = None,
    switches: dict[str, Any] | None = None,
) -> GPT:
    """A GPT in fp32 with the weights at a path that find_weights gave, and with their sizes.

    vocab_size: None for the weights' own; or N_SPECIAL more: the new rows start as the one of "<<".
    spec: of the tokenizer that will be used; it has to be the one that the weights know of, if any.
    switches: settings of GPTConfig that GPT-2 has not, such as smear; parts of the model that they
    ask for and the weights have not start as nothing.
    Raises UserError; all that is wrong with the tensors stands in a single one.
    """
    path = Path(path)
    shape, tensors, trained_spec, conv1d = _read(path)
    rows = shape.vocab_size
    if spec and trained_spec and spec != trained_spec:
        raise UserError(
            f"{path} was trained with another vocabulary: {rows} tokens of kind "
            f"{trained_spec.get('kind')!r}, this run's has {vocab_size} of kind {spec['kind']!r}.\n"
            "Use its --tokenizer, and rows with the same words."
        )
    if vocab_size not in (None, rows, rows + N_SPECIAL):
        raise UserError(
            f"{path} has a vocabulary of {rows} tokens, this run's has {vocab_size}.\n"
            "Choose the --tokenizer that belongs to these weights, or train --init_from=scratch."
        )
    wte = tensors.get("wte.weight")
    wrong = []
    for alias in ("lm_head.weight", "embedding.weight"):  # GPT-2's head is tied
        tied = tensors.pop(alias, None)
        if tied is None or wte is None:
            continue
        if tied.shape != wte.shape or not torch.equal(tied.float(), wte.float()):
            wrong.append(f"{alias} differs from wte.weight, to which it should be tied")
    if vocab_size == rows + N_SPECIAL and wte is not None and wte.dim() == 2:
        tensors["wte.weight"] = torch.cat([wte, wte[_like_row(wte)].expand(N_SPECIAL, -1)])
    asked = dict(switches or {})
    asked["smear"] = asked.get("smear") or shape.smear  # what it was trained with, it needs
    config = replace(shape, vocab_size=vocab_size or rows, dropout=dropout, **asked)
    try:
        model = GPT(config)
    except ValueError as e:
        raise _no_gpt2(path, e) from None
    own = {  # views in the file's layout
        key: p.t() if conv1d and key.endswith(TRANSPOSED) else p
        for key, p in model.state_dict().items()
    }
    if shape.thought == "projected" and model.project is None:
        raise UserError(
            f"{path} was trained by --method=projected: another method has no place for its map of "
            "the hidden state.\nGo on with --method=projected, or give a run of another one."
        )
    if shape.stop and model.stop is None:  # it watched: without it the model is the same
        print(f"{path}: its stop classifier is left out; --stop=classifier goes on with it")
        tensors = {key: p for key, p in tensors.items() if not key.startswith("stop.")}
    for key, tensor in tensors.items():
        if key not in own:
            wrong.append(f"{key} is unknown")
        elif own[key].shape != tensor.shape or not tensor.is_floating_point():
            kind = "" if tensor.is_floating_point() else f" {tensor.dtype}"
            wrong.append(f"{key} is {tuple(tensor.shape)}{kind}, wanted {tuple(own[key].shape)}")
    added = ("smear.", "project.", "stop.")
    missing = [key for key in own if key not in tensors and not key.startswith(added)]
    wrong += [f"{key} is missing" for key in missing]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise _no_gpt2(path, "; ".join(wrong[:4]) + more)
    for key, tensor in tensors.items():
        own[key].copy_(tensor)
    return model


def _like_row(wte: Tensor) -> int:
    """GPT-2's "<<" (released code: new rows start there); the last row of a smaller vocabulary."""
    return min(16791, len(wte) - 1)


def _no_gpt2(path: Path, why: object) -> UserError:
    return UserError(f"{path} holds no GPT-2: {why}.\n{_WANTED}")


def _is_ours(path: Path) -> bool:
    """A checkpoint, or a run's folder with one in it (checkpoint.py)."""
    return (path / checkpoint.MANIFEST).is_file() or bool(checkpoint.steps_in(path))


def _from_hub(name: str) -> Path:
    """The folder of the hub's cache with both files of `name`, after a download if need be."""
    repo, cache = f"openai-community/{name}", constants.HF_HUB_CACHE
    found = [try_to_load_from_cache(repo, file, cache) for file in (CONFIG, WEIGHTS)]
    if not all(isinstance(f, str) for f in found):
        try:
            # a look first, which fails at once where the download would try for minutes
            get_hf_file_metadata(hf_hub_url(repo, WEIGHTS), timeout=10)
            found = [hf_hub_download(repo, file, cache_dir=cache) for file in (CONFIG, WEIGHTS)]
        except Exception as e:  # the hub lets through whatever its HTTP client raises
            raise Unavailable(
                f"no weights of {name!r}: not in {cache} and no way to the hub "
                f"({type(e).__name__}).\nGive a folder as --init_from, made elsewhere by `hf "
                f"download {repo} {CONFIG} {WEIGHTS} --local-dir FOLDER`, or train from scratch "
                "(config/prosqa_small.py)."
            ) from None
    return Path(found[1]).parent


def _read(path: Path) -> tuple[GPTConfig, dict[str, Tensor], dict[str, Any] | None, bool]:
    """What is at a path: (sizes, tensors by GPT's names, the tokenizer's spec where it is said,
    whether matrices lie as Conv1D's)."""
    if path.name == WEIGHTS and _is_ours(path.parent):
        path = path.parent
    if _is_ours(path):
        model, tokenizer, _ = checkpoint.load(path)
        return model.config, model.state_dict(), tokenizer.spec, False
    file = path / WEIGHTS if path.is_dir() else path
    try:
        read = load_file if file.suffix == ".safetensors" else _load_torch
        tensors = {
            _PREFIX.sub("", key): tensor
            for key, tensor in read(file).items()
            if not key.endswith((".attn.bias", ".attn.masked_bias"))  # causal masks
        }
        said = file.with_name(CONFIG)
        if path.is_dir() or said.is_file():
            shape, spec = _sizes_said(said, tensors)
        else:
            shape, spec = _sizes_seen(tensors), None
            print(
                f"{path}: no {CONFIG} beside it, so by its tensors n_layer={shape.n_layer} "
                f"n_embd={shape.n_embd}, and by GPT-2's rule n_head=n_embd/64={shape.n_head}"
            )
    except (OSError, ValueError, SafetensorError) as e:
        raise _no_gpt2(path, e) from None
    return shape, tensors, spec, True


def _load_torch(file: Path) -> dict[str, Tensor]:
    """A state dict written by torch.save, as the released code does. Nothing else is unpickled."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is said below
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # a torn or hostile pickle may raise anything
        raise ValueError(
            f"neither safetensors nor a state dict of plain tensors ({type(e).__name__}), and "
            "nothing else is unpickled"
        ) from None
    if not isinstance(found, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()
    ):
        raise ValueError("no state dict, names to tensors")
    return found


def _sizes_said(file: Path, tensors: dict[str, Tensor]) -> tuple[GPTConfig, dict | None]:
    """Sizes by a config.json, and the tokenizer's spec if the folder is an export of ours."""
    c = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(c, dict):
        raise ValueError(f"{CONFIG} is no table of settings")
    for key, only in FIXED.items():
        if c.get(key, only) != only:
            raise ValueError(f"{CONFIG} says {key}={c[key]!r}, known is {only!r}")
    sizes = {ours: c.get(theirs) for ours, theirs in SIZES.items()}
    bad = [SIZES[k] for k, v in sizes.items() if type(v) is not int or v < 1]
    if bad:
        raise ValueError(f"{CONFIG} has no proper {', '.join(bad)}")
    exported = c.get("nanococonut")
    spec = exported.get("tokenizer") if isinstance(exported, dict) else None
    wte = tensors.get("wte.weight")  # its rows are the vocabulary, whatever the config says
    known = wte is not None and wte.dim() == 2
    vocab_size = len(wte) if known else GPTConfig.vocab_size - N_SPECIAL
    return GPTConfig(vocab_size=vocab_size, **sizes), spec if isinstance(spec, dict) else None


def _sizes_seen(tensors: dict[str, Tensor]) -> GPTConfig:
    """Sizes by the tensors alone. How many heads there are they do not show: 64 wide, as GPT-2."""
    wte, wpe = tensors.get("wte.weight"), tensors.get("wpe.weight")
    layers = {found[1] for key in tensors if (found := re.match(r"h\.(\d+)\.", key))}
    if wte is None or wpe is None or not wte.dim() == wpe.dim() == 2 or not layers:
        raise ValueError("it has no wte.weight, wpe.weight or layers")
    vocab_size, n_embd = wte.shape
    if n_embd % 64:
        raise ValueError(f"n_embd={n_embd} gives no heads of 64; put its {CONFIG} beside it")
    return GPTConfig(vocab_size, len(wpe), len(layers), n_embd // 64, n_embd)


if __name__ == "__main__":

    def main() -> None:
        from nanococonut.export import export  # it imports this module

        if len(sys.argv) != 4 or sys.argv[1] != "export":
            raise UserError(
                "two arguments are wanted: a run and a folder to write.\n"
                "python -m nanococonut.hub export out/prosqa FOLDER"
            )
        print(f"wrote {export(sys.argv[2], sys.argv[3])}")

    main_guard(main)
