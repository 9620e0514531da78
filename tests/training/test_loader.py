"""An epoch has the requested fractions of each kind of example, and is generated once."""

import pytest
from helpers import random_gpt

from nanococonut.config import TrainConfig
from nanococonut.curriculum import Curriculum
from nanococonut.data.shortcuts import prosqa_shortcuts
from nanococonut.data.tasks import Data
from nanococonut.training.loader import TrainLoader
from nanococonut.training.setup import init_tokenizer
from nanococonut.training.step import TrainStep


def make_loader(**settings):
    config = TrainConfig(
        tokenizer="words", render="compact", n_nodes=16, min_hops=2, max_hops=4,
        train_examples=200, regenerate_each_epoch=True, **settings,
    )  # fmt: skip
    curriculum, tokenizer = Curriculum.from_config(config), init_tokenizer(config, None)
    return TrainLoader(config, curriculum, tokenizer, Data(None, {}))


def generated(epoch, **settings):
    """Return the examples of an epoch, as texts."""
    loader = make_loader(**settings)
    loader._fitting = lambda examples: [(x, x) for x in examples]
    loader.close()
    return loader._generate(epoch)


def test_the_last_epoch_prepares_no_other():
    """Guards against generating an epoch that is never used, which delays the end of a run."""
    loader, made = make_loader(epochs=3), []
    loader._make_epoch = made.append
    for epoch in range(3):
        loader.epoch(epoch)
    loader.close(wait=True)
    assert made == [0, 1, 2]


def test_long_fraction_adds_the_longest_chains():
    """Guards against missing long examples without a shortcut, rare among plain ones."""
    examples = generated(0, short_fraction=0.3, long_fraction=0.5)
    plain, short, longest = examples[:40], examples[40:100], examples[100:]
    assert len(examples) == 200
    assert {len(x["steps"]) for x in short} == {1}
    assert {len(x["steps"]) for x in longest} == {3, 4}
    assert {len(x["steps"]) for x in plain} == {2, 3, 4}
    assert all(abs(fraction - 0.5) < 0.2 for fraction in prosqa_shortcuts(longest).values())


def test_graphs_grow_after_the_first_epochs():
    """Guards against one epoch of small graphs too many, or none."""
    small, large = generated(1, grow_epochs=2), generated(2, grow_epochs=2)
    assert {len(x["steps"]) for x in small} == {1, 2}
    assert max(len(x["idx_to_symbol"]) for x in small) <= 8
    assert large == generated(2)


def test_fractions_that_round_up_leave_no_plain_examples():
    """The plain part became -1, which generated hundreds of examples."""
    fractions = dict(matched_fraction=0.2475, short_fraction=0.2475, long_fraction=0.505)
    assert len(generated(0, **fractions)) == 201  # 50 + 50 + 101


@pytest.mark.parametrize("method, n", [("pause_as_thought", 0), ("coconut", 2)])
def test_pauses_are_no_latent_steps(method, n):
    """With CUDA graphs, the batches of pauses were padded with thoughts that do nothing."""
    loader, seen = make_loader(method=method), []
    loader.get(0, 2, lambda sequences, counted, counts, n_thoughts: seen.append(n_thoughts))
    loader.close()
    assert set(seen) == {n}


def test_a_batch_belongs_to_what_prepared_it():
    """A second TrainStep got the batch of the first, with its scale of the thought loss."""
    loader, model = make_loader(thought_labels="path"), random_gpt()
    steps = [TrainStep(model, thought_loss=weight) for weight in (0.0, 1.0, 2.0)]
    scales = [loader.get(0, 2, step.prepare).micro_batches[0].scale[2].item() for step in steps]
    loader.close()
    assert scales[0] == 0 < scales[1] == scales[2] / 2
