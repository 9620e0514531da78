"""Which kernels run is said and never silently changed; with them the engine says the same."""

import pytest
import torch
from helpers import generate, random_gpt

from nanococonut import ops
from nanococonut.runtime.errors import UserError

pytest.importorskip("triton")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_the_engine_says_the_same_with_triton(device):
    """Ragged rows, thoughts that stop row by row, rows that end early and leave the batch."""
    model = random_gpt(seed=4, dtype=torch.float32, n_layer=1, n_head=2, n_embd=32, stop=True)
    model = model.to(device)
    rows = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
    free = generate(model, rows, 2, [39], -1, 3, stop=True)
    eos = free.tokens[0][0]
    plain = generate(model, rows, 2, [39], eos, 2, stop=True)
    fused = generate(model, rows, 2, [39], eos, 2, stop=True, kernels="triton")
    assert fused.tokens == plain.tokens and len({len(t) for t in plain.tokens}) > 1
    assert fused.n_thoughts == plain.n_thoughts and len(set(plain.n_thoughts)) > 1
    for b, n in enumerate(plain.n_thoughts):
        torch.testing.assert_close(
            fused.thoughts[b, :n], plain.thoughts[b, :n], rtol=1e-4, atol=1e-4
        )


def test_what_cannot_train_is_said(monkeypatch):
    plain, dropout = random_gpt(dtype=torch.float32), random_gpt(dtype=torch.float32, dropout=0.1)
    assert ops.choose_training_backend("torch", plain) == ("torch", "as asked for")
    if not torch.cuda.is_available():  # interpreted kernels are for who asks for them
        assert ops.choose_training_backend("auto", plain) == (
            "torch",
            "the model is on cpu, not on a GPU",
        )
        assert ops.choose_training_backend("triton", plain)[0] == "triton"
        for model, why in (
            (dropout, "no kernel for attention with dropout, which is 0.1"),
            (random_gpt(), "float64"),
            (random_gpt(dtype=torch.float32, n_head=1, n_embd=144), "heads of 144"),
        ):
            with pytest.raises(UserError, match=why):
                ops.choose_training_backend("triton", model)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="triton cannot run here: the model is on cpu"):
        ops.choose_training_backend("triton", plain)
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: None)
    assert ops.choose_training_backend("auto", plain) == ("torch", "triton is not installed")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_on_a_gpu_training_takes_the_kernels_unless_there_is_dropout():
    plain, dropout = random_gpt(dtype=torch.float32), random_gpt(dtype=torch.float32, dropout=0.1)
    assert ops.choose_training_backend("auto", plain.cuda())[0] == "triton"
    assert ops.choose_training_backend("auto", dropout.cuda())[0] == "torch"


def test_what_cannot_run_is_said(monkeypatch):
    plain, smeared = random_gpt(), random_gpt(smear=True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert ops.choose_backend("torch", plain) == ("torch", "as asked for")
    assert ops.choose_backend("auto", plain) == ("torch", "the model is on cpu, not on a GPU")
    with pytest.raises(UserError, match="triton cannot run here: the model is on cpu"):
        ops.choose_backend("triton", plain)
    for graph, on in (("auto", False), ("off", False)):
        assert ops.choose_graph(graph, plain) is on
    with pytest.raises(UserError, match="graph=on cannot run here: the model is on cpu"):
        ops.choose_graph("on", plain)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ops.choose_backend("triton", random_gpt(dtype=torch.float32))[0] == "triton"
    assert ops.choose_backend("auto", plain)[0] == "torch"  # not unasked
    for model, why in ((plain, "float64"), (smeared.float(), "smear"),
                       (random_gpt(thought="soft").float(), "soft thoughts"),
                       (random_gpt(n_head=1, n_embd=129).float(), "128 dimensions")):  # fmt: skip
        with pytest.raises(UserError, match=why):
            ops.choose_backend("triton", model)
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: None)
    assert ops.choose_backend("auto", plain) == ("torch", "triton is not installed")
