"""Training in C against plain PyTorch: losses, gradients, threads, memory and errors."""

import copy
import gc
import weakref

import pytest
import torch
from helpers import assert_three_way, needs_c, random_batch, random_gpt

from kernels.cpu_train import Rows, hidden_states
from nanococonut import coconut
from nanococonut.runtime.errors import UserError

pytestmark = needs_c
# more than one group of sequences, the last one incomplete, and thoughts that end at various steps
THOUGHTS = [3, 0, 1, 5, 2, 3, 3, 0, 1, 1, 4]


def small_gpt(seed, smear=False, **shape):
    """Return a random model whose roundings do not grow from thought to thought."""
    model = random_gpt(seed % 1000, smear, torch.float32, stop=True, **shape)
    for p in model.parameters():
        p.data *= 0.3 if p.dim() == 2 else 1
    return model


def losses_and_gradients(model, batch, kernels):
    """Return (whether each sequence is correct, the losses and the gradients of their sum)."""
    hidden = coconut.forward(model, batch, kernels)
    loss, correct = coconut.loss(model, batch, hidden)
    losses = {"loss": loss, "stop_loss": coconut.stop_loss(model, batch, hidden)}
    if batch.max_thoughts:
        losses["thought_loss"] = coconut.thought_loss(model, batch, hidden)
    sum(losses.values()).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return correct, {name: x.detach().double() for name, x in (losses | grads).items()}


@pytest.mark.parametrize("smear", [False, True])
@pytest.mark.parametrize("n_head, n_embd, n_layer", [(2, 64, 2), (4, 32, 3), (1, 96, 1)])
@pytest.mark.parametrize("thoughts", [THOUGHTS, [2], [0, 0, 0]], ids=str)
def test_equals_pytorch(smear, n_head, n_embd, n_layer, thoughts, seed, nan_memory):
    """Guards against a wrong derivative, row or block boundary, and against memory that is read
    but not written."""
    model = small_gpt(seed, smear, n_head=n_head, n_embd=n_embd, n_layer=n_layer)
    batch, _ = random_batch(seed, thoughts, markers=len(thoughts) > 3)  # or it may have no target
    right, truth = losses_and_gradients(copy.deepcopy(model).double(), batch, "torch")
    correct, got = losses_and_gradients(model, batch, "c")
    assert torch.equal(correct, right) and got.keys() == truth.keys()
    largest = max(x.norm() for x in truth.values())
    for name, x in truth.items():
        # PyTorch's own errors in float32 are up to 6e-7
        assert (got[name] - x).norm() <= 4e-6 * x.norm() + 1e-7 * largest, name


def test_what_c_would_ignore_is_refused():
    """C ran projected thoughts as hidden ones, and left out dropout and hooks."""
    shape = dict(dtype=torch.float32, n_head=2, n_embd=32)
    batch, _ = random_batch(0, THOUGHTS)
    hooked, dropout = random_gpt(**shape), random_gpt(dropout=0.5, **shape)
    hooked.h[1].attn.register_forward_hook(lambda module, args, y: 0 * y)
    for model, feature in (
        (random_gpt(thought="projected", **shape), "projected thoughts"),
        (dropout.train(), r"dropout \(0.5\)"),
        (hooked, "forward hooks"),
    ):
        with pytest.raises(UserError, match=f"cpu_train.c would ignore {feature}"):
            coconut.forward(model, batch, "c")
    assert coconut.forward(dropout.eval(), batch, "c").states


def test_large_scores_and_activations():
    """Guards against an exponential that overflows, and against one that hides a NaN."""
    model = random_gpt(dtype=torch.float32, n_head=2, n_embd=64)
    batch, _ = random_batch(0, THOUGHTS)
    for p in model.h.parameters():
        p.data *= 20
    truth, plain, got = (
        coconut.loss(m, batch, coconut.forward(m, batch, kernels))[0]
        for m, kernels in ((copy.deepcopy(model).double(), "torch"), (model, "torch"), (model, "c"))
    )
    assert_three_way(got, plain, truth)
    model.h[0].mlp.c_fc.bias.data[3] = float("nan")
    assert coconut.loss(model, batch, coconut.forward(model, batch, "c"))[0].isnan()


@pytest.mark.parametrize("repeats", [1, 3])  # so groups of 8, 6 and 4 sequences, or all of 8
def test_threads_change_no_bit_and_memory_is_freed(repeats, seed):
    """Guards against a race, a second backward pass with the first's sums, and a leak."""
    model = random_gpt(seed % 1000, True, torch.float32, n_head=2, n_embd=64)
    batch, _ = random_batch(seed, THOUGHTS * repeats)
    n_threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            for _ in range(5):
                hidden = coconut.forward(model, batch, "c")
                emb = model.wpe.weight  # its gradient needs no matrix product, which threads change
                for _ in range(2):
                    (grad,) = torch.autograd.grad(hidden.suffix.sum(), emb, retain_graph=True)
                    results.append(torch.cat([hidden.suffix.detach().flatten(), grad.flatten()]))
    finally:
        torch.set_num_threads(n_threads)
    assert all(torch.equal(result, results[0]) for result in results)
    freed = weakref.ref(hidden.suffix.grad_fn.next_functions[0][0])
    del hidden, grad
    gc.disable()  # freed by its reference count
    try:
        assert freed() is None
    finally:
        gc.enable()


def test_wrong_arguments_are_refused():
    """Guards against reads and writes out of bounds, which nothing in C would notice."""
    model = random_gpt(dtype=torch.float32, n_head=1, n_embd=32)
    weights, x = model.layer_weights(), torch.zeros(7, 32)
    first, prefix, thoughts = torch.tensor([0, 4, 7]), torch.tensor([2, 1]), torch.tensor([1, 2])
    rows = Rows(first, prefix, thoughts)
    assert hidden_states(rows, x, x, weights, 1).shape == (7, 32)
    for wrong in (
        (first + 1, prefix, thoughts),
        (first, prefix, thoughts + 1),
        (first, prefix - 1, thoughts),
        (first, prefix + 2, thoughts - 2),
        (first, prefix[:1], thoughts),
        (first.int(), prefix, thoughts),
        (first[:1], prefix[:0], thoughts[:0]),
    ):
        with pytest.raises(ValueError, match="expected"):
            Rows(*wrong)
    for wrong in (
        (rows, x[:6], x, weights, 1),
        (rows, x, x.double(), weights, 1),
        (rows, x, x, weights[:-1], 1),
        (rows, x, x, weights[2:], 1),
        (rows, x, x, weights, 3),
        (rows, x[:, :31], x[:, :31], weights, 1),
        (rows, x, x, weights, 1, torch.zeros(31, 32)),
    ):
        with pytest.raises(ValueError, match="expected"):
            hidden_states(*wrong)


def test_strides_and_changed_weights():
    """Guards against embeddings or gradients that are not row-major, and against gradients of
    weights that an optimizer has already changed."""
    model = small_gpt(0, n_head=1, n_embd=32)
    weights, x = model.layer_weights(), torch.randn(7, 32)
    rows = Rows(torch.tensor([0, 7]), torch.tensor([2]), torch.tensor([1]))
    results = []
    for strides in (torch.Tensor.detach, lambda t: t.detach().T.contiguous().T):
        emb, pos = strides(x).requires_grad_(), strides(x.flip(0))
        matrices = [strides(w) if w.dim() == 2 else w for w in weights]
        hidden = hidden_states(rows, emb, pos, matrices, 1)
        hidden.backward(strides(torch.ones(7, 32).tril()))
        results.append((hidden, emb.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    hidden = hidden_states(rows, x, x, weights, 1)
    model.ln_f.bias.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        hidden.sum().backward()
