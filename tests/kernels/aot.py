"""Compile every kernel ahead of time, on a machine without a GPU, and audit the machine code.

    python tests/kernels/aot.py                       # sm_80 and sm_90
    python tests/kernels/aot.py --target sm_90 --only latent_attention

One line per kernel, case and target: registers, bytes of stack (spills), shared memory, number of
128-bit and 16-bit loads from global memory (in brackets: inside loops), number of loads that go to
shared memory asynchronously (cp.async), tensor-core instructions. The exit code is 1 if a check
fails: no stack, shared memory within the limit of the chip, 128-bit loads if the case sets
wide_loads (in its loops, if it loads there), tensor cores if the case sets dots, and what
kernels/_launch.py says about programmatic dependent launch (PDL): the wait and the start of the
next kernel in the right order, loads or prefetches before the wait.

The "async" column matters because ptxas moves a masked load right before its use, no matter how
early it is in the source: a loop without async loads has few loads in flight.

Run without TRITON_INTERPRET: an interpreted kernel has no machine code.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parent.parent.parent))  # works in a checkout, uninstalled

import kernels._linear as _linear
import kernels.append as append
import kernels.feedback as feedback
import kernels.latent_attention as latent_attention
import kernels.linear_cross_entropy as linear_cross_entropy
import kernels.linear_residual as linear_residual
import kernels.ln_linear_gelu as ln_linear_gelu
import kernels.prefix_attention as prefix_attention
from kernels._launch import EARLY, LATE, OFF, pdl_options

CAPABILITY = {"sm_80": (8, 0), "sm_90": (9, 0)}
TARGETS = {name: GPUTarget("cuda", 10 * c[0] + c[1], 32) for name, c in CAPABILITY.items()}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}  # bytes per block


@dataclass(frozen=True)
class Case:
    """One specialization of one kernel, as its launcher would request it.

    signature    argument -> type ("*bf16", "*fp32", "*i64", "i32", ...), except constexprs
    constexprs   argument -> value (None for a pointer that is not passed)
    wide_loads   require 128-bit loads
    dots         require tensor-core instructions
    batch, late  arguments of _launch.pdl
    divisible    arguments that are multiples of 16, which Triton detects at launch
    """

    name: str
    kernel: Any  # a JITFunction
    signature: dict[str, str]
    constexprs: dict[str, Any]
    batch: int = 1
    late: bool = False
    num_warps: int = 4
    num_stages: int = 1
    wide_loads: bool = False
    dots: bool = False
    divisible: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """The machine code of one case in numbers. Instructions are counted statically; *_looped counts
    those between a label and a jump back to it."""

    registers: int
    stack: int  # bytes
    shared: int  # bytes
    wide: int
    wide_looped: int
    narrow: int
    narrow_looped: int
    cp_async: int
    tensor: int
    pdl: int  # the requested form of PDL
    pdl_order: tuple[str, ...]  # its instructions
    early: int  # 128-bit loads and prefetches before the wait

    def failures(self, case: Case, target: str) -> list[str]:
        failures = []
        if self.stack:
            failures.append(f"{self.stack} bytes of stack: registers are spilled")
        if self.shared > SHARED_LIMIT[target]:
            failures.append(f"{self.shared} bytes of shared memory > {SHARED_LIMIT[target]}")
        if case.wide_loads and not (self.wide_looped or (self.wide and not self.narrow_looped)):
            failures.append("no 128-bit loads")
        if case.dots and not self.tensor:
            failures.append("no tensor-core instructions")
        if self.pdl_order != PDL_ORDER[self.pdl]:
            failures.append(f"{' before '.join(self.pdl_order) or 'no PDL'}")
        if case.wide_loads and self.pdl != OFF and not self.early:
            failures.append("no load before the wait")
        return failures


WAIT, START_NEXT = "ACQBULK", "PREEXIT"  # machine code of gdc_wait and gdc_launch_dependents
PDL_ORDER = {OFF: (), EARLY: (START_NEXT, WAIT), LATE: (WAIT, START_NEXT)}
LABEL = r"^(\.L_x_\w+):"
JUMP = r"\bBRA\b.*`\((\.L_x_\w+)\)"
INSTRUCTIONS = dict(
    wide=r"\bLDG\S*\.128|\bLDGSTS\S*\.128",
    narrow=r"\bLDG\S*\.[US]16",
    cp_async=r"\bLDGSTS",
    tensor=r"\b(?:HMMA|HGMMA|IMMA|QGMMA)\b",
    prefetch=r"\bCCTL\S*\.PF",
)


def looped_lines(lines: list[str]) -> set[int]:
    """Return the numbers of the lines between a label and a later jump back to it."""
    label_line, looped = {}, set()
    for i, line in enumerate(lines):
        if label := re.search(LABEL, line.strip()):
            label_line[label[1]] = i
        elif (jump := re.search(JUMP, line)) and jump[1] in label_line:
            looped.update(range(label_line[jump[1]], i))
    return looped


def _run_tool(name: str, *args: str) -> str:
    """Return the output of a program shipped with Triton (cuobjdump, nvdisasm)."""
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout


def compile_case(case: Case, target: str) -> Report:
    """Compile one case for one of TARGETS and count its instructions."""
    names = case.kernel.arg_names
    constexprs, options, pdl = dict(case.constexprs), {}, OFF
    if "PDL" in names:
        options = pdl_options(CAPABILITY[target], case.batch, case.late)
        pdl = constexprs["PDL"] = options.pop("PDL")
    mismatch = set(names) ^ (set(case.signature) | set(constexprs))
    if mismatch:
        raise ValueError(f"{case.name}: arguments {sorted(mismatch)} do not match the kernel's")
    source = ASTSource(
        case.kernel,
        signature={n: case.signature.get(n, "constexpr") for n in names},
        constexprs=constexprs,
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in case.divisible},
    )
    options |= dict(num_warps=case.num_warps, num_stages=case.num_stages, enable_fp_fusion=True)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        lines = _run_tool("nvdisasm", "-c", f.name).splitlines()
        usage = _run_tool("cuobjdump", "-res-usage", f.name)
    registers, stack = (int(re.search(rf"{k}:(\d+)", usage)[1]) for k in ("REG", "STACK"))
    looped = looped_lines(lines)

    def matches(kind: str) -> set[int]:
        return {i for i, line in enumerate(lines) if re.search(INSTRUCTIONS[kind], line)}

    wide, narrow = matches("wide"), matches("narrow")
    order = re.findall(rf"\b({WAIT}|{START_NEXT})\b", "\n".join(lines))
    wait = next((i for i, line in enumerate(lines) if WAIT in line), 0)
    return Report(
        registers, stack, compiled.metadata.shared, len(wide), len(wide & looped), len(narrow),
        len(narrow & looped), len(matches("cp_async")), len(matches("tensor")), pdl, tuple(order),
        sum(i < wait for i in wide | matches("prefetch")),
    )  # fmt: skip


# ---- the cases: GPT-2's sizes, and the limits of what the launchers accept


def _case(kernel: Any, name: str, values: dict[str, Any], **options: Any) -> Case:
    """Return a case of bf16 pointers; values: the other arguments, a type (string) or a value."""
    values = {a: "*bf16" for a in kernel.arg_names if a.endswith("_ptr")} | values
    signature = {a: t for a, t in values.items() if isinstance(t, str) and a != "IMPL"}
    constexprs = {a: v for a, v in values.items() if a not in signature}
    divisible = [a for a in signature if a.endswith("_ptr") or a.startswith("stride")]
    return Case(name, kernel, signature, constexprs, divisible=divisible, **options)


def _linear_case(
    kernel: Any, impl: str, shape: tuple[int, int, int], dtype: str, late: bool = False,
    **values: Any,
) -> Case:  # fmt: skip
    """Return a case of a linear map of shape (B, N, K), with its launcher's block sizes.

    The residual stream is fp32; `layer_norm` rounds it to the weights' dtype for all but gemv.
    """
    B, N, K = shape
    blocks = dict(_linear.launch_config(impl, B, N, K, 2 if dtype == "bf16" else 4)[1])
    del blocks["enable_fp_fusion"]
    options = dict(num_warps=blocks.pop("num_warps"), num_stages=blocks.pop("num_stages"))
    options |= dict(batch=B, late=late, wide_loads=True, dots=impl != "gemv")
    pointers = {a: f"*{dtype}" for a in kernel.arg_names if a.endswith("_ptr")}
    pointers["x_ptr"] = "*fp32" if impl == "gemv" or "y_ptr" in pointers else f"*{dtype}"
    values = pointers | dict(B="i32") | values | blocks
    return _case(kernel, f"{dtype} {impl} B={B} {N}x{K}", values, **options)


def _append_cases() -> Iterable[Case]:
    values = dict(lengths_ptr="*i64", eps="fp32", T="i32", D=64)
    values |= dict.fromkeys(("stride_kb", "stride_kh", "stride_kt"), "i32")
    for impl, B, C, dtype in [
        ("gemv", 1, 768, "bf16"), ("gemv", 4, 768, "bf16"), ("gemv", 4, 1024, "fp32"),
        ("gemm", 8, 768, "bf16"), ("gemm", 256, 768, "bf16"),
    ]:  # fmt: skip
        shape = (B, 3 * C, C)
        yield _linear_case(append._append_kernel, impl, shape, dtype, late=True, C=C, **values)


def _feedback_cases() -> Iterable[Case]:
    # no wide_loads: a row is too short for 128 bits per thread
    values = dict(x_ptr="*fp32", lengths_ptr="*i64", P="i32", C=768, BLOCK_C=1024)
    active = dict(active_ptr="*i1", eps="fp32")
    all_active = dict(active_ptr=None, thought_ptr=None, eps="fp32")
    norm = dict(eps="fp32", C=768, BLOCK_C=1024)
    for batch in (1, 64):
        for name, more in ("active", values | active), ("all active", values | all_active):
            yield _case(feedback._feedback_kernel, f"{name} B={batch}", more, batch=batch)
        embed = values | dict(token_ptr="*i64")
        yield _case(feedback._embed_kernel, f"bf16 B={batch}", embed, batch=batch)
        yield _case(_linear._layer_norm_kernel, f"bf16 B={batch}", norm, batch=batch)


def _attention_case(
    kernel: Any, dtype: str, hs: int, batch: int, n_splits: int, **pointers: str | None
) -> Case:
    """Return a case of attention with 12 heads."""
    module = latent_attention
    elements, warps, stages = module.BLOCK_ELEMENTS, module.NUM_WARPS, module.NUM_STAGES
    if kernel is module._latent_attention_fwd_kernel:
        elements, warps, stages = module.launch_form(12 * batch)
    block_n, block_d = module.block_sizes(hs, elements)
    values = {a: "fp32" if a == "scale" else "i32" for a in kernel.arg_names}
    values |= {a: f"*{dtype}" for a in kernel.arg_names if a.endswith("_ptr")}
    values |= dict(D=hs, SPLITS=n_splits, BLOCK_N=block_n, BLOCK_D=block_d, STAGES=stages, N_NEW=1)
    values |= dict(lengths_ptr="*i64", counter_ptr="*i32", lse_ptr="*fp32", grad_lse_ptr="*fp32")
    values |= dict(partial_acc_ptr="*fp32", partial_ml_ptr="*fp32") | pointers
    if n_splits == 1:
        values |= dict(partial_acc_ptr=None, partial_ml_ptr=None, counter_ptr=None)
    values = {a: values[a] for a in kernel.arg_names if a != "PDL"}
    name = f"{dtype} hs={hs} B={batch} splits={n_splits}"
    options = dict(num_warps=warps, num_stages=stages, wide_loads=True)
    return _case(kernel, name, values, batch=batch, **options)


def _attention_cases() -> Iterable[Case]:
    fwd = latent_attention._latent_attention_fwd_kernel
    bwd = prefix_attention._prefix_attention_bwd_kernel
    for batch, n_splits in (1, 8), (8, 2), (64, 1), (256, 1):  # a step of GPT-2 124M
        yield _attention_case(fwd, "bf16", 64, batch, n_splits, lse_ptr=None)
    yield _attention_case(fwd, "bf16", 128, 1, 32, lse_ptr=None)
    yield _attention_case(fwd, "fp16", 80, 1, 32)
    yield _attention_case(fwd, "fp32", 64, 64, 1)
    yield _attention_case(bwd, "bf16", 64, 64, 1)
    yield _attention_case(bwd, "bf16", 64, 8, 4, dk_ptr="*fp32", dv_ptr="*fp32")
    yield _attention_case(bwd, "fp32", 128, 64, 1)


def _cross_entropy_cases() -> Iterable[Case]:
    module = linear_cross_entropy
    options = dict(num_warps=module.NUM_WARPS, num_stages=module.NUM_STAGES, wide_loads=True)
    for dtype in ("bf16", "fp32"):
        values = dict(x_ptr=f"*{dtype}", label_ptr="*i64", loss_ptr="*fp32", correct_ptr="*i1")
        values |= dict(V="i32", stride_x="i32")
        values |= dict(BLOCK_V=module.BLOCK_V, STAGES=module.NUM_STAGES)
        yield _case(module._softmax_cross_entropy_kernel, dtype, values, **options)


def _residual_and_gelu_cases() -> Iterable[Case]:
    for impl, B, K, dtype in [
        ("gemv", 1, 768, "bf16"), ("gemv", 4, 3072, "bf16"), ("gemv", 4, 4096, "fp32"),
        ("gemm_tile", 8, 3072, "bf16"), ("gemm", 64, 3072, "bf16"),
        ("gemv", 4, 6400, "bf16"), ("gemv", 4, 6400, "fp32"), ("gemm_tile", 32, 6400, "bf16"),
    ]:  # fmt: skip
        N = K if K == 768 else K // 4
        kernel = linear_residual._linear_residual_kernel
        yield _linear_case(kernel, impl, (B, N, K), dtype, N=N, K=K)
    for impl, B, C, dtype in [
        ("gemv", 4, 768, "bf16"), ("gemv", 4, 1024, "fp32"),
        ("gemm", 8, 1024, "bf16"), ("gemm", 256, 768, "bf16"),
    ]:  # fmt: skip
        kernel = ln_linear_gelu._ln_linear_gelu_kernel
        yield _linear_case(kernel, impl, (B, 4 * C, C), dtype, eps="fp32", N=4 * C, K=C)


def all_cases(only: str = "") -> Iterable[Case]:
    """Yield the cases of every module; only: those whose "kernel case" contains this text."""
    for cases in (
        _append_cases, _feedback_cases, _attention_cases, _cross_entropy_cases,
        _residual_and_gelu_cases,
    ):  # fmt: skip
        yield from (c for c in cases() if only in f"{c.kernel.fn.__name__} {c.name}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="aot.py", description=__doc__.split("\n")[0])
    parser.add_argument("--target", choices=[*TARGETS, "all"], default="all")
    parser.add_argument("--only", default="", help="part of a kernel's or a case's name")
    args = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, but an interpreted kernel has no code: unset it")
    targets = list(TARGETS) if args.target == "all" else [args.target]
    cases = [(c, t) for t in targets for c in all_cases(args.only)]
    if not cases:
        parser.error(f"--only={args.only!r} matches no kernel and no case")

    print(f"triton {triton.__version__}; static instruction counts, (n) of them in loops")
    row = "{:<34} {:<30} {:<7} {:>5} {:>5} {:>7} {:>9} {:>9} {:>5} {:>6}  {}"
    heads = "kernel case target regs stack shared 128-bit 16-bit async tensor checks"
    print(row.format(*heads.split()))
    n_failed = 0
    for case, target in cases:
        r = compile_case(case, target)
        failures = r.failures(case, target)
        n_failed += bool(failures)
        wide, narrow = f"{r.wide} ({r.wide_looped})", f"{r.narrow} ({r.narrow_looped})"
        code = (r.registers, r.stack, r.shared, wide, narrow, r.cp_async, r.tensor)
        verdict = "; ".join(failures) or "ok"
        print(row.format(case.kernel.fn.__name__, case.name, target, *code, verdict), flush=True)
    print(f"{n_failed} of {len(cases)} fail" if n_failed else "all checks hold")
    return int(n_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
