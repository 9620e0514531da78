"""The engine equals a naive loop, for any batch, and refuses prompts that do not fit."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fake_graphs import FakeGraphCache
from helpers import THOUGHTS, generate, random_gpt, save_random_run

import nanococonut
from nanococonut.curriculum import Curriculum
from nanococonut.inference.engine import Engine, Request
from nanococonut.runtime.errors import UserError

EOS, EOT = 40, 39


def naive(model, prefix, n_thoughts, forced_tokens, max_new_tokens, stop=False):
    """Return (tokens, thoughts) from a loop that re-runs the sequence for every position."""
    emb = model.wte(torch.tensor([prefix]))

    def last():
        return model.backbone(emb, torch.arange(emb.shape[1]))[:, -1:]

    thoughts = []
    for _ in range(n_thoughts):
        if stop and model.stop(last())[0, 0, 0] > 0:
            break
        thoughts.append(last())
        emb = torch.cat([emb, model.thought_embedding(thoughts[-1])], 1)
    for token in forced_tokens:
        emb = torch.cat([emb, model.wte(torch.tensor([[token]]))], 1)
    tokens = []
    for _ in range(max_new_tokens):
        token = int(model.head(last()).argmax())
        if token == EOS:
            break
        tokens.append(token)
        emb = torch.cat([emb, model.wte(torch.tensor([[token]]))], 1)
    return tokens, torch.cat(thoughts, 1) if thoughts else None


def random_prefixes(seed, n):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 20, (n,), generator=g).tolist()
    return [torch.randint(0, 39, (k,), generator=g).tolist() for k in lengths]


@pytest.mark.parametrize("n_thoughts", [0, 1, 6])
@pytest.mark.parametrize("forced", [[], [EOT]], ids=["bare", "eot"])
@torch.no_grad()
def test_ragged_batch_equals_naive_loop(gpt, n_thoughts, forced):
    """Guards against attention to padding, and writes at another sequence's length."""
    prefixes = random_prefixes(n_thoughts, 7)
    out = generate(gpt, prefixes, n_thoughts, forced, EOS, 12)
    for b, prefix in enumerate(prefixes):
        tokens, thoughts = naive(gpt, prefix, n_thoughts, forced, 12)
        assert out.tokens[b] == tokens
        if n_thoughts:
            torch.testing.assert_close(out.thoughts[b], thoughts[0], rtol=1e-9, atol=1e-9)
        alone = generate(gpt, [prefix], n_thoughts, forced, EOS, 12)
        assert alone.tokens[0] == tokens


@pytest.mark.parametrize("thought", THOUGHTS)
@pytest.mark.parametrize("smear", [False, True])
@torch.no_grad()
def test_classifier_stops_each_sequence_itself(thought, smear):
    """Guards against a classifier that stops another sequence, or does not stop its own."""
    model = random_gpt(seed=5, thought=thought, smear=smear, stop=True)
    prefixes = random_prefixes(6, 9)
    model.stop.bias.fill_(-0.3)
    out = generate(model, prefixes, 5, [EOT], EOS, 10, stop=True)
    for b, prefix in enumerate(prefixes):
        tokens, thoughts = naive(model, prefix, 5, [EOT], 10, stop=True)
        n = 0 if thoughts is None else thoughts.shape[1]
        assert (out.n_thoughts[b], out.tokens[b]) == (n, tokens)
        if n:
            torch.testing.assert_close(out.thoughts[b, :n], thoughts[0], rtol=1e-9, atol=1e-9)
    assert len(set(out.n_thoughts)) > 2  # none, all and some in between, by the choice of the bias
    # without stop=True the classifier is not used
    assert generate(model, prefixes, 5, [EOT], EOS, 10).n_thoughts == [5] * 9


@torch.no_grad()
def test_eos_may_be_the_first_token():
    """Guards against a bug of the released code, which never compares the first token with eos."""
    model = random_gpt(seed=3)
    prefixes = random_prefixes(1, 5)
    endless = generate(model, prefixes, 2, [EOT], EOS, 8).tokens
    eos = endless[2][0]
    out = generate(model, prefixes, 2, [EOT], eos, 8).tokens
    assert out[2] == []
    for tokens, expected in zip(out, endless, strict=True):
        assert tokens == (expected[: expected.index(eos)] if eos in expected else expected)
    assert len({len(tokens) for tokens in out}) > 1  # some ended early while others went on


def test_what_does_not_fit_is_refused_before_work(gpt):
    """Guards against an error only after minutes of generation."""
    gpt.backbone = None  # any work would raise TypeError
    with pytest.raises(ValueError, match="block_size"):
        generate(gpt, [[1] * 40], 6, [EOT], EOS, 8)
    for prefixes, n_thoughts, n_new in ([[]], -1, 8), ([[1]], -1, 8), ([[1]], 0, 0), ([], 1, 8):
        with pytest.raises(ValueError, match="none of them empty|n_thoughts >= 0"):
            generate(gpt, prefixes, n_thoughts, [], EOS, n_new)


@torch.no_grad()
def test_finished_sequences_leave_the_batch():
    """Guards against remaining sequences that get another sequence's cache or tokens."""
    model = random_gpt(seed=8, smear=True)
    prefixes = random_prefixes(3, 12)
    endless = [generate(model, [p], 2, [EOT], -1, 14).tokens[0] for p in prefixes]
    early = [t for tokens in endless for t in tokens[1:4]]
    eos = max(set(early), key=early.count)  # a token that many sequences generate early
    sizes = []
    backbone = model.backbone

    def spy(emb, *args, **kwargs):
        sizes.append(len(emb))
        return backbone(emb, *args, **kwargs)

    model.backbone = spy
    out = generate(model, prefixes, 2, [EOT], eos, 14).tokens
    assert out == [t[: t.index(eos)] if eos in t else t for t in endless]
    assert sizes[0] == 12 and sizes[-1] <= 6


@torch.no_grad()
def test_sampling_follows_the_softmax_and_its_seed():
    """Guards against biased sampling, an ignored seed, and use of torch's global generator."""
    model = random_gpt(seed=9)
    logits = model(torch.tensor([[3, 7, 1]]))[0, -1]
    out = generate(model, [[3, 7, 1]] * 4000, 0, [], EOS, 1, temperature=2.0, seed=1).tokens
    counts = torch.bincount(torch.tensor([t[0] if t else EOS for t in out]), minlength=41)
    expected = (logits / 2.0).softmax(-1)
    # 5 standard errors of a fraction of 4,000, and a floor for rare tokens
    assert ((counts / 4000 - expected).abs() < 5 * (expected / 4000).sqrt() + 1e-3).all()
    state = torch.random.get_rng_state()
    args = [[3, 7], [1]], 1, [], EOS, 9
    a, b, c = (generate(model, *args, temperature=1.5, seed=s) for s in (5, 5, 6))
    assert a.tokens == b.tokens != c.tokens
    assert torch.equal(state, torch.random.get_rng_state())
    with pytest.raises(ValueError, match="temperature"):
        generate(model, *args, temperature=-1.0)


@pytest.mark.parametrize("temperature", [1e-7, 1e-30, 1e-44, 1e-320])
def test_a_temperature_near_zero_is_greedy(temperature):
    """Guards against garbage tokens: logits divided by such a number are infinite."""
    args = random_gpt(dtype=torch.float32), [[3, 7, 1], [4]], 2, [EOT], EOS, 9
    assert generate(*args, temperature=temperature).tokens == generate(*args).tokens


def engine_with_graphs(model, max_graphs=24) -> Engine:
    """Return an engine that uses fake graphs, as if on a GPU."""
    engine = Engine(model)
    engine.graphs = FakeGraphCache(max_graphs)
    return engine


@torch.no_grad()
@pytest.mark.parametrize("thought", ["hidden", "soft"])
@pytest.mark.parametrize("smear", [False, True])
def test_replayed_steps_equal_the_naive_loop(thought, smear):
    """Guards against a replay that reads shapes, lengths or tokens of the captured batch.

    The batches have several shapes, padding sequences, sequences that end early and thoughts that
    stop early.
    """
    FakeGraphCache.captured = FakeGraphCache.replayed = 0
    model = random_gpt(seed=8, smear=smear, thought=thought, stop=True)
    model.stop.bias.fill_(-0.3)
    engine = engine_with_graphs(model, max_graphs=12)
    requests = [(2, 6, 3, [EOT]), (3, 5, 3, [EOT]), (4, 6, 3, []), (2, 1, 3, [EOT]),
                (5, 11, 4, [EOT]), (2, 6, 3, [EOT])]  # fmt: skip
    for seed, n, n_thoughts, forced in requests:
        prefixes, stop = random_prefixes(seed, n), seed != 3
        out = engine.run(Request(prefixes, n_thoughts, forced, EOS, 9, stop))
        for b, prefix in enumerate(prefixes):
            tokens, thoughts = naive(model, prefix, n_thoughts, forced, 9, stop)
            n_taken = 0 if thoughts is None else thoughts.shape[1]
            assert out.thoughts.shape[1] == max(out.n_thoughts)
            assert (out.tokens[b], out.n_thoughts[b]) == (tokens, n_taken)
            if n_taken:
                actual = out.thoughts[b, :n_taken]
                torch.testing.assert_close(actual, thoughts[0], rtol=1e-9, atol=1e-9)
        assert len(engine.graphs.graphs) <= 12
    assert FakeGraphCache.replayed > 2 * FakeGraphCache.captured > 8


@torch.no_grad()
def test_graphs_are_captured_again_if_weights_move():
    """Guards against a replay that reads freed weights."""
    model = random_gpt(seed=8)
    engine, prefixes = engine_with_graphs(model), random_prefixes(2, 3)

    def is_correct():
        expected = [naive(model, prefix, 2, [EOT], 6)[0] for prefix in prefixes]
        return engine.run(Request(prefixes, 2, [EOT], EOS, 6)).tokens == expected

    assert is_correct()
    captured = FakeGraphCache.captured
    model.load_state_dict(random_gpt(seed=9).state_dict())  # in place
    assert is_correct() and FakeGraphCache.captured == captured  # same graphs, new weights
    model.float()
    assert engine.run(Request(prefixes, 2, [EOT], EOS, 6)).thoughts.dtype == torch.float32
    assert FakeGraphCache.captured > captured


@torch.no_grad()
def test_sampling_is_the_same_replayed():
    """Guards against a graph that repeats the random numbers of its capture."""
    model, prefixes = random_gpt(seed=9), random_prefixes(4, 4)
    plain, replayed = Engine(model), engine_with_graphs(model)
    for seed in (1, 2):
        expected = plain.run(Request(prefixes, 2, [EOT], EOS, 7, temperature=1.3, seed=seed))
        out = replayed.run(Request(prefixes, 2, [EOT], EOS, 7, temperature=1.3, seed=seed))
        assert out.tokens == expected.tokens


def test_edit_cannot_ask_its_own_engine(tokenizer):
    """Guards against a deadlock: its own thread already holds the engine's lock."""
    model = random_gpt(vocab_size=tokenizer.vocab_size)
    engine = Engine(model, tokenizer, kernels="torch", graph="off")

    def edit(i, fed):
        engine.generate(["Tom is"], 1, 2)
        return fed

    with pytest.raises(UserError, match="Use another Engine"):
        engine.generate(["Every"], 1, 2, edit=edit)
    assert engine.generate(["Every"], 1, 2).tokens  # the lock is free again


@pytest.mark.parametrize("candidates", [[["Tom", "Sam"]], ["Tom", "Sam"], [["Tom"], []], []])
def test_candidates_fit_the_questions(tokenizer, candidates):
    """One list was broadcast to all questions, and a string was scored letter by letter."""
    model = random_gpt(2, smear=False, vocab_size=tokenizer.vocab_size)
    with pytest.raises(ValueError, match="a list of answers for each question"):
        Engine(model, tokenizer, Curriculum("coconut")).choose(["a", "b"], candidates, 1)


def test_latent_is_as_in_training_by_default(tokenizer):
    """Guards against thoughts that the caller has to look up in the manifest."""
    engine = Engine(random_gpt(vocab_size=tokenizer.vocab_size), tokenizer)
    with pytest.raises(ValueError, match="latent: expected a number"):
        engine.generate(["Every Tom"])
    engine.manifest = {"n_thoughts": 3}
    assert engine.generate(["Every Tom"]).n_thoughts == [3]


def test_threads_share_an_engine():
    """Guards against threads that write to each other's buffers."""
    model = random_gpt(seed=8)
    model.train()  # a call switches to eval mode and back
    requests = [
        (random_prefixes(seed, 1 + seed % 5), 1 + seed % 4, [EOT], EOS, 9) for seed in range(40)
    ]
    expected = [generate(model, *request) for request in requests]
    engine = Engine(model)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            outs = list(pool.map(lambda request: engine.run(Request(*request)), requests))
    finally:
        sys.setswitchinterval(interval)
    for out, single in zip(outs, expected, strict=True):
        assert out.tokens == single.tokens and torch.equal(out.thoughts, single.thoughts)
    assert model.training


@pytest.mark.parametrize("smear", [False, True])
def test_an_edit_may_reuse_its_memory(tokenizer, smear):
    """The smear and Branch.inputs read a thought again after the next edit had overwritten it."""
    model = random_gpt(vocab_size=tokenizer.vocab_size, smear=smear)
    engine, memory = Engine(model, tokenizer), torch.empty(2, model.config.n_embd).double()

    def edit(i, fed):
        return 0.5 * fed + i

    def edit_in_place(i, fed):
        return memory.copy_(edit(i, fed))

    answers, inputs = [], []
    for fn in (edit, edit_in_place):
        branch = engine.branch(["Tom is", "a"], [["Tom"], ["a lempus"]], 3)
        branch.think(3, fn)
        answers.append(branch.answer())
        inputs.append(torch.stack(branch.inputs))
    assert torch.equal(*answers) and torch.equal(*inputs)


def test_a_branch_has_no_dropout(tokenizer):
    """A branch of a model in training mode gave other answers in every call."""
    engine = Engine(random_gpt(vocab_size=tokenizer.vocab_size, dropout=0.5).train(), tokenizer)
    with pytest.raises(ValueError, match=r"training mode.*call model.eval\(\)"):
        engine.branch(["Tom is"], [["Tom"]], 2)
    assert torch.equal(*(engine.choose(["Tom is"], [["Tom"]], 2) for _ in range(2)))


@pytest.mark.parametrize("render", ["compact", "sentences"])
def test_load_renders_prompts_as_trained(tmp_path, tokenizer, render):
    """Guards against a prompt in a different format than in training."""
    model = save_random_run(tmp_path, tokenizer, render=render)
    engine = nanococonut.load(tmp_path, device="cpu", kernels="torch", graph="off")
    assert engine.config.render == render and engine.manifest["n_thoughts"] == 3
    question = "Tom is a lempus. Every lempus is a wumpus. Is Tom a lempus or wumpus?"
    prompt = {
        "compact": " Tom lempus. lempus wumpus.? Tom? lempus? wumpus",
        "sentences": question + "\n",
    }[render]
    expected = Engine(model, tokenizer).generate([prompt], 3, 9)
    out = engine.generate([question], 3, 9)
    assert (out.text, out.tokens) == (expected.text, expected.tokens)
    assert torch.equal(out.thoughts, expected.thoughts)


def test_thoughts_without_special_tokens_refused(tokenizer):
    """Guards against an IndexError, or a dead process on a GPU: a CoT model has no <bot>."""
    model = random_gpt(vocab_size=tokenizer.bot)
    engine = Engine(model, tokenizer, Curriculum("coconut"))
    for ask in (engine.generate, lambda questions, n: engine.choose(questions, [["Tom"]], n)):
        with pytest.raises(UserError, match=r"token \d+ is not one of the model's") as e:
            ask(["Tom is"], 2)
        assert str(e.value).count("\n") == 1
    engine = Engine(model, tokenizer, Curriculum("cot"))
    assert engine.generate(["Tom is"], 0, 3).n_thoughts == [0]
    with pytest.raises(UserError, match="is not one of"):  # not only the last token counts
        engine.run(Request([[1, tokenizer.vocab_size, 2]], 0, [], EOS, 3))
    with pytest.raises(ValueError, match="none of them empty"):
        engine.generate([""], 0, 3)
    for latent in (-1, [1]):  # a list was compared with 0
        with pytest.raises(ValueError, match="latent: expected one number for all, 0 or more"):
            engine.generate(["Tom is"], latent, 3)


def test_a_nan_does_not_outlive_its_request(tokenizer):
    """Guards against keys and values of an earlier request past the end of a shorter sequence."""
    model = random_gpt(vocab_size=tokenizer.vocab_size, dtype=torch.float32)
    engine = Engine(model, tokenizer, kernels="torch", graph="off")
    questions = ["Tom is a lempus.", "Tom"]
    expected = engine.generate(questions, 2, 4)
    long = ["Every lempus is a wumpus. Tom is a lempus."] * 2
    weights = model.wpe.weight.clone()
    with torch.no_grad():  # as a diverged model; an edit can overflow as well
        model.wpe.weight.fill_(torch.nan)
        assert engine.generate(long, 2, 4).thoughts.isnan().all()
        model.wpe.weight.copy_(weights)
    after = engine.generate(questions, 2, 4)
    assert after.tokens == expected.tokens and torch.equal(after.thoughts, expected.thoughts)


def test_inference_mode_is_left(tokenizer):
    """Guards against buffers that no later call can update, since they were made in this mode."""
    engine = Engine(random_gpt(vocab_size=tokenizer.vocab_size), tokenizer)
    with torch.inference_mode():
        first = engine.generate(["Tom is"], 2, 4)
        branch = engine.branch(["Tom is"], [["Tom"]], 2)
    assert engine.generate(["Tom is"], 2, 4).tokens == first.tokens
    branch.think(2)
    assert torch.is_grad_enabled() and not branch.answer().requires_grad


def test_forward_hooks_are_called_or_refused(tokenizer):
    """Guards against a hook that a replayed graph or a packed copy never calls."""
    model, calls = random_gpt(vocab_size=tokenizer.vocab_size), []
    engine = Engine(model, tokenizer, kernels="torch", graph="off")
    handle = model.h[0].register_forward_hook(lambda *_: calls.append(1))
    engine.generate(["Tom is"], 2, 4)
    assert calls
    engine.graphs = FakeGraphCache(8)
    with pytest.raises(UserError, match="do not call the model's forward hooks"):
        engine.generate(["Tom is"], 2, 4)
    handle.remove()
    assert engine.generate(["Tom is"], 2, 4).tokens
    engine.graphs = Engine(model, graph="off").graphs
    model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(UserError, match="the hooks of a model itself"):
        engine.generate(["Tom is"], 2, 4)


def test_a_filled_batch_may_have_no_eos():
    """The sequences that fill a batch for a graph read token -1, which no embedding has."""
    engine = Engine(random_gpt(vocab_size=40), kernels="torch", graph="off")
    request = Request([[1], [2], [3]], 1, [33], eos=-1, max_new_tokens=3)
    plain = engine.run(request).tokens
    engine.graphs = FakeGraphCache(8)
    assert engine.run(request).tokens == plain
