"""Each Triton kernel of kernels/ against plain torch, torch.compile and its byte floor.

    python bench/kernels.py                    on a GPU: GPT-2 124M's sizes, batch 1, 8, 64, 256
    python bench/kernels.py --check            anywhere: only compare numbers, at a tiny size

Times are of a GPU whose L2 was emptied before, as it is when a step comes back to a layer. The
floor is what has to be read and written once, at the bandwidth measured in the same run. Kernels
that training uses are timed with their backward. The last line is JSON.
"""

import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout works uninstalled too

import torch
from bandwidth import Bandwidth, best
from rich.console import Console
from rich.table import Table
from schema import Rows, command_of
from torch import Tensor
from torch.nn import functional as F

from nanococonut.runtime.cli import make_config, option, parse_cli, validate
from nanococonut.runtime.errors import UserError, run_main

TOLERANCE = 1e-4  # of the greatest value, in float32


@dataclass(frozen=True)
class KernelsConfig:
    check: bool = option(False, "only compare the numbers, at a tiny size, on Triton's interpreter")
    batches: str = option("1,8,64,256", "rows of a step, with commas")
    context: int = option(400, "keys that a step attends to", ge=1)
    n_embd: int = option(768, "width", ge=16)
    n_head: int = option(12, "attention heads", ge=1)
    vocab_size: int = option(50260, "vocabulary", ge=2)
    rows: int = option(2048, "supervised positions of a training step", ge=1)
    dtype: str = option("bfloat16", "of all tensors", choices=("float32", "bfloat16", "float16"))
    only: str | None = option(None, "kernels whose name holds this")
    out: str | None = option(None, "append the rows to this file")

    def __post_init__(self) -> None:
        validate(self)
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd={self.n_embd} does not divide into {self.n_head} heads.")
        parts = self.batches.split(",")
        if not all(p.strip().isdigit() and int(p) for p in parts):
            raise UserError(f"--batches={self.batches} is no list of numbers, as in 1,8,64.")


@dataclass
class Case:
    """ours and plain take args, and do the same to them; numbers: what has to be read and written.
    grads: args are differentiated too, as many as want it."""

    name: str
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    args: list[Tensor]
    numbers: int
    shapes: dict[str, int]
    grads: bool = False

    def fresh(self) -> list[Tensor]:
        return [a.detach().clone().requires_grad_(a.requires_grad) for a in self.args]

    def run(self, work: Callable[..., Any], args: list[Tensor]) -> list[Tensor]:
        """What comes out, and what became of the args."""
        if not self.grads:
            with torch.no_grad():
                out = work(*args)
            return [t for t in (out, *args) if t is not None]
        out = work(*args)
        wanted = [a for a in args if a.requires_grad]
        return [out, *torch.autograd.grad(out, wanted, torch.ones_like(out))]


def plain_append(
    x: Tensor, gain: Tensor, shift: Tensor, w: Tensor, b: Tensor, k: Tensor, v: Tensor, n: Tensor
) -> Tensor:
    B, nh, _, hs = k.shape
    qkv = F.linear(F.layer_norm(x, x.shape[-1:], gain, shift), w, b).view(B, 3, nh, hs)
    rows = torch.arange(B, device=x.device)
    k[rows, :, n] = qkv[:, 1]
    v[rows, :, n] = qkv[:, 2]
    return qkv[:, 0]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, n: Tensor) -> Tensor:
    """Keys [0, n[b]) of row b."""
    seen = torch.arange(k.shape[2], device=k.device) < n[:, None, None, None]
    return F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=seen)[:, :, 0]


def plain_cross_entropy(h: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w).float(), targets, reduction="sum")


def cases(config: KernelsConfig, batch: int, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """All kernels at one batch."""
    from kernels.append import append
    from kernels.feedback import embed, feedback
    from kernels.latent_attention import SplitWorkspace, latent_attention
    from kernels.linear_cross_entropy import linear_cross_entropy
    from kernels.linear_residual import linear_residual
    from kernels.ln_linear_gelu import ln_linear_gelu
    from kernels.prefix_attention import PrefixBuffers, prefix_attention
    from kernels.reference import embed_ref, feedback_ref, linear_residual_ref, ln_linear_gelu_ref

    B, C, T, V, nh = batch, config.n_embd, config.context, config.vocab_size, config.n_head
    sizes = dict(batch=B, context=T, n_embd=C)
    torch.manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * std).to(dtype)

    def norm() -> tuple[Tensor, Tensor]:
        return 1 + normal(C, std=0.1), normal(C, std=0.1)

    def linear(n_out: int, n_in: int) -> tuple[Tensor, Tensor]:
        return normal(n_out, n_in, std=n_in**-0.5), normal(n_out, std=0.1)

    def cache() -> tuple[Tensor, Tensor]:
        return normal(B, nh, T + 8, C // nh), normal(B, nh, T + 8, C // nh)

    def lengths(n: int) -> Tensor:
        return torch.full((B,), n, device=device)

    workspace = SplitWorkspace.allocate(B, nh, T + 8, C // nh, torch.device(device))
    yield Case(
        "append", append, plain_append,
        [normal(B, C), *norm(), *linear(3 * C, C), *cache(), lengths(T - 1)],
        3 * C * C + 5 * C + 4 * B * C, sizes,
    )  # fmt: skip
    yield Case(
        "latent_attention",
        lambda q, k, v, n: latent_attention(q, k, v, n, workspace),
        plain_attention,
        [normal(B, nh, C // nh), *cache(), lengths(T)],
        2 * B * C * T + 2 * B * C, sizes,
    )  # fmt: skip
    yield Case(
        "linear_residual", linear_residual, linear_residual_ref,
        [normal(B, 4 * C), *linear(C, 4 * C), normal(B, C)],
        4 * C * C + C + 6 * B * C, sizes,
    )  # fmt: skip
    yield Case(
        "ln_linear_gelu", ln_linear_gelu, ln_linear_gelu_ref,
        [normal(B, C), *norm(), *linear(4 * C, C)],
        4 * C * C + 6 * C + 5 * B * C, sizes,
    )  # fmt: skip
    yield Case(
        "feedback", feedback, feedback_ref,
        [normal(B, C), *norm(), normal(T + 8, C), lengths(1), normal(B, C)],
        4 * B * C + 2 * C, sizes,
    )  # fmt: skip
    yield Case(
        "embed", embed, embed_ref,
        [normal(V, C), torch.randint(V, (B,), device=device), normal(T + 8, C), lengths(1),
         normal(B, C)],
        3 * B * C, sizes,
    )  # fmt: skip
    q, (k, v) = normal(B, nh, C // nh), cache()
    yield Case(
        "prefix_attention, with backward",
        lambda q, k, v, n: prefix_attention(q, k, v, n, PrefixBuffers(workspace))[0],
        plain_attention,
        [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), lengths(T)],
        6 * B * C * T + 5 * B * C, sizes, grads=True,
    )  # fmt: skip
    if batch == min(int(b) for b in config.batches.split(",")):  # has rows of its own
        N = config.rows
        h, w = normal(N, C), normal(V, C, std=C**-0.5)
        yield Case(
            "linear_cross_entropy, with backward",
            lambda h, w, t: linear_cross_entropy(h, w, t, len(t))[0],
            plain_cross_entropy,
            [h.requires_grad_(), w.requires_grad_(), torch.randint(V, (N,), device=device)],
            2 * N * C + 2 * V * C, dict(rows=N, n_embd=C, vocab_size=V), grads=True,
        )  # fmt: skip


def off(case: Case) -> float:
    """How far ours is from plain torch at most, of the greatest value."""
    ours, plain = (case.run(work, case.fresh()) for work in (case.ours, case.plain))
    errors = [
        (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)
        for a, b in zip(ours, plain, strict=True)
    ]
    return max(errors).item()


def checked(config: KernelsConfig, batch: int, device: str) -> None:
    """UserError where a kernel computes something else than plain torch, in float32."""
    for case in cases(config, batch, device, torch.float32):
        if config.only is None or config.only in case.name:
            error = off(case)
            if not error <= TOLERANCE:
                raise UserError(
                    f"{case.name} is off by {error:.1e} of the greatest value at batch {batch}.\n"
                    "It computes something else than plain torch: nothing was timed."
                )


def main() -> None:
    given, _ = parse_cli(KernelsConfig, sys.argv[1:], __doc__.split("\n")[0])
    config = make_config(KernelsConfig, given)
    gpu = torch.cuda.is_available()
    if not gpu and not config.check:
        print("There is no GPU, and Triton's interpreter is no machine to time kernels on.")
        print("bench/kernels.py --check compares their numbers with plain torch's, at a tiny size.")
        return
    if not gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so not yet
    if config.check:
        tiny = dict(n_embd=32, n_head=2, context=20, vocab_size=50, rows=7, batches="1,3")
        config = make_config(KernelsConfig, tiny, {"check": True, "only": config.only})
    device, batches = "cuda" if gpu else "cpu", [int(b) for b in config.batches.split(",")]
    for batch in batches:
        checked(config, batch, device)
    print(f"every kernel computes what plain torch does, in float32, at batch {config.batches}")
    if config.check:
        return
    from triton.testing import do_bench

    dtype = getattr(torch, config.dtype)
    command = command_of(config, "bench/kernels.py")
    rows = Rows(torch.device(device), dtype, command, config.out, {})
    bandwidth = Bandwidth(torch.device(device))
    kind, rates = best([bandwidth.measure() for _ in range(10)])
    gb = statistics.median(rates)
    rows.add("memory bandwidth", kind, rates, "GB/s")
    title = f"{rows.common['device']}, {rows.common['dtype']}, {gb:,.0f} GB/s; microseconds"
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(("kernel", "batch", "ours", "torch", "compiled", "floor", "of it")):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for batch in batches:
        for case in cases(config, batch, device, dtype):
            if config.only is not None and config.only not in case.name:
                continue
            torch._dynamo.reset()
            ways = {"ours": case.ours, "torch": case.plain, "torch.compile": case.plain}
            ways["torch.compile"] = torch.compile(case.plain, dynamic=False)
            medians = []
            for way, work in ways.items():
                args = case.fresh()
                case.run(work, args)  # compiled at first use
                times = do_bench(
                    lambda work=work, args=args, case=case: case.run(work, args), return_mode="all"
                )
                rows.add(f"{case.name} kernel", way, times, "ms", **case.shapes)
                medians.append(statistics.median(times))
            floor = case.numbers * dtype.itemsize / gb / 1e6
            rows.add(f"{case.name} kernel", "floor", [floor], "ms", derived=True, **case.shapes)
            cells = [f"{1e3 * m:,.1f}" for m in (*medians, floor)]
            table.add_row(case.name, str(batch), *cells, f"{floor / medians[0]:.0%}")
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table)
    print(rows.line("kernels"))


if __name__ == "__main__":
    run_main(main)
