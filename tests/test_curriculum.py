"""The schedule and the layouts, against lists written by hand from the paper's section 3."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nanococonut.curriculum import (
    IGNORE,
    METHODS,
    Curriculum,
    EncodedRow,
    Stage,
    answer_of,
    collate,
    encode_row,
    layout,
    longest,
    schedule,
)
from nanococonut.loader import rendered

ROW = EncodedRow(question=[1, 2], steps=[[3], [4, 5], [6]], answer=[7, 8])
SHORT = EncodedRow(question=[9], steps=[[3]], answer=[7])


@pytest.fixture
def ids(tokenizer):
    return tokenizer.bot, tokenizer.eot, tokenizer.eos


def test_coconut_layout_by_stage(tokenizer, ids):
    bot, eot, eos = ids
    c = Curriculum("coconut", c_thought=2, max_latent_stage=2)
    expected = {
        0: ([1, 2, bot], 0, [eot, 3, 4, 5, 6, 7, 8, eos], 1),
        1: ([1, 2, bot], 2, [eot, 4, 5, 6, 7, 8, eos], 1),
        2: ([1, 2, bot], 4, [eot, 6, 7, 8, eos], 1),
        3: ([1, 2, bot], 4, [eot, 7, 8, eos], 1),  # the final stage drops all steps
    }
    for stage, parts in expected.items():
        assert layout(c, stage, ROW, tokenizer) == parts


def test_a_row_with_fewer_steps_gets_the_stages_thoughts(tokenizer, ids):
    bot, eot, eos = ids
    c = Curriculum("coconut", c_thought=1, max_latent_stage=3)
    for stage, thoughts in [(1, 1), (2, 2), (3, 3), (4, 3)]:
        assert layout(c, stage, SHORT, tokenizer) == ([9, bot], thoughts, [eot, 7, eos], 1)
    unpadded = Curriculum("coconut", max_latent_stage=3, pad_latent_to_max=False)
    assert layout(unpadded, 4, SHORT, tokenizer)[1] == 1  # only the final stage looks at it
    assert layout(unpadded, 3, SHORT, tokenizer)[1] == 3


@pytest.mark.parametrize("stage", [0, 1, 3, 7])
def test_cot_and_no_cot_have_no_stages_and_no_markers(tokenizer, ids, stage):
    eos = ids[2]
    cot, no_cot = Curriculum("cot"), Curriculum("no_cot")
    assert layout(cot, stage, ROW, tokenizer) == ([1, 2], 0, [3, 4, 5, 6, 7, 8, eos], 0)
    assert layout(no_cot, stage, ROW, tokenizer) == ([1, 2], 0, [7, 8, eos], 0)


def test_collate_pads_to_the_right_and_supervises_words_only(tokenizer, ids):
    bot, eot, eos = ids
    batch = collate(Curriculum("coconut", max_latent_stage=3), [1, 4], [ROW, SHORT], tokenizer)
    assert batch.prefix.tolist() == [[1, 2, bot], [9, bot, 0]]
    assert batch.length.tolist() == [3, 2]
    assert batch.n_thoughts.tolist() == [1, 3] and batch.max_thoughts == 3
    assert batch.suffix.tolist() == [[eot, 4, 5, 6, 7, 8, eos], [eot, 7, eos, 0, 0, 0, 0]]
    assert batch.targets.tolist() == [
        [IGNORE, 4, 5, 6, 7, 8, eos],
        [IGNORE, 7, eos, IGNORE, IGNORE, IGNORE, IGNORE],
    ]
    assert batch.n_labels == 8
    assert batch.prefix.dtype == batch.targets.dtype == torch.int64


def test_without_markers_the_first_word_is_supervised(tokenizer, ids):
    batch = collate(Curriculum("no_cot"), [7, 7], [ROW, SHORT], tokenizer)
    assert batch.targets.tolist() == [[7, 8, ids[2]], [7, ids[2], IGNORE]]


def test_the_papers_schedules():
    prosqa = schedule(Curriculum("coconut", max_latent_stage=6), epochs=50, epochs_per_stage=5)
    assert prosqa == [Stage(s, 5) for s in range(7)] + [Stage(7, 15)]
    gsm = Curriculum("coconut", c_thought=2, max_latent_stage=3)
    paper = schedule(gsm, epochs=50, epochs_per_stage=3, first_stage_epochs=6)
    assert paper == [Stage(0, 6), Stage(1, 3), Stage(2, 3), Stage(3, 3), Stage(4, 35)]
    released = schedule(gsm, epochs=25, epochs_per_stage=3, start_stage=1)
    assert released == [Stage(1, 3), Stage(2, 3), Stage(3, 3), Stage(4, 16)]
    assert schedule(gsm, epochs=4, epochs_per_stage=3) == [Stage(0, 3), Stage(1, 1)]
    for method in ("cot", "no_cot"):
        assert schedule(Curriculum(method), 50, 5) == [Stage(7, 50)]


def test_thoughts_when_asked_are_the_stages_own():
    c = Curriculum("coconut", c_thought=2, max_latent_stage=3)
    assert [c.thoughts_at(s) for s in range(5)] == [0, 2, 4, 6, 6]
    assert [replace(c, final_thoughts=9).thoughts_at(s) for s in range(5)] == [0, 2, 4, 6, 9]
    assert Curriculum("cot").thoughts_at(7) == Curriculum("no_cot").thoughts_at(7) == 0


def test_uniform_prob_draws_over_the_rows_own_steps():
    n_steps = [3] * 30_000
    rng = np.random.default_rng(0)
    never = Curriculum("coconut").draw_stages(5, n_steps, rng)
    assert set(never) == {5}
    always = Curriculum("coconut", uniform_prob=1.0).draw_stages(5, n_steps, rng)
    assert sorted(set(always)) == [0, 1, 2, 3]
    assert max(abs(always.count(s) / 30_000 - 0.25) for s in range(4)) < 0.02
    to_stage = Curriculum("coconut", uniform_prob=1.0, uniform_to="stage")
    assert sorted(set(to_stage.draw_stages(1, n_steps, rng))) == [0, 1]
    some = Curriculum("coconut", uniform_prob=0.3).draw_stages(5, n_steps, rng)
    assert abs(some.count(5) / 30_000 - 0.7) < 0.02


def test_longest_is_the_longest_stage(tokenizer):
    c = Curriculum("coconut", c_thought=3, max_latent_stage=3)
    lengths = []
    for stage in range(5):
        prefix, n, suffix, _ = layout(c, stage, ROW, tokenizer)
        lengths.append(len(prefix) + n + len(suffix))
    assert longest(c, ROW, tokenizer) == max(lengths) and lengths[0] != max(lengths)


def test_parts_are_tokenised_on_their_own(tokenizer):
    rows = [{"question": "Tom is.", "steps": ["Tom is a lempus."], "answer": "Tom is a lempus."}]
    row = encode_row(tokenizer, rendered(rows, "sentences")[0])
    assert tokenizer.decode(row.question) == "Tom is.\n"
    assert [tokenizer.decode(s) for s in row.steps] == ["Tom is a lempus.\n"]
    assert tokenizer.decode(row.answer) == "### Tom is a lempus."


@pytest.mark.parametrize(
    ("text", "answer"),
    [("a\n### 2,125", "2125"), ("###  Tom is a lempus. ", "Tom is a lempus."), ("x # y # z", "z")],
)
def test_the_answer_stands_behind_the_last_hash(text, answer):
    assert answer_of(text) == answer


def test_methods_say_only_what_plan_understands():
    for method in METHODS.values():
        assert method.drop in ("stage", "none", "all") and method.insert in ("stage", "none")
