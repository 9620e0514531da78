"""GPT-2 in one file: tensors in, tensors out.

Follows "Language Models are Unsupervised Multitask Learners" (Radford et al. 2019) as published on
the Hugging Face hub: pre-LayerNorm, learned positions, tanh-GELU, biases, head tied to the token
embedding. In manner it follows karpathy/nanoGPT. It differs in two ways that Coconut needs:

- it takes input *embeddings*, because a thought is a vector and no token;
- attention's memory is the caller's: `attend(layer, q, k, v)` decides what a query may see. Here
  are the two simple ones, plain causal attention and attention over a KVCache; the differentiable
  one of training is in coconut.py.

Shapes: B rows, T positions, C = n_embd, nh heads of hs = C / nh, V = vocab_size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nanococonut.cache import KVCache

# (layer, q, k, v), each (B, nh, T, hs) -> (B, nh, T, hs)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
BlockAttend = Callable[[Tensor, Tensor, Tensor], Tensor]  # the same with its layer given


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = 50260  # GPT-2's 50257 and <bot>, <eot>, <latent>
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    smear: bool = False  # x_t += W x_(t-1) on the input embeddings; off for GPT-2
    wte_init_std: float = 0.02  # of the token embeddings at first; GPT-2's
    wpe_init_std: float = 0.02
    thought: str = "hidden"  # what is fed back: the hidden state, or "soft", or "projected"
    soft_temperature: float = 1.0  # "soft": of the softmax that weighs the token embeddings
    soft_top_k: int = 0  # "soft": only the k most probable tokens (0: all)
    stop: bool = False  # a classifier that says when the thoughts are enough


def causal_attention(layer: int, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Every position sees itself and what came before. Right-padding needs no mask."""
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


def cached_attention(
    cache: KVCache, pos: Tensor, span: int, layer: int, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Append k, v at pos (B, T) and attend to the cache: position p sees the keys [0, p].

    span: no key at or behind it is looked at (a host integer, so that no device is asked).
    """
    cache.append(layer, k, v, pos)
    keys, values = cache.data[layer, :, :, :, :span].to(q.dtype)  # (B, nh, span, hs) each
    seen = torch.arange(span, device=pos.device) <= pos[:, None, :, None]  # (B, 1, T, span)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, attend: BlockAttend, only: Tensor | None = None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, nh, T, hs) each
        if only is not None:
            q = q[torch.arange(B, device=x.device), :, only][:, :, None]  # (B, nh, 1, hs)
        y = attend(q, k, v).transpose(1, 2).flatten(2)  # (B, T or 1, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.recompute_mlp = False  # in backward make the MLP anew, the most of what is kept for it

    def forward(self, x: Tensor, attend: BlockAttend, only: Tensor | None = None) -> Tensor:
        y = self.attn(self.ln_1(x), attend, only)
        if only is not None:
            x = x[torch.arange(len(x), device=x.device), only][:, None]  # (B, 1, C)
        x = x + y
        if self.recompute_mlp and self.training:
            h, drawn = self.ln_2(x), self.mlp.dropout.p > 0
            return x + checkpoint(self.mlp, h, use_reentrant=False, preserve_rng_state=drawn)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 of any size. `model(idx)` returns logits; its parts are `embed`, `backbone`, `head`."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd={config.n_embd} does not divide into {config.n_head} heads")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.smear = nn.Linear(config.n_embd, config.n_embd, bias=False) if config.smear else None
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd)
        stds = {"wte.weight": config.wte_init_std, "wpe.weight": config.wpe_init_std}
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # GPT-2's init: the projections into the residual stream shrink with its depth
                depth = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(p, std=stds.get(name, 0.02) / depth)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        # made last, and all zero: they draw no random number that the rest would miss
        projected = config.thought == "projected"
        self.project = nn.Linear(config.n_embd, config.n_embd) if projected else None
        self.stop = nn.Linear(config.n_embd, 1) if config.stop else None
        for added in (self.smear, self.project, self.stop):
            for p in added.parameters() if added is not None else ():
                nn.init.zeros_(p)  # starts as plain GPT-2

    def n_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def new_cache(
        self,
        batch: int,
        capacity: int,
        memory: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> KVCache:
        """A cache of this model's shape, in its dtype and on its device (memory, lengths: see
        KVCache)."""
        c, w = self.config, self.wte.weight
        hs = c.n_embd // c.n_head
        return KVCache(c.n_layer, batch, c.n_head, capacity, hs, w.device, w.dtype, memory, lengths)

    def embed(self, idx: Tensor) -> Tensor:
        """Token ids (B, T) -> input embeddings (B, T, C), before smear and positions."""
        return self.wte(idx)

    def backbone(
        self,
        e: Tensor,
        pos: Tensor,
        attend: Attend | None = None,
        prev: Tensor | None = None,
        only: Tensor | None = None,
    ) -> Tensor:
        """Input embeddings e (B, T, C) at positions pos (T,) or (B, T) -> hidden states (B, T, C).

        The hidden states are those after the final LayerNorm: what the head reads and what Coconut
        feeds back. prev (B, C): the input embedding just before e, for the smear (None: nothing).
        only (B,): the one position of each row whose hidden state is wanted -> (B, 1, C). Of the
        others the last layer then makes keys and values and nothing else: exact, and with few
        layers much cheaper (attend has to mask for a single query).
        """
        x = e
        if self.smear is not None:
            first = torch.zeros_like(e[:, :1]) if prev is None else prev[:, None]
            x = e + self.smear(torch.cat([first, e[:, :-1]], dim=1))
        x = self.drop(x + self.wpe(pos))
        if attend is None:
            attend = partial(causal_attention, dropout=self.attn_dropout)
        for layer, block in enumerate(self.h):
            last = layer == len(self.h) - 1
            x = block(x, partial(attend, layer), only if last else None)
        return self.ln_f(x)

    def thought_embedding(self, hidden: Tensor) -> Tensor:
        """What a thought puts in place of a token's embedding: hidden states (..., C) -> (..., C).

        Coconut's is the hidden state itself (paper, section 3). "projected" adds a learned map that
        starts at zero; "soft" is the mean of the token embeddings, weighted by the probabilities
        that the head gives them."""
        if self.project is not None:
            return hidden + self.project(hidden)
        if self.config.thought == "hidden":
            return hidden
        logits = self.head(hidden) / self.config.soft_temperature
        if not self.config.soft_top_k:
            return logits.softmax(-1) @ self.wte.weight
        best = logits.topk(self.config.soft_top_k, dim=-1)
        p = best.values.softmax(-1)  # (..., k)
        return (p[..., None, :] @ self.wte(best.indices))[..., 0, :]

    def stop_logit(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., C) -> (...) the logit of "no further thought is needed" (paper,
        section 3: a binary classifier on latent thoughts). Only with config.stop."""
        return self.stop(hidden)[..., 0]

    @property
    def attn_dropout(self) -> float:
        return self.config.dropout if self.training else 0.0

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., C) -> logits (..., V); tied to the token embedding."""
        return F.linear(hidden, self.wte.weight)

    def forward(self, idx: Tensor) -> Tensor:
        """Token ids (B, T) -> logits at every position (B, T, V)."""
        pos = torch.arange(idx.shape[1], device=idx.device)
        return self.head(self.backbone(self.embed(idx), pos))
