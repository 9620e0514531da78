"""From settings to a model and its optimizers, the same for training and for measuring it."""

import torch

from nanococonut import hub
from nanococonut.config import TrainConfig
from nanococonut.curriculum import METHODS
from nanococonut.model import GPT, GPTConfig
from nanococonut.muon import Muon


def build_model(config: TrainConfig, vocab_size: int) -> GPT:
    """A model from random weights (torch's seed is the caller's), or GPT-2's from the hub's cache
    or a folder, whose size is then its own."""
    folder = None if config.init_from == "scratch" else hub.find_weights(config.init_from)
    if folder:
        return hub.load_gpt2(folder, vocab_size, config.dropout)
    slot = METHODS[config.method].slot
    return GPT(
        GPTConfig(
            vocab_size=vocab_size,
            block_size=config.block_size,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            dropout=config.dropout,
            smear=config.smear,
            token_std=config.token_std,
            position_std=config.position_std,
            thought=slot if slot in ("soft", "projected") else "hidden",
            soft_temperature=config.soft_temperature,
            soft_top_k=config.soft_top_k,
            stop=config.stop == "classifier",
        )
    )


def build_optimizers(config: TrainConfig, model: GPT) -> list[torch.optim.Optimizer]:
    """AdamW for all; or Muon for the matrices within the layers and those that map one stream of
    embeddings to another, AdamW for the rest. Muon's rate is config.muon_learning_rate."""
    inner = [part for part in (model.h, model.smear, model.project) if part is not None]
    matrices = [
        p
        for part in inner
        for p in part.parameters()
        if p.dim() == 2 and config.optimizer == "muon"
    ]
    chosen = {id(p) for p in matrices}
    adamw = torch.optim.AdamW(
        [p for p in model.parameters() if id(p) not in chosen],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
    )
    if not matrices:
        return [adamw]
    return [adamw, Muon(matrices, config.muon_learning_rate, config.weight_decay)]
