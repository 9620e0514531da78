"""Interventions on thoughts change only what they should; verdicts follow the rules."""

import json

import pytest
import torch
from fake_graphs import FakeGraphCache
from helpers import THOUGHTS, random_gpt

import nanococonut
from nanococonut.config import TrainConfig
from nanococonut.curriculum import Curriculum
from nanococonut.data import prontoqa, prosqa
from nanococonut.data.tasks import TASKS
from nanococonut.evaluation import insight
from nanococonut.evaluation.interchange import Figures, fraction, interchange
from nanococonut.evaluation.pairs import check_lengths, generated_pairs, load_pairs, own_pairs
from nanococonut.evaluation.readout import words_by_step
from nanococonut.evaluation.report import measure
from nanococonut.evaluation.view import question_view
from nanococonut.inference.engine import Engine
from nanococonut.runtime.errors import UserError

QUESTIONS = ["Tom is a lempus. Is Tom a lempus or wumpus?", "Every Tom is a wumpus. Is a?"]
CANDIDATES = [["lempus", "wumpus"], ["zonk", "Tom"]]  # zonk is several tokens


def random_engine(tokenizer, method="coconut", **shape) -> Engine:
    model = random_gpt(
        3, smear=True, dtype=torch.float32, vocab_size=tokenizer.vocab_size, block_size=96, **shape
    )
    return Engine(model, tokenizer, Curriculum(method))


# ---- the engine


@pytest.mark.parametrize("thought", THOUGHTS)
def test_an_edit_that_returns_its_input_is_exact(tokenizer, thought):
    """The plain steps of an edit could differ from those without one."""
    engine, seen = random_engine(tokenizer, thought=thought), []
    plain = engine.generate(QUESTIONS, 3, 9)
    edited = engine.generate(QUESTIONS, 3, 9, edit=lambda i, fed: (seen.append(fed), fed)[1])
    assert plain.tokens == edited.tokens and torch.equal(plain.thoughts, edited.thoughts)
    inputs = torch.stack(seen, 1)
    torch.testing.assert_close(engine.model.thought_embedding(plain.thoughts), inputs)
    assert torch.equal(inputs, plain.thoughts) == (thought == "hidden")
    same = engine.choose(QUESTIONS, CANDIDATES, 3, edit=lambda i, fed: fed)
    assert torch.equal(same, engine.choose(QUESTIONS, CANDIDATES, 3))


def test_an_edit_is_fed_back(tokenizer):
    """An edit could come late, or keep the engine's memory."""
    engine = random_engine(tokenizer)
    seen, returned = [], []

    def edit(i, fed):
        seen.append((i, fed))
        returned.append(fed.flip(0) if i == 1 else fed)
        return returned[-1]

    plain = engine.generate(QUESTIONS, 3, 9).thoughts  # also the inputs, with hidden thoughts
    out = engine.generate(QUESTIONS, 3, 9, edit=edit)
    assert [i for i, _ in seen] == [0, 1, 2]
    assert torch.equal(seen[0][1], plain[:, 0])  # not overwritten by later steps
    assert torch.equal(seen[1][1], plain[:, 1])
    assert not torch.allclose(seen[2][1], plain[:, 2])
    clamped = engine.generate(QUESTIONS, 3, 9, edit=lambda i, fed: returned[i])
    assert clamped.tokens == out.tokens


def test_an_edit_runs_without_graphs(tokenizer):
    """A replayed CUDA graph would not call the edit."""
    engine, seen = random_engine(tokenizer), []
    plain = engine.generate(QUESTIONS, 3, 9)
    engine.graphs = FakeGraphCache(8)
    out = engine.generate(QUESTIONS, 3, 9, edit=lambda i, fed: (seen.append(i), fed)[1])
    assert seen == [0, 1, 2] and out.tokens == plain.tokens
    assert not engine.graphs.graphs
    # an edit does not see the sequences that fill a batch: this slice changes nothing
    edited = engine.generate(QUESTIONS + QUESTIONS[:1], 1, 2, edit=lambda i, fed: fed[:3])
    assert len(edited.tokens) == 3


def test_bad_edits_are_refused(tokenizer):
    """A wrong shape could be broadcast, NaN would spread, pauses would ignore the edit."""
    engine = random_engine(tokenizer)
    bad_edits = {
        r"\(24,\)": lambda fed: fed[0] / 0,
        "float64": lambda fed: fed.double(),
        "NaN": lambda fed: fed / 0,
        "int": lambda fed: 3,
        "on meta": lambda fed: fed.to("meta"),
    }
    for problem, bad in bad_edits.items():
        with pytest.raises(UserError, match=rf"edit\(1, fed\) returned .*{problem}"):
            engine.generate(QUESTIONS, 3, edit=lambda i, fed, bad=bad: bad(fed) if i == 1 else fed)
    with pytest.raises(UserError, match="no thoughts"):
        engine.choose(QUESTIONS, CANDIDATES, 0, edit=lambda i, fed: fed)
    with pytest.raises(UserError, match="pauses are tokens"):
        random_engine(tokenizer, "pause").generate(QUESTIONS, 3, edit=lambda i, fed: fed)


@pytest.mark.parametrize("method", ["coconut", "pause", "cot"])
@torch.no_grad()
def test_choice_equals_a_naive_loop(tokenizer, method):
    """Candidates of several tokens, pauses, or padding could be wrong."""
    engine, n = random_engine(tokenizer, method), 0 if method == "cot" else 3
    model = engine.model
    log_p = engine.choose(QUESTIONS, CANDIDATES, n)
    for question, row, candidates in zip(QUESTIONS, log_p, CANDIDATES, strict=True):
        for value, candidate in zip(row, candidates, strict=True):
            prefix = tokenizer.encode(question) + [tokenizer.bot] * (n > 0)
            prefix += [tokenizer.latent] * n * (method == "pause")
            emb = model.wte(torch.tensor([prefix]))
            for _ in range(n * (method == "coconut")):
                emb = torch.cat([emb, model.backbone(emb, torch.arange(emb.shape[1]))[:, -1:]], 1)
            tail = [tokenizer.eot] * (n > 0) + tokenizer.encode("### " + candidate)
            tail += [tokenizer.eos]
            emb = torch.cat([emb, model.wte(torch.tensor([tail]))], 1)
            logits = model.head(model.backbone(emb, torch.arange(emb.shape[1])))[0]
            n_tokens = len(tokenizer.encode("### " + candidate))  # with eos, without the mark
            expected = logits.log_softmax(-1)[-n_tokens - 1 : -1].gather(
                1, torch.tensor(tail[-n_tokens:])[:, None]
            )
            assert float(value) == pytest.approx(float(expected.sum()), abs=1e-4)


def test_an_answer_is_not_the_start_of_another(tokenizer):
    """Without an end, "3" is at least as likely as "3.5", so the longer answer never won."""
    engine = random_engine(tokenizer)
    options = ["lempus", "lempus wumpus", "lempus wumpus Tom"]
    p = engine.choose(QUESTIONS[:1], [options], 2).exp()[0]
    start = engine.choose(QUESTIONS[:1], [options], 2, is_answer=False).exp()[0]
    assert start[0] >= start[1] >= start[2] and (p < start).all() and p.sum() < 1
    with pytest.raises(ValueError, match="expected .*0 or more, got -1"):
        engine.choose(QUESTIONS[:1], [options], -1)


# ---- branches


@pytest.mark.parametrize("method", ["coconut", "pause"])
def test_own_slots_put_back_change_no_bit(tokenizer, method):
    """put() could miss a layer, a position, or the smear's last input."""
    engine = random_engine(tokenizer, method)
    branch = engine.branch(QUESTIONS, CANDIDATES, 4)
    branch.think(3)
    own, slots = branch.answer(), branch.slots(3)
    assert torch.equal(branch.answer(), own)  # answer() leaves the cache unchanged
    branch.put(slots, only=[1])
    assert torch.equal(branch.answer(), own)
    branch.restart().put(slots)
    assert torch.equal(branch.answer(), own)
    branch.think(1)
    longer = branch.answer()
    branch.restart().think(4)
    assert torch.equal(branch.answer(), longer) and not torch.equal(longer, own)


def test_slots_belong_to_their_state(tokenizer):
    """The first 2 slots of 3 had the state after 3, and slots put back lost their inputs."""
    branch = random_engine(tokenizer).branch(QUESTIONS, CANDIDATES, 4)
    branch.think(2)
    own, slots, inputs = branch.answer(), branch.slots(2), branch.inputs
    branch.think(1)
    with pytest.raises(ValueError, match=r"expected every sequence to end after 2, got \[3\]"):
        branch.slots(2)
    with pytest.raises(ValueError, match="expected every sequence to end after 2"):
        branch.put(slots, only=[0])
    branch.put(slots)
    assert torch.equal(branch.answer(), own)
    branch.write([branch.forced] * len(branch))
    with pytest.raises(ValueError, match="expected every sequence to end after 2"):
        branch.slots(2)
    branch.restart().put(slots)
    seen = []
    branch.think(1, lambda i, fed: (seen.append(i), fed)[1])
    assert seen == [2]  # the third thought
    assert all(map(torch.equal, branch.slots(3).inputs, inputs))


def test_only_question_and_slots_decide(tokenizer):
    """Question a with the last tokens of b must answer like question b with the slots of a."""
    engine = random_engine(tokenizer)
    a, b = "Tom is a lempus. Is Tom a lempus?", "Tom is a lempus. Is wumpus a lempus?"
    rows = [engine.branch([text], CANDIDATES[:1], 3) for text in (a, b)]
    for row in rows:
        row.think(3)
    slots = rows[0].slots(3)
    start, first = int(rows[0].start), len(tokenizer.encode("Tom is a lempus. Is"))
    rows[0].cache.data[..., first:start, :] = rows[1].cache.data[..., first:start, :]
    assert not torch.equal(rows[0].answer(), rows[1].answer())
    rows[1].put(slots)
    assert torch.equal(rows[0].answer(), rows[1].answer())


# ---- twins


@pytest.mark.parametrize("split", ["prosqa", "prosqa_balanced"])
def test_a_prosqa_twin_asks_about_the_other_root(split, seed):
    """A twin could share the answer, or lose the graph that a hash needs."""
    task, base = TASKS["prosqa"], prosqa.GraphConfig(13, 1, 3)
    for example in prosqa.generate(40, seed, prosqa.SPLITS[split](base)):
        twin = task.twin(example)
        words = [x["question"].replace("?", " ?").split() for x in (example, twin)]
        assert sum(a != b for a, b in zip(*words, strict=True)) == 1
        assert task.solve(twin["question"]) == twin["answer"] != example["answer"]
        prosqa.compact_example(twin)
        back = task.twin(twin)
        for key in ("question", "answer", "root", "target", "neg_target"):
            assert back[key] == example[key]
        assert len(back["steps"]) == len(example["steps"])
        if new := task.reworded(example):
            parsed = [prosqa.parse_question(q) for q in (new, task.reworded(twin))]
            assert parsed[0].options == parsed[1].options and parsed[0].entity != parsed[1].entity
            assert not set(parsed[0].options) & set(prosqa.parse_question(example["question"])[2])
            assert task.solve(new).startswith(parsed[0].entity)
        asked = prosqa.parse_question(twin["question"]).entity
        renamed = prosqa.renamed(example, twin)
        assert prosqa.parse_question(renamed).entity == asked
        answer = example["answer"].split()[-1]
        assert task.solve(renamed) == f"{asked} is a {answer}"
        # the search ends at the other option, of the same question
        retargeted, query = prosqa.retargeted(example), example["question"].rsplit(" Is ")[1]
        assert retargeted.endswith(query) and task.solve(retargeted) == twin["answer"].replace(
            prosqa.parse_question(twin["question"]).entity,
            prosqa.parse_question(example["question"]).entity,
        )


def test_a_prontoqa_twin_has_the_other_answer(seed):
    """The proof of a twin is found by search, which could go wrong."""
    task = TASKS["prontoqa"]
    for example in prontoqa.generate(20, seed, prontoqa.OntologyConfig(3, matched=True)):
        twin = task.twin(example)
        assert task.solve(twin["question"]) == twin["answer"] != example["answer"]
        assert task.twin(twin) == example  # so its steps are those of the generator
        assert task.solve(task.reworded(example)) == twin["answer"]
    example = prontoqa.generate(1, seed, prontoqa.OntologyConfig(3))[0]
    assert task.twin(example) is None  # both facts are about one name
    stated = "Every wumpus is not red. Max is a wumpus. Sam is red. True or false: Max is red."
    assert task.twin({"question": stated, "steps": [], "answer": "False"}) is None  # no rule


def test_all_pairs_fit_in_the_model(monkeypatch):
    """Pairs as in training were not checked, which ended the tests after minutes."""
    checked = []

    def check(engine, pairs):
        checked.append(pairs)
        return check_lengths(engine, pairs)

    monkeypatch.setattr("nanococonut.evaluation.pairs.check_lengths", check)
    plain, pairs = load_pairs(random_insight_engine("coconut"), 50, 1)
    assert [len(x.examples) for x in checked] == [len(plain.examples), len(pairs.examples)]


def test_twins_of_other_examples():
    """A twin that the user gives comes first; a text of no task has none."""
    example = {"question": "2 + 2?", "steps": [], "answer": "4"}
    for task in TASKS.values():
        assert task.twin(example) is None
        assert task.twin(example | {"twin": example}) == example
        with pytest.raises(ValueError, match="answer"):
            task.twin(example | {"twin": {"question": "3 + 3?", "steps": []}})


# ---- rules


def made_up(value, lo, hi, n=1000, mass=0.9):
    return {"value": value, "lo": lo, "hi": hi, "n": n, "mass": mass}


LOW, HALF, HIGH = made_up(0.02, 0.01, 0.03), made_up(0.5, 0.47, 0.53), made_up(0.97, 0.95, 0.98)


def falls(value, lo, hi):
    return made_up(0.98 - value, 0.4, 0.99) | {"fall": {"value": value, "lo": lo, "hi": hi}}


KEPT, LOST, PARTLY = falls(0.01, -0.01, 0.03), falls(0.48, 0.45, 0.5), falls(0.25, 0.22, 0.28)
MIDDLE, FEW = made_up(0.7, 0.67, 0.73), made_up(0.97, 0.9, 0.99, n=40)
RULES = [
    (insight.judge_pairs, (HIGH, LOW, HIGH, "x"), "yes", "looks at what is asked"),
    (insight.judge_pairs, (HIGH, HIGH, LOW, "x"), "no", "ignores what is asked"),
    (insight.judge_pairs, (HIGH, HALF, HALF, "x"), "part", "same answer to some twins"),
    (insight.judge_pairs, (HIGH, made_up(0.1, 0.08, 0.12), HIGH, "x"), "?", "undecided"),
    (insight.judge_control, (HIGH, MIDDLE, "x", "thoughts"), "yes", "better than the control"),
    (insight.judge_control, (HIGH, FEW | {"n": 200}, "x", ""), "no", "not better than the control"),
    (insight.judge_control, (HALF, HIGH, "x", "thoughts"), "no", "not better than the control"),
    (insight.judge_control, (HIGH, FEW, "x", "thoughts"), "?", "undecided"),
    (insight.judge_needed, (HIGH, LOST, 0.5, "thoughts"), "yes", "needed"),
    (insight.judge_needed, (HIGH, PARTLY, 0.5, "thoughts"), "part", "needed in part"),
    (
        insight.judge_needed,
        (HIGH, falls(0.4, 0.3, 0.5), 0.5, "thoughts"),
        "part",
        "needed at least in part",
    ),
    (insight.judge_needed, (HIGH, KEPT, 0.5, "pauses"), "no", "not needed"),
    (insight.judge_needed, (FEW, LOST, 0.5, "thoughts"), "?", "undecided"),
    (insight.judge_needed, (HIGH, LOST, 0.5, "thoughts", {"none": LOST}), "yes", "needed"),
    (
        insight.judge_needed,
        (HIGH, LOST, 0.5, "thoughts", {"none": PARTLY}),
        "part",
        "needed in part",
    ),
    (
        insight.judge_needed,
        (HIGH, LOST, 0.5, "thoughts", {"unrelated": KEPT}),
        "no",
        "not needed",
    ),  # known before
    (
        insight.judge_needed,
        (HIGH, LOST, 0.5, "thoughts", {"none": KEPT | {"mass": 0.1}}),
        "yes",
        "needed",
    ),
    (insight.judge_needed, (HALF, KEPT, 0.5, "pauses"), "?", "undecided"),  # nothing to lose
    (insight.judge_needed, (HIGH, LOST | {"mass": 0.01}, 0.5, "thoughts"), "?", "undecided"),
    (insight.judge_needed, (HIGH, falls(0.04, -0.01, 0.09), 0.5, "thoughts"), "?", "undecided"),
    (insight.judge_carried, (HIGH, HALF, LOW, HALF, "thoughts"), "yes", "carried"),
    (insight.judge_carried, (LOW, LOW, HIGH, HIGH, "pauses"), "no", "ignored"),
    (insight.judge_carried, (LOW, HALF, HIGH, HALF, "thoughts"), "?", "undecided"),
    (insight.judge_carried, (HALF, HALF, HALF, HALF, "thoughts"), "?", "undecided"),
    (insight.judge_carried, (MIDDLE, HALF, LOW, HALF, "thoughts"), "part", "carried in part"),
    (
        insight.judge_carried,
        (made_up(0.92, 0.87, 0.95), HALF, LOW, HALF, "thoughts"),
        "part",
        "carried at least in part",
    ),
    (insight.judge_carried, (FEW, HALF, LOW, HALF, "thoughts"), "?", "undecided"),
    (insight.judge_carried, (HIGH, FEW, LOW, LOW, "thoughts"), "?", "undecided"),
    (insight.judge_carried, (HIGH | {"mass": 0.4}, HALF, LOW, HALF, "pauses"), "?", "undecided"),
    (insight.judge_carried, (None, None, None, None, "thoughts"), "?", "undecided"),
    (insight.judge_carried, (LOW, LOW, HALF, HALF, "thoughts", False), "?", "undecided"),
    (insight.judge_carried, (LOW, LOW, HIGH, LOW, "thoughts", False), "?", "undecided"),
    (insight.judge_carried, (LOW, LOW, HIGH, HIGH, "thoughts", False), "no", "ignored"),
    *(
        (insight.judge_search, (*flips, "thoughts", "", *controls), mark, verdict)
        for flips, controls, mark, verdict in (
            ((HIGH, HIGH, LOW), (LOW, HIGH), "yes", "the search, not the answer"),
            ((HIGH, HIGH, LOW), (LOW, MIDDLE), "part", "part of the search"),
            ((HIGH, HIGH, LOW), (LOW, LOW), "part", "what is asked, perhaps no search"),
            ((HIGH, HIGH, LOW), (HIGH, LOW), "part", "what is asked, perhaps no search"),
            (
                (HIGH, HIGH, LOW),
                (made_up(0.4, 0.37, 0.43), MIDDLE),
                "part",
                "search and what is asked",
            ),
            ((HIGH, HIGH, LOW), (), "part", "not the answer"),
            ((HIGH, MIDDLE, LOW), (LOW, HIGH), "part", "more search than answer"),
            ((HIGH, MIDDLE, LOW), (LOW, HALF), "part", "more than the answer"),
            ((HIGH, LOW, LOW), (), "no", "the answer itself"),
            ((HIGH, HALF, HALF), (LOW, HIGH), "no", "the answer itself"),
            ((HIGH, HIGH, HIGH), (), "part", "search and answer"),
            ((HIGH, None, LOW), (), "?", "undecided"),
            ((LOW, LOW, LOW), (), "?", "undecided"),
        )
    ),
]


@pytest.mark.parametrize("rule, figures, mark, verdict", RULES)
def test_rules_on_made_up_figures(rule, figures, mark, verdict):
    """An interval across a limit, or a figure of too few questions, could give a verdict."""
    options = figures[-1] if isinstance(figures[-1], dict) and "n" not in figures[-1] else {}
    finding = rule(*figures[: len(figures) - bool(options)], **options)
    assert (finding["mark"], finding["verdict"]) == (mark, verdict)
    n = sum(f"{{{i}}}" in finding["text"] for i in range(9))
    assert n == len(finding["figures"]) and finding["title"].endswith(".")


def test_an_undecided_finding_says_why():
    """The reason was missing: few questions, an unlikely answer, wide intervals, no effect."""
    few = insight.judge_pairs(HIGH, FEW, HIGH, "x")["text"]
    unlikely = insight.judge_needed(HIGH, LOST | {"mass": 0.3}, 0.5, "written chain")["text"]
    assert few.endswith("fewer than 100 such questions.")
    assert "only 30\xa0% of the probability" in unlikely
    wide = insight.judge_pairs(HIGH, made_up(0.1, 0.08, 0.12), HIGH, "x")["text"]
    unmoved = insight.judge_search(LOW, LOW, LOW, "thoughts")["text"]
    assert "use more questions" in wide and "changes with the thoughts" in unmoved
    assert "fewer than 100" in insight.reason([HIGH, None])


def test_depth_and_readout_on_made_up_figures():
    """A constant number of thoughts, or a control that names as many concepts, could pass."""
    curve = {h: [HALF] * h + [HIGH] * (9 - h) for h in (2, 3, 4)}
    slots = {h: [HIGH if j == h else LOW for j in range(6)] for h in (2, 3, 4)}
    assert insight.judge_depth(curve, slots, "thoughts")["mark"] == "yes"
    assert insight.judge_depth(dict.fromkeys(curve, curve[2]), slots, "thoughts")["mark"] == "part"
    assert insight.judge_depth(curve, slots | {4: slots[2]}, "thoughts")["mark"] == "part"
    best = {d: {"thought": d, "own": HIGH, "other": LOW, "base": 0.2, "mass": 0.5} for d in (1, 2)}
    assert insight.judge_read(best)["mark"] == "yes"
    assert insight.judge_read({1: best[1], 2: best[2] | {"thought": 1}})["mark"] == "part"
    assert insight.judge_read({d: b | {"other": HIGH} for d, b in best.items()})["mark"] == "no"
    assert insight.judge_read({d: b | {"mass": 0.01} for d, b in best.items()})["mark"] == "no"
    for other, control, mark in ((HIGH, HALF, "yes"), (MIDDLE, HALF, "part"), (HALF, HALF, "no")):
        cells = {"other": other, "own": LOW, "control": control}
        w = {"thought": 1, "distance": 2, "factor": 4, "erase": []}
        w["points"] = [{"id": name} | f for name, f in cells.items()]
        assert insight.judge_write(w)["mark"] == mark


def test_a_fall_is_of_paired_answers():
    """Two intervals overlap although most questions that change are lost."""
    own = torch.tensor([[0.0, -1.0]] * 90 + [[-1.0, 0.0]] * 10)
    mean = own.clone()
    mean[[*range(8), 99]] = mean[[*range(8), 99]].flip(1)  # 8 of 90 are lost, 1 of 10 is won
    f = Figures({"own": own, "twin_own": own, "mean": mean}, torch.ones(100), own[:, 0] > -9)
    ablated, accuracy = f.ablated("mean"), f.accuracy("own")
    assert ablated["value"] == 0.83 and ablated["hi"] > accuracy["lo"]
    assert ablated["fall"]["value"] == 0.07 and 0 < ablated["fall"]["lo"] < 0.07
    falls = []
    for seed in range(400):  # of the same questions, each changed with probability 0.1
        g = torch.Generator().manual_seed(seed)
        changed = torch.rand(300, generator=g) < 0.1
        own = torch.where(torch.rand(300, 1, generator=g) < 0.9, torch.tensor([1.0, 0.0]), 0.5)
        own[:, 1] = 0.6
        mean = torch.where(changed[:, None], own.flip(1), own)
        f = Figures({"own": own, "twin_own": own, "mean": mean}, torch.ones(300), own[:, 0] > -9)
        falls.append(f.ablated("mean")["fall"])
    expected = 0.1 * (0.9 - 0.1)
    assert 0.93 < sum(x["lo"] <= expected <= x["hi"] for x in falls) / 400 < 0.98


def test_fractions_leave_out_what_was_not_measured():
    """A question without a reworded form would count as an unchanged answer."""
    own, nan = torch.tensor([[0.0, -3.0]] * 4), float("nan")
    moved = torch.tensor([[-3.0, 0.0], [0.0, -3.0], [nan, nan], [-3.0, 0.0]])
    cells = {"own": own, "twin_own": own.flip(1), "twin": moved}
    f = Figures(cells, torch.tensor([1, 2, 2, 3]), torch.tensor([False, True, True, True]))
    assert f.flips("twin")["n"] == 2 and f.flips("twin")["value"] == 0.5
    assert f.accuracy("own")["n"] == 3 and f.flips("mean") is None
    assert fraction(torch.tensor([])) is None and f.flips("own", f.groups > 3) is None


# ---- models


def random_insight_engine(method, n_thoughts=2) -> Engine:
    config = TrainConfig(
        tokenizer="words", render="compact", method=method, n_nodes=10, min_hops=1, max_hops=2,
        max_new_tokens=6,
    )  # fmt: skip
    tokenizer = nanococonut.tokenizer.Tokenizer.words(prosqa.VOCABULARY)
    model = random_gpt(
        1, True, torch.float32, vocab_size=tokenizer.vocab_size, block_size=160, n_layer=1
    )
    engine = Engine.from_config(model, tokenizer, config, kernels="torch", graph="off")
    engine.manifest = {"n_thoughts": n_thoughts, "method": method}
    return engine


@pytest.mark.parametrize("method", ["coconut", "pause", "cot", "no_cot"])
def test_a_random_model_does_not_solve_anything(method):
    """Noise could get a verdict. The row must be JSON and the same for the same seed."""
    engine = random_insight_engine(method, n_thoughts=0 if "cot" in method else 2)
    plain, pairs = generated_pairs(engine.config, 150, 3)
    plain = plain.take(range(300))
    rows = []
    for _ in range(2):
        row, _ = measure(engine, "random", plain, pairs)
        rows.append(json.dumps(row))
    assert rows[0] == rows[1]
    assert row["verdict"] == "does not solve these questions" and len(row["findings"]) == 1


@pytest.fixture(scope="module")
def bundled():
    engine = nanococonut.load(device="cpu", kernels="torch")
    _, pairs = generated_pairs(engine.config, 30, 11)
    return engine, pairs.take([i for i, h in enumerate(pairs.groups) if h in (2, 3)])


def test_thoughts_of_the_bundled_model_carry_its_answers(bundled):
    """The thoughts of the bundled model must matter, and the interchange must show it."""
    engine, pairs = bundled
    f = pairs.figures(engine)
    assert f.flips("twin")["lo"] > 0.9 and abs(f.flips("unrelated")["value"] - 0.5) < 0.25
    assert f.flips("same_other")["hi"] < f.flips("other_other")["lo"]
    assert f.accuracy("own")["value"] > 0.9 > f.accuracy("mean")["hi"]


def test_interchange_of_inputs_agrees_with_keys_and_values(bundled):
    """Twins of different length exchange inputs, which must act like keys and values."""
    engine, pairs = bundled
    questions = [x["question"] for x in pairs.examples[:40]]
    longer = [x["question"].replace(" Is ", " Every a is a b. Is ") for x in pairs.twins[:40]]
    cells = interchange(engine, questions, longer, pairs.candidates(engine)[:40])
    assert cells["by_inputs"].mean() == 1
    flips = (cells["twin"].argmax(1) == 1)[(cells["own"].argmax(1) == 0)]
    assert flips.float().mean() > 0.8
    # a donor of another length is compared with the twin's inputs, too
    twins, candidates = [x["question"] for x in pairs.twins[:40]], pairs.candidates(engine)[:40]
    both = interchange(engine, questions, twins, candidates, donors={"longer": longer})
    assert both["by_inputs"].mean() == 0 and (both["longer"].argmax(1) == 1).float().mean() > 0.8
    assert (both["twin_inputs"].argmax(1) == 1).float().mean() > 0.8
    assert "twin_inputs" not in interchange(engine, questions, twins, candidates)


def test_pauses_are_exchanged_at_the_same_positions():
    """Keys of another position were put in without a word, if a twin had another length."""
    engine = random_insight_engine("pause")
    questions = ["Tom is a lempus. Is Tom a lempus or wumpus?"] * 2
    twins = [questions[0].replace("Tom", "Sam"), f"Every gorpus is a wumpus. {questions[1]}"]
    cells = interchange(engine, questions, twins, [["lempus", "wumpus"]] * 2)
    for name in ("twin", "slot1", "slot2"):
        assert cells[name].isnan().tolist() == [[False] * 2, [True] * 2]


def test_a_view_follows_the_thoughts(bundled):
    """Probabilities, attention or swapped answers could be those of another thought."""
    engine, pairs = bundled
    view = question_view(engine, pairs.examples[0], 6)
    json.dumps(view)
    states, right = view["states"], view["candidates"].index(view["answer"])
    assert len(states) == len(view["swapped"]) == 7 and states[0]["p"] is None
    assert states[6]["answer"][right] > 0.9 > 0.1 > view["swapped"][6]["answer"][right]
    assert all(len(s["attention"]) == len(view["edges"]) for s in states[1:])
    assert all(0 < sum(s["attention"]) <= 1.001 for s in states[1:])
    children = [b for a, b in view["edges"] if a == view["entity"]]
    p = states[2]["p"]
    assert sum(p[i] for i in children) > 0.5  # the second thought names the first step


def test_a_view_works_in_bfloat16(bundled):
    """On a CPU the cache is float32 then, so queries and keys differ in dtype."""
    engine = nanococonut.load(dtype=torch.bfloat16)
    view = question_view(engine, bundled[1].examples[0], 2)
    assert all(0 < sum(s["attention"]) <= 1.001 for s in view["states"][1:])


# ---- a user's own task


def test_pairs_of_a_users_examples(capsys):
    """Twins with the same answer, or too few of them, would make every test meaningless."""
    examples = [
        {"question": f"What is {i} + 1?", "steps": ["add"], "answer": str(i + 1)}
        for i in range(120)
    ]
    twins = [x | {"question": "not " + x["question"], "answer": "no"} for x in examples]
    pairs = own_pairs("gsm8k", examples, twins)
    assert pairs.twinned and pairs.twins[3]["answer"] == "no"
    assert own_pairs("gsm8k", [x | {"twin": t} for x, t in zip(examples, twins, strict=True)],
                     None).twins == twins  # fmt: skip
    unpaired = own_pairs("gsm8k", examples, None)
    assert not unpaired.twinned and len(unpaired.examples) == 120
    for x, t in zip(unpaired.examples, unpaired.twins, strict=True):
        assert x["answer"] != t["answer"] and len(x["steps"]) == len(t["steps"])
    with pytest.raises(UserError, match="119 twins of 120"):
        own_pairs("gsm8k", examples, twins[1:])
    with pytest.raises(UserError, match="twin of example 2 has the same answer"):
        own_pairs("gsm8k", examples, [*twins[:2], examples[2], *twins[3:]])
    with pytest.raises(UserError, match="only 50 pairs"):
        own_pairs("gsm8k", examples[:50], twins[:50])
    stored = [x | {"twin": t} for x, t in zip(examples, twins, strict=True)]
    del stored[1]["twin"]  # the numbers in errors counted only the examples with twins
    for twin, error in (("text", "is invalid"), (examples[2], "has the same answer")):
        with pytest.raises(UserError, match=f"twin of example 2 {error}"):
            own_pairs("gsm8k", [*stored[:2], examples[2] | {"twin": twin}, *stored[3:]], None)
    assert len(own_pairs("gsm8k", stored, None).examples) == 119
    assert "note: examples without a twin are left out: 1" in capsys.readouterr().out


def test_without_twins_destroyed_is_not_ignored(bundled):
    """The donor's answer is not an option here, so its thoughts can only destroy the answer."""
    engine, twinned = bundled
    plain = [{k: x[k] for k in ("question", "steps", "answer")} for x in twinned.examples]
    pairs = type(twinned)(plain, plain[1:] + plain[:1], twinned.groups, False)
    f, candidates = pairs.figures(engine), pairs.candidates(engine)
    own = [answer for answer, *_ in candidates]
    assert len(set(map(len, candidates))) == 1 and len(set(candidates[0])) == len(set(own))
    # accuracy is that of the best of all answers, not that of an answer above one half
    answers = sorted(set(own))
    texts = [x["question"] for x in pairs.examples]
    best = engine.choose(texts, [answers] * len(texts), 6).argmax(1).tolist()
    correct = [answers[i] == answer for i, answer in zip(best, own, strict=True)]
    assert f.correct.tolist() == correct
    assert f.accuracy("own")["lo"] > f.accuracy("mean")["hi"] and f.chance < 0.2
    assert f.flips("twin")["hi"] < 0.2 and f.flips("twin", candidate=0)["hi"] < 0.9
    figures = f.flips("twin"), f.flips("unrelated"), f.flips("twin", candidate=0)
    kept = f.flips("unrelated", candidate=0)
    assert insight.judge_carried(*figures, kept, "thoughts", False)["mark"] == "?"


def test_thoughts_name_the_words_of_their_step(bundled):
    """The words of another step or question could be counted."""
    engine, pairs = bundled
    while len(pairs.examples) < 100:  # MIN_PAIRS
        pairs = pairs.take([*range(len(pairs.examples))] * 2)
    p = words_by_step(engine, pairs.figures(engine), pairs, 6)
    assert set(p) <= {1, 2, 3} and p[2]["own"]["lo"] > p[2]["other"]["hi"]
    assert insight.judge_words(p)["mark"] in ("yes", "part")
    assert insight.judge_words({1: {"own": HALF, "other": HALF}})["mark"] == "no"


def test_a_model_that_ignores_what_is_asked(monkeypatch):
    """A model that uses a shortcut is often correct, but its pauses carry nothing to test."""
    engine = random_insight_engine("pause")
    engine.curriculum = Curriculum("pause", pad_latent_to_max=False)
    _, pairs = generated_pairs(engine.config, 50, 3)
    N = len(pairs.examples)
    first = torch.tensor([[-0.1, -3.0]] * N)  # the same option for both twins
    first[: N // 10] = first[: N // 10].flip(1)
    names = ("own", "twin_own", "mean", "twin", "unrelated", "k0", "k1", "k2", "slot1", "slot2")
    cells = dict.fromkeys(names, first) | {"by_inputs": torch.zeros(N, 1)}
    figures = Figures(cells, torch.tensor(pairs.groups), torch.ones(N, dtype=torch.bool))
    monkeypatch.setattr(type(pairs), "figures", lambda *args, **options: figures)
    row, _ = measure(engine, "pauses", None, pairs)
    assert row["verdict"] == "ignores what is asked" and row["noun"] == "pauses"
    assert "No other test applies" in row["refused"][0]
    assert any("fewer in training" in text for text in row["warnings"])
    assert [f["id"] for f in row["findings"]] == ["pairs", "needed"]


@pytest.mark.parametrize("n, c_thought, n_steps", [(4, 2, 2), (5, 2, 3), (2, 0, 2)])
def test_slots_are_grouped_by_step(n, c_thought, n_steps):
    """With two thoughts per step, replacing one would look like redundancy; five would crash."""
    engine = random_insight_engine("coconut", n_thoughts=n)
    engine.curriculum = Curriculum("coconut", c_thought=c_thought)
    _, pairs = generated_pairs(engine.config, 50, 3)
    pairs = pairs.take(range(8))
    figures = pairs.figures(engine)
    cells = figures.outcomes
    slots = {f"slot{i}" for i in range(1, n_steps + 1)}
    assert {name for name in cells if name.startswith("slot")} == slots
    assert {name for name in cells if name.startswith("k")} == {f"k{k}" for k in range(n + 3)}
    assert torch.equal(cells["own"], cells[f"k{n}"]) and cells["thoughts"].shape[:2] == (8, n + 2)
    assert words_by_step(engine, figures, pairs, n) == {}  # too few questions, but no error


def test_a_run_in_stage_0_has_no_thoughts_to_test():
    """A run that stopped before its first thought crashed the report."""
    engine = random_insight_engine("coconut", n_thoughts=0)
    plain, pairs = generated_pairs(engine.config, 50, 3)
    row, _ = measure(engine, "early", plain.take(range(100)), pairs)
    assert row["verdict"] == "does not solve these questions"
