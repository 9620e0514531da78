"""Load GPT-2 weights: from the Hugging Face hub, a folder, a file, a run or a released checkpoint.

transformers is not needed. No code in a file is run: PyTorch files load with weights_only=True.
"""

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nanococonut.model import GPT, GPTConfig
from nanococonut.runtime.errors import UserError
from nanococonut.weights import checkpoint

GPT2_SIZES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"  # of weights in several files
GPT2_VOCAB, PADDED_VOCAB = 50257, 50304  # nanoGPT pads GPT-2's to a multiple of 64
N_SPECIAL_TOKENS = 3  # <bot>, <eot>, <latent>: their ids follow GPT-2's own
INIT_TOKEN = 16791  # "<<" in GPT-2's vocabulary: as in the released code, new tokens copy it
N_HEADS = {(12, 768): 12, (24, 1024): 16, (36, 1280): 20, (48, 1600): 25}  # by n_layer, n_embd
# transformers stores these as (in, out), because GPT-2's Conv1D is a transposed nn.Linear
CONV1D_WEIGHTS = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
# field of GPTConfig -> key of config.json
CONFIG_KEYS = {"block_size": "n_positions"} | {key: key for key in ("n_layer", "n_head", "n_embd")}
# keys of config.json for which our GPT implements only one value
FIXED_SETTINGS = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
MAX_SIZE = 10**6  # checked first, since the model is built before its tensors are compared
NANOGPT_ARGS = {*CONFIG_KEYS, "vocab_size", "dropout", "bias"}  # keys of nanoGPT's model_args
WRAPPER_PREFIX = re.compile(r"^(module\.|_orig_mod\.)*(base_causallm\.)?(transformer\.)?")
TIED = ("lm_head.weight", "embedding.weight")  # GPT-2's head and the released code's copy of wte
UNKNOWN = {  # tensor that a model does not have -> why it cannot be dropped
    **dict.fromkeys(TIED, "differs from wte.weight, to which it should be tied"),
    "project.weight": "is used only by --method=projected",
    "pause.weight": "is used only by --method=pause_multipass",
}
MASKS = (".attn.bias", ".attn.masked_bias")  # old files store the causal mask
ACCEPTED = (
    f"Give {', '.join(GPT2_SIZES)}, a folder with a GPT-2's {CONFIG_NAME} and {WEIGHTS_NAME} (or "
    "pytorch_model.bin), one such file, one of our runs, a released checkpoint, or nanoGPT's "
    "ckpt.pt."
)
Spec = dict[str, Any]  # Tokenizer.spec


class Weights(NamedTuple):
    """The content of a weights file, with the tensor names and layouts of our GPT."""

    config: GPTConfig
    tensors: dict[str, Tensor]
    spec: Spec | None = None  # of its tokenizer, if the file names one


class WeightsUnavailable(UserError):
    """The weights are neither cached nor downloadable. train.py may use its fallback config."""


def load_pretrained(name_or_path: str, dropout: float = 0.0) -> GPT:
    """Return a GPT with pretrained weights. name_or_path: any value of --init_from."""
    return load_gpt2(resolve_weights(name_or_path), dropout=dropout)


def resolve_weights(init_from: str) -> Path:
    """Return the path of the weights. Download one of GPT2_SIZES if it is not cached.

    Raise WeightsUnavailable if the hub cannot be reached, UserError if the path has no weights.
    """
    if init_from in GPT2_SIZES:  # even if a folder has this name; for that, use ./gpt2
        return _from_hub(init_from)
    path = Path(init_from)
    if not path.exists():
        raise UserError(f"no weights at {init_from!r}: no such file or folder.\n{ACCEPTED}")
    if path.is_dir() and not checkpoint.is_run(path) and not _weights_file(path).is_file():
        raise UserError(f"no weights in {init_from!r}: it has no {WEIGHTS_NAME}.\n{ACCEPTED}")
    return path


def load_gpt2(
    path: str | Path,
    vocab_size: int | None = None,
    dropout: float = 0.0,
    spec: Spec | None = None,
    extra: dict[str, Any] | None = None,
) -> GPT:
    """Return a GPT in fp32 with the weights at `path`, which also decide its sizes.

    path        as returned by resolve_weights
    vocab_size  None: the checkpoint's. Else it may be N_SPECIAL_TOKENS larger (the new tokens
                copy "<<") or smaller (the checkpoint's special tokens are dropped)
    spec        the tokenizer that the checkpoint should have been trained with
    extra       values for fields of GPTConfig that GPT-2 lacks, such as smear. Modules that the
                checkpoint lacks start at zero

    Raise UserError if anything does not fit. One error lists all bad tensors.
    """
    path = Path(path)
    source, tensors, own_spec = _read(path)
    vocab_size = vocab_size or source.vocab_size
    n_new = vocab_size - source.vocab_size
    same_vocab = abs(n_new) in (0, N_SPECIAL_TOKENS)
    if not same_vocab or (spec and own_spec and spec != own_spec):
        raise UserError(
            f"{path} was trained with another vocabulary: it has {source.vocab_size} tokens, this "
            f"run has {vocab_size}.\nUse its --tokenizer and data with the same words, or train "
            "with --init_from=scratch."
        )
    wte = tensors["wte.weight"]  # (V, C)
    for name in TIED:
        if name in tensors and torch.equal(tensors[name].float(), wte.float()):
            del tensors[name]
    init = wte[min(INIT_TOKEN, len(wte) - 1)]  # (C,)
    tensors["wte.weight"] = torch.cat([wte, init.expand(max(n_new, 0), -1)])[:vocab_size]
    extra = dict(extra or {})
    extra["smear"] = extra.get("smear") or source.smear  # weights trained with a smear need it
    config = replace(source, vocab_size=vocab_size, dropout=dropout, **extra)
    try:
        model = GPT(config)
    except (ValueError, RuntimeError) as e:  # RuntimeError: out of memory
        raise _not_gpt2(path, str(e).split("\n")[0]) from None
    if model.stop is None and "stop.weight" in tensors:  # it never changed the output
        print(f"{path}: its stop classifier is left out; --stop=classifier keeps it")
        tensors = {k: v for k, v in tensors.items() if not k.startswith("stop.")}
    ours = ("smear.", "project.", "pause.", "stop.")
    new = {name: p for name, p in model.state_dict().items() if name.startswith(ours)}
    tensors = new | tensors
    if problems := checkpoint.tensor_problems(model, tensors, UNKNOWN):
        rest = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise _not_gpt2(path, "; ".join(problems[:4]) + rest)
    model.load_state_dict(tensors)
    return model


def _not_gpt2(path: Path, reason: object) -> UserError:
    return UserError(f"{path} holds no GPT-2: {reason}.\n{ACCEPTED}")


# ---- reading


def _from_hub(name: str) -> Path:
    """Return the cache folder of a model on the hub. Download its two files if they are missing."""
    repo, files = f"openai-community/{name}", [CONFIG_NAME, WEIGHTS_NAME]
    cached = [try_to_load_from_cache(repo, file) for file in files]
    if all(isinstance(file, str) for file in cached):
        return Path(cached[0]).parent  # without asking the hub for a newer version
    try:
        folder = Path(snapshot_download(repo, allow_patterns=files))
        for file in files:
            (folder / file).stat()  # offline, snapshot_download may return an incomplete download
        return folder
    except Exception as e:  # anything that the hub's HTTP client raises
        raise WeightsUnavailable(
            f"no weights of {name!r}: not in {constants.HF_HUB_CACHE}, and the hub cannot be "
            f"reached ({type(e).__name__}).\nGive a folder, downloaded elsewhere by `hf download "
            f"{repo} {' '.join(files)} --local-dir FOLDER`, or train from scratch "
            "(config/prosqa_small.py)."
        ) from None


def _read(path: Path) -> Weights:
    """Read weights in any of the formats of ACCEPTED. Raise UserError for any other."""
    if path.name == WEIGHTS_NAME and checkpoint.is_run(path.parent):
        path = path.parent
    if checkpoint.is_run(path):
        model, tokenizer, _ = checkpoint.load(path)
        return Weights(model.config, model.state_dict(), tokenizer.spec)
    file = _weights_file(path) if path.is_dir() else path
    readers = {".safetensors": load_file, ".json": _load_shards}
    try:
        state = readers.get(file.suffix, _load_torch)(file)
        if isinstance(state, dict) and "model_args" in state:
            return _from_nanogpt(state)
        tensors = _rename(state)
        settings = _read_config(file.with_name(CONFIG_NAME), tensors)
        sizes = _read_sizes(settings, CONFIG_KEYS)
    except (OSError, ValueError, RecursionError, SafetensorError) as e:
        raise _not_gpt2(path, e) from None
    config = GPTConfig(vocab_size=len(tensors["wte.weight"]), **sizes)
    tensors = {
        k: v.mT if k.endswith(CONV1D_WEIGHTS) and v.dim() > 1 else v for k, v in tensors.items()
    }
    ours = settings.get("nanococonut")  # written by export.py
    return Weights(config, tensors, ours.get("tokenizer") if isinstance(ours, dict) else None)


def _from_nanogpt(saved: dict[str, Any]) -> Weights:
    """Return the weights in nanoGPT's ckpt.pt, without the rows that pad the vocabulary.

    nanoGPT's GELU is exact, GPT-2's and ours the tanh approximation: a difference below 0.0005.
    """
    tensors, args = _rename(saved.get("model")), saved["model_args"]
    sizes = _read_sizes(args, {field: field for field in CONFIG_KEYS})
    if extra := args.keys() - NANOGPT_ARGS:  # a fork, perhaps with another activation or norm
        raise ValueError(f"its model_args have {', '.join(sorted(map(str, extra)))}")
    padded = {k: v for k, v in tensors.items() if v.shape[:1] == (PADDED_VOCAB,)}
    tensors |= {k: v[:GPT2_VOCAB] for k, v in padded.items()}
    if not args.get("bias", True):  # our GPT always has biases; zeros change nothing
        for name in [name for name in tensors if name.startswith(("h.", "ln_f."))]:
            bias = torch.zeros(tensors[name].shape[:1])
            tensors.setdefault(name.replace("weight", "bias"), bias)
    return Weights(GPTConfig(vocab_size=len(tensors["wte.weight"]), **sizes), tensors)


def _weights_file(folder: Path) -> Path:
    """Return the path of a folder's weights. An index lists several safetensors files."""
    names = WEIGHTS_NAME, INDEX_NAME, "pytorch_model.bin", "ckpt.pt"  # the last is nanoGPT's
    files = [folder / name for name in names]
    return next((file for file in files if file.is_file()), files[0])


def _load_shards(index: Path) -> dict[str, Tensor]:
    """Load the safetensors files that an index lists. They must be in the index's folder."""
    content = json.loads(index.read_text(encoding="utf-8-sig"))
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    names = {str(n) for n in weight_map.values()} if isinstance(weight_map, dict) else set()
    if not names or any(Path(n).name != n for n in names):
        raise ValueError(f"{index.name} names no files")
    return {k: v for n in sorted(names) for k, v in load_file(index.with_name(n)).items()}


def _load_torch(file: Path) -> Any:
    """Load a file of torch.save, which the released code and nanoGPT use. Never run its code."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the ValueError below says what is wrong
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged or malicious pickle may raise anything
        raise ValueError(
            f"neither safetensors nor a state dict of plain tensors ({type(e).__name__}), and "
            "nothing else is unpickled"
        ) from None


def _rename(state: Any) -> dict[str, Tensor]:
    """Return the state dict with our GPT's names and without masks, or raise ValueError."""

    def is_dense(x: Any) -> bool:
        return isinstance(x, Tensor) and x.layout == torch.strided and not x.is_meta

    is_dict = isinstance(state, dict) and len(state) > 0
    if not is_dict or not all(type(k) is str and is_dense(v) for k, v in state.items()):
        raise ValueError("not a state dict of names and tensors")
    tensors = {WRAPPER_PREFIX.sub("", k): v for k, v in state.items() if not k.endswith(MASKS)}
    wte = tensors.get("wte.weight")
    if wte is None:
        raise ValueError("wte.weight is missing")
    if wte.dim() != 2 or len(wte) == 0:
        raise ValueError(f"wte.weight is {tuple(wte.shape)}, expected (tokens, n_embd)")
    return tensors


def _read_config(file: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the settings in a config.json. Raise ValueError if our GPT does not implement them.

    Weights of one of GPT-2's own sizes, as in released checkpoints, need no config.json.
    """
    n_layer = len({name.split(".")[1] for name in tensors if name.startswith("h.")})
    n_embd = tensors["wte.weight"].shape[1]
    n_head = N_HEADS.get((n_layer, n_embd))
    if n_head and not file.is_file():
        return {"n_positions": 1024, "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
    if not file.is_file():
        raise UserError(
            f"{file.parent} has no {CONFIG_NAME} next to its weights, so their sizes are unknown.\n"
            "Copy it there, for example with `hf download openai-community/gpt2 "
            f"{CONFIG_NAME} --local-dir {file.parent}`."
        )
    settings = json.loads(file.read_text(encoding="utf-8-sig"))
    if not isinstance(settings, dict):
        raise ValueError(f"{CONFIG_NAME} is not a JSON object")
    for key, value in FIXED_SETTINGS.items():
        if settings.get(key, value) != value:
            raise ValueError(f"{CONFIG_NAME} has {key}={settings[key]!r}, expected {value!r}")
    return settings


def _read_sizes(settings: Any, keys: dict[str, str]) -> dict[str, int]:
    """Return the sizes in settings. keys: field of GPTConfig -> key of settings."""
    settings = settings if isinstance(settings, dict) else {}
    sizes = {field: settings.get(key) for field, key in keys.items()}
    bad = [keys[f] for f, n in sizes.items() if type(n) is not int or not 0 < n < MAX_SIZE]
    if bad:
        raise ValueError(f"its settings have no valid {', '.join(bad)}")
    return sizes
