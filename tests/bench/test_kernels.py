"""bench/kernels.py: its cases do to plain torch's tensors what the kernels do to theirs."""

import runpy

import pytest
import torch
from helpers import ROOT

pytest.importorskip("triton")


@pytest.fixture
def kernels(script):
    return lambda *argv: script(*argv, script="bench/kernels.py")


@pytest.mark.skipif(torch.cuda.is_available(), reason="it times kernels where there is a GPU")
def test_without_a_gpu_nothing_is_timed(kernels):
    code, out, err = kernels()
    assert (code, err) == (0, "") and len(out.splitlines()) == 2
    assert "no machine to time kernels on" in out and "--check" in out


def test_the_numbers_are_compared(kernels):
    code, out, err = kernels("--check", "--only=residual")
    assert code == 0, err
    assert out.splitlines() == [
        "every kernel computes what plain torch does, in float32, at batch 1,3"
    ]


def test_a_kernel_that_is_wrong_is_named(monkeypatch):
    names = runpy.run_path(str(ROOT / "bench/kernels.py"), run_name="bench")
    config = names["KernelsConfig"](n_embd=16, n_head=2, context=8, vocab_size=9, only="residual")
    names["checked"](config, 2, "cuda" if torch.cuda.is_available() else "cpu")
    cases = list(names["cases"](config, 2, "cpu", torch.float32))
    assert len({case.name for case in cases}) == len(cases) and all(c.numbers > 0 for c in cases)
    for case in cases:
        case.ours = lambda *args, case=case: case.plain(*args) * 1.01
        if case.plain(*case.fresh()) is not None:  # gives something back
            assert names["off"](case) > names["TOLERANCE"], case.name


@pytest.mark.parametrize(
    "argv, said", [(["--batches=x"], "no list of numbers"), (["--n_head=7"], "does not divide")]
)
def test_mistakes_take_two_lines(kernels, argv, said):
    code, _, err = kernels(*argv)
    assert code == 2 and said in err and len(err.splitlines()) <= 2


@pytest.mark.gpu
def test_times_on_a_gpu(kernels, tmp_path):
    code, out, err = kernels("--batches=1", "--context=64", "--rows=64", "--out=rows.jsonl")
    assert code == 0, err
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 1 + 4 * 8
