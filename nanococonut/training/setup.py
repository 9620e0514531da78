"""Set up a run: config, tokenizer, model and optimizers."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from nanococonut.config import TrainConfig
from nanococonut.curriculum import METHODS
from nanococonut.data.examples import Example
from nanococonut.data.tasks import TASKS
from nanococonut.model import GPT, GPTConfig
from nanococonut.runtime.cli import make_config, parse_cli, read_config_file
from nanococonut.runtime.errors import UserError
from nanococonut.tokenizer import Tokenizer
from nanococonut.training.log import console
from nanococonut.training.muon import Muon
from nanococonut.weights import checkpoint, pretrained

BETA1 = 0.9  # of AdamW, in every recipe
WEIGHT_DECAY = 0.01  # the released code's, and torch's default


def load_config(argv: list[str], doc: str | None) -> tuple[TrainConfig, str, dict[str, str]]:
    """Return (config, run name, fallback info).

    The fallback info says which config was replaced by its fallback and why; {} if none was.

    doc: the script's __doc__, for --help
    """
    overrides, path = parse_cli(TrainConfig, argv, doc, config_file=True)
    has_file = path is not None
    if has_file:
        values = read_config_file(path, TrainConfig)
    elif overrides.get("resume") is True and type(out_dir := overrides.get("out_dir")) is str:
        path = out_dir  # the run's own settings
        values = checkpoint.read_manifest(checkpoint.resolve(out_dir))["config"]
    else:
        raise UserError(
            "no config file.\nGive one, as in: python train.py config/prosqa.py. "
            "To continue a run: python train.py --resume --out_dir=out/NAME."
        )
    config, fallback_info = make_config(TrainConfig, values, overrides), {}
    # a run's own settings: its checkpoint has the weights, so init_from is not read
    if has_file and (reason := _fallback_reason(config)):
        # never replace weights that the user asked for on the command line
        if "init_from" in overrides and "fallback" not in overrides:
            raise UserError(
                f"--init_from={config.init_from}: {reason}.\n"
                f"Leave it out to train {config.fallback}, or force it with --fallback=None."
            )
        fallback = str(Path(path).parent / config.fallback)
        console.print(f"[bold red]NOT TRAINING {path}[/]: {escape(reason)}.")
        console.print(f"[bold red]TRAINING {fallback} INSTEAD[/]. To prevent it: --fallback=None")
        fallback_info = {"instead_of": path, "because": reason}
        overrides = {k: v for k, v in overrides.items() if k not in ("init_from", "fallback")}
        config = make_config(TrainConfig, read_config_file(fallback, TrainConfig), overrides)
        path = fallback
    # a config file may serve several methods, but an option on the command line should matter
    if ignored := [f"--{name}" for name in overrides if name in config.unused]:
        how = f"by method {config.method} with this data and init_from"
        console.print(f"[bold red]NOT USED[/] {how}: {', '.join(ignored)}")
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "--tensorboard needs the package tensorboard, which is not installed.\n"
            "Run pip install tensorboard, or leave the option out."
        )
    return config, Path(path).stem, fallback_info


def _fallback_reason(config: TrainConfig) -> str:
    """Return why init_from cannot be trained here, or "". Raise UserError if it has no fallback."""
    no_gpu = not torch.cuda.is_available() and config.device in ("auto", "cpu")
    if config.init_from in pretrained.GPT2_SIZES and no_gpu and config.fallback:
        return f"no GPU to train {config.init_from!r} on"  # checked first: saves the download
    if config.init_from != "scratch":
        try:
            pretrained.resolve_weights(config.init_from)
        except pretrained.WeightsUnavailable as e:
            if not config.fallback:
                raise
            return str(e).split("\n")[0].rstrip(".")
    return ""


def init_tokenizer(config: TrainConfig, examples: list[Example] | None) -> Tokenizer:
    """Return GPT-2's tokenizer, or one with the words of the task and the training examples."""
    if config.tokenizer == "gpt2":
        return Tokenizer.gpt2()
    texts = (" ".join([x["question"], *x["steps"], x["answer"]]) for x in examples or ())
    words = re.findall(r"[A-Za-z]+|[0-9]+|[^\sA-Za-z0-9]", " ".join(texts))
    return Tokenizer.words([*TASKS[config.task].module.VOCABULARY, *words])


def init_model(
    config: TrainConfig, tokenizer: Tokenizer, saved: dict[str, Any] | None = None
) -> GPT:
    """Return a model with random weights (the caller seeds torch), or with those of init_from.

    saved: GPTConfig of the checkpoint that a run resumes from. Its weights replace all others, so
    init_from is not read: it may have moved, like data.

    Raise UserError if block_size exceeds the positions of the weights, or if an option does not
    fit the method or the vocabulary.
    """
    if saved:
        return GPT(GPTConfig(**saved))
    method = METHODS[config.method]
    if config.stop == "classifier" and not method.feeds_back:
        raise UserError(
            f"--stop=classifier needs latent thoughts, but method {config.method} has none.\n"
            "Leave it out, or choose a method with thoughts, such as coconut."
        )
    if config.soft_top_k > tokenizer.vocab_size:
        raise UserError(
            f"soft_top_k={config.soft_top_k} exceeds the vocabulary of "
            f"{tokenizer.vocab_size} tokens.\nUse a smaller number, or 0 for all tokens."
        )
    n_tokens = count_tokens(config, tokenizer)
    extra = dict(  # GPTConfig fields that GPT-2 lacks
        smear=config.smear,
        thought=method.thought_type if method.feeds_back else "hidden",
        soft_temperature=config.soft_temperature,
        soft_top_k=config.soft_top_k,
        stop=config.stop == "classifier",
    )
    if config.init_from == "scratch":
        names = ("block_size", "n_layer", "n_head", "n_embd", "dropout")
        sizes = {name: getattr(config, name) for name in names}
        # a small vocabulary learns faster from larger embeddings (docs/LOG.md); GPT-2 has 0.02
        sizes["wte_init_std"] = 0.1 if config.tokenizer == "words" else 0.02
        # the smear already encodes the order of tokens
        sizes["wpe_init_std"] = 0.0 if config.smear else 0.02
        try:
            return GPT(GPTConfig(vocab_size=n_tokens, **sizes, **extra))
        except RuntimeError as e:  # from the allocator
            raise UserError(
                f"the model cannot be allocated: {str(e).splitlines()[0]}\n"
                "Lower --n_embd, --n_layer or --block_size."
            ) from None
    path = pretrained.resolve_weights(config.init_from)
    model = pretrained.load_gpt2(path, n_tokens, config.dropout, tokenizer.spec, extra)
    if config.block_size > (n_positions := model.config.block_size):
        raise UserError(
            f"block_size={config.block_size}, but {config.init_from} has {n_positions} positions."
            f"\nUse --block_size={n_positions}."
        )
    return model


def count_tokens(config: TrainConfig, tokenizer: Tokenizer) -> int:
    """Return the model's vocabulary size, with <bot>, <eot> and <latent> only if they are used."""
    # as in the released code: in a CoT run, unused tokens would be in every softmax and drift away
    # from "<<", their initial value, before Coconut starts. Word-level models always have them,
    # because the models of bench/results were trained with them
    is_used = METHODS[config.method].markers or tokenizer.spec["kind"] == "words"
    return tokenizer.vocab_size if is_used else tokenizer.bot  # the special tokens come last


def init_optimizers(config: TrainConfig, model: GPT) -> list[torch.optim.Optimizer]:
    """Return [AdamW], or [AdamW, Muon] if muon_learning_rate > 0.

    Muon trains the matrices of the layers, the smear and the projection of thoughts; AdamW trains
    the other parameters, without the position embeddings if train_positions is False.
    """
    model.wpe.weight.requires_grad_(config.train_positions)
    matrices = []
    if config.muon_learning_rate:
        modules = [m for m in (model.h, model.smear, model.project) if m is not None]
        matrices = [p for m in modules for p in m.parameters() if p.dim() == 2]
    muon_ids = {id(p) for p in matrices}
    beta2 = 0.98 if matrices else 0.999  # small models, which use Muon, train for few steps
    adamw = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad and id(p) not in muon_ids],
        fused=True,
        lr=config.learning_rate,
        betas=(BETA1, beta2),
        weight_decay=WEIGHT_DECAY,
    )
    return [adamw, Muon(matrices, config.muon_learning_rate, WEIGHT_DECAY)] if matrices else [adamw]
