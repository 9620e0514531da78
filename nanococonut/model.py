"""GPT-2 in one file: tensors in, tensors out.

The code follows karpathy/nanoGPT, with two differences that Coconut needs. The backbone takes
*embeddings*, because a thought is a vector and not a token. The caller passes the attention:
`attend(layer, q, k, v)` decides which keys a query sees. This file has causal attention and
attention over a KVCache; coconut.py has the attention over the blocks of a training batch.

Shapes: B sequences, T positions, C = n_embd, nh heads of hs = C / nh, V = vocab_size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from nanococonut.cache import KVCache

# attend(layer, q, k, v) -> y, each (B, nh, T, hs). With last_pos, q and y of the last layer are
# (B, nh, 1, hs)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = 50260  # GPT-2's 50257, then <bot>, <eot>, <latent>
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    smear: bool = False  # add W x_(t-1) to the input embedding x_t; GPT-2 does not
    wte_init_std: float = 0.02
    wpe_init_std: float = 0.02
    thought: str = "hidden"  # input of a latent step: "hidden", "soft", "projected" or "fixed"
    soft_temperature: float = 1.0  # "soft": temperature of the softmax over the vocabulary
    soft_top_k: int = 0  # "soft": average only the k most probable tokens (0: all)
    stop: bool = False  # add a classifier that decides when to stop thinking


def causal_attention(layer: int, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Attend to the same and earlier positions. Right-padding needs no mask."""
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


def cached_attention(
    cache: KVCache, pos: Tensor, bias: Tensor, layer: int, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Append k and v to the cache, then attend to the cache.

    pos   (B, T)           positions of the queries and the new keys
    bias  (B, 1, T, span)  cache.attention_bias(pos, span), the same for all layers
    """
    cache.append(layer, k, v, pos)
    span = bias.shape[-1]
    keys, values = cache.data[layer, :, :, :, :span]  # (B, nh, span, hs) each
    # on a CPU, a bfloat16 model has a float32 cache
    y = F.scaled_dot_product_attention(q.to(keys.dtype), keys, values, attn_mask=bias)
    return y.to(q.dtype)


def at_position(x: Tensor, pos: Tensor) -> Tensor:
    """Return x[b, pos[b]] of every sequence b, (B, 1, C)."""
    return x[torch.arange(len(x), device=x.device), pos][:, None]


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer  # tells `attend` which keys and values to use
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, attend: Attend, last_pos: Tensor | None = None) -> Tensor:
        q, k, v = self.c_attn(x).chunk(3, dim=-1)  # (B, T, C) each
        if last_pos is not None:  # one query per sequence, but keys and values of all positions
            q = at_position(q, last_pos)  # (B, 1, C)
        q, k, v = (t.unflatten(2, (self.n_head, -1)).transpose(1, 2) for t in (q, k, v))
        y = attend(self.layer, q, k, v)  # (B, nh, T or 1, hs)
        y = y.transpose(1, 2).flatten(2)  # (B, T or 1, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")  # GPT-2's
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, attend: Attend, last_pos: Tensor | None = None) -> Tensor:
        y = self.attn(self.ln_1(x), attend, last_pos)
        if last_pos is not None:
            x = at_position(x, last_pos)
        x = x + y
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 of any size. model(idx) = head(backbone(wte(idx), positions))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd={config.n_embd} is not a multiple of {config.n_head} heads")
        self.config = config
        C = config.n_embd
        self.wte = nn.Embedding(config.vocab_size, C)
        self.wpe = nn.Embedding(config.block_size, C)
        self.smear = nn.Linear(C, C, bias=False) if config.smear else None
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(C)
        stds = {"wte.weight": config.wte_init_std, "wpe.weight": config.wpe_init_std}
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # GPT-2 scales the 2 * n_layer residual projections by 1 / sqrt(2 * n_layer)
                scale = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(p, std=stds.get(name, 0.02) / scale)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        # created last, unlike the smear, so that they do not change the random weights above
        self.project = nn.Linear(C, C) if config.thought == "projected" else None
        self.pause = nn.Embedding(1, C) if config.thought == "fixed" else None
        self.stop = nn.Linear(C, 1) if config.stop else None
        for module in filter(None, (self.smear, self.project, self.pause, self.stop)):
            for p in module.parameters():
                nn.init.zeros_(p)  # the model starts as plain GPT-2

    @property
    def attn_dropout(self) -> float:
        return self.config.dropout if self.training else 0.0

    def n_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def layer_weights(self) -> list[Tensor]:
        """Return weight and bias of ln_1, c_attn, c_proj, ln_2, c_fc and c_proj of each block, then
        of ln_f."""
        modules = []
        for b in self.h:
            modules += [b.ln_1, b.attn.c_attn, b.attn.c_proj, b.ln_2, b.mlp.c_fc, b.mlp.c_proj]
        return [w for m in (*modules, self.ln_f) for w in (m.weight, m.bias)]

    @property
    def cache_dtype(self) -> torch.dtype:
        """Return the dtype of KVCache.data: the weights' dtype, but float32 for bfloat16 on a CPU.

        Attention in bfloat16 takes a CPU two to three times as long.
        """
        w = self.wte.weight
        return torch.float32 if (w.device.type, w.dtype) == ("cpu", torch.bfloat16) else w.dtype

    def cache_shape(self, B: int, capacity: int) -> tuple[int, ...]:
        """Return the shape of KVCache.data for B sequences of up to `capacity` positions."""
        c = self.config
        return c.n_layer, 2, B, c.n_head, capacity, c.n_embd // c.n_head

    def new_cache(self, B: int, capacity: int) -> KVCache:
        """Return an empty cache for B sequences of up to `capacity` positions."""
        w = self.wte.weight
        data = w.new_zeros(self.cache_shape(B, capacity), dtype=self.cache_dtype)
        return KVCache(data, w.new_zeros(B, dtype=torch.int64))

    def block_input(self, emb: Tensor, pos: Tensor, prev_embedding: Tensor | None) -> Tensor:
        """Return the input (B, T, C) of the first block. The arguments are those of backbone."""
        if self.smear is not None:
            prev = torch.zeros_like(emb[:, 0]) if prev_embedding is None else prev_embedding
            emb = emb + self.smear(torch.cat([prev[:, None], emb[:, :-1]], dim=1))
        return self.drop(emb + self.wpe(pos))

    def backbone(
        self,
        emb: Tensor,
        pos: Tensor,
        attend: Attend | None = None,
        prev_embedding: Tensor | None = None,
        last_pos: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states (B, T, C) after the final LayerNorm.

        emb             (B, T, C)       input embeddings
        pos             (T,) or (B, T)  their positions
        attend                          attention of all layers (None: causal; needs last_pos=None)
        prev_embedding  (B, C)          input embedding before emb, for the smear (None: zeros)
        last_pos        (B,)            return only the hidden state at this position, (B, 1, C)
        """
        x = self.block_input(emb, pos, prev_embedding)
        attend = attend or partial(causal_attention, dropout=self.attn_dropout)
        *blocks, last = self.h
        for block in blocks:
            x = block(x, attend)
        # last_pos is exact: in the last layer, other positions are needed only as keys and values
        return self.ln_f(last(x, attend, last_pos))

    def append(self, cache: KVCache, emb: Tensor, prev_embedding: Tensor, span: int) -> Tensor:
        """Append an input embedding to each sequence of a cache. Return the hidden states (B, C).

        The lengths of the cache do not change.

        emb, prev_embedding  (B, C)  this input embedding, and the one before it
        span                         see KVCache.attention_bias
        """
        pos = cache.lengths[:, None]  # (B, 1)
        attend = partial(cached_attention, cache, pos, cache.attention_bias(pos, span))
        return self.backbone(emb[:, None], pos, attend, prev_embedding)[:, 0]

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states (..., C)."""
        return F.linear(hidden, self.wte.weight)  # tied weights

    def thought_embedding(self, hidden: Tensor) -> Tensor:
        """Return the thoughts (..., C): the input embeddings made from hidden states (..., C)."""
        match self.config.thought:
            case "hidden":
                return hidden  # Coconut (paper, section 3)
            case "projected":
                return hidden + self.project(hidden)
            case "fixed":
                return self.pause.weight.expand_as(hidden)
            case "soft":  # the average token embedding, weighted by the head's probabilities
                logits = self.head(hidden) / self.config.soft_temperature  # (..., V)
                if not self.config.soft_top_k:
                    return logits.softmax(-1) @ self.wte.weight
                best = logits.topk(self.config.soft_top_k, dim=-1)
                p = best.values.softmax(-1)  # (..., k)
                return (p[..., None, :] @ self.wte(best.indices))[..., 0, :]
            case other:
                raise ValueError(f"thought={other!r}: expected hidden, projected, fixed or soft")

    def stop_logit(self, hidden: Tensor) -> Tensor:
        """Return the stop logits (...): no further thought is needed if > 0 (paper, section 3)."""
        return self.stop(hidden)[..., 0]

    def forward(self, idx: Tensor) -> Tensor:
        """Return the logits (B, T, V) of token ids (B, T)."""
        pos = torch.arange(idx.shape[1], device=idx.device)
        return self.head(self.backbone(self.wte(idx), pos))
