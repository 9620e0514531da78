"""The step in C against GPT.append: hidden states, logits, cache, precision and errors."""

import copy

import pytest
import torch
from helpers import assert_three_way, needs_c, random_gpt

from kernels.cpu_step import CpuStep

pytestmark = needs_c


def run(model, batch, data, lengths, x):
    """Return (hidden states, cache) after a step of `model`, in its dtype."""
    cache = model.new_cache(batch, data.shape[4])
    cache.data.copy_(data)
    cache.lengths.copy_(lengths)
    with torch.no_grad():
        hidden = model.append(cache, x.to(model.wte.weight.dtype), x, int(lengths.max()) + 1)
    assert torch.equal(cache.lengths, lengths)
    return hidden, cache.data


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", range(1, CpuStep.MAX_BATCH + 1))
@pytest.mark.parametrize("n_head, head_dim", [(3, 8), (1, 5), (4, 64)])
def test_equals_the_model(dtype, batch, n_head, head_dim):
    """Guards against wrong strides of sequences, heads or layers, and sizes that fill no vector.
    bfloat16 weights must give the results of the same weights in float32."""
    model = random_gpt(batch, n_head=n_head, n_embd=n_head * head_dim, n_layer=3).to(dtype).float()
    truth_model = copy.deepcopy(model).double()
    lengths = torch.randint(0, 20, (batch,))
    data, x = torch.randn(model.cache_shape(batch, 20)), torch.randn(batch, n_head * head_dim)
    truth, truth_cache = run(truth_model, batch, data, lengths, x.double())
    plain, plain_cache = run(model, batch, data, lengths, x)

    weights = [w.to(dtype) for w in model.layer_weights()]
    step = CpuStep(weights, model.wte.weight.to(dtype), n_head)
    hidden, cache = x + model.wpe.weight[lengths].detach(), data.clone()
    assert step(hidden, cache, lengths) is hidden
    assert_three_way(hidden, plain, truth)
    assert_three_way(cache, plain_cache, truth_cache)
    assert_three_way(step.lm_head(hidden), model.head(hidden), truth_model.head(hidden.double()))
    written = torch.zeros(data.shape, dtype=torch.bool)
    written[:, :, torch.arange(batch), :, lengths] = True
    assert torch.equal(cache[~written], data[~written])


def test_threads_and_batch_change_no_bit():
    """Guards against a race, and against sums whose order depends on the threads or the batch."""
    model = random_gpt(dtype=torch.float32, n_embd=96)
    step = CpuStep(model.layer_weights(), model.wte.weight, 3)
    data, x = torch.randn(model.cache_shape(3, 30)), torch.randn(3, 96)
    lengths, results, n_threads = torch.tensor([29, 0, 11]), [], torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results += [step(x.clone(), data.clone(), lengths) for _ in range(20)]
    finally:
        torch.set_num_threads(n_threads)
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(step.lm_head(results[0])[1:2], step.lm_head(results[0][1:2]))
    alone = [step(x[b : b + 1].clone(), data[:, :, b : b + 1].clone(), lengths[b : b + 1])
             for b in range(3)]  # fmt: skip
    assert torch.equal(torch.cat(alone), results[0])


def test_wrong_arguments_are_refused():
    """Guards against reads and writes out of bounds, which nothing in C would notice."""
    model = random_gpt(dtype=torch.float32)
    step = CpuStep(model.layer_weights(), model.wte.weight, 3)
    x, data, lengths = torch.zeros(2, 24), model.new_cache(2, 5).data, torch.tensor([1, 4])
    step(x, data, lengths)
    for args in (
        (x, data[:, :, :1], lengths),
        (x.double(), data, lengths),
        (x, data, lengths.int()),
        (x, data, lengths[:1]),
        (torch.zeros(24, 2).t(), data, lengths),
    ):
        with pytest.raises(ValueError, match="expected"):
            step(*args)
    for full in ([1, 5], [-1, 0]):
        with pytest.raises(IndexError, match="in a cache of 5 positions"):
            step(x, data, torch.tensor(full))
    for hidden in (torch.zeros(2, 23), torch.zeros(2, 24, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="expected"):
            step.lm_head(hidden)
