"""linear_cross_entropy against F.linear and F.cross_entropy: the loss, both gradients, the argmax,
and that at most one chunk of logits exists."""

import pytest
import torch

pytest.importorskip("triton")
from helpers import assert_three_way, exact_match, loss_sum
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.reference import linear_cross_entropy_ref

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def random_inputs(N, C, V, dtype, device, unsupervised=3):
    """Return h, w, targets: the first `unsupervised` have no label, the last one is the argmax."""
    h = torch.randn(N, C, device=device)
    w = torch.randn(V, C, device=device) / C**0.5
    targets = torch.randint(V, (N,), device=device)
    targets[:unsupervised] = -100
    w[targets[-1]] = 12 * h[-1] / h[-1].square().sum()
    return h.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), targets


def with_gradients(op, h, w, *args):
    """Return loss, correct, dh, dw of the loss scaled as training does (1 / number of labels)."""
    h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
    loss, correct = op(h, w, *args)
    return loss.detach(), correct, *torch.autograd.grad(loss / 8, (h, w))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, C, V, chunk", [(11, 24, 101, 3), (6, 16, 4999, 100), (5, 8, 32, 1)])
def test_loss_and_gradients_match_reference(N, C, V, chunk, dtype, device, seed):
    h, w, targets = random_inputs(N, C, V, dtype, device)
    ours = with_gradients(linear_cross_entropy, h, w, targets, chunk)
    plain = with_gradients(linear_cross_entropy_ref, h, w, targets)
    exact = with_gradients(linear_cross_entropy_ref, h.double(), w.double(), targets)
    assert ours[0].dtype == torch.float32 and ours[1][-1]
    assert torch.equal(ours[1], plain[1])
    for x, y, z in zip(ours[::2] + ours[3:], plain[::2] + plain[3:], exact[::2] + exact[3:],
                       strict=True):  # fmt: skip
        # the loss is fp32, of logits in dtype
        floor = 16.0 if x.dtype == dtype else 4 * torch.finfo(dtype).eps / torch.finfo(x.dtype).eps
        if z.dim():  # p - 1 cancels: fp32 roundings of 1, times h or w, in a smaller gradient
            size = max(h.abs().max().item(), w.abs().max().item()) / z.abs().max().item()
            floor = max(floor, 4 * torch.finfo(torch.float32).eps / torch.finfo(x.dtype).eps * size)
        assert_three_way(x, y, z, floor)
    assert (ours[2][:3] == 0).all()  # unsupervised positions
    again = with_gradients(linear_cross_entropy, h, w, targets, chunk)
    assert all(map(torch.equal, ours, again))


def test_first_of_equal_logits_is_the_argmax(device):
    h = torch.ones(4, 1, device=device)
    w = torch.zeros(3000, 1, device=device)
    w[[7, 2500]] = 1.0
    targets = torch.tensor([7, 2500, 3, -100], device=device)
    assert linear_cross_entropy(h, w, targets, 2)[1].tolist() == [True, False, False, True]


@pytest.mark.parametrize("n", [0, 4])
def test_no_label_gives_zero_loss(n, device):
    h, w, targets = random_inputs(4, 8, 30, torch.float32, device)
    h, args = h[:n], (targets[:n] * 0 - 100, 2)
    loss, correct, dh, dw = with_gradients(linear_cross_entropy, h, w, *args)
    assert loss == 0 and correct.all() and (dh == 0).all() and (dw == 0).all()


def test_label_outside_the_vocabulary_gives_nan(device):
    """An error would need a GPU synchronization, but the loss must not look valid."""
    h, w, targets = random_inputs(4, 8, 30, torch.float32, device)
    targets[-1] = 30
    assert linear_cross_entropy(h, w, targets, 4)[0].isnan()


def test_equals_the_torch_training_loss(device, seed):
    """The same as helpers.loss_sum and helpers.exact_match, which take all logits."""
    h, w, targets = random_inputs(12, 8, 9, torch.float32, device)
    targets = targets.view(4, 3)
    logits = (h @ w.t()).view(4, 3, 9)
    loss, correct = linear_cross_entropy(h, w, targets.flatten(), 5)
    torch.testing.assert_close(loss, loss_sum(logits, targets))
    assert torch.equal(correct.view(4, 3).all(1), exact_match(logits, targets))


class LargestTensor(TorchDispatchMode):
    """Record the largest number of elements of any tensor created under it."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.is_floating_point():  # not the interpreter's bytes
                self.numel = max(self.numel, x.numel())
        return out


def test_logits_exist_one_chunk_at_a_time(device, seed):
    h, w, targets = random_inputs(64, 4, 500, torch.float32, device, unsupervised=20)
    with LargestTensor() as largest, torch.no_grad():
        linear_cross_entropy_ref(h, w, targets)
    assert largest.numel == 64 * 500
    with LargestTensor() as largest:
        linear_cross_entropy(h, w, targets, 6)
    assert largest.numel == 6 * 512  # rows are padded to multiples of 16


def test_autocast_keeps_head_gradient_in_fp32(device, seed):
    h, w, targets = random_inputs(40, 16, 50, torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        ours = with_gradients(linear_cross_entropy, h, w, targets, 7)
        plain = with_gradients(linear_cross_entropy_ref, h, w, targets)
    exact = with_gradients(linear_cross_entropy_ref, h.double(), w.double(), targets)
    for i in (0, 2, 3):
        roundings = torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps
        assert_three_way(ours[i], plain[i], exact[i], roundings)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_gpt2_head_on_a_gpu(seed):
    """The real size: three-way, bit-equal, and the promised peak memory."""
    h, w, targets = random_inputs(3000, 768, 50260, torch.bfloat16, "cuda", unsupervised=500)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours = with_gradients(linear_cross_entropy, h, w, targets)
    peak = torch.cuda.max_memory_allocated() - before
    # a chunk of logits; dw in fp32, in bf16 and one chunk's product; scaled by backward
    assert peak < 1.1 * (1024 * 50264 * 2 + (4 + 2 + 2 + 2) * w.numel() + 8 * h.numel() * 2)
    plain = with_gradients(linear_cross_entropy_ref, h, w, targets)
    exact = with_gradients(linear_cross_entropy_ref, h.float(), w.float(), targets)
    for i in (0, 2, 3):
        roundings = 1.0 if ours[i].dtype == torch.bfloat16 else 2.0**16
        assert_three_way(ours[i], plain[i], exact[i].double(), roundings)
    again = with_gradients(linear_cross_entropy, h, w, targets)
    assert all(map(torch.equal, ours, again))
