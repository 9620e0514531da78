"""A checkpoint as a Hugging Face folder: what transformers loads, and a card that says what it is.

Tokenizers are written as the plain JSON they are, so neither transformers nor tokenizers is needed.
"""

import json
import os
import re
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from nanococonut import checkpoint, hub
from nanococonut.config import TrainConfig, build
from nanococonut.curriculum import METHODS
from nanococonut.errors import UserError
from nanococonut.loader import render_question
from nanococonut.model import GPT, GPTConfig
from nanococonut.tokenizer import BOT, EOS, EOT, LATENT, Tokenizer

# sizes and first values; any other switch of GPTConfig makes a model that GPT-2 is not
PLAIN = {*hub.SIZES, "vocab_size", "dropout", "token_std", "position_std"}
TENSOR = re.compile(
    r"(wte|wpe)\.weight|ln_f\.(weight|bias)"
    r"|h\.\d+\.(ln_1|ln_2|attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.(weight|bias)"
)
PATHS = {"data", "valid_data", "init_from", "fallback"}  # the card shows their last part only


def export(run: str | Path, folder: str | Path) -> Path:
    """Write a run's best checkpoint to `folder`, which must not exist: all of it or nothing.

    Raises UserError, also where the model has what GPT-2 has not.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} exists already.\nGive a folder that is not there yet.")
    model, tokenizer, manifest = checkpoint.load(run)
    _refuse_other_models(run, model)
    texts = {
        hub.CONFIG: _json(_config(model, tokenizer, manifest)),
        "generation_config.json": _json(
            {"bos_token_id": tokenizer.eos, "eos_token_id": tokenizer.eos}
            | {"pad_token_id": tokenizer.eos, "do_sample": False}
        ),
        "README.md": card(model, manifest),
        **tokenizer_files(tokenizer, model.config.block_size),
    }
    weights = {
        f"transformer.{key}": (p.t() if key.endswith(hub.TRANSPOSED) else p).contiguous()
        for key, p in model.state_dict().items()
    }
    temporary = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(weights, temporary / hub.WEIGHTS, metadata={"format": "pt"})
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        os.rename(temporary, folder)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"{folder} could not be written: {e}.\nMake room or choose another folder."
        ) from None
    return folder


def _json(data: Any) -> str:
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def _refuse_other_models(run: str | Path, model: GPT) -> None:
    switches = [
        f"{f.name}={getattr(model.config, f.name)!r}"
        for f in fields(GPTConfig)
        if f.name not in PLAIN and getattr(model.config, f.name) != f.default
    ]
    tensors = [key for key in model.state_dict() if not TENSOR.fullmatch(key)]
    if switches or tensors:
        raise UserError(
            f"{run} is no plain GPT-2, it has {', '.join(switches + tensors[:3])}: transformers "
            "cannot run it.\nTrain without, or share the checkpoint folder itself."
        )


def _config(model: GPT, tokenizer: Tokenizer, manifest: dict[str, Any]) -> dict[str, Any]:
    sizes = {theirs: getattr(model.config, ours) for ours, theirs in hub.SIZES.items()}
    drops = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), model.config.dropout)
    ids = {"bos_token_id": tokenizer.eos, "eos_token_id": tokenizer.eos}
    ours = {"tokenizer": tokenizer.spec, "n_thoughts": manifest["n_thoughts"]}
    return {
        "architectures": ["GPT2LMHeadModel"],
        **hub.FIXED,
        "vocab_size": tokenizer.vocab_size,
        **sizes,
        **drops,
        **ids,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "nanococonut": ours | {"method": manifest["method"]},
    }


# -- tokenizers


def _letters() -> dict[int, str]:
    """GPT-2's letter for each byte: itself where it is printable Latin-1, else one from 256 on."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) if b in shown else chr(256 + hidden.index(b)) for b in range(256)}


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens that byte-pair encoding puts together last to make this one."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:], strict=False)]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _all_merges(token: bytes, ranks: dict[bytes, int]) -> list[list[bytes]]:
    """Every two tokens that make this one: a word list was not learnt by merging, and tiktoken
    spells unknown words with whatever of it fits."""
    cuts = ([token[:i], token[i:]] for i in range(1, len(token)))
    return [[a, b] for a, b in cuts if a in ranks and b in ranks]


def tokenizer_files(tokenizer: Tokenizer, longest: int) -> dict[str, str]:
    """File name -> text, such that AutoTokenizer gives the ids of `tokenizer`.

    longest: positions of the model (model_max_length).
    """
    ranks, letter = tokenizer.encoding._mergeable_ranks, _letters()

    def word(token: bytes) -> str:
        return "".join(letter[b] for b in token)

    of_gpt2 = tokenizer.spec["kind"] == "gpt2"
    longer = sorted((t for t in ranks if len(t) > 1), key=ranks.__getitem__)
    if of_gpt2:
        merges = [_last_merge(token, ranks) for token in longer]
    else:
        merges = [merge for token in longer for merge in _all_merges(token, ranks)]
    lines = [f"{word(a)} {word(b)}" for a, b in merges]
    vocab = {word(token): i for token, i in sorted(ranks.items(), key=lambda item: item[1])}
    vocab[EOS] = tokenizer.eos
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = of_gpt2  # GPT-2's own pattern
    cut = {"type": "Split", "pattern": {"Regex": tokenizer.encoding._pat_str}}
    cut |= {"behavior": "Isolated", "invert": False}
    special = {EOS: tokenizer.eos, BOT: tokenizer.bot, EOT: tokenizer.eot, LATENT: tokenizer.latent}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    flags["special"] = True
    model = dict.fromkeys(("dropout", "unk_token"))
    model |= {"continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False}
    model |= {"byte_fallback": False, "ignore_merges": not of_gpt2}  # words are looked up whole
    files = {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": i, "content": name, **flags} for name, i in special.items()],
            "normalizer": None,
            "pre_tokenizer": byte_level
            if of_gpt2
            else {"type": "Sequence", "pretokenizers": [cut, byte_level]},
            "post_processor": None,
            "decoder": byte_level,
            "model": {"type": "BPE", **model, "vocab": vocab, "merges": lines},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],  # GPT-2 has no token types
            "model_max_length": longest,
            "clean_up_tokenization_spaces": False,
            **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), EOS),
            "additional_special_tokens": [BOT, EOT, LATENT],
        },
    }
    if of_gpt2:
        files["vocab.json"] = vocab
    texts = {name: _json(data) for name, data in files.items()}
    if of_gpt2:
        texts["merges.txt"] = "\n".join(["#version: 0.2", *lines, ""])
    return texts


# -- the card

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, coconut, nanococonut]
---

# GPT-2 trained by {method}, {slots}: {n_thoughts}

A GPT-2 of {n_params:,} parameters, trained by nanococonut with method `{method}` (after Coconut,
[arXiv 2412.06769](https://arxiv.org/abs/2412.06769)).

| | |
|---|---|
| method | {method} |
| stage | {stage} |
| optimizer steps | {step} |
| {slots} before an answer | {n_thoughts} |
| minutes of training | {minutes:.1f} on {device} |
| commit | {commit} |
| versions | {versions} |

The question in the code is an example: write yours the way the training rows do.

{how}
<details><summary>All settings</summary>

```
{settings}
```
</details>
"""
EXAMPLES = {  # a question of each task
    "prosqa": "Tom is a terpus. Every brimpus is a lempus. Sam is a gorpus. Every terpus is a "
    "brimpus. Is Tom a lempus or gorpus?",
    "prontoqa": "Every vumpus is a lempus. Lempuses are not windy. Each impus is windy. Max is a "
    "vumpus. True or false: Max is not windy.",
    "gsm8k": "Tom has 3 apples and buys 2 bags of 4. How many apples does he have?",
}
WITHOUT = """\
{reads}a stock `generate` is all that it needs. In this folder:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")
ids = tokenizer({question!r}{behind}, return_tensors="pt")
out = model.generate(**ids, max_new_tokens={max_new_tokens})[0, ids["input_ids"].shape[1] :]
print(tokenizer.decode(out, skip_special_tokens=True))
```

With nanococonut:

```python
{ours}```
"""
WORDS = """\
It writes its answer, and its steps if it has any, as words: """
PAUSES = """\
Its pauses are tokens, read along with the question. Where the prompt holds them, and the markers
around them, """
WITH = """\
A stock `generate` **does not run its thoughts**: behind `<|start-latent|>` the last hidden state is
fed back as the next input, once for each thought, before `<|end-latent|>` and the words. In plain
torch, in this folder:

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")
embed = model.get_input_embeddings()
ids = tokenizer({question!r} + "<|start-latent|>", return_tensors="pt")["input_ids"]
end = tokenizer("<|end-latent|>", return_tensors="pt")["input_ids"]
with torch.no_grad():
    e = embed(ids)
    for _ in range({n_thoughts}):  # a thought is the last hidden state, after the final LayerNorm
        thought = model.transformer(inputs_embeds=e).last_hidden_state[:, -1:]
        e = torch.cat([e, thought], dim=1)
    e = torch.cat([e, embed(end)], dim=1)
    mask = torch.ones(e.shape[:2], dtype=torch.long)
    out = model.generate(inputs_embeds=e, attention_mask=mask, max_new_tokens={max_new_tokens})
print(tokenizer.decode(out[0], skip_special_tokens=True))
```

With nanococonut, which keeps a cache:

```python
{ours}```
"""
OURS = """import json

from nanococonut.curriculum import Curriculum
from nanococonut.engine import Engine
from nanococonut.model import GPT
from nanococonut.tokenizer import Tokenizer

own = json.load(open("config.json"))["nanococonut"]
tokenizer, layout = Tokenizer.from_spec(own["tokenizer"]), Curriculum(own["method"])
engine = Engine(GPT.from_pretrained("."), tokenizer, layout)
print(engine.generate([{question!r}], own["n_thoughts"], {max_new_tokens}).text[0])
"""


def card(model: GPT, manifest: dict[str, Any]) -> str:
    """README.md: what it is, how it was trained, how to run it."""
    trained_as, method = build(TrainConfig, manifest["config"]), manifest["method"]
    config = asdict(trained_as)
    trained = manifest.get("trained_with", manifest)  # a bundled one was written by another commit
    markers, n = METHODS[method].markers, manifest["n_thoughts"]
    pauses = n if METHODS[method].slot == "pause" else 0
    held = f' + "{LATENT}" * {pauses}' if pauses else ""
    shown = {k: v for k, v in config.items() if k not in checkpoint.FREE}
    shown |= {k: Path(shown[k]).name for k in PATHS if shown[k]}
    known = {
        **manifest,
        "n_params": model.n_params(),
        "commit": trained["commit"],
        "versions": ", ".join(f"{k} {v}" for k, v in trained["versions"].items()),
        "question": render_question(trained_as, EXAMPLES[trained_as.task]),
        "max_new_tokens": config["max_new_tokens"],
        "slots": "pauses" if METHODS[method].slot == "pause" else "thoughts",
        "reads": PAUSES if pauses else WORDS,
        "behind": f' + "{BOT}"{held} + "{EOT}"' if markers else "",
        "settings": "\n".join(f"{k} = {v!r}" for k, v in shown.items()),
    }
    # a thought is the hidden state: what else may be fed back makes a model that is not exported
    how = WITH if n and not pauses else WITHOUT
    return CARD.format(**known, how=how.format(**known, ours=OURS.format(**known)))
