"""linear_cross_entropy against F.linear and F.cross_entropy: loss, both gradients, which labels are
the most probable, and that no more logits exist than a chunk's."""

import pytest
import torch

pytest.importorskip("triton")
from helpers import assert_three_way
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.linear_cross_entropy as module
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.reference import linear_cross_entropy_ref
from nanococonut.coconut import loss_sum, right_rows

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
# what computes a chunk's softmax: the kernel, or torch
KERNEL = pytest.mark.parametrize("kernel", [True, False], ids=["triton", "torch"])


def random_rows(N, C, V, dtype, device, ignored=3):
    """h, w and targets of which the first `ignored` have no label and the last is far ahead."""
    h = torch.randn(N, C, device=device)
    w = torch.randn(V, C, device=device) / C**0.5
    targets = torch.randint(V, (N,), device=device)
    targets[:ignored] = -100
    w[targets[-1]] = 12 * h[-1] / h[-1].square().sum()
    return h.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), targets


def with_gradients(op, h, w, *args):
    """Loss, right, dh, dw; the loss is scaled, as train.py divides it by the labels."""
    h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
    loss, right = op(h, w, *args)
    return loss.detach(), right, *torch.autograd.grad(loss / 8, (h, w))


@KERNEL
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, C, V, chunk", [(11, 24, 101, 3), (6, 16, 4999, 100), (5, 8, 32, 1)])
def test_loss_and_gradients(N, C, V, chunk, dtype, kernel, device, seed):
    h, w, targets = random_rows(N, C, V, dtype, device)
    got = with_gradients(linear_cross_entropy, h, w, targets, chunk, kernel)
    usual = with_gradients(linear_cross_entropy_ref, h, w, targets)
    truth = with_gradients(linear_cross_entropy_ref, h.double(), w.double(), targets)
    assert got[0].dtype == torch.float32 and got[1][-1]
    assert torch.equal(got[1], usual[1])
    for x, y, z in zip(got[::2] + got[3:], usual[::2] + usual[3:], truth[::2] + truth[3:],
                       strict=True):  # fmt: skip
        # p - 1 cancels: roundings of 1 in a smaller gradient. The loss is fp32, of logits in dtype
        floor = 16.0 if x.dtype == dtype else 4 * torch.finfo(dtype).eps / torch.finfo(x.dtype).eps
        assert_three_way(x, y, z, floor)
    assert (got[2][:3] == 0).all()  # rows without a label
    again = with_gradients(linear_cross_entropy, h, w, targets, chunk, kernel)
    assert all(map(torch.equal, got, again))


@KERNEL
def test_of_equal_logits_the_first_is_the_most_probable(kernel, device):
    h = torch.ones(4, 1, device=device)
    w = torch.zeros(3000, 1, device=device)
    w[[7, 2500]] = 1.0
    targets = torch.tensor([7, 2500, 3, -100], device=device)
    assert linear_cross_entropy(h, w, targets, 2, kernel)[1].tolist() == [True, False, False, True]


@KERNEL
def test_no_label_at_all(kernel, device):
    h, w, targets = random_rows(4, 8, 30, torch.float32, device)
    loss, right, dh, dw = with_gradients(linear_cross_entropy, h, w, targets * 0 - 100, 2, kernel)
    assert loss == 0 and right.all() and (dh == 0).all() and (dw == 0).all()


@KERNEL
def test_a_label_outside_the_vocabulary_is_no_silent_loss(kernel, device):
    if device == "cuda" and not kernel:
        pytest.skip("torch's check would end the process's CUDA context")
    h, w, targets = random_rows(4, 8, 30, torch.float32, device)
    targets[-1] = 30
    if kernel:
        assert linear_cross_entropy(h, w, targets, 4, True)[0].isnan()
    else:
        with pytest.raises(IndexError):
            linear_cross_entropy(h, w, targets, 4, False)


@KERNEL
def test_equals_what_training_computes(kernel, device, seed):
    """coconut.loss_sum and right_rows over (B, Ts) targets, of all logits at once."""
    h, w, targets = random_rows(12, 8, 9, torch.float32, device)
    targets = targets.view(4, 3)
    logits = (h @ w.t()).view(4, 3, 9)
    loss, right = linear_cross_entropy(h, w, targets.flatten(), 5, kernel)
    torch.testing.assert_close(loss, loss_sum(logits, targets))
    assert torch.equal(right.view(4, 3).all(1), right_rows(logits, targets))


class Largest(TorchDispatchMode):
    """The most elements that any tensor made under it has."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@KERNEL
def test_the_number_of_labels_may_be_given(kernel, device, seed):
    h, w, targets = random_rows(11, 24, 101, torch.float32, device)
    targets = targets[torch.randperm(11).to(device)]
    n = int((targets != -100).sum())
    want = with_gradients(linear_cross_entropy, h, w, targets, 3, kernel)
    got = with_gradients(linear_cross_entropy, h, w, targets, 3, kernel, n)
    assert all(map(torch.equal, got, want))
    more = with_gradients(linear_cross_entropy, h, w, targets, 3, kernel, n + 2)
    for a, b in zip(more, want, strict=True):  # two rows more, which add nothing
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    if device == "cpu":
        with pytest.raises(ValueError, match=f"n_labels={n - 1}, and {n} targets"):
            linear_cross_entropy(h, w, targets, 3, kernel, n - 1)


def test_no_more_logits_than_a_chunk(seed):
    h, w, targets = random_rows(64, 4, 500, torch.float32, "cpu", ignored=20)
    with Largest() as largest, torch.no_grad():
        linear_cross_entropy_ref(h, w, targets)
    assert largest.numel == 64 * 500
    with Largest() as largest, torch.no_grad():
        module._linear_cross_entropy._init_fn(h, w, targets, 44, 6, False, True, True)
    assert largest.numel == 6 * 512  # rows start at multiples of 16


def test_gradients_only_where_they_are_wanted(seed):
    h, w, targets = random_rows(6, 8, 30, torch.float32, "cpu")
    both = with_gradients(linear_cross_entropy, h, w, targets, 2)
    loss, _ = linear_cross_entropy(h, w.detach(), targets, 2)
    assert torch.equal(torch.autograd.grad(loss / 8, h)[0], both[2])
    loss, _ = linear_cross_entropy(h.detach(), w, targets, 2)
    assert torch.equal(torch.autograd.grad(loss / 8, w)[0], both[3])
    with torch.no_grad():
        assert not linear_cross_entropy(h, w, targets, 2)[0].requires_grad


def test_autocast_keeps_the_gradient_of_an_fp32_head_in_fp32(device, seed):
    h, w, targets = random_rows(40, 16, 50, torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        got = with_gradients(linear_cross_entropy, h, w, targets, 7, device == "cuda")
        usual = with_gradients(linear_cross_entropy_ref, h, w, targets)
    truth = with_gradients(linear_cross_entropy_ref, h.double(), w.double(), targets)
    for i in (0, 2, 3):
        roundings = torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps
        assert_three_way(got[i], usual[i], truth[i], roundings)


@KERNEL
def test_the_op_is_what_torch_expects(kernel, device, seed):
    h, w, targets = random_rows(6, 8, 30, torch.float32, device)
    torch.library.opcheck(
        torch.ops.nanococonut.linear_cross_entropy, (h, w, targets, -1, 2, kernel, True, True)
    )


@KERNEL
def test_compiles_as_one_graph(kernel, device, seed):
    h, w, targets = random_rows(6, 8, 30, torch.float32, device)

    def loss(h, w):
        return linear_cross_entropy(2 * h, w, targets, 2, kernel)[0] / 8

    backend = "aot_eager" if device == "cpu" else "inductor"
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    got = torch.autograd.grad(compiled(h, w), (h, w))
    for x, y in zip(got, torch.autograd.grad(loss(h, w), (h, w)), strict=True):
        torch.testing.assert_close(x, y)


def test_bad_input_is_named():
    h, w, targets = random_rows(6, 8, 30, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"must be \(N, C\)"):
        linear_cross_entropy(h, w.t(), targets)
    with pytest.raises(ValueError, match="chunk=0"):
        linear_cross_entropy(h, w, targets, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_gpt2s_head_on_a_gpu(seed):
    """The real size: three-way, bit-equal, and the peak memory that the file promises."""
    h, w, targets = random_rows(3000, 768, 50260, torch.bfloat16, "cuda", ignored=500)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = with_gradients(linear_cross_entropy, h, w, targets)
    peak = torch.cuda.max_memory_allocated() - before
    # a chunk of logits; dw in fp32, in bf16 and a chunk's part of it; scaled by backward
    assert peak < 1.1 * (1024 * 50264 * 2 + (4 + 2 + 2 + 2) * w.numel() + 8 * h.numel() * 2)
    usual = with_gradients(linear_cross_entropy_ref, h, w, targets)
    truth = with_gradients(linear_cross_entropy_ref, h.float(), w.float(), targets)
    for i in (0, 2, 3):
        roundings = 1.0 if got[i].dtype == torch.bfloat16 else 2.0**16
        assert_three_way(got[i], usual[i], truth[i].double(), roundings)
    assert all(map(torch.equal, got, with_gradients(linear_cross_entropy, h, w, targets)))
