"""Thoughts all at once are the thoughts one by one, after as many passes as there are."""

import json

import pytest
import torch
from conftest import random_gpt
from test_coconut import random_batch

from nanococonut import coconut, jacobi

N = [3, 0, 1, 5, 2]
LATENT = 7
MODELS = {
    "hidden": {},
    "smear": {"smear": True},
    "projected": {"thought": "projected"},
    "soft": {"thought": "soft", "soft_temperature": 0.7},
}


@pytest.mark.parametrize("switches", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("iterations", [0, 5, 9])
def test_n_passes_are_exact(seed, switches, iterations):
    """Logits, every hidden state, the stop classifier's loss and all gradients; ragged rows."""
    model = random_gpt(seed % 1000, stop=True, **switches)
    batch, _ = random_batch(seed, N)
    found = []
    for thinking in (
        coconut.think(model, batch),
        jacobi.think(model, batch, iterations, LATENT),
    ):
        loss = coconut.loss_sum(coconut.answer(model, batch, thinking), batch.targets)
        loss = loss + coconut.stop_loss(model, batch, thinking, "correct")
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        found.append([*thinking.states, *thinking.inputs, loss, *gradients])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_pass_k_makes_the_first_k_thoughts_exact(gpt, seed):
    batch, _ = random_batch(seed, N)
    exact = coconut.think(gpt, batch).states
    for k in range(1, 5):
        states = jacobi.think(gpt, batch, k, LATENT).states
        for i, (got, want) in enumerate(zip(states, exact, strict=True)):
            same = torch.isclose(got, want, rtol=1e-9, atol=1e-9).all(dim=1)
            assert same[batch.n_thoughts <= k].all() and (i > k or same.all())
        assert not same[batch.n_thoughts == 5].any()  # states[5]: the fifth thought of that row


def test_no_thoughts_is_plain(gpt):
    batch, _ = random_batch(3, [0, 0])
    thinking = jacobi.think(gpt, batch, 2, LATENT)
    assert torch.equal(coconut.answer(gpt, batch, thinking), coconut.forward(gpt, batch))


def test_right_counts_rows_as_generation_would(gpt, seed):
    """Teacher-forced and right to the last label: what greedy words, one by one, would be."""
    batch, rows = random_batch(seed, [2, 3, 1, 0])
    for b, (prefix, n, suffix, _) in enumerate(rows):  # half the rows get the model's own words
        if b % 2:
            continue
        e = gpt.embed(torch.tensor([prefix]))
        for _ in range(n):
            h = gpt.trunk(e, torch.arange(e.shape[1]))
            e = torch.cat([e, gpt.feed_back(h[:, -1:])], dim=1)
        e = torch.cat([e, gpt.embed(torch.tensor([suffix[:1]]))], dim=1)
        for j in range(1, len(suffix)):
            word = gpt.head(gpt.trunk(e, torch.arange(e.shape[1]))[:, -1]).argmax(-1)
            batch.suffix[b, j] = batch.targets[b, j] = word
            e = torch.cat([e, gpt.embed(word)[None]], dim=1)
    exact = coconut.right_rows(coconut.forward(gpt, batch), batch.targets)
    assert exact[::2].all()
    assert jacobi.right(gpt, [batch, batch], 0, LATENT) == 2 * int(exact.sum())


def test_train_has_parallel_thoughts(script, tmp_path):
    (tmp_path / "tiny.py").write_text(
        "tokenizer='words';render='compact';n_nodes=10;min_hops=2;max_hops=3;n_layer=1;n_head=2\n"
        "n_embd=16;block_size=128;dropout=0.0;rows_per_epoch=32;valid_rows=6;batch_size=16\n"
        "max_latent_stage=2;start_stage=1;epochs_per_stage=1;epochs=3;max_new_tokens=8\n"
    )
    logs = {}
    for name, flags in {"one by one": [], "all": [0], "few": [1]}.items():
        given = [f for k in flags for f in ("--thoughts=jacobi", f"--jacobi_iterations={k}")]
        assert script("tiny.py", f"--out_dir={name}", *given)[0] == 0
        logs[name] = [json.loads(line) for line in open(f"{name}/metrics.jsonl")]
    losses = {name: [r["loss"] for r in log if "loss" in r] for name, log in logs.items()}
    assert losses["all"] == pytest.approx(losses["one by one"], abs=1e-5)
    # a single pass is all there is to a single thought, and not to two
    assert losses["few"][:2] == pytest.approx(losses["all"][:2], abs=1e-5)
    assert losses["few"][3] != pytest.approx(losses["all"][3], abs=1e-5)
    assert [r["thoughts"] for r in logs["few"] if "valid_as_trained" in r] == [2, 2]
    assert not any("valid_as_trained" in r for r in logs["all"])
    for name in ("few", "all"):  # inference has thoughts one by one
        code, _, err = script(f"--out_dir={name}", "--max_new_tokens=2", script="sample.py")
        assert (code, "in 1 parallel passes" in err) == ((2, True) if name == "few" else (0, False))
        assert err.count("\n") <= 2
