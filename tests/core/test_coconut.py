"""The three-block pass equals a naive loop that re-runs each sequence for every thought."""

from dataclasses import replace

import pytest
import torch
from helpers import assert_three_way, exact_match, forward, loss_sum, random_batch, random_gpt
from torch.nn import functional as F

from nanococonut import coconut
from nanococonut.batch import IGNORE
from nanococonut.model import GPT, GPTConfig


def naive_thought(model, h):
    """Return the thought (1, 1, C) after hidden state h (1, 1, C), by definition."""
    c = model.config
    if c.thought == "projected":
        return h + h @ model.project.weight.T + model.project.bias
    if c.thought == "fixed":
        return model.pause.weight[None]
    if c.thought == "soft":
        logits = (h @ model.wte.weight.T / c.soft_temperature)[0, 0]
        if c.soft_top_k:
            smallest = logits.sort(descending=True).values[c.soft_top_k - 1]
            logits = logits.masked_fill(logits < smallest, float("-inf"))
        weighted = (p * w for p, w in zip(logits.softmax(0), model.wte.weight, strict=True))
        return sum(weighted)[None, None]
    return h


def naive_loss(model, sequences):
    """Return the loss of the paper's section 3, without cache and batching."""
    total = 0.0
    for prefix, n, suffix, targets in sequences:
        emb = model.wte(torch.tensor([prefix]))
        for _ in range(n):
            h = model.backbone(emb, torch.arange(emb.shape[1]))
            emb = torch.cat([emb, naive_thought(model, h[:, -1:])], dim=1)
        emb = torch.cat([emb, model.wte(torch.tensor([suffix]))], dim=1)
        logits = model.head(model.backbone(emb, torch.arange(emb.shape[1])))[0]
        first = len(prefix) + n - 1  # the position that predicts the first suffix token
        predicted = logits[first : first + len(suffix)]
        total = total + F.cross_entropy(
            predicted, torch.tensor(targets), ignore_index=IGNORE, reduction="sum"
        )
    return total


def training_loss(model, batch, kernels="torch"):
    return coconut.loss(model, batch, coconut.forward(model, batch, kernels))[0]


def assert_gradients_equal(model, loss, expected):
    """Assert that two losses have the same gradient for every parameter, or none."""
    got = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    want = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    for (name, _), a, b in zip(model.named_parameters(), got, want, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: n + m)


CASES = {
    "ragged": ([3, 0, 1, 5, 2], True),
    "none": ([0, 0, 0], True),
    "single": ([4], True),
    "no_markers": ([0, 0, 0, 0], False),
    "markerless_thoughts": ([2, 0, 3], False),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradients_equal_the_naive_loop(gpt, case, seed):
    """Guards against wrong masks, positions or block boundaries."""
    batch, sequences = random_batch(seed, *CASES[case])
    loss = training_loss(gpt, batch)
    expected = naive_loss(gpt, sequences)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    if batch.n_targets:
        assert_gradients_equal(gpt, loss, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"thought": "projected"},
        {"thought": "fixed", "smear": True},
        {"thought": "soft", "soft_temperature": 0.7},
        {"thought": "soft", "soft_top_k": 3, "smear": True},
    ],
    ids=["projected", "fixed", "soft", "soft_top_k"],
)
def test_other_thoughts_equal_the_naive_loop(options):
    """Guards against a wrong soft average or projection, and a parameter without a gradient."""
    model = random_gpt(seed=4, **options)
    batch, sequences = random_batch(11, [3, 0, 1, 4])
    loss = training_loss(model, batch)
    expected = naive_loss(model, sequences)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)  # fails if one is unused
    assert_gradients_equal(model, loss, expected)


def naive_thought_loss(model, sequences, thought_targets):
    """Return the cross-entropy of each state fed back with its labels, one at a time."""
    total = 0.0
    for (prefix, n, _, _), labels in zip(sequences, thought_targets.tolist(), strict=True):
        emb = model.wte(torch.tensor([prefix]))
        for row in labels[:n]:
            h = model.backbone(emb, torch.arange(emb.shape[1]))[:, -1:]  # fed back below
            emb = torch.cat([emb, naive_thought(model, h)], dim=1)
            row = [label for label in row if label != IGNORE]
            for label in row:  # a uniform distribution over them
                total = total - model.head(h)[0, 0].log_softmax(0)[label] / len(row)
    return total


@pytest.mark.parametrize("thought", ["hidden", "soft"])
def test_thought_loss_equals_the_naive_loop(thought, seed):
    """Guards against labels that are off by one: they belong to the state that is fed back."""
    model = random_gpt(seed % 1000, thought=thought)
    batch, sequences = random_batch(seed, [3, 0, 1, 5])
    loss = coconut.thought_loss(model, batch, coconut.forward(model, batch))
    expected = naive_thought_loss(model, sequences, batch.thought_targets)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    assert_gradients_equal(model, loss, expected)


@pytest.mark.parametrize("case", CASES)
def test_loss_equals_that_of_all_logits(case, seed):
    """Guards against wrong indices, since coconut.loss computes only the supervised logits."""
    model = random_gpt(seed % 1000, vocab_size=5)
    batch, _ = random_batch(seed, *CASES[case], vocab=5)
    logits = forward(model, batch)
    supervised = batch.targets[0] != IGNORE
    batch.targets[0, supervised] = logits[0].argmax(-1)[supervised]  # one correct sequence
    loss, correct = coconut.loss(model, batch, coconut.forward(model, batch))
    torch.testing.assert_close(loss, loss_sum(logits, batch.targets))
    assert torch.equal(correct, exact_match(logits, batch.targets)) and correct[0]


@pytest.mark.parametrize("smear", [False, True])
def test_fixed_thoughts_equal_pauses_in_one_pass(smear, seed):
    """Guards a claim of docs/RESULTS.md: without feedback, n passes compute the same as one."""
    model = random_gpt(seed % 1000, thought="fixed", smear=smear)
    model.pause.weight.data = model.wte.weight.data[:1].clone()  # token 0 is never in a batch
    batch, sequences = random_batch(seed, [3, 1, 4])
    logits = forward(model, batch)
    for b, (prefix, n, suffix, _) in enumerate(sequences):
        one_pass = model(torch.tensor([prefix + [0] * n + suffix]))[0, len(prefix) + n - 1 : -1]
        torch.testing.assert_close(logits[b, : len(suffix)], one_pass, rtol=1e-10, atol=1e-10)


def test_projection_starts_as_the_hidden_state():
    """Guards against a nonzero projection, and against different random weights elsewhere."""
    torch.manual_seed(0)
    plain = GPT(GPTConfig(41, 48, 2, 3, 24))
    torch.manual_seed(0)
    projected = GPT(GPTConfig(41, 48, 2, 3, 24, thought="projected", stop=True))
    batch, _ = random_batch(1, [3, 2])
    assert torch.equal(forward(plain, batch), forward(projected, batch))


def naive_stop_loss(model, sequences, needed):
    """Return the stop classifier's loss, for one sequence and number of thoughts at a time."""
    losses = []
    for (prefix, n, _, _), n_needed in zip(sequences, needed, strict=True):
        for k in range(n + 1):
            emb = model.wte(torch.tensor([prefix]))
            for _ in range(k):
                h = model.backbone(emb, torch.arange(emb.shape[1]))
                emb = torch.cat([emb, h[:, -1:]], dim=1)
            h = model.backbone(emb, torch.arange(emb.shape[1]))[0, -1]
            p = torch.sigmoid(h.detach() @ model.stop.weight[0] + model.stop.bias[0])
            losses.append(-torch.log(p if k >= n_needed else 1 - p))
    return sum(losses)


def test_stop_loss_equals_the_naive_loop():
    """Guards against wrong labels or masks, and against a gradient that reaches the model."""
    model = random_gpt(seed=2, vocab_size=7, stop=True)
    batch, sequences = random_batch(12, [3, 0, 1, 4, 4], vocab=7)
    needed = torch.tensor([2, 0, 3, 1, 9])
    suffix, targets = batch.suffix[:, :2], batch.targets[:, :2]
    batch = replace(batch, suffix=suffix, targets=targets, n_needed=needed)
    hidden = coconut.forward(model, batch)
    loss = coconut.stop_loss(model, batch, hidden)
    expected = naive_stop_loss(model, sequences, batch.n_needed.tolist())
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"stop.weight", "stop.bias"}


def test_no_thoughts_equals_plain_gpt(gpt):
    """Guards against an offset between the blocks that the naive loop has, too."""
    batch, sequences = random_batch(9, [0, 0, 0])
    logits = forward(gpt, batch)
    for b, (prefix, _, suffix, _) in enumerate(sequences):
        plain = gpt(torch.tensor([prefix + suffix]))[0, len(prefix) - 1 : -1]
        torch.testing.assert_close(logits[b, : len(suffix)], plain, rtol=1e-10, atol=1e-10)


def test_dropout_reaches_attention():
    """Guards against attention that ignores dropout or the seed."""
    model = random_gpt(dropout=0.5).train()
    batch, _ = random_batch(3, [3, 1])
    torch.manual_seed(1)
    a = forward(model, batch)
    torch.manual_seed(1)
    b = forward(model, batch)
    c = forward(model, batch)
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_exact_match_needs_every_label():
    """Guards the reference that other tests compare `correct` with."""
    logits = torch.zeros(2, 3, 5)
    logits[0, 1, 2] = logits[0, 2, 3] = logits[1, 1, 2] = 1.0
    targets = torch.tensor([[IGNORE, 2, 3], [IGNORE, 2, 3]])
    assert exact_match(logits, targets).tolist() == [True, False]


def gradients(model, batch, kernels="torch", autocast=False):
    """Return the loss, and the gradient of every parameter by name."""
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
def test_kernel_gradients_are_as_accurate_as_torch(n_thoughts, shape, autocast, device, seed):
    """Guards against wrong gradients of the kernels combined, over several thoughts."""
    pytest.importorskip("triton")
    shape = dict(n_embd=32, n_head=2) | shape
    model = random_gpt(seed % 1000, dtype=torch.float32, **shape).to(device)
    exact = random_gpt(seed % 1000, **shape).to(device)
    exact.load_state_dict(model.state_dict())
    batch = random_batch(seed, n_thoughts)[0].map(lambda t: t.to(device))
    got, usual = (gradients(model, batch, k, autocast) for k in ("triton", "torch"))
    truth = gradients(exact, batch)
    # four roundings per layer and pass, since a gradient passes through all of them;
    # one rounding in bfloat16 is as large as 2^16 in float32
    roundings = 4 * model.config.n_layer * (batch.max_thoughts + 2) * (2**16 if autocast else 1)
    assert_three_way(got[0], usual[0], truth[0], roundings)
    assert got[1].keys() == usual[1].keys() == truth[1].keys()
    for name, grad in truth[1].items():
        assert_three_way(got[1][name], usual[1][name], grad, roundings)


def test_thoughts_share_one_prefix_gradient_buffer(monkeypatch, seed):
    """Guards the purpose of the kernel: one key for the prefix, one dK and dV buffer per layer."""
    attention = pytest.importorskip("kernels.prefix_attention")
    model = random_gpt(seed % 1000, dtype=torch.float32, n_embd=32, n_head=2)
    batch = random_batch(1, [2, 3])[0]
    assert batch.prefix.shape[1] > 1  # a prefix of one token would use the kernel in all layers
    biases, written = [], []
    plain, writable = coconut.attention_bias, attention._writable
    monkeypatch.setattr(coconut, "attention_bias", lambda mask: biases.append(mask) or plain(mask))
    monkeypatch.setattr(
        attention, "_writable", lambda *args: written.append(writable(*args)) or written[-1]
    )
    if torch.cuda.is_available():
        model, batch = model.cuda(), batch.map(torch.Tensor.cuda)
    training_loss(model, batch, "triton").backward()
    assert [mask.shape[1] for mask in biases[:3]] == [2, 3, 4]  # one for the prefix, then thoughts
    # dk and dv of 3 thoughts per layer; in the last one also of the prefill query
    assert len(written) == 2 * (3 + 4)
    assert len({t.data_ptr() for t in written}) == 2 * model.config.n_layer
