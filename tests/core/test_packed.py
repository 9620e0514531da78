"""Packed linear layers generate the same tokens, follow the weights, and are reported."""

import copy
import itertools

import pytest
import torch
from helpers import generate, needs_c, random_gpt

from kernels._compile import compile_c
from kernels.cpu_step import CpuStep
from nanococonut import ops, packed
from nanococonut.inference.engine import Engine, Request
from nanococonut.model import GPT
from nanococonut.runtime.errors import UserError

MODEL = {"dtype": torch.float32, "n_layer": 2, "n_head": 2, "n_embd": 32}
if packed.unavailable(random_gpt(**MODEL)):
    pytest.skip("this PyTorch packs no linear layers", allow_module_level=True)
KERNELS = ["packed", pytest.param("c", marks=needs_c)]
PREFIXES = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]


def ask(engine):
    return engine.run(Request(PREFIXES[:3], 3, [39], -1, 6))


@pytest.mark.parametrize("kernels", KERNELS)
def test_generates_the_same(gpt, kernels):
    """Guards against a wrong activation, bias or head, a missing smear, and too many rows for C."""
    model = gpt.float()
    for prefixes in (PREFIXES[:1], PREFIXES[1:], PREFIXES):
        plain = generate(model, prefixes, 3, [39], -1, 6)
        fast = generate(model, prefixes, 3, [39], -1, 6, kernels=kernels)
        assert fast.tokens == plain.tokens
        torch.testing.assert_close(fast.thoughts, plain.thoughts, rtol=1e-5, atol=1e-5)


@needs_c
def test_a_step_in_c_that_cannot_run_is_refused(monkeypatch):
    """Guards against a traceback without a compiler, and against a miscompiled step."""
    model = random_gpt(**MODEL)
    monkeypatch.setattr(packed, "MIN_PARAMS", 0)
    compilers = {"no-such-cc": "No such file", "false": "false: failed"}
    for compiler, why in compilers.items():
        compile_c.cache_clear()
        with monkeypatch.context() as m:
            m.setenv("CC", compiler)
            with pytest.raises(UserError, match=f"--kernels=c cannot run here: .*{why}"):
                ops.choose_backend("c", model)
            for speedup, expected in ((1.62, "packed"), (0.9, "torch")):
                m.setattr(packed, "speedup", lambda model, kernels, x=speedup: x)
                name, reason = ops.choose_backend("auto", model)
                assert name == expected and why in reason
    step = CpuStep.__call__
    monkeypatch.setattr(CpuStep, "__call__", lambda *args: step(*args) * 1.001)
    with pytest.raises(UserError, match="its results differ by 1e-03 from plain PyTorch's"):
        ops.choose_backend("c", model)


@pytest.mark.parametrize("kernels", KERNELS)
def test_the_self_check_accepts_large_and_training_models(kernels):
    """Guards against a check that dropout or the roundings of a wide model fail."""
    wide = dict(dtype=torch.float32, n_layer=1, n_head=25, n_embd=1600, vocab_size=11, block_size=8)
    model = random_gpt(**wide, dropout=0.1).train()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.14)
    state = torch.get_rng_state()
    assert packed.unavailable(model, kernels) == "" and model.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kernels", KERNELS)
def test_engine_with_transposed_weights(kernels):
    """Guards against packed layers or a step in C that sampling, a stop classifier, a shrinking
    batch, or tensors that are not contiguous lead astray."""
    plain = random_gpt(stop=True, smear=True, **MODEL)
    torch.nn.init.normal_(plain.stop.weight, std=2)
    transposed = copy.deepcopy(plain)
    for linear in (transposed.wte, transposed.h[1].attn.c_proj, transposed.h[0].mlp.c_fc):
        linear.weight = torch.nn.Parameter(linear.weight.detach().t().contiguous().t())
    transposed.h[1].mlp.c_proj.bias = torch.nn.Parameter(
        plain.h[1].mlp.c_proj.bias.detach().repeat_interleave(2)[::2]
    )
    for model in (plain, transposed):
        for seed, eos in itertools.product(range(3), (-1, 9, 25)):
            for prefixes in (PREFIXES[:3], PREFIXES):  # four shrink to three or fewer
                args = (prefixes, 4, [39], eos, 6, True, 1.0 * (seed > 0), seed)
                expected = generate(plain, *args)
                fast = generate(model, *args, kernels=kernels)
                assert fast.tokens == expected.tokens
                assert fast.n_thoughts == expected.n_thoughts

    def edit(i, fed):
        return (fed + 1).t().contiguous().t()

    args = (PREFIXES[:2], 3, [39], -1, 6)
    expected = generate(plain, *args, edit=edit)
    assert generate(plain, *args, edit=edit, kernels=kernels).tokens == expected.tokens


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("thought", ["soft", "projected"])
def test_packed_feeds_back_every_thought(thought, kernels):
    """Guards against losing the layers that only some methods have."""
    model = random_gpt(thought=thought, **MODEL)
    plain = generate(model, PREFIXES[:3], 3, [39], -1, 6)
    fast = generate(model, PREFIXES[:3], 3, [39], -1, 6, kernels=kernels)
    assert fast.tokens == plain.tokens


@pytest.mark.parametrize("kernels", KERNELS)
def test_packed_copies_follow_the_weights(kernels):
    """Guards against stale copies after an optimizer changed the weights in place."""
    model = random_gpt(**MODEL)
    engine = Engine(model, kernels=kernels)
    before = ask(engine)
    with torch.no_grad():
        model.h[0].mlp.c_proj.weight.mul_(-3)
    after = ask(engine)
    assert not torch.equal(before.thoughts, after.thoughts)
    expected = ask(Engine(model, kernels="torch")).thoughts
    torch.testing.assert_close(after.thoughts, expected, rtol=1e-5, atol=1e-5)
    model.h[0].attn.c_attn.weight.data[:, 16:] = 0  # a common ablation, which no version counts
    expected = ask(Engine(model, kernels="torch")).thoughts
    torch.testing.assert_close(ask(engine).thoughts, expected, rtol=1e-5, atol=1e-5)
    assert engine.memory()["packed"] == 4 * (2 * 12 * 32 * 32 + model.wte.weight.numel())
    model.half()
    with pytest.raises(UserError, match="no packed form of torch.float16"):
        ask(engine)


class Adapted(torch.nn.Linear):
    """A layer with an adapter, which keeps the name of the weight."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.weight, self.bias = linear.weight, linear.bias
        self.gain = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.gain * super().forward(x)


def replace_activation(model):
    model.h[0].mlp.gelu = torch.nn.ReLU()


def replace_forward(model):
    model.h[1].mlp.forward = torch.zeros_like


def replace_layer(model):
    model.h[1].mlp.c_fc = Adapted(model.h[1].mlp.c_fc)


def replace_thoughts(model):
    model.thought_embedding = lambda hidden: 0.5 * hidden


EDITS = [replace_activation, replace_forward, replace_layer, replace_thoughts]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_after_the_engine_was_made_is_refused(kernels, edit):
    """The engine ignored an edit before its first call."""
    model = random_gpt(**MODEL)
    engine = Engine(model, kernels=kernels)
    if edit is replace_layer:  # after the first call, only changes of parameters are noticed
        ask(engine)
    edit(model)
    for _ in range(2):
        with pytest.raises(UserError, match="not a plain GPT-2"):
            ask(engine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fingerprint_shows_every_changed_bit(dtype):
    """Guards against a change that a sum of floats rounds away, and against odd sizes."""
    x = torch.randn(5, 7).to(dtype)
    x[0, 0] = 1e9
    for weight in (x, x.T, x[1:, 1:], x.flatten()[1:]):
        before = packed.fingerprint(weight)
        assert packed.fingerprint(weight) == before
        for i in range(weight.numel()):
            index = tuple(int(k) for k in torch.unravel_index(torch.tensor(i), weight.shape))
            value = weight[index].item()
            weight.data[index] = value + 0.5 if abs(value) < 1e6 else 2 * value
            assert packed.fingerprint(weight)[1:] != before[1:]
            weight.data[index] = value
        assert packed.fingerprint(weight)[1:] == before[1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fingerprint_shows_shuffled_and_negated_weights(dtype):
    """Guards against a sum of all bits, which does not show rows or columns that change places, nor
    an even number of changed signs."""
    weight = torch.randn(96, 64).to(dtype)
    order = torch.randperm(64)
    changes = {
        "rows": lambda w: w.copy_(w.roll(1, 0)),
        "columns": lambda w: w.copy_(w[:, order]),
        "blocks of columns": lambda w: w.copy_(w.roll(32, 1)),
        "two columns": lambda w: w.copy_(w[:, [*range(5), 40, *range(6, 40), 5, *range(41, 64)]]),
        "signs of a column": lambda w: w[:, 63].neg_(),
        "signs of rows": lambda w: w[::2].neg_(),
        "all signs": lambda w: w.neg_(),
    }
    for name, change in changes.items():
        before = packed.fingerprint(weight)
        change(weight.data)
        assert packed.fingerprint(weight) != before, name


def test_packing_leaves_the_model_as_it_is():
    """Guards against layers replaced in the model itself, which lose gradients and state dict."""
    model = random_gpt(**MODEL)
    names, layer = list(model.state_dict()), model.h[0].attn.c_attn
    fast = packed.PackedGPT(model)
    assert list(model.state_dict()) == names and model.h[0].attn.c_attn is layer
    assert fast.h[0].ln_1.weight is model.h[0].ln_1.weight and fast.wpe.weight is model.wpe.weight


@needs_c
def test_auto_chooses_the_fastest_for_large_models(monkeypatch):
    """Guards against a timing that decides the roundings of a small model."""
    model = random_gpt(**MODEL)
    monkeypatch.setattr(packed, "speedup", lambda model, k: {"c": 1.62, "packed": 1.3}[k])
    assert ops.choose_backend("auto", model) == ("torch", "a small model on a CPU")
    monkeypatch.setattr(packed, "MIN_PARAMS", 0)
    reason = "1.6x as fast as plain PyTorch on this CPU"
    assert ops.choose_backend("auto", model) == ("c", reason)
    assert ops.choose_backend("torch", model)[0] == "torch"
    monkeypatch.setattr(packed, "speedup", lambda model, kernels: 1.01)
    assert ops.choose_backend("auto", model)[0] == "torch"


def test_subclass_is_not_packed():
    """Guards against a packed copy that ignores what the subclass changes."""

    class Louder(GPT):
        def thought_embedding(self, hidden):
            return 2 * hidden

    model = Louder(random_gpt(**MODEL).config)
    with pytest.raises(UserError, match="a subclass of GPT"):
        Engine(model, kernels="packed")
    assert Engine(model).kernels == "torch"


def test_packing_that_computes_something_else_is_refused(monkeypatch):
    """Guards the self-check, which compares with plain layers before the first answer."""
    forward = packed.PackedLinear.forward
    monkeypatch.setattr(packed.PackedLinear, "forward", lambda m, x: forward(m, x) * 1.001)
    with pytest.raises(UserError, match="its results differ by 2e-03 from plain PyTorch's"):
        ops.choose_backend("packed", random_gpt(**MODEL))
    with pytest.raises(UserError, match=r"no packed form of torch.float64"):
        ops.choose_backend("packed", random_gpt())
