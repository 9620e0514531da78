"""Training of a GPT-2 on a CPU, in C: cpu_train.c, as one differentiable function."""

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._check import check_tensors
from kernels._compile import compile_c

COLS = 32  # n_embd must be a multiple of it


@dataclass(frozen=True)
class Rows:
    """The positions of B sequences, one sequence after another, without padding: N rows.

    first       (B + 1,)  first row of each sequence, then N
    n_prefix    (B,)      positions of the prefix, at least one
    n_thoughts  (B,)      thoughts after the prefix; the other positions are the suffix

    All int64, on a CPU. Raise ValueError if they do not fit together.
    """

    first: Tensor
    n_prefix: Tensor
    n_thoughts: Tensor

    def __post_init__(self) -> None:
        tensors, B = vars(self), len(self.n_prefix)
        check_tensors(**{name: (t, (B + (name == "first"),)) for name, t in tensors.items()})
        kinds = {(t.dtype, t.device.type) for t in tensors.values()}
        n_suffix = self.first.diff() - self.n_prefix - self.n_thoughts
        counts = torch.cat([self.n_prefix - 1, self.n_thoughts, n_suffix])
        if kinds != {(torch.int64, "cpu")} or self.first[0] or B == 0 or counts.min() < 0:
            raise ValueError(f"expected int64 rows of whole sequences on a CPU, got {self}")


def hidden_states(
    rows: Rows,
    emb: Tensor,
    pos: Tensor,
    weights: Sequence[Tensor],
    n_head: int,
    smear: Tensor | None = None,
) -> Tensor:
    """Return the hidden states (N, C) after the final LayerNorm, differentiable once. In a prefix,
    only the hidden state of the last position is computed; the others are zero.

    emb, pos  (N, C)  token and position embeddings; a thought has only the latter
    weights           those of GPT.layer_weights: weight and bias of ln_1, c_attn, c_proj, ln_2,
                      c_fc and c_proj of each layer, then of ln_f
    smear     (C, C)  weight of the smear, if there is one

    All float32, on a CPU; C is a multiple of 32. Raise ValueError otherwise, and OSError if
    compile_c does.
    """
    N, C = int(rows.first[-1]), emb.shape[1]
    layer = [(C,), (C,), (3 * C, C), (3 * C,), (C, C), (C,)]
    layer += [(C,), (C,), (4 * C, C), (4 * C,), (C, 4 * C), (C,)]
    shapes = [(N, C), (N, C), *layer * (len(weights) // 12), (C,), (C,)]
    tensors = [emb, pos, *weights]
    if smear is not None:
        shapes, tensors = [*shapes, (C, C)], [*tensors, smear]
    if [t.shape for t in tensors] != shapes or C % COLS or C % n_head:
        actual = [tuple(t.shape) for t in tensors]
        raise ValueError(
            f"expected {N} rows and the weights of a GPT-2, got {n_head=} and {actual}"
        )
    if any(t.dtype != torch.float32 or t.device.type != "cpu" for t in tensors):
        raise ValueError("expected float32 tensors on a CPU")
    return _Hidden.apply(rows, n_head, emb, pos, smear, *[w.contiguous() for w in weights])


class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, n_head, emb, pos, smear, *weights):
        N, C = emb.shape
        lengths = rows.first.diff()
        start = rows.first[:-1].repeat_interleave(lengths)
        sizes = [len(weights) // 12, len(lengths), torch.get_num_threads()]
        workspace = torch.empty_like(start)
        indices = [rows.first, rows.n_prefix, rows.n_thoughts, start, workspace]

        def new(*widths: int) -> list[Tensor]:
            return [emb.new_empty(N, width) for width in widths]

        layers = []  # weights of each layer, and what forward saves, as in the C struct Block
        for i in range(0, len(weights) - 2, 12):
            pairs = zip(weights[i : i + 12 : 2], weights[i + 1 : i + 12 : 2], strict=True)
            members = [t for w, b in pairs for t in ([w] if w.dim() == 1 else _linear(w)) + [b]]
            saved = new(C, C, 1, C, C, 1, 3 * C, n_head, C, 4 * C, 4 * C)
            layers.append((members, saved))
        ln_f = weights[-2:]
        smear = [None] * 3 if smear is None else [*_linear(smear), None]
        emb = emb.clone(memory_format=torch.contiguous_format)  # thoughts are written to it
        prev, x, normed, scale = new(C, C, C, 1)
        hidden = emb.new_zeros(N, C)
        library = compile_c("cpu_train.c", f"-DC={C}", f"-DNH={n_head}")
        blocks = _struct(t for w, saved in layers for t in [*w, *saved, *[None] * 6])
        inputs = [*ln_f, *smear, emb, prev, pos.contiguous(), x]
        outputs = [hidden, normed, scale, None, None, None]
        ctx.save_for_backward(*weights)
        library.forward(_struct([*sizes, *indices, blocks, *inputs, *outputs]))
        ctx.library, ctx.layers = library, layers
        ctx.arguments = sizes, indices, inputs, normed, scale  # without hidden, which refers to ctx
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx, d_hidden):
        sizes, indices, inputs, normed, scale = ctx.arguments
        (N, C), (first, n_prefix, *_) = d_hidden.shape, indices
        smear, *_, prev, _, x = inputs[2:]
        ctx.saved_tensors  # noqa: B018  # raises if a weight was changed since forward
        d_hidden = d_hidden.clone(memory_format=torch.contiguous_format)
        d_emb = torch.zeros_like(d_hidden)  # C adds to both
        d_layers = [[d_hidden.new_empty(N, n * C) for n in (1, 3, 1, 1, 4, 1)] for _ in ctx.layers]
        for _, d_qkv, *_ in d_layers:
            d_qkv.zero_()  # C adds to these
        layers = [(*layer, grads) for layer, grads in zip(ctx.layers, d_layers, strict=True)]
        blocks = _struct(t for w, saved, grads in layers for t in [*w, *saved, *grads])
        outputs = [None, normed, scale, d_hidden, d_emb, torch.empty_like(x)]
        ctx.library.backward(_struct([*sizes, *indices, blocks, *inputs, *outputs]))

        # the rows that the last layer computed in forward
        last = (first[:-1] + n_prefix - 1).repeat_interleave(first.diff())
        tail = (torch.arange(N) >= last).nonzero()[:, 0]
        d_weights = []
        for i, (_, saved, grads) in enumerate(layers):
            norm_1, normed_1, _, norm_2, normed_2, _, _, _, y, h, _ = saved
            d_norm_1, d_qkv, d_attn, d_norm_2, d_fc, d_mlp = grads
            if i == len(layers) - 1:
                norm_2, normed_2, y, h = (t[tail] for t in (norm_2, normed_2, y, h))
                d_attn, d_norm_2, d_fc, d_mlp = (t[tail] for t in (d_attn, d_norm_2, d_fc, d_mlp))
            d_weights += [
                (d_norm_1 * normed_1).sum(0), d_norm_1.sum(0), d_qkv.T @ norm_1, d_qkv.sum(0),
                d_attn.T @ y, d_attn.sum(0), (d_norm_2 * normed_2).sum(0), d_norm_2.sum(0),
                d_fc.T @ norm_2, d_fc.sum(0), d_mlp.T @ h, d_mlp.sum(0),
            ]  # fmt: skip
        d_hidden, normed = d_hidden[tail], normed[tail]
        d_weights += [(d_hidden * normed).sum(0), d_hidden.sum(0)]
        d_smear = x.T @ prev if smear is not None else None
        # x is the gradient of pos now; a copy, because another backward pass would overwrite it
        return None, None, d_emb, x.clone(), d_smear, *d_weights


def _linear(w: Tensor) -> list[Tensor]:
    """Return w and its transpose in panels of COLS columns, as mul in cpu_train.c reads them."""
    return [m.unflatten(1, (-1, COLS)).transpose(0, 1).contiguous() for m in (w, w.T)]


def _struct(members: Iterable[Tensor | ctypes.Array | int | None]) -> ctypes.Array:
    """Return a C struct of pointers and 64-bit integers: tensors, structs, None and integers."""
    values = [
        t.data_ptr() if isinstance(t, Tensor)
        else ctypes.addressof(t) if isinstance(t, ctypes.Array)
        else t or 0
        for t in members
    ]  # fmt: skip
    return (ctypes.c_int64 * len(values))(*values)
