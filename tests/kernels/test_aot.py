"""aot.py compiles without a GPU, reads the machine code, and fails if a check fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

pytest.importorskip("triton")
from aot import EARLY, LATE, OFF, SHARED_LIMIT, Case, Report, all_cases, looped_lines, main

AOT = Path("tests/kernels/aot.py")


def run(*argv, **env):
    """Run a new process, since kernels are interpreted in this one and have no machine code."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | env
    return subprocess.run(
        [sys.executable, *argv], cwd=ROOT, env=env, capture_output=True, text=True
    )


def test_attention_kernel_compiles_for_hopper(tmp_path):
    only = "_latent_attention_fwd_kernel bf16 hs=64 B=64"
    done = run(AOT, "--target=sm_90", "--only", only, TRITON_CACHE_DIR=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith("_latent")).split()
    registers, stack, shared, wide, _, _, _, cp_async = row[row.index("sm_90") + 1 :][:8]
    # the 768 blocks of batch 64, of two warps each, fit at once
    assert 16 < int(registers) <= 168 and stack == "0"
    assert 0 < int(shared) <= SHARED_LIMIT["sm_90"] / 6 and int(wide) >= int(cp_async) > 0
    assert "all checks hold" in done.stdout


def test_failed_check_gives_exit_code_1(tmp_path):
    code = (
        "import sys, dataclasses; sys.path.insert(0, 'tests/kernels'); import aot; "
        "case = next(iter(aot.all_cases('_softmax_cross_entropy_kernel bf16'))); "
        "aot.all_cases = lambda only: [dataclasses.replace(case, dots=True)]; "
        "sys.exit(aot.main(['--target=sm_90']))"
    )
    done = run("-c", code, TRITON_CACHE_DIR=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no tensor-core instructions" in done.stdout and "1 of 1 fail" in done.stdout


@pytest.mark.parametrize(
    "interpret, argv, error",
    [("1", [], "TRITON_INTERPRET is set"), ("0", ["--only=nothing"], "'nothing'")],
)
def test_bad_arguments_are_refused(interpret, argv, error, monkeypatch, capsys):
    """Guards against an audit of no kernel."""
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    with pytest.raises(SystemExit) as e:
        main(argv)
    assert e.value.code == 2 and error in capsys.readouterr().err


def test_cases_cover_every_kernel():
    """A new kernel without a case would never be audited."""
    text = "".join(p.read_text() for p in (ROOT / "kernels").glob("*.py"))
    names = {line.split("(")[0] for line in text.split("\ndef ")[1:]}
    kernels = {name for name in names if name.endswith("_kernel")}
    assert kernels == {case.kernel.fn.__name__ for case in all_cases()}


def test_cases_name_every_argument():
    cases = list(all_cases())
    assert len({(c.kernel.fn.__name__, c.name) for c in cases}) == len(cases)
    for case in cases:
        chosen = {"PDL"}  # by the target
        named = {*case.signature} | {*case.constexprs} | chosen
        assert named == set(case.kernel.arg_names) | chosen, case.name
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
    cp_async=4,
    tensor=2,
    pdl=EARLY,
    pdl_order=("PREEXIT", "ACQBULK"),
    early=1,
)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, []),
        ({"stack": 8}, ["8 bytes of stack"]),
        ({"shared": 170_000}, ["170000 bytes of shared memory > 166912"]),
        ({"wide": 0, "wide_looped": 0}, ["no 128-bit loads"]),
        ({"wide_looped": 0, "narrow": 9, "narrow_looped": 9}, ["no 128-bit loads"]),
        ({"wide_looped": 0}, []),  # unrolled: nothing is loaded in a loop
        ({"pdl": LATE}, ["PREEXIT before ACQBULK"]),
        ({"pdl_order": ()}, ["no PDL"]),
        ({"early": 0}, ["no load before the wait"]),
        ({"pdl": OFF, "pdl_order": (), "early": 0}, []),
        ({"tensor": 0, "stack": 4}, ["4 bytes of stack", "no tensor-core"]),
    ],
)
def test_report_lists_failed_checks(change, expected):
    case = Case("test", None, {}, {}, wide_loads=True, dots=True)
    failures = Report(**GOOD | change).failures(case, "sm_80")
    assert len(failures) == len(expected) and all(map(str.startswith, failures, expected)), failures


def test_loop_lines_are_between_label_and_jump():
    lines = [".L_x_1:", "a", "BRA `(.L_x_2)", ".L_x_3:", "b", "BRA `(.L_x_3)", ".L_x_2:", "c"]
    assert looped_lines(lines) == {3, 4}
