"""bench/precision.py: what half precision changes, in hidden states and in losses."""

import json
from pathlib import Path

import pytest
import torch

from bench import precision
from bench.common.results import read_results
from nanococonut.model import GPT, GPTConfig
from nanococonut.weights import checkpoint

THOUGHTS = 12


def drifts(seed, std, device="cpu", kinds=("torch",)):
    """Mean relative error after 1 to 12 thoughts, in roundings of its dtype, by dtype and kernels;
    fp64 is the truth. std: of the matrices (None: GPT-2's)."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(41, 48, 3, 2, 48)).double().to(device)
    for name, p in model.named_parameters():
        if std and "ln" not in name:
            torch.nn.init.normal_(p, std=std)
    prompts = [torch.randint(41, (n,)).tolist() for n in (3, 9, 17, 6, 12, 4, 8, 11)]
    truth = precision.think(model, prompts, THOUGHTS, torch.float64, "torch")
    found = {}
    for kind in kinds:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            got = precision.think(model, prompts, THOUGHTS, dtype, kind)
            stats = precision.compare_hidden(*got, *truth)
            error = torch.tensor([s["error"] for s in stats])
            found[dtype, kind] = error / torch.finfo(dtype).eps
    return found


@pytest.mark.parametrize("std", [None, 0.1], ids=["gpt2", "random"])
def test_half_precision_drifts_by_its_roundings_only(device, std, seed):
    """To first order a drift is a number of roundings that the model decides, not the dtype: so
    float32's, against float64, foretells a half's (which has fewer: its sums are float32). But
    float32's are independent and add up as the root of the n + 1 passes; a half's may all lean the
    same way, where a thought moves the state by less than one of them, and then add up as n + 1. So
    it is at most sqrt(n + 1) times as many. In 200 seeds it was 0.6 of that, or less."""
    found = drifts(seed, std, device, ("torch", "triton") if device == "cuda" else ("torch",))
    usual = found[torch.float32, "torch"]
    assert 0.1 < usual.min() and usual.max() < 100
    most = usual * torch.arange(2, THOUGHTS + 2).sqrt()
    for label, error in found.items():
        assert (error <= most).all(), (label, error / most)


def test_compare_hidden():
    expected = torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]])  # two prompts, one thought
    got = torch.tensor([[[3.0, 4.5]], [[1.0, 2.0]]])
    tokens, others = torch.tensor([[7], [8]]), torch.tensor([[7], [9]])
    [stats] = precision.compare_hidden(got, tokens, expected, others)
    cosines = 27 / 5 / 29.25**0.5, 2 / 5**0.5
    assert stats == pytest.approx(
        {"error": 0.3, "worst": 0.5, "cosine": sum(cosines) / 2, "same_token": 0.5}
    )


@pytest.fixture
def bench(script):
    return lambda *argv: script(*argv, script="bench/precision.py")


SHAPE = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--vocab_size=50", "--length=5"]
TINY = ["--prompts=2", "--thoughts=3", "--device=cpu"]


@pytest.mark.parametrize("argv", [SHAPE, [f"--checkpoint={checkpoint.BUNDLED}"]])
def test_hidden_states_of_random_and_trained(bench, tmp_path, argv):
    code, out, err = bench(*TINY, *argv, "--kernels=torch", "--out=rows.jsonl")
    assert (code, err) == (0, "")
    rows = read_results(tmp_path / "rows.jsonl")
    assert [(r["dtype"], r["shape"]["thoughts"]) for r in rows] == [
        (dtype, n) for dtype in ("bfloat16", "float16") for n in (1, 2, 3)
    ]
    assert {(r["metric"], r["provider"], r["shape"]["examples"]) for r in rows} == {
        ("hidden_error", "torch", 2)
    }
    coarse, fine = ([r["value"] for r in rows if r["dtype"] == d] for d in ("bfloat16", "float16"))
    assert all(0 < 3 * b < a < 0.1 for a, b in zip(coarse, fine, strict=True))
    assert all(r["value"] <= r["detail"]["worst"] for r in rows)
    name = "random weights" if argv == SHAPE else "prosqa_small (step 5000)"
    assert rows[0]["labels"] == {"checkpoint": name}


def test_mistakes_take_two_lines(bench):
    for argv, message in (
        ([*SHAPE, "--n_head=3"], "is not a multiple"),
        (["--thoughts=0"], "thoughts=0"),
        (["--checkpoint=nowhere"], "does not exist"),
        ([f"--checkpoint={checkpoint.BUNDLED}", "--thoughts=500"], "block_size=160"),
        ([*SHAPE, "--kernels=triton", "--n_embd=258"], "triton cannot run here"),
        (["--of=loss", "--config=nowhere.py"], "nowhere.py"),
    ):
        code, _, err = bench(*TINY, *argv)
        assert code == 2 and message in err and len(err.splitlines()) <= 2, err


RECIPE = """
tokenizer = "words"
render = "compact"
n_nodes = 10
min_hops = 2
max_hops = 3
n_layer = 1
n_head = 2
n_embd = 32
train_examples = 32
val_examples = 2
batch_size = 8
"""


@pytest.mark.slow  # .ci/run has a run of it
def test_bfloat16_loss_is_near_and_not_the_same(bench, tmp_path):
    Path("tiny.py").write_text(RECIPE)
    argv = ("--of=loss", "--config=tiny.py", "--steps=3", "--out=rows.jsonl", "--device=cpu")
    code, out, err = bench(*argv)
    assert (code, err) == (0, "")
    [row] = read_results(tmp_path / "rows.jsonl")
    assert json.loads(out.splitlines()[-1])["rows"][0]["value"] == row["value"]
    assert row["shape"] == {"steps": 3, "seed": 0} and row["dtype"] == "bfloat16"
    assert 0 < row["detail"]["first"] <= row["detail"]["greatest"] < 0.05
