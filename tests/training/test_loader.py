"""What an epoch holds: the parts that its fractions ask for."""

from nanococonut.config import TrainConfig
from nanococonut.curriculum import Curriculum
from nanococonut.data.shortcuts import prosqa_shortcuts
from nanococonut.data.tasks import Data
from nanococonut.training.loader import TrainLoader
from nanococonut.training.setup import init_tokenizer


def test_long_fraction_adds_the_longest_chains():
    """They are 1 in 40 of the plain examples, and there a shortcut finds almost all answers."""
    config = TrainConfig(
        tokenizer="words", render="compact", n_nodes=16, min_hops=2, max_hops=4,
        train_examples=200, regenerate_each_epoch=True, short_fraction=0.3, long_fraction=0.5,
    )  # fmt: skip
    loader = TrainLoader(
        config, Curriculum.from_config(config), init_tokenizer(config, None), Data(None, {})
    )
    loader._fitting = lambda examples: [(x, x) for x in examples]  # texts, not tokens
    examples = loader._generate(0)
    loader.close()
    plain, short, longest = examples[:40], examples[40:100], examples[100:]
    assert len(examples) == 200
    assert {len(x["steps"]) for x in short} == {1}
    assert {len(x["steps"]) for x in longest} == {3, 4}
    assert {len(x["steps"]) for x in plain} == {2, 3, 4}
    assert all(abs(fraction - 0.5) < 0.2 for fraction in prosqa_shortcuts(longest).values())
