"""The engine equals a naive loop, batched equals one by one, and it refuses what cannot fit."""

import pytest
import torch
from fake_graphs import FakeGraphCache
from helpers import generate, random_gpt

from nanococonut.inference.engine import Engine

EOS, EOT = 40, 39


def naive(model, prefix, n_thoughts, opening, max_new, stop=False):
    """No cache: the whole sequence again for each thought and word."""
    e = model.embed(torch.tensor([prefix]))

    def last():
        return model.backbone(e, torch.arange(e.shape[1]))[:, -1:]

    thoughts = []
    for _ in range(n_thoughts):
        if stop and model.stop(last())[0, 0, 0] > 0:
            break
        thoughts.append(last())
        e = torch.cat([e, model.thought_embedding(thoughts[-1])], 1)
    for token in opening:
        e = torch.cat([e, model.embed(torch.tensor([[token]]))], 1)
    words = []
    for _ in range(max_new):
        token = int(model.head(last()).argmax())
        if token == EOS:
            break
        words.append(token)
        e = torch.cat([e, model.embed(torch.tensor([[token]]))], 1)
    return words, torch.cat(thoughts, 1) if thoughts else None


def prefixes(seed, n):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 20, (n,), generator=g).tolist()
    return [torch.randint(0, 39, (k,), generator=g).tolist() for k in lengths]


@pytest.mark.parametrize("n_thoughts", [0, 1, 6])
@pytest.mark.parametrize("opening", [[], [EOT]], ids=["bare", "eot"])
@torch.no_grad()
def test_batched_and_ragged_equals_the_naive_loop(gpt, n_thoughts, opening):
    rows = prefixes(n_thoughts, 7)
    out = generate(gpt, rows, n_thoughts, opening, EOS, 12)
    for b, row in enumerate(rows):
        words, thoughts = naive(gpt, row, n_thoughts, opening, 12)
        assert out.tokens[b] == words
        if n_thoughts:
            torch.testing.assert_close(out.thoughts[b], thoughts[0], rtol=1e-9, atol=1e-9)
        alone = generate(gpt, [row], n_thoughts, opening, EOS, 12)
        assert alone.tokens[0] == words


@pytest.mark.parametrize("thought", ["hidden", "soft", "projected"])
@pytest.mark.parametrize("smear", [False, True])
@torch.no_grad()
def test_each_row_thinks_until_its_classifier_says_enough(thought, smear):
    model = random_gpt(seed=5, thought=thought, smear=smear, stop=True)
    rows = prefixes(6, 9)
    model.stop.bias.fill_(-0.3)
    out = generate(model, rows, 5, [EOT], EOS, 10, stop=True)
    for b, row in enumerate(rows):
        words, thoughts = naive(model, row, 5, [EOT], 10, stop=True)
        n = 0 if thoughts is None else thoughts.shape[1]
        assert (out.n_thoughts[b], out.tokens[b]) == (n, words)
        if n:
            torch.testing.assert_close(out.thoughts[b, :n], thoughts[0], rtol=1e-9, atol=1e-9)
    assert len(set(out.n_thoughts)) > 2  # none, all and some in between: the test's own bias
    assert generate(model, rows, 5, [EOT], EOS, 10).n_thoughts == [5] * 9  # only where asked


@torch.no_grad()
def test_eos_ends_a_row_at_once_and_leaves_the_others_alone():
    """The released generate never looks at its first token."""
    model = random_gpt(seed=3)
    rows = prefixes(1, 5)
    free = generate(model, rows, 2, [EOT], EOS, 8).tokens
    first = free[2][0]
    out = generate(model, rows, 2, [EOT], first, 8).tokens
    assert out[2] == []
    for a, b in zip(out, free, strict=True):
        assert a == (b[: b.index(first)] if first in b else b)
    lengths = {len(a) for a in out}
    assert len(lengths) > 1  # some ended early while others went on


def test_what_does_not_fit_is_refused_before_any_work(gpt):
    gpt.backbone = None  # any work would raise TypeError
    with pytest.raises(ValueError, match="block_size"):
        generate(gpt, [[1] * 40], 6, [EOT], EOS, 8)
    for bad in ([[]], -1, 8), ([[1]], -1, 8), ([[1]], 0, 0):
        with pytest.raises(ValueError, match="must not be empty"):
            generate(gpt, bad[0], bad[1], [], EOS, bad[2])


@torch.no_grad()
def test_rows_that_are_done_leave_the_batch_and_the_others_do_not_notice():
    model = random_gpt(seed=8, smear=True)
    rows = prefixes(3, 12)
    never = -1
    free = [generate(model, [row], 2, [EOT], never, 14).tokens[0] for row in rows]
    ends = [t for row in free for t in row[1:4]]
    eos = max(set(ends), key=ends.count)  # a token that many rows say early
    sizes = []
    backbone = model.backbone

    def spy(e, *args, **kwargs):
        sizes.append(len(e))
        return backbone(e, *args, **kwargs)

    model.backbone = spy
    out = generate(model, rows, 2, [EOT], eos, 14).tokens
    assert out == [row[: row.index(eos)] if eos in row else row for row in free]
    assert sizes[0] == 12 and sizes[-1] <= 6


@torch.no_grad()
def test_sampling_draws_from_the_softmax_by_its_own_seed():
    model = random_gpt(seed=9)
    logits = model(torch.tensor([[3, 7, 1]]))[0, -1]
    said = generate(model, [[3, 7, 1]] * 4000, 0, [], EOS, 1, temperature=2.0, seed=1).tokens
    found = torch.bincount(torch.tensor([t[0] if t else EOS for t in said]), minlength=41) / 4000
    wanted = (logits / 2.0).softmax(-1)
    # 5 standard errors of a share of 4,000, and a floor for rare ones
    assert ((found - wanted).abs() < 5 * (wanted / 4000).sqrt() + 1e-3).all()
    state = torch.random.get_rng_state()
    ask = [[3, 7], [1]]
    a, b, c = (generate(model, ask, 1, [], EOS, 9, temperature=1.5, seed=s) for s in (5, 5, 6))
    assert a.tokens == b.tokens != c.tokens
    assert torch.equal(state, torch.random.get_rng_state())  # torch's own is left alone
    with pytest.raises(ValueError, match="temperature"):
        generate(model, ask, 1, [], EOS, 9, temperature=-1.0)


def taped(model, max_graphs=24) -> Engine:
    """The engine as on a GPU, with fake_graphs for graphs."""
    engine = Engine(model)
    engine.graphs = FakeGraphCache(max_graphs)
    return engine


@torch.no_grad()
@pytest.mark.parametrize("thought", ["hidden", "soft"])
@pytest.mark.parametrize("smear", [False, True])
def test_replayed_steps_equal_the_naive_loop(thought, smear):
    """Batches of other sizes, lengths and contents, in turn, over one engine's memory and graphs:
    with rows that fill up the batch, rows that end early and leave it, thoughts that stop."""
    FakeGraphCache.captured = FakeGraphCache.replayed = 0
    model = random_gpt(seed=8, smear=smear, thought=thought, stop=True)
    model.stop.bias.fill_(-0.3)
    engine = taped(model, max_graphs=12)
    asked = [(2, 6, 3, [EOT]), (3, 5, 3, [EOT]), (4, 6, 3, []), (2, 1, 3, [EOT]),
             (5, 11, 4, [EOT]), (2, 6, 3, [EOT])]  # fmt: skip
    for seed, n, thoughts, opening in asked:
        rows, stop = prefixes(seed, n), seed != 3
        out = engine.run(rows, thoughts, opening, EOS, 9, stop)
        for b, row in enumerate(rows):
            words, had = naive(model, row, thoughts, opening, 9, stop)
            n_had = 0 if had is None else had.shape[1]
            assert (out.tokens[b], out.n_thoughts[b]) == (words, n_had)
            if n_had:
                torch.testing.assert_close(out.thoughts[b, :n_had], had[0], rtol=1e-9, atol=1e-9)
        assert len(engine.graphs.graphs) <= 12
    assert FakeGraphCache.replayed > 2 * FakeGraphCache.captured > 8


@torch.no_grad()
def test_graphs_are_made_anew_where_the_weights_moved():
    model = random_gpt(seed=8)
    engine, rows = taped(model), prefixes(2, 3)

    def right():
        words = [naive(model, row, 2, [EOT], 6)[0] for row in rows]
        return engine.run(rows, 2, [EOT], EOS, 6).tokens == words

    assert right()
    captured = FakeGraphCache.captured
    model.load_state_dict(random_gpt(seed=9).state_dict())  # in place
    assert right() and FakeGraphCache.captured == captured  # the same graphs, other weights
    model.float()
    assert engine.run(rows, 2, [EOT], EOS, 6).thoughts.dtype == torch.float32
    assert FakeGraphCache.captured > captured


@torch.no_grad()
def test_sampling_is_the_same_replayed():
    model, rows = random_gpt(seed=9), prefixes(4, 4)
    plain, replayed = Engine(model), taped(model)
    for seed in (1, 2):
        want = plain.run(rows, 2, [EOT], EOS, 7, temperature=1.3, seed=seed)
        got = replayed.run(rows, 2, [EOT], EOS, 7, temperature=1.3, seed=seed)
        assert got.tokens == want.tokens
