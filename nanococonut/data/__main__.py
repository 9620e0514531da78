"""Write a file of examples: a generated split, or a split of GSM8k-Aug.

python -m nanococonut.data prosqa --n 1000 --out examples.json
"""

import sys
from dataclasses import dataclass

from nanococonut.config import TrainConfig
from nanococonut.data import gsm8k
from nanococonut.data.files import write_examples
from nanococonut.data.tasks import TASK_OF, generated
from nanococonut.runtime.cli import Options, make_config, option, parse_cli
from nanococonut.runtime.errors import run_main


@dataclass(frozen=True)
class DataOptions(Options):
    data: str = option(
        "prosqa", "split, or gsm8k (also as the first argument)", choices=[*TASK_OF, "gsm8k"]
    )
    out: str = option("examples.json", "file to write; it must not exist")
    n: int = option(1000, "number of generated examples", ge=1)
    seed: int = option(0, "random seed", ge=0)
    n_nodes: int = option(28, "ProsQA: nodes per graph")
    min_hops: int = option(3, "ProsQA: fewest steps")
    max_hops: int | None = option(None, "ProsQA: most steps (6); ProntoQA: steps (5)", ge=1)
    split: str = option("test", "GSM8k-Aug: split of the data set", choices=gsm8k.HUB_SPLITS)
    revision: str = option("main", "GSM8k-Aug: branch, tag or commit")


def main() -> None:
    """Write the file that the options in sys.argv describe."""
    argv = sys.argv[1:]
    if argv and not argv[0].startswith("-"):
        argv[0] = f"--data={argv[0]}"
    c = make_config(DataOptions, parse_cli(DataOptions, argv, __doc__)[0])
    task = TASK_OF.get(c.data, "gsm8k")
    max_hops = c.max_hops or (5 if task == "prontoqa" else 6)
    config = TrainConfig(task=task, n_nodes=c.n_nodes, min_hops=c.min_hops, max_hops=max_hops)
    examples, source = generated(c.data, c.n, c.seed, config), f"seed {c.seed}"
    if examples is None:
        examples, commit = gsm8k.from_hub(c.split, c.revision)
        source = f"{c.split}, --revision={commit}"
    write_examples(c.out, examples)
    print(f"{len(examples)} examples in {c.out} ({source})")


if __name__ == "__main__":
    run_main(main)
