"""The three-block pass equals a naive loop: one row at a time, all re-run for every thought."""

from dataclasses import replace

import pytest
import torch
from helpers import assert_three_way, random_batch, random_gpt
from torch.nn import functional as F

from nanococonut import coconut
from nanococonut.batch import IGNORE, Batch
from nanococonut.model import GPT, GPTConfig


def naive_thought(model, h):
    """What is fed back for a hidden state (1, 1, C), by definition."""
    c = model.config
    if c.thought == "projected":
        return h + h @ model.project.weight.T + model.project.bias
    if c.thought == "soft":
        logits = (h @ model.wte.weight.T / c.soft_temperature)[0, 0]
        if c.soft_top_k:
            least = logits.sort(descending=True).values[c.soft_top_k - 1]
            logits = logits.masked_fill(logits < least, float("-inf"))
        return sum(p * row for p, row in zip(logits.softmax(0), model.wte.weight, strict=True))[
            None, None
        ]
    return h


def naive_loss(model, rows):
    """The paper's section 3, literally: no cache, no batch, everything again for each thought."""
    total = 0.0
    for prefix, n, suffix, targets in rows:
        e = model.embed(torch.tensor([prefix]))
        for _ in range(n):
            h = model.backbone(e, torch.arange(e.shape[1]))
            e = torch.cat([e, naive_thought(model, h[:, -1:])], dim=1)
        e = torch.cat([e, model.embed(torch.tensor([suffix]))], dim=1)
        logits = model.head(model.backbone(e, torch.arange(e.shape[1])))[0]
        before = len(prefix) + n - 1  # the position that predicts the first suffix token
        predicted = logits[before : before + len(suffix)]
        total = total + F.cross_entropy(
            predicted, torch.tensor(targets), ignore_index=IGNORE, reduction="sum"
        )
    return total


def training_loss(model, batch, kernels="torch"):
    return coconut.loss(model, batch, coconut.think(model, batch, kernels))[0]


CASES = {
    "ragged": ([3, 0, 1, 5, 2], True),
    "none": ([0, 0, 0], True),
    "one_row": ([4], True),
    "no_markers": ([0, 0, 0, 0], False),
    "markerless_thoughts": ([2, 0, 3], False),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_every_gradient_equal_the_naive_loop(gpt, case, seed):
    batch, rows = random_batch(seed, *CASES[case])
    loss = training_loss(gpt, batch)
    expected = naive_loss(gpt, rows)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    if batch.n_labels == 0:
        return
    got = torch.autograd.grad(loss, list(gpt.parameters()), allow_unused=True)
    want = torch.autograd.grad(expected, list(gpt.parameters()), allow_unused=True)
    for (name, _), g, w in zip(gpt.named_parameters(), got, want, strict=True):
        assert (g is None) == (w is None), name
        if g is not None:
            torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize(
    "switches",
    [
        {"thought": "projected"},
        {"thought": "soft", "soft_temperature": 0.7},
        {"thought": "soft", "soft_top_k": 3, "smear": True},
    ],
    ids=["projected", "soft", "soft_top_k"],
)
def test_other_thoughts_equal_the_naive_loop(switches):
    model = random_gpt(seed=4, **switches)
    batch, rows = random_batch(11, [3, 0, 1, 4])
    loss = training_loss(model, batch)
    expected = naive_loss(model, rows)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    got = torch.autograd.grad(loss, list(model.parameters()))
    want = torch.autograd.grad(expected, list(model.parameters()))
    for (name, _), g, w in zip(model.named_parameters(), got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_right_are_those_of_all_logits(case, seed):
    """coconut.loss makes logits of supervised positions only."""
    model = random_gpt(seed % 1000, vocab_size=5)
    batch, _ = random_batch(seed, *CASES[case], vocab=5)
    logits = coconut.forward(model, batch)
    supervised = batch.targets[0] != IGNORE
    batch.targets[0, supervised] = logits[0].argmax(-1)[supervised]  # one row is right
    loss, right = coconut.loss(model, batch, coconut.think(model, batch))
    torch.testing.assert_close(loss, coconut.loss_sum(logits, batch.targets))
    assert torch.equal(right, coconut.right_rows(logits, batch.targets)) and right[0]


def test_a_projection_starts_as_the_hidden_state_itself():
    torch.manual_seed(0)
    plain = GPT(GPTConfig(41, 48, 2, 3, 24))
    torch.manual_seed(0)
    projected = GPT(GPTConfig(41, 48, 2, 3, 24, thought="projected", stop=True))
    batch, _ = random_batch(1, [3, 2])
    assert torch.equal(coconut.forward(plain, batch), coconut.forward(projected, batch))


def naive_stop_loss(model, rows, needed):
    """Example by row: the hidden state after k thoughts, and whether they are enough."""
    losses = []
    for (prefix, n, _, _), need in zip(rows, needed, strict=True):
        for k in range(n + 1):
            e = model.embed(torch.tensor([prefix]))
            for _ in range(k):
                e = torch.cat([e, model.backbone(e, torch.arange(e.shape[1]))[:, -1:]], dim=1)
            h = model.backbone(e, torch.arange(e.shape[1]))[0, -1]
            enough = k >= need
            p = torch.sigmoid(h.detach() @ model.stop.weight[0] + model.stop.bias[0])
            losses.append(-torch.log(p if enough else 1 - p))
    return sum(losses) / len(losses)


def test_the_stop_classifiers_loss_equals_the_naive_loop():
    model = random_gpt(seed=2, vocab_size=7, stop=True)
    batch, rows = random_batch(12, [3, 0, 1, 4, 4], vocab=7)
    rows = [(p, n, s[:2], t[:2]) for p, n, s, t in rows]  # short: some right by chance
    suffix, targets = (
        torch.tensor([r[i] + [f] * (2 - len(r[i])) for r in rows]) for i, f in ((2, 0), (3, IGNORE))
    )
    needed = torch.tensor([2, 0, 3, 1, 9])
    batch = replace(batch, suffix=suffix, targets=targets, needed=needed)
    trace = coconut.think(model, batch)
    loss = coconut.stop_loss(model, batch, trace)
    expected = naive_stop_loss(model, rows, batch.needed.tolist())
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    loss.backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None}
    assert touched == {"stop.weight", "stop.bias"}  # it watches the model, it does not train it


def test_the_gradient_reaches_the_first_thought():
    """Detaching a thought would leave the loss as it is and cut this."""
    model = random_gpt(seed=1)
    batch, _ = random_batch(5, [4, 4])
    assert batch.prefix.shape[1] > 1 and batch.suffix.shape[1] > 2  # only thoughts are one wide
    seen = []
    backbone = model.backbone

    def spy(e, pos, attend=None, prev=None, only=None):
        if e.shape[1] == 1:
            e.retain_grad()
            seen.append(e)
        return backbone(e, pos, attend, prev, only)

    model.backbone = spy
    training_loss(model, batch).backward()
    assert len(seen) == 4
    for thought in seen:
        assert (thought.grad.flatten(1).norm(dim=1) > 1e-6).all()


def test_padding_changes_nothing(gpt):
    """A row alone and the same row among longer ones: the same logits."""
    batch, _ = random_batch(7, [2, 5, 0, 3])
    together = coconut.forward(gpt, batch)
    for b in range(4):
        n, s = int(batch.length[b]), int((batch.targets[b] != IGNORE).sum()) + 1
        alone = Batch(
            batch.prefix[b : b + 1, :n],
            batch.length[b : b + 1],
            batch.n_thoughts[b : b + 1],
            batch.needed[b : b + 1],
            batch.suffix[b : b + 1, :s],
            batch.targets[b : b + 1, :s],
            int(batch.n_thoughts[b]),
            s - 1,
        )
        torch.testing.assert_close(
            coconut.forward(gpt, alone)[0], together[b, :s], rtol=1e-10, atol=1e-10
        )


def test_garbage_in_the_padding_changes_nothing(gpt):
    batch, _ = random_batch(8, [2, 5, 0, 3])
    expected = coconut.loss_sum(coconut.forward(gpt, batch), batch.targets)
    cols = torch.arange(batch.prefix.shape[1])
    batch.prefix[cols >= batch.length[:, None]] = 40
    batch.suffix[(batch.targets == IGNORE) & (torch.arange(batch.suffix.shape[1]) > 0)] = 40
    got = coconut.loss_sum(coconut.forward(gpt, batch), batch.targets)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_no_thoughts_equals_plain_gpt(gpt):
    batch, rows = random_batch(9, [0, 0, 0])
    logits = coconut.forward(gpt, batch)
    for b, (prefix, _, suffix, _) in enumerate(rows):
        plain = gpt(torch.tensor([prefix + suffix]))[0, len(prefix) - 1 : -1]
        torch.testing.assert_close(logits[b, : len(suffix)], plain, rtol=1e-10, atol=1e-10)


def test_dropout_reaches_attention_in_training():
    model = random_gpt(dropout=0.5).train()
    batch, _ = random_batch(3, [3, 1])
    torch.manual_seed(1)
    a = coconut.forward(model, batch)
    torch.manual_seed(1)
    b = coconut.forward(model, batch)
    c = coconut.forward(model, batch)
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_right_rows_counts_whole_rows():
    logits = torch.zeros(2, 3, 5)
    logits[0, 1, 2] = logits[0, 2, 3] = logits[1, 1, 2] = 1.0
    targets = torch.tensor([[IGNORE, 2, 3], [IGNORE, 2, 3]])
    assert coconut.right_rows(logits, targets).tolist() == [True, False]


def gradients(model, batch, kernels="torch", autocast=False):
    """The loss, and every parameter's gradient by name."""
    model.zero_grad()
    with torch.autocast(batch.prefix.device.type, torch.bfloat16, autocast):
        loss = training_loss(model, batch, kernels)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "n_thoughts, shape",
    [([2, 0, 3], {}), ([1, 1], {"n_layer": 1, "smear": True}), ([0, 0], {"thought": "projected"})],
    ids=["ragged", "one_layer", "none"],
)
def test_with_kernels_every_gradient_is_as_near_the_truth(
    n_thoughts, shape, autocast, device, seed
):
    pytest.importorskip("triton")
    shape = dict(n_embd=32, n_head=2) | shape
    model = random_gpt(seed % 1000, dtype=torch.float32, **shape).to(device)
    exact = random_gpt(seed % 1000, **shape).to(device)
    exact.load_state_dict(model.state_dict())
    batch = random_batch(seed, n_thoughts)[0].to(torch.device(device))
    got, usual = (gradients(model, batch, k, autocast) for k in ("triton", "torch"))
    truth = gradients(exact, batch)
    # assert_three_way's four roundings in a row, once for every layer of every pass: the paths that
    # a gradient takes are as long. One of bfloat16 is as large as 2^16 of float32
    roundings = 4 * model.config.n_layer * (batch.max_thoughts + 2) * (2**16 if autocast else 1)
    assert_three_way(got[0], usual[0], truth[0], roundings)
    assert got[1].keys() == usual[1].keys() == truth[1].keys()
    for name, grad in truth[1].items():
        assert_three_way(got[1][name], usual[1][name], grad, roundings)


def test_no_thought_masks_the_prefix_or_has_a_gradient_of_its_own(monkeypatch, seed):
    attention = pytest.importorskip("kernels.prefix_attention")
    model = random_gpt(seed % 1000, dtype=torch.float32, n_embd=32, n_head=2)
    batch = random_batch(seed, [2, 3])[0]
    biases, buffers = [], []
    plain, backward = coconut._bias, attention.prefix_attention_backward
    monkeypatch.setattr(coconut, "_bias", lambda seen: biases.append(seen) or plain(seen))
    monkeypatch.setattr(
        attention,
        "prefix_attention_backward",
        lambda *args: buffers.append(args[8:10]) or backward(*args),
    )
    if torch.cuda.is_available():
        model, batch = model.cuda(), batch.to(torch.device("cuda"))
    training_loss(model, batch, "triton").backward()
    assert [seen.shape[1] for seen in biases[:3]] == [2, 3, 4]  # the prefix, and the thoughts
    assert len(buffers) == 3 + 4  # every thought, and in the last layer the prefix's last token
    assert len({(dk.data_ptr(), dv.data_ptr()) for dk, dv in buffers}) == model.config.n_layer


def test_dropout_is_for_torch():
    model = random_gpt(dropout=0.5).train()
    batch, _ = random_batch(3, [3, 1])
    with pytest.raises(ValueError, match="dropout=0.5 in attention"):
        coconut.think(model, batch, "triton")
