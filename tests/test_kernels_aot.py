"""kernels.aot compiles without a GPU, reads what came out, and fails where a must does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from kernels.aot import MODULES, SHARED_LIMIT, Case, Report, _looped, all_cases

ROOT = Path(__file__).parent.parent
FAMILY = dict(label=r"^(\.L\w+):", jump=r"BRA (\.L\w+)")


def run(*argv, **env):
    """In a process of its own: this one's kernels may be interpreted, those have no code."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | env
    return subprocess.run(
        [sys.executable, *argv], cwd=ROOT, env=env, capture_output=True, text=True
    )


def test_the_attention_kernel_compiles_for_hopper(tmp_path):
    only = "_latent_attention_fwd_kernel bf16 hs=64 splits=8"
    done = run("-m", "kernels.aot", "--target=sm_90", "--only", only, TRITON_CACHE_DIR=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith("_latent")).split()
    registers, stack, shared, wide, _, _, _, ahead = row[row.index("sm_90") + 1 :][:8]
    assert 16 < int(registers) <= 72 and stack == "0"  # 768 blocks at once: see latent_attention
    assert 0 < int(shared) <= SHARED_LIMIT["sm_90"] / 6 and int(wide) > int(ahead) > 0
    assert "all musts hold" in done.stdout


def test_a_must_that_fails_is_exit_code_1(tmp_path):
    code = (
        "import sys, dataclasses; import kernels.aot as aot; "
        "case = next(iter(aot.all_cases('_softmax_cross_entropy_kernel bf16 no grad'))); "
        "aot.all_cases = lambda only, hip: [dataclasses.replace(case, dots=True)]; "
        "sys.exit(aot.main(['--target=sm_90']))"
    )
    done = run("-c", code, TRITON_CACHE_DIR=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no tensor-core instructions" in done.stdout and "1 of 1 fail" in done.stdout


def test_an_interpreted_kernel_has_no_code():
    done = run("-m", "kernels.aot", TRITON_INTERPRET="1")
    assert done.returncode == 2 and "TRITON_INTERPRET is set" in done.stderr


def test_an_unknown_name_is_an_error():
    done = run("-m", "kernels.aot", "--only=nothing")
    assert done.returncode == 2 and "'nothing'" in done.stderr


def test_no_module_of_kernels_is_left_out():
    found = {p.stem for p in (ROOT / "kernels").glob("*.py") if "@triton.jit" in p.read_text()}
    assert found - {"linear"} == {*MODULES}  # linear's are parts of others


@pytest.mark.parametrize("hip", [False, True])
def test_every_case_names_all_that_its_kernel_takes(hip):
    cases = list(all_cases(hip=hip))
    assert len({(c.kernel.fn.__name__, c.name) for c in cases}) == len(cases) >= len(MODULES)
    for case in cases:
        assert {*case.signature} | {*case.constexprs} == set(case.kernel.arg_names), case.name
        assert not {*case.signature} & {*case.constexprs}
        assert {*case.divisible} <= {*case.signature}


GOOD = dict(
    registers=40,
    stack=0,
    shared=1000,
    wide=8,
    wide_looped=4,
    narrow=0,
    narrow_looped=0,
    ahead=4,
    tensor=2,
)


@pytest.mark.parametrize(
    "change, said",
    [
        ({}, []),
        ({"stack": 8}, ["8 bytes of stack"]),
        ({"shared": 70_000}, ["70000 bytes of shared memory > 65536"]),
        ({"wide": 0, "wide_looped": 0}, ["no 128-bit loads"]),
        ({"wide_looped": 0, "narrow": 9, "narrow_looped": 9}, ["no 128-bit loads"]),
        ({"wide_looped": 0}, []),  # unrolled: nothing is loaded in a loop
        ({"tensor": 0, "stack": 4}, ["4 bytes of stack", "no tensor-core"]),
    ],
)
def test_musts(change, said):
    case = Case("made up", None, {}, {}, wide_loads=True, dots=True)
    found = Report(**GOOD | change).failures(case, "gfx942")
    assert len(found) == len(said) and all(map(str.startswith, found, said)), found


def test_a_loop_is_what_a_jump_goes_back_over():
    lines = [".L_1:", "a", "BRA .L_2", ".L_3:", "b", "BRA .L_3", ".L_2:", "c"]
    assert _looped(lines, FAMILY) == {3, 4}
