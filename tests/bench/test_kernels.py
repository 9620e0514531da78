"""bench/kernels.py: kernels and their plain references compute the same."""

import pytest
import torch

from bench import kernels as bench

pytest.importorskip("triton")


@pytest.fixture
def kernels(script):
    return lambda *argv: script(*argv, script="bench/kernels.py")


@pytest.mark.skipif(torch.cuda.is_available(), reason="it times kernels where there is a GPU")
def test_without_a_gpu_nothing_is_timed(kernels):
    code, out, err = kernels()
    assert (code, err) == (0, "") and len(out.splitlines()) == 2
    assert "no machine to time kernels on" in out and "tests/kernels" in out


def test_wrong_kernel_is_named():
    config = bench.KernelsConfig(n_embd=16, n_head=2, context=8, vocab_size=9, only="residual")
    bench.check_cases(config, 2, "cuda" if torch.cuda.is_available() else "cpu")
    config = bench.KernelsConfig(n_embd=16, n_head=2, context=8, vocab_size=9, batches="2")
    cases = bench.requested(config, 2, "cpu", torch.float32)
    assert len({case.name for case in cases}) == len(cases) == 8
    assert all(case.n_numbers > 0 for case in cases)
    for case in cases:
        case.impl = lambda *args, case=case: case.reference(*args) * 1.01
        if case.reference(*case.copy_args()) is not None:  # returns something
            assert bench.max_error(case) > bench.TOLERANCE, case.name


@pytest.mark.parametrize(
    "argv, message", [(["--batches=x"], "no list of numbers"), (["--n_head=7"], "does not divide")]
)
def test_mistakes_take_two_lines(kernels, argv, message):
    code, _, err = kernels(*argv)
    assert code == 2 and message in err and len(err.splitlines()) <= 2


@pytest.mark.gpu
def test_times_on_a_gpu(kernels, tmp_path):
    code, out, err = kernels("--batches=1", "--context=64", "--positions=64", "--out=rows.jsonl")
    assert code == 0, err
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 1 + 3 * 8
