"""ops.py reports the backend and never changes it silently; all backends generate the same."""

import pytest
import torch
from helpers import generate, needs_c, random_gpt

from kernels._compile import compile_c
from nanococonut import ops, plain_gpt2
from nanococonut.model import GPT, MLP, Attention
from nanococonut.runtime.errors import UserError

pytest.importorskip("triton")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_engine_generates_the_same_with_triton(device):
    """Guards inactive sequences, with ragged prefixes, early stops and a shrinking batch. With
    several layers, each must use its own cache."""
    model = random_gpt(seed=2, dtype=torch.float32, n_layer=2, n_head=2, n_embd=16, stop=True)
    model = model.to(device)
    prefixes = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
    no_eos = generate(model, prefixes, 2, [39], -1, 3, stop=True)
    eos = no_eos.tokens[0][0]  # so that a sequence ends at once
    plain = generate(model, prefixes, 2, [39], eos, 2, stop=True)
    fused = generate(model, prefixes, 2, [39], eos, 2, stop=True, kernels="triton")
    assert fused.tokens == plain.tokens and len({len(t) for t in plain.tokens}) > 1
    assert fused.n_thoughts == plain.n_thoughts and len(set(plain.n_thoughts)) > 1
    for b, n in enumerate(plain.n_thoughts):
        torch.testing.assert_close(
            fused.thoughts[b, :n], plain.thoughts[b, :n], rtol=1e-4, atol=1e-4
        )


def test_training_backend_gives_its_reason(monkeypatch):
    """Guards against a silent fallback, and against "auto" choosing the interpreter."""
    plain, dropout = random_gpt(dtype=torch.float32), random_gpt(dtype=torch.float32, dropout=0.1)
    assert ops.choose_training_backend("torch", plain) == ("torch", "as requested")
    if not torch.cuda.is_available():  # interpreted kernels need --kernels=triton
        assert ops.choose_training_backend("triton", plain)[0] == "triton"
        for model, reason in (
            (dropout, r"no kernel for attention with dropout \(0.1\)"),
            (random_gpt(), "float64"),
            (random_gpt(dtype=torch.float32, n_head=1, n_embd=144), "heads of 144"),
        ):
            with pytest.raises(UserError, match=reason):
                ops.choose_training_backend("triton", model)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="triton cannot run here: the model is on cpu"):
        ops.choose_training_backend("triton", plain)
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="triton is not installed"):
        ops.choose_training_backend("triton", plain)


@needs_c
def test_training_in_c_gives_its_reason(monkeypatch):
    """Guards against a traceback without a compiler, and a model that C would train wrongly."""

    def gpt(**options):
        return random_gpt(**dict(dtype=torch.float32, n_head=1, n_embd=32) | options)

    for kernels in ("auto", "c"):
        assert ops.choose_training_backend(kernels, gpt())[0] == "c"
    changed, other_eps, subclass = gpt(n_layer=2), gpt(), gpt()
    changed.h[1].mlp.gelu = torch.nn.ReLU()
    other_eps.ln_f.eps = 0.1  # hardly matters with the random weights of plain_gpt2.py
    subclass.__class__ = type("Other", (GPT,), {})
    refused = [
        (changed, False, "layer 1 gives logits that differ"),
        (other_eps, False, "its results differ by"),
        (subclass, False, "a subclass of GPT"),
        (gpt(dropout=0.1), False, "does not support dropout"),
        (gpt(thought="projected"), False, "projected thoughts"),
        (gpt(dtype=torch.float64), False, "float64 on cpu"),
        (gpt(), True, "bfloat16 on cpu"),
        (gpt(n_embd=48), False, "n_embd=48, only multiples of 32"),
    ]
    with monkeypatch.context() as m:
        m.setenv("CC", "no-such-cc")
        compile_c.cache_clear()
        assert "No such file" in ops.choose_training_backend("auto", gpt())[1]
        with pytest.raises(UserError, match="--kernels=c cannot run here: .*No such file"):
            ops.choose_training_backend("c", gpt())
    for model, use_bf16, reason in refused:
        kernels, why = ops.choose_training_backend("auto", model, use_bf16)
        assert kernels == "torch" and reason in why
        with pytest.raises(UserError, match=f"--kernels=c cannot run here: .*{reason}"):
            ops.choose_training_backend("c", model, use_bf16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_gpu_training_uses_kernels_without_dropout():
    """Guards against "auto" never choosing the kernels."""
    plain, dropout = random_gpt(dtype=torch.float32), random_gpt(dtype=torch.float32, dropout=0.1)
    assert ops.choose_training_backend("auto", plain.cuda())[0] == "triton"
    assert ops.choose_training_backend("auto", dropout.cuda())[0] == "torch"


def test_inference_backend_gives_its_reason(monkeypatch):
    """Guards against a silent fallback, and against models that the kernels do not support."""
    plain, smeared = random_gpt(), random_gpt(smear=True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert ops.choose_backend("torch", plain) == ("torch", "as requested")
    assert ops.choose_backend("auto", plain) == ("torch", "a small model on a CPU")
    with pytest.raises(UserError, match="triton cannot run here: the model is on cpu"):
        ops.choose_backend("triton", plain)
    for misspelt in (lambda: ops.choose_backend("tritn", plain),
                     lambda: ops.choose_training_backend("packed", plain),
                     lambda: ops.choose_graph("yes", plain)):  # fmt: skip
        with pytest.raises(UserError, match="'(tritn|packed|yes)': expected one of auto"):
            misspelt()
    for graph, on in (("auto", False), ("off", False)):
        assert ops.choose_graph(graph, plain) is on
    with pytest.raises(UserError, match="graph=on cannot run here: the model is on cpu"):
        ops.choose_graph("on", plain)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ops.choose_backend("triton", random_gpt(dtype=torch.float32))[0] == "triton"
    assert ops.choose_backend("auto", plain)[0] == "torch"  # never interpreted
    for model, reason in ((plain, "float64"), (smeared.float(), "smear"),
                       (random_gpt(thought="soft").float(), "soft thoughts"),
                       (random_gpt(thought="fixed").float(), "fixed thoughts"),
                       (random_gpt(n_head=1, n_embd=129).float(), "129 dimensions")):  # fmt: skip
        with pytest.raises(UserError, match=reason):
            ops.choose_backend("triton", model)
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="triton is not installed"):
        ops.choose_backend("triton", plain)


class GainMLP(MLP):
    """An addition that starts at zero, such as an adapter."""

    def __init__(self, config):
        super().__init__(config)
        self.gain = torch.nn.Parameter(torch.zeros(config.n_embd))

    def forward(self, x):
        return (1 + self.gain) * super().forward(x)


class RolledAttention(Attention):
    """Depends on positions, like rotary embeddings."""

    def forward(self, x, attend, last_pos=None):
        def rolled(layer, q, k, v):
            return attend(layer, q.roll(1, 2), k, v)

        return super().forward(x, rolled, last_pos)


class ScaledAttention(Attention):
    """Divides the scores by the number of the layer, like an option of GPT-2 in transformers."""

    def forward(self, x, attend, last_pos=None):
        def scaled(layer, q, k, v):
            return attend(layer, q / (layer + 1), k, v)

        return super().forward(x, scaled, last_pos)


def zero_gain(model):
    for block in model.h:
        block.mlp = GainMLP(model.config)


def rotary(model):
    for layer, block in enumerate(model.h):
        block.attn = RolledAttention(model.config, layer)


def late_adapter(model):
    model.h[-1].mlp = GainMLP(model.config)


def scaled_by_layer(model):
    for layer, block in enumerate(model.h):
        block.attn = ScaledAttention(model.config, layer)


def rms_norm(model):
    for block in model.h:
        block.ln_1 = torch.nn.RMSNorm(model.config.n_embd)


def scaled_thoughts(model):
    model.thought_embedding = lambda hidden: 0.5 * hidden


EDITS = [zero_gain, rotary, late_adapter, scaled_by_layer, rms_norm, scaled_thoughts]


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kernels", ["triton", "c", "packed"])
def test_kernels_refuse_an_edited_model(edit, kernels):
    """C trained a model without its zero-initialized gain; Triton ignored a rotary embedding. An
    edit of later layers only was not noticed."""
    model = random_gpt(dtype=torch.float32, n_head=1, n_embd=32)
    assert plain_gpt2.difference(model) == ""
    edit(model)
    assert ops.choose_training_backend("auto", model)[0] == "torch"
    with pytest.raises(UserError, match=f"--kernels={kernels} .* not a plain GPT-2"):
        ops.choose_backend(kernels, model)
    if kernels != "packed":
        with pytest.raises(UserError, match="not a plain GPT-2"):
            ops.choose_training_backend(kernels, model)


def test_another_activation_shows_in_a_wide_model():
    """With weights that do not shrink with the width, ReLU differed from GELU by less than 1 %."""
    model = random_gpt(dtype=torch.float32, n_head=4, n_embd=512)
    assert plain_gpt2.difference(model) == ""
    model.h[1].mlp.gelu = torch.nn.ReLU()
    assert "layer 1 gives" in plain_gpt2.difference(model)


@pytest.mark.parametrize("options", [{}, {"smear": True}, {"thought": "soft"}, {"stop": True}])
def test_every_option_is_plain_gpt2(options):
    """The check must not refuse what the kernels support."""
    model = random_gpt(n_layer=2, n_head=2, n_embd=16, dropout=0.1, **options)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert plain_gpt2.difference(model.to(dtype)) == ""
