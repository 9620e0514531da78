"""bench/kernels.py: kernels and their plain references compute the same thing."""

import pytest
import torch

from bench import kernels as bench
from nanococonut.model import GPTConfig

pytest.importorskip("triton")


@pytest.fixture
def kernels(script):
    return lambda *argv: script(*argv, script="bench/kernels.py")


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, the kernels are timed")
def test_without_a_gpu_nothing_is_timed(kernels):
    code, out, err = kernels()
    assert (code, err) == (0, "") and len(out.splitlines()) == 2
    assert "There is no GPU" in out and "tests/kernels" in out


@pytest.mark.parametrize("batch", [1, 3])
def test_case_and_reference_agree(batch, device, monkeypatch):
    """Times are comparable only if the kernel and plain torch do the same work."""
    monkeypatch.setattr(bench, "POSITIONS", 7)
    sizes = GPTConfig(n_embd=32, n_head=2, block_size=20, vocab_size=50)
    dtype = torch.float32
    cases = [*bench.cases(sizes, batch, device, dtype), bench.head_case(sizes, device, dtype)]
    assert len({case.name for case in cases}) == len(cases) == 8
    for case in cases:
        ours, plain = (case.run(fn, case.copy_args()) for fn in (case.impl, case.reference))
        for a, b in zip(ours, plain, strict=True):
            scale = b.double().abs().max().item()
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * scale, msg=case.name)
        assert case.n_numbers > 0


def test_mistake_takes_two_lines(kernels):
    code, _, err = kernels("--batches=x")
    assert code == 2 and "expected positive whole numbers" in err and len(err.splitlines()) <= 2


@pytest.mark.gpu
def test_times_on_a_gpu(kernels, tmp_path):
    code, out, err = kernels("--batches=1", "--out=rows.jsonl")
    assert code == 0, err
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 1 + 3 * 8
