"""latent_attention against its reference: the three-way rule, ragged and empty sequences, NaN in
unused slots, splits. On Triton's interpreter; on a GPU (-m gpu) also bf16 and large sizes."""

import pytest
import torch

pytest.importorskip("triton")
from attention_inputs import random_inputs, slow
from helpers import assert_three_way

from kernels.latent_attention import SplitWorkspace, block_sizes, latent_attention
from kernels.reference import latent_attention_ref
from nanococonut.cache import KVCache
from nanococonut.model import cached_attention

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def attend(q, k, v, lengths, n_new=0, n_splits=None):
    workspace = SplitWorkspace(*k.shape, k.device, n_splits)
    return latent_attention(q, k, v, lengths, workspace, n_new)


def exact(q, k, v, lengths):
    return latent_attention_ref(q.double(), k.double(), v.double(), lengths)[0]


@pytest.mark.parametrize("n_splits", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hs", [16, 64, 80, 128, *slow(24, 48, 96)])
def test_output_matches_reference(hs, dtype, n_splits, device, seed, nan_memory):
    T = 3 * block_sizes(hs)[0] + 5
    q, k, v, lengths = random_inputs([T, 0, 1, T // 2 + 3], 2, T, hs, dtype, device)
    workspace = SplitWorkspace(*k.shape, k.device, n_splits)
    out = latent_attention(q, k, v, lengths, workspace)
    assert (out[1] == 0).all()
    assert_three_way(out, latent_attention_ref(q, k, v, lengths)[0], exact(q, k, v, lengths))
    again = latent_attention(q, k, v, lengths, workspace)  # the counters are zero again
    assert torch.equal(out, again)


def test_own_key_is_attended(device, seed):
    """n_new=1: the key just stored at lengths[b] counts, but no slot past the cache is read."""
    q, k, v, lengths = random_inputs([9, 1, 40], 1, 40, 16, torch.float32, device)
    out = attend(q, k, v, lengths - 1, n_new=1)
    assert torch.equal(out, attend(q, k, v, lengths))
    assert torch.equal(out[2], attend(q, k, v, lengths, n_new=1)[2])  # full


def test_equals_the_models_cached_attention(device, seed):
    """The same as the torch path of a step: append, then attend to everything so far."""
    data = torch.zeros(3, 2, 4, 2, 20, 16, device=device)
    cache = KVCache(data, torch.zeros(4, dtype=torch.int64, device=device))
    cache.data.normal_()
    cache.lengths.copy_(torch.tensor([7, 0, 19, 3]))
    q, k, v = torch.randn(3, 4, 2, 1, 16, device=device)
    pos = cache.lengths[:, None]
    bias = cache.attention_bias(pos, 20)
    expected = cached_attention(cache, pos, bias, 1, q, k, v)  # (B, nh, 1, hs)
    out = attend(q[:, :, 0], *cache.data[1], cache.lengths, n_new=1)
    torch.testing.assert_close(out, expected[:, :, 0], rtol=1e-5, atol=1e-6)


def test_bad_input_is_named(device):
    q, k, v, lengths = random_inputs([4, 2], 2, 8, 16, torch.float32, device)
    for args, message in [
        ((q[:, :1], k, v, lengths), "q, k, v: expected"),
        ((q, k, v[:, :, 1:], lengths), "q, k, v: expected"),
        ((q, k, v, lengths[:1]), "lengths: expected"),
        ((q, k.transpose(2, 3).contiguous().transpose(2, 3), v, lengths), "contiguous last"),
    ]:
        with pytest.raises(ValueError, match=message):
            attend(*args)
    with pytest.raises(ValueError, match="workspace: expected"):
        workspace = SplitWorkspace(3, 2, 8, 16, q.device, n_splits=2)
        latent_attention(q, k, v, lengths, workspace)


@pytest.mark.parametrize(
    "B, T, n_splits", [(1, 448, 8), (1, 1024, 16), (8, 448, 2), (64, 448, 1), (1, 64, 1)]
)
def test_splits_depend_on_shapes_only(B, T, n_splits, monkeypatch):
    """GPT-2's 12 heads of 64 on 132 multiprocessors."""
    properties = type("Properties", (), {"multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for name in ("empty", "zeros"):
        monkeypatch.setattr(torch, name, lambda *shape, **kwargs: shape)
    workspace = SplitWorkspace(B, 12, T, 64, torch.device("cuda"))
    assert workspace.n_splits == n_splits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("B", [1, 8, 64])
def test_long_contexts(B, dtype, seed):
    T = 4096
    lengths = [T, *torch.randint(0, T, (B - 1,)).tolist()]
    q, k, v, lengths = random_inputs(lengths, 12, T, 64, dtype, "cuda")
    out = attend(q, k, v, lengths)
    assert_three_way(out, latent_attention_ref(q, k, v, lengths)[0], exact(q, k, v, lengths))
    assert all(torch.equal(out, attend(q, k, v, lengths)) for _ in range(20))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_captured_graph_follows_the_lengths(seed):
    """The grid is static; loop bounds and used splits are read on the device. The counters are zero
    after each replay."""
    q, k, v, lengths = random_inputs([900] * 2, 12, 1000, 64, torch.bfloat16, "cuda")
    k, v = k.nan_to_num(), v.nan_to_num()
    workspace = SplitWorkspace(*k.shape, k.device)
    assert workspace.n_splits > 1
    latent_attention(q, k, v, lengths, workspace, 1)  # compile before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = latent_attention(q, k, v, lengths, workspace, 1)
    for n in ([0, 1], [899, 30], [1000, 500], [63, 64]):
        lengths.copy_(torch.tensor(n))
        graph.replay()
        assert torch.equal(out, attend(q, k, v, lengths, n_new=1))
        assert (workspace.counter == 0).all()
