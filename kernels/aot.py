"""Compile every kernel ahead of time, on a machine without a GPU, and look at the machine code.

    python -m kernels.aot                       # sm_80, sm_90 and gfx942
    python -m kernels.aot --target sm_90 --only latent_attention

One line per kernel, case and target: registers, bytes of stack (spills), shared memory, how many
128-bit and 16-bit loads from global memory (in brackets: those in loops), how many of them go to
shared memory on their own (cp.async; NVIDIA), tensor-core instructions. Exit code 1 where a must
fails: no stack, shared memory within the chip's limit, 128-bit loads where a case says wide_loads
(in its loops, if it loads there), tensor cores where it says dots.

What to look for in the "async" column: ptxas puts a masked load right before its use, however early
it stands in the source, so that a loop with none has few loads in flight.

Each module in MODULES offers `aot_cases(hip: bool) -> list[Case]`, hip: as a launcher on an AMD GPU
would have them. Triton must not be interpreting (TRITON_INTERPRET unset). AMD's code is compiled
and read only, never run by us.
"""

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

MODULES = [
    "append",
    "feedback",
    "latent_attention",
    "linear_cross_entropy",
    "linear_residual",
    "ln_linear_gelu",
]
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}  # bytes per block


@dataclass(frozen=True)
class Case:
    """One specialisation of one kernel, as a launcher would ask for it.

    signature    every argument that is no constexpr -> "*bf16", "*fp32", "*i64", "i32", ...
    constexprs   the others -> their value (None for a pointer that is not given)
    divisible    arguments whose value is a multiple of 16, as Triton finds out at a launch
    wide_loads   128-bit loads are a must
    dots         tensor-core instructions are a must
    """

    name: str
    kernel: Any  # a JITFunction
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    wide_loads: bool = False
    dots: bool = False
    divisible: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """What the machine code of one case says. Loads and tensor-core instructions are counted as
    they stand in the code, not as they run; *_looped are those between a label and a jump back."""

    registers: int
    stack: int  # bytes
    shared: int  # bytes
    wide: int
    wide_looped: int
    narrow: int
    narrow_looped: int
    ahead: int  # cp.async
    tensor: int

    def failures(self, case: Case, target: str) -> list[str]:
        found = []
        if self.stack:
            found.append(f"{self.stack} bytes of stack: registers are spilled")
        if self.shared > SHARED_LIMIT[target]:
            found.append(f"{self.shared} bytes of shared memory > {SHARED_LIMIT[target]}")
        if case.wide_loads and not (self.wide_looped or (self.wide and not self.narrow_looped)):
            found.append("no 128-bit loads")
        if case.dots and not self.tensor:
            found.append("no tensor-core instructions")
        return found


# per family: a label's definition, a jump and its label, and what the instructions look like
NVIDIA = dict(
    label=r"^(\.L_x_\w+):",
    jump=r"\bBRA\b.*`\((\.L_x_\w+)\)",
    wide=r"\bLDG\S*\.128|\bLDGSTS\S*\.128",
    narrow=r"\bLDG\S*\.[US]16",
    ahead=r"\bLDGSTS",
    tensor=r"\b(?:HMMA|HGMMA|IMMA|QGMMA)\b",
)
AMD = dict(
    label=r"^(\.LBB\w+):",
    jump=r"\bs_c?branch\w*\s+(\.LBB\w+)",
    wide=r"\b(?:global|buffer|flat)_load_dwordx4",
    narrow=r"\b(?:global|buffer|flat)_load_(?:ushort|sshort|short_d16)",
    ahead=r"\b(?:global|buffer)_load_lds|\b(?:global|buffer)_load_\w+ .*\blds\b",
    tensor=r"\bv_s?mfma_",
)


def _looped(lines: list[str], family: dict[str, str]) -> set[int]:
    """Line numbers between a label and a later jump back to it."""
    at, inside = {}, set()
    for i, line in enumerate(lines):
        if label := re.search(family["label"], line.strip()):
            at[label[1]] = i
        elif (jump := re.search(family["jump"], line)) and jump[1] in at:
            inside.update(range(at[jump[1]], i))
    return inside


def _tool(name: str, *args: str) -> str:
    """Output of a program that comes with Triton (cuobjdump, nvdisasm)."""
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout


def compile_case(case: Case, target: str) -> Report:
    """Compile one case for one of TARGETS and read the result."""
    names = case.kernel.arg_names
    missing = set(names) ^ (set(case.signature) | set(case.constexprs))
    if missing:
        raise ValueError(f"{case.name}: {sorted(missing)} are not what the kernel takes")
    source = ASTSource(
        case.kernel,
        signature={n: case.signature.get(n, "constexpr") for n in names},
        constexprs=case.constexprs,
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in case.divisible},
    )
    options = dict(num_warps=case.num_warps, num_stages=case.num_stages, enable_fp_fusion=True)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    if target.startswith("sm"):
        family = NVIDIA
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(compiled.asm["cubin"])
            f.flush()
            code, usage = _tool("nvdisasm", "-c", f.name), _tool("cuobjdump", "-res-usage", f.name)
        registers, stack = (int(re.search(rf"{k}:(\d+)", usage)[1]) for k in ("REG", "STACK"))
    else:
        family, code = AMD, compiled.asm["amdgcn"]
        keys = (r"\.vgpr_count", r"\.private_segment_fixed_size")
        registers, stack = (int(re.search(rf"{k}:\s+(\d+)", code)[1]) for k in keys)
    lines = code.splitlines()
    inside = _looped(lines, family)

    def count(kind: str) -> tuple[int, int]:
        found = [i for i, line in enumerate(lines) if re.search(family[kind], line)]
        return len(found), len(inside & set(found))

    shared, ahead, tensor = compiled.metadata.shared, count("ahead")[0], count("tensor")[0]
    return Report(registers, stack, shared, *count("wide"), *count("narrow"), ahead, tensor)


def all_cases(only: str = "", hip: bool = False) -> Iterable[Case]:
    """The cases of every module; only: those whose "kernel case" contains this text."""
    for module in MODULES:
        for case in importlib.import_module(f"kernels.{module}").aot_cases(hip):
            if only in f"{case.kernel.fn.__name__} {case.name}":
                yield case


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.aot", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--target", choices=[*TARGETS, "all"], default="all")
    parser.add_argument("--only", default="", help="part of a kernel's or a case's name")
    args = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: unset it, an interpreted kernel has no code")
    targets = list(TARGETS) if args.target == "all" else [args.target]
    cases = [(c, t) for t in targets for c in all_cases(args.only, TARGETS[t].backend == "hip")]
    if not cases:
        parser.error(f"no kernel and no case is named like {args.only!r}")

    print(f"triton {triton.__version__}; counts are of instructions, (n) of them in loops")
    row = "{:<34} {:<26} {:<7} {:>5} {:>5} {:>7} {:>9} {:>9} {:>5} {:>6}  {}"
    heads = "kernel case target regs stack shared 128-bit 16-bit async tensor musts"
    print(row.format(*heads.split()))
    failed = 0
    for case, target in cases:
        r = compile_case(case, target)
        bad = r.failures(case, target)
        failed += bool(bad)
        wide, narrow = f"{r.wide} ({r.wide_looped})", f"{r.narrow} ({r.narrow_looped})"
        code = (r.registers, r.stack, r.shared, wide, narrow, r.ahead, r.tensor)
        kernel, verdict = case.kernel.fn.__name__, "; ".join(bad) or "ok"
        print(row.format(kernel, case.name, target, *code, verdict), flush=True)
    print(f"{failed} of {len(cases)} fail" if failed else "all musts hold")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
