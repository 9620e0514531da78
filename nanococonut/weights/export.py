"""Export a run as a Hugging Face folder for transformers: weights, tokenizer and a model card.

    python -m nanococonut.weights.export out/RUN FOLDER

transformers is not needed: the files are plain JSON and text.
"""

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import tiktoken.load
from jinja2 import StrictUndefined, Template
from safetensors.torch import save_file

from nanococonut.curriculum import METHODS
from nanococonut.model import GPT, GPTConfig
from nanococonut.runtime.errors import UserError, run_main
from nanococonut.tokenizer import BOT, EOS, EOT, LATENT, Tokenizer
from nanococonut.weights import checkpoint
from nanococonut.weights.pretrained import (
    CONFIG_KEYS,
    CONFIG_NAME,
    CONV1D_WEIGHTS,
    FIXED_SETTINGS,
    WEIGHTS_NAME,
)

# fields of GPTConfig that a GPT-2 may set; with any other, transformers cannot run the model
GPT2_FIELDS = {*CONFIG_KEYS, "vocab_size", "dropout", "wte_init_std", "wpe_init_std"}
OPENAI_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
EXAMPLES = {  # task -> question in the model card, if the run was trained on the task's own data
    "prosqa": "Tom is a terpus. Sam is a gorpus. Every terpus is a lempus. "
    "Every gorpus is a zumpus. Is Tom a lempus or zumpus?",
    "prontoqa": "Max is a vumpus. Every vumpus is a lempus. Lempuses are not windy. Each impus is "
    "windy. True or false: Max is not windy.",
    "gsm8k": "Tom has 3 apples and buys 2 bags of 4. How many apples does he have?",
}


def export(run: str | Path, folder: str | Path) -> Path:
    """Write a run's best checkpoint to `folder`, all of it or nothing. Return the folder.

    Raise UserError if the folder exists, or if the model or its vocabulary is not GPT-2's.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} exists already.\nGive a folder that does not exist yet.")
    model, tokenizer, manifest = checkpoint.load(run)
    _check_exportable(run, model, tokenizer)
    eos = {"bos_token_id": tokenizer.eos, "eos_token_id": tokenizer.eos}
    texts = {
        CONFIG_NAME: _json(_config(model, tokenizer, manifest) | eos),
        "generation_config.json": _json(eos | {"pad_token_id": tokenizer.eos, "do_sample": False}),
        "README.md": _card(model, manifest),
        **_tokenizer_files(tokenizer, model.config),
    }
    weights = {
        f"transformer.{name}": (p.t() if name.endswith(CONV1D_WEIGHTS) else p).contiguous()
        for name, p in model.state_dict().items()
    }
    with checkpoint.new_folder(folder) as new:
        save_file(weights, new / WEIGHTS_NAME, metadata={"format": "pt"})
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8")
    return folder


def _check_exportable(run: str | Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Raise UserError if the model or its vocabulary is not GPT-2's."""
    config = model.config
    extra = [
        f"{f.name}={getattr(config, f.name)!r}"
        for f in fields(GPTConfig)
        if f.name not in GPT2_FIELDS and getattr(config, f.name) != f.default
    ]
    if tokenizer.spec["kind"] != "gpt2":
        extra.append(f"tokenizer {tokenizer.spec['kind']!r}")
    if extra:
        raise UserError(
            f"{run} is not a plain GPT-2, it has {', '.join(extra)}: transformers cannot run it.\n"
            "Train without these settings, or share the checkpoint folder instead."
        )


def _json(data: Any) -> str:
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def _config(model: GPT, tokenizer: Tokenizer, manifest: dict[str, Any]) -> dict[str, Any]:
    ours = {"tokenizer": tokenizer.spec, "n_thoughts": manifest["n_thoughts"]}
    return {
        "architectures": ["GPT2LMHeadModel"],
        **FIXED_SETTINGS,
        "vocab_size": model.config.vocab_size,
        **{key: getattr(model.config, field) for field, key in CONFIG_KEYS.items()},
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), model.config.dropout),
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "nanococonut": ours | {"method": manifest["method"]},
    }


def _card(model: GPT, manifest: dict[str, Any]) -> str:
    """Return the model card: how the model was trained, and a program that runs it."""
    config, question = manifest["config"], "a question, written as in the training data"
    if not config["data"] and not config.get("valid_data"):
        question = EXAMPLES[config["task"]]
    text = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    template = Template(text, trim_blocks=True, undefined=StrictUndefined)
    facts = {
        # the commit of the training; a bundled checkpoint's manifest["commit"] is the bundling's
        "commit": manifest.get("trained_with", manifest)["commit"],
        "rules": METHODS[manifest["method"]],
        "n_params": model.n_params(),
        "question": repr(question + "\n"),  # in sentences: GPT-2 has no compact style
    }
    return template.render(manifest | facts) + "\n"


def _tokenizer_files(tokenizer: Tokenizer, config: GPTConfig) -> dict[str, str]:
    """Return file name -> text of the files that give AutoTokenizer the ids of `tokenizer`."""
    special = {EOS: tokenizer.eos, BOT: tokenizer.bot, EOT: tokenizer.eot, LATENT: tokenizer.latent}
    special = {name: i for name, i in special.items() if i < config.vocab_size}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "added_tokens_decoder": {
            str(i): {"content": name, "special": True, **flags} for name, i in special.items()
        },
        "model_input_names": ["input_ids", "attention_mask"],  # no token_type_ids
        "model_max_length": config.block_size,
        "clean_up_tokenization_spaces": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), EOS),
        "additional_special_tokens": [name for name in special if name != EOS],
    }
    files = {"tokenizer_config.json": _json(settings)}
    # OpenAI's two files, from which tiktoken builds the encoding, are in its cache
    for name, source in (("merges.txt", "vocab.bpe"), ("vocab.json", "encoder.json")):
        files[name] = tiktoken.load.read_file_cached(OPENAI_URL + source).decode()
    return files


def main() -> None:
    if "--help" in sys.argv:
        print(__doc__.strip())
        return
    if len(sys.argv) != 3 or sys.argv[1].startswith("-"):
        raise UserError(
            f"expected a run and a folder to write, got {' '.join(sys.argv[1:]) or 'nothing'}.\n"
            "python -m nanococonut.weights.export out/prosqa FOLDER"
        )
    print(f"wrote {export(sys.argv[1], sys.argv[2])}")


if __name__ == "__main__":
    run_main(main)
