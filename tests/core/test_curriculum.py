"""Schedules and token layouts equal lists written by hand from the paper's section 3."""

from dataclasses import fields, replace
from typing import get_args

import numpy as np
import pytest
import torch
from helpers import ROOT

from nanococonut.batch import (
    IGNORE,
    TokenizedExample,
    build_sequence,
    collate,
    max_length,
    tokenize,
)
from nanococonut.config import TrainConfig
from nanococonut.curriculum import METHODS, Curriculum, Method, Stage, ignored_options, list_stages
from nanococonut.data.tasks import TASKS
from nanococonut.runtime.cli import make_config, parse_cli, read_config_file
from nanococonut.tokenizer import Tokenizer

EXAMPLE = TokenizedExample([1, 2], [[3], [4, 5], [6]], [7, 8], thought_labels=[[3], [5], [6]])
SHORT = TokenizedExample([9], [[3]], [7], thought_labels=[[3]])


def layout(*args):
    """Return (prefix, thoughts, suffix, forced tokens) of build_sequence."""
    s = build_sequence(*args)
    return s.prefix, s.n_thoughts, s.suffix, s.n_forced


def thought_labels(c, stage, example, tokenizer):
    return build_sequence(c, stage, example, tokenizer).thought_labels


def collate_examples(c, stages, examples, tokenizer):
    pairs = zip(stages, examples, strict=True)
    return collate([build_sequence(c, *pair, tokenizer) for pair in pairs])


@pytest.fixture
def ids(tokenizer):
    return tokenizer.bot, tokenizer.eot, tokenizer.eos


def test_coconut_layout_by_stage(tokenizer, ids):
    """Guards against an off-by-one between dropped steps and thoughts."""
    bot, eot, eos = ids
    c = Curriculum("coconut", c_thought=2, max_latent_stage=2)
    expected = {
        0: ([1, 2, bot], 0, [eot, 3, 4, 5, 6, 7, 8, eos], 1),
        1: ([1, 2, bot], 2, [eot, 4, 5, 6, 7, 8, eos], 1),
        2: ([1, 2, bot], 4, [eot, 6, 7, 8, eos], 1),
        3: ([1, 2, bot], 4, [eot, 7, 8, eos], 1),  # the final stage drops all steps
    }
    for stage, sequence in expected.items():
        assert layout(c, stage, EXAMPLE, tokenizer) == sequence


def test_short_example_has_the_stages_thoughts(tokenizer, ids):
    """Guards against fewer thoughts in training than at inference."""
    bot, eot, eos = ids
    c = Curriculum("coconut", c_thought=1, max_latent_stage=3)
    for stage, thoughts in [(1, 1), (2, 2), (3, 3), (4, 3)]:
        assert layout(c, stage, SHORT, tokenizer) == ([9, bot], thoughts, [eot, 7, eos], 1)
    unpadded = Curriculum("coconut", max_latent_stage=3, pad_latent_to_max=False)
    assert build_sequence(unpadded, 4, SHORT, tokenizer).n_thoughts == 1  # final stage only
    assert build_sequence(unpadded, 3, SHORT, tokenizer).n_thoughts == 3


def test_collate_pads_right_and_supervises_text(tokenizer, ids):
    """Guards against a loss on <eot> or on padding."""
    bot, eot, eos = ids
    batch = collate_examples(
        Curriculum("coconut", max_latent_stage=3), [1, 4], [EXAMPLE, SHORT], tokenizer
    )
    assert batch.prefix.tolist() == [[1, 2, bot], [9, bot, 0]]
    assert batch.length.tolist() == [3, 2]
    assert batch.n_thoughts.tolist() == [1, 3] and batch.max_thoughts == 3
    assert batch.suffix.tolist() == [[eot, 4, 5, 6, 7, 8, eos], [eot, 7, eos, 0, 0, 0, 0]]
    assert batch.targets.tolist() == [
        [IGNORE, 4, 5, 6, 7, 8, eos],
        [IGNORE, 7, eos, IGNORE, IGNORE, IGNORE, IGNORE],
    ]
    assert batch.n_targets == 8
    assert batch.prefix.dtype == batch.targets.dtype == torch.int64


def test_thought_targets_are_the_dropped_steps_nodes(tokenizer, monkeypatch):
    """Guards against a label of the wrong step, and against labels of steps that are kept."""
    c = Curriculum("coconut", max_latent_stage=3, final_thoughts=4)
    expected = {0: [], 1: [[3]], 2: [[3], [5]], 3: [[3], [5], [6]], 4: [[3], [5], [6], []]}
    for stage, labels in expected.items():
        assert thought_labels(c, stage, EXAMPLE, tokenizer) == labels
    assert thought_labels(c, 2, SHORT, tokenizer) == [[3], []]
    assert thought_labels(replace(c, c_thought=2), 2, EXAMPLE, tokenizer) == [[3], [3], [5], [5]]
    assert (
        thought_labels(Curriculum("pause_as_thought"), 2, EXAMPLE, tokenizer) == []
    )  # no latent steps
    assert thought_labels(Curriculum("cot"), 2, EXAMPLE, tokenizer) == []
    # a new rule that keeps the first step
    monkeypatch.setattr(Curriculum, "plan", lambda *args: (range(1, 3), 2))
    sequence = build_sequence(c, 2, EXAMPLE, tokenizer)
    assert sequence.thought_labels == [[5], [6]] and sequence.suffix[1:2] == [3]
    monkeypatch.undo()
    several = replace(EXAMPLE, thought_labels=[[3, 9], [5]])
    batch = collate_examples(c, [2, 1], [several, SHORT], tokenizer)
    x = IGNORE
    assert batch.thought_targets.tolist() == [[[3, 9], [5, x]], [[3, x], [x, x]]]
    assert collate_examples(c, [0], [EXAMPLE], tokenizer).thought_targets.shape == (1, 0, 0)


def test_thought_targets_name_nodes_of_prosqa():
    """Guards a requirement of thought_loss: a compact step ends in the node that it reaches."""
    task = TASKS["prosqa"]
    words = Tokenizer.words(task.module.VOCABULARY)
    raw = task.module.generate(3, 1)
    for example, plain in zip(task.render(raw, "compact"), raw, strict=True):
        labels = thought_labels(Curriculum("coconut"), 7, tokenize(words, example), words)
        n = len(example["steps"])
        reached = [f" {step.split()[1]}" for step in example["steps"]]
        assert [words.decode(ids) for ids in labels[:n]] == reached
        assert labels[n:] == [[]] * (6 - n) and reached[-1].strip() == example["answer"]
        # all nodes k steps away, found by a separate loop over node numbers
        frontiers = task.module.frontiers(plain["question"])
        frontier, seen = {plain["root"]}, {plain["root"]}
        for ids in tokenize(words, example, frontiers).thought_labels:
            frontier = {b for a, b in plain["edges"] if a in frontier} - seen
            seen |= frontier
            names = {" " + plain["idx_to_symbol"][node] for node in frontier}
            assert {words.decode([t]) for t in ids} == names and len(ids) == len(names) > 0
        assert reached[-1] in {" " + word for word in frontiers[n - 1].split()}


def test_schedules_equal_the_papers():
    """Guards the epochs per stage of the paper and the released code."""
    prosqa = list_stages(Curriculum("coconut", max_latent_stage=6), epochs=50, epochs_per_stage=5)
    assert prosqa == [Stage(s, 5) for s in range(7)] + [Stage(7, 15)]
    gsm = Curriculum("coconut", c_thought=2, max_latent_stage=3)
    paper = list_stages(gsm, epochs=50, epochs_per_stage=3, first_stage_epochs=6)
    assert paper == [Stage(0, 6), Stage(1, 3), Stage(2, 3), Stage(3, 3), Stage(4, 35)]
    assert list_stages(gsm, epochs=4, epochs_per_stage=3) == [Stage(0, 3), Stage(1, 1)]
    for method in ("cot", "no_cot"):
        assert list_stages(Curriculum(method), 50, 5) == [Stage(7, 50)]


# args/*_coconut.yaml: c_thought, epochs_per_stage, max_latent_stage, resume, num_epochs
RELEASED = {"prosqa": (1, 5, 6, 0, 50), "prontoqa": (1, 5, 6, 0, 50), "gsm8k": (2, 3, 3, 3, 25)}


@pytest.mark.parametrize("task", RELEASED)
def test_configs_follow_the_released_schedule(task):
    """Guards against 25 epochs for GSM8k: the released config resumes at epoch 3 of 25."""
    c_thought, epochs_per_stage, max_stage, resume, num_epochs = RELEASED[task]
    file = ROOT / f"config/{task}.py"
    # the last command in the docstring, if there is one, gives the released schedule
    _, *commands = file.read_text().split('"""')[1].replace("\\\n", "").split("python train.py")
    argv = (commands or [f"config/{task}.py"])[-1].split()
    overrides, path = parse_cli(TrainConfig, argv, "", config_file=True)
    config = make_config(TrainConfig, read_config_file(ROOT / path, TrainConfig), overrides)
    curriculum = Curriculum.from_config(config)
    stages = list_stages(
        curriculum, config.epochs, config.epochs_per_stage, config.first_stage_epochs
    )
    epochs = [stage.index for stage in stages for _ in range(stage.epochs)]
    released = [epoch // epochs_per_stage for epoch in range(resume, num_epochs)]
    assert epochs == [min(stage, max_stage + 1) for stage in released]
    for epoch, stage in zip(epochs, released, strict=True):
        n_thoughts = min(stage, max_stage) * c_thought
        for n_steps in (
            1,
            3,
            9,
        ):  # dataset.py: skip the first `stage` steps, all in the final stage
            n_skipped = min(n_steps, 10_000 if stage > max_stage else stage)
            assert curriculum.plan(epoch, n_steps) == (range(n_skipped), n_thoughts)
    assert (config.batch_size, config.learning_rate) == (4 * 32, 1e-4)


def test_thoughts_at_inference_follow_the_stage():
    """Guards against an evaluation with more thoughts than in training."""
    c = Curriculum("coconut", c_thought=2, max_latent_stage=3)
    assert [c.n_thoughts(s) for s in range(5)] == [0, 2, 4, 6, 6]
    assert [replace(c, final_thoughts=9).n_thoughts(s) for s in range(5)] == [0, 2, 4, 6, 9]
    assert Curriculum("cot").n_thoughts(7) == Curriculum("no_cot").n_thoughts(7) == 0


def test_uniform_prob_samples_up_to_own_steps():
    """Guards the distribution of the released code, and against stages not reached yet."""
    n_steps = [3] * 30_000
    rng = np.random.default_rng(0)
    never = Curriculum("coconut").sample_stages(5, n_steps, rng)
    assert set(never) == {5}
    always = Curriculum("coconut", uniform_prob=1.0).sample_stages(5, n_steps, rng)
    assert sorted(set(always)) == [0, 1, 2, 3]
    assert max(abs(always.count(s) / 30_000 - 0.25) for s in range(4)) < 0.02
    to_stage = Curriculum("coconut", uniform_prob=1.0, advance_at=0.9)
    assert sorted(set(to_stage.sample_stages(1, n_steps, rng))) == [0, 1]
    some = Curriculum("coconut", uniform_prob=0.3).sample_stages(5, n_steps, rng)
    assert abs(some.count(5) / 30_000 - 0.7) < 0.02


def test_max_length_covers_every_stage(tokenizer):
    """Guards against a check of stage 0 only: thoughts can be longer than their steps."""
    c = Curriculum("coconut", c_thought=3, max_latent_stage=3)
    lengths = []
    for stage in range(5):
        prefix, n, suffix, _ = layout(c, stage, EXAMPLE, tokenizer)
        lengths.append(len(prefix) + n + len(suffix))
    assert max_length(c, EXAMPLE, tokenizer) == max(lengths) and lengths[0] != max(lengths)


def test_texts_are_tokenized_separately(tokenizer):
    """Guards against tokens that span two steps, one of which may be dropped."""
    raw = [{"question": "Tom is.", "steps": ["Tom is a lempus."], "answer": "Tom is a lempus."}]
    example = tokenize(tokenizer, TASKS["prosqa"].render(raw, "sentences")[0])
    assert tokenizer.decode(example.question) == "Tom is.\n"
    assert [tokenizer.decode(s) for s in example.steps] == ["Tom is a lempus.\n"]
    assert tokenizer.decode(example.answer) == "### Tom is a lempus."


def test_methods_have_valid_rules():
    """Guards against a typo in METHODS, which would silently select another rule."""
    for method in METHODS.values():
        for field in fields(Method):
            allowed = get_args(field.type)
            assert not allowed or getattr(method, field.name) in allowed
        assert (method.thought_type == "") == (method.n_thoughts_rule == "none")


# Written by hand: the sequence of EXAMPLE (question 1 2, steps 3 | 4 5 | 6, answer 7 8) at each
# stage, with max_latent_stage=3 and c_thought=1. B, E: <bot>, <eot>; P: pause; $: eos; ~: thought
# (a latent step). Tokens after | are labels.
LAYOUTS = {
    "coconut": {
        0: "1 2 B E | 3 4 5 6 7 8 $",
        1: "1 2 B ~ E | 4 5 6 7 8 $",
        2: "1 2 B ~ ~ E | 6 7 8 $",
        4: "1 2 B ~ ~ ~ E | 7 8 $",
    },
    "cot": {0: "1 2 | 3 4 5 6 7 8 $", 2: "1 2 | 3 4 5 6 7 8 $", 4: "1 2 | 3 4 5 6 7 8 $"},
    "no_cot": {0: "1 2 | 7 8 $", 2: "1 2 | 7 8 $", 4: "1 2 | 7 8 $"},
    "icot": {  # 1.5 tokens per stage
        0: "1 2 | 3 4 5 6 7 8 $",
        1: "1 2 | 4 5 6 7 8 $",
        2: "1 2 | 6 7 8 $",
        3: "1 2 | 7 8 $",
        40: "1 2 | 7 8 $",
    },
    "pause": {n: "1 2 B P P P E | 7 8 $" for n in (0, 2, 4)},
    "coconut_no_curriculum": {n: "1 2 B ~ ~ ~ E | 7 8 $" for n in (0, 2, 4)},
    "coconut_no_thought": {
        0: "1 2 | 3 4 5 6 7 8 $",
        1: "1 2 | 4 5 6 7 8 $",
        2: "1 2 | 6 7 8 $",
        4: "1 2 | 7 8 $",
    },
    "pause_as_thought": {
        0: "1 2 B E | 3 4 5 6 7 8 $",
        1: "1 2 B P E | 4 5 6 7 8 $",
        2: "1 2 B P P E | 6 7 8 $",
        4: "1 2 B P P P E | 7 8 $",
    },
}
for name in ("soft_thought", "projected", "pause_multipass"):
    LAYOUTS[name] = LAYOUTS["coconut"]
assert set(LAYOUTS) == set(METHODS), "every method needs its layouts here"
CASES = [(method, stage) for method, stages in LAYOUTS.items() for stage in stages]


def expected_layout(method, stage, tokenizer):
    """Return (token ids, with None for a thought; index of the first label)."""
    context, labels = LAYOUTS[method][stage].split("|")
    ids = {"B": tokenizer.bot, "E": tokenizer.eot, "P": tokenizer.latent, "$": tokenizer.eos}
    ids |= {"~": None} | {str(i): i for i in range(10)}
    return [ids[symbol] for symbol in (context + labels).split()], len(context.split())


@pytest.mark.parametrize(("method", "stage"), CASES)
def test_layout_equals_the_hand_written_one(tokenizer, method, stage):
    """Guards tokens, labels and positions of every method against the paper."""
    sequence, first_label = expected_layout(method, stage, tokenizer)
    c = Curriculum(method, max_latent_stage=3, icot_tokens=1.5)
    batch = collate_examples(c, [stage, stage], [EXAMPLE, SHORT], tokenizer)
    n, k = int(batch.length[0]), int(batch.n_thoughts[0])
    s = int((batch.targets[0] != IGNORE).sum()) + len(sequence[n + k : first_label])
    assert batch.prefix[0, :n].tolist() == sequence[:n]
    assert sequence[n : n + k] == [None] * k and None not in sequence[n + k :]
    assert batch.suffix[0, :s].tolist() == sequence[n + k :]
    assert batch.targets[0, :s].tolist() == (
        [IGNORE] * (first_label - n - k) + sequence[first_label:]
    )
    assert batch.targets[0, s:].eq(IGNORE).all() and batch.n_needed.tolist() == [3, 1]
    # one position per token and per thought
    assert n + k + s == len(sequence) <= max_length(c, EXAMPLE, tokenizer)


def test_unpadded_short_example_has_fewer_thoughts(tokenizer):
    """Guards pad_latent_to_max=False for latent steps and for pauses."""
    for method in ("pause", "coconut_no_curriculum", "pause_as_thought"):
        c = Curriculum(method, c_thought=2, max_latent_stage=3, pad_latent_to_max=False)
        prefix, thoughts, *_ = layout(c, 4, SHORT, tokenizer)
        assert thoughts + prefix.count(tokenizer.latent) == 2
        assert c.n_thoughts(4) == 6


def test_icot_has_one_stage_per_epoch():
    """Guards against iCoT stages limited by the number of steps."""
    assert list_stages(Curriculum("icot"), 4, 5) == [Stage(i, 1) for i in range(4)]
    samples = Curriculum("icot", uniform_prob=1.0).sample_stages(
        9, [2] * 500, np.random.default_rng(0)
    )
    assert set(samples) == set(range(10))


SETTINGS = dict(first_stage_epochs=3, epochs_per_stage=1, uniform_prob=0.0)
SETTINGS |= dict(max_latent_stage=1, c_thought=2, final_thoughts=5)
SETTINGS |= dict(pad_latent_to_max=False, icot_tokens=2.5)


def trained_on(config, tokenizer):
    """Return the sequences of every epoch, and the number of thoughts at inference."""
    c, rng = Curriculum.from_config(config), np.random.default_rng(1)
    schedules = config.epochs_per_stage, config.first_stage_epochs
    epochs = [s.index for s in list_stages(c, 12, *schedules) for _ in range(s.epochs)]
    sampled = [c.sample_stages(stage, [3, 1], rng) for stage in epochs]
    sequences = [
        [layout(c, s, x, tokenizer) for s, x in zip(stages, (EXAMPLE, SHORT), strict=True)]
        for stages in sampled
    ]
    return sequences, c.n_thoughts(epochs[-1])


@pytest.mark.parametrize("method", METHODS)
def test_ignored_options_change_nothing(tokenizer, method):
    """Guards both directions: an option either is ignored or changes the training."""
    base = TrainConfig(method=method, max_latent_stage=3, uniform_prob=0.5, epochs_per_stage=2)
    unchanged = trained_on(base, tokenizer)
    ignored = ignored_options(METHODS[method])
    for name, value in SETTINGS.items():
        changed = trained_on(replace(base, **{name: value}), tokenizer) != unchanged
        assert changed == (name not in ignored), name
    assert ("soft_top_k" in ignored) == (METHODS[method].thought_type != "soft")
    assert ("advance_at" in ignored) == (METHODS[method].advance_by == "never")
    labels = thought_labels(Curriculum(method), 1, EXAMPLE, tokenizer)
    assert ("thought_labels" in ignored) == (labels == [])
    others = {"soft_top_k", "soft_temperature", "advance_at", "thought_labels"}
    assert ignored - set(SETTINGS) <= others, "add the new option to SETTINGS"
