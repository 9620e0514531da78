"""From settings to a model and its optimizers, the same for training and for measuring it."""

import re
from typing import Any

import torch

from nanococonut.config import TrainConfig
from nanococonut.curriculum import METHODS
from nanococonut.data.examples import Example
from nanococonut.data.tasks import TASKS
from nanococonut.model import GPT, GPTConfig
from nanococonut.runtime.errors import UserError
from nanococonut.tokenizer import Tokenizer
from nanococonut.training.muon import Muon
from nanococonut.weights.pretrained import load_gpt2, resolve_weights

BETA1 = 0.9  # AdamW's first beta; every recipe has this one


def init_model(config: TrainConfig, tokenizer: Tokenizer) -> GPT:
    """A model from random weights (torch's seed is the caller's), or init_from's with their sizes;
    with config.recompute_mlp its MLPs are made anew in backward.

    Raises UserError where block_size, which rows are checked against, is more than the weights have
    positions for, and where a setting of the thoughts fits neither method nor vocabulary.
    """
    slot = METHODS[config.method].thought_type
    if config.stop == "classifier" and slot not in ("hidden", "soft", "projected"):
        raise UserError(
            f"--stop=classifier ends thoughts, and method {config.method} feeds none back.\n"
            "Leave it out, or choose a method with thoughts, such as coconut."
        )
    if config.soft_top_k > tokenizer.vocab_size:
        raise UserError(
            f"soft_top_k={config.soft_top_k} is more than the vocabulary has: "
            f"{tokenizer.vocab_size}.\nUse less, or 0 for all."
        )
    switches = dict(
        smear=config.smear,
        thought=slot if slot in ("soft", "projected") else "hidden",
        soft_temperature=config.soft_temperature,
        soft_top_k=config.soft_top_k,
        stop=config.stop == "classifier",
    )
    model = _sized(config, tokenizer, switches)
    for block in model.h:
        block.recompute_mlp = config.recompute_mlp
    return model


def _sized(config: TrainConfig, tokenizer: Tokenizer, switches: dict[str, Any]) -> GPT:
    if config.init_from == "scratch":
        return GPT(
            GPTConfig(
                vocab_size=tokenizer.vocab_size,
                block_size=config.block_size,
                n_layer=config.n_layer,
                n_head=config.n_head,
                n_embd=config.n_embd,
                dropout=config.dropout,
                wte_init_std=config.wte_init_std,
                # a smear knows the order already
                wpe_init_std=0.0 if config.smear else 0.02,
                **switches,
            )
        )
    path = resolve_weights(config.init_from)
    model = load_gpt2(path, tokenizer.vocab_size, config.dropout, tokenizer.spec, switches)
    if config.block_size > model.config.block_size:
        raise UserError(
            f"block_size={config.block_size}, and {config.init_from} has positions for "
            f"{model.config.block_size}.\nGive --block_size={model.config.block_size}."
        )
    return model


def init_optimizers(config: TrainConfig, model: GPT) -> list[torch.optim.Optimizer]:
    """AdamW for all; or Muon for the matrices within the layers and those that map one stream of
    embeddings to another, AdamW for the rest, if config.muon_learning_rate > 0."""
    inner = [part for part in (model.h, model.smear, model.project) if part is not None]
    matrices = [
        p
        for part in inner
        for p in part.parameters()
        if p.dim() == 2 and config.muon_learning_rate > 0
    ]
    chosen = {id(p) for p in matrices}
    adamw = torch.optim.AdamW(
        [p for p in model.parameters() if id(p) not in chosen],
        fused=model.wte.weight.is_cuda or None,  # None: as torch chooses
        lr=config.learning_rate,
        betas=(BETA1, config.beta2),
        weight_decay=config.weight_decay,
    )
    if not matrices:
        return [adamw]
    return [adamw, Muon(matrices, config.muon_learning_rate, config.weight_decay)]


def init_tokenizer(config: TrainConfig, rows: list[Example] | None) -> Tokenizer:
    """GPT-2's, or words: the task's own, and those of the rows that are trained on."""
    if config.tokenizer == "gpt2":
        return Tokenizer.gpt2()
    text = " ".join(" ".join([r["question"], *r["steps"], r["answer"]]) for r in rows or ())
    return Tokenizer.words(
        [*TASKS[config.task].words(), *re.findall(r"[A-Za-z]+|[0-9]+|[^\sA-Za-z0-9]", text)]
    )
