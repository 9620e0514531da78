"""Write a file of examples: python -m nanococonut.data TASK --key=value ..."""

import sys
from dataclasses import dataclass, make_dataclass

from nanococonut.data import gsm8k
from nanococonut.data.files import skipped_summary, write_examples
from nanococonut.data.tasks import TASKS
from nanococonut.runtime.cli import make_config, option, parse_cli, validate
from nanococonut.runtime.errors import UserError, run_main


@dataclass(frozen=True)
class Generated:
    """Options of a task that is generated, in addition to the generator's settings."""

    out: str = option("examples.json", "a new file")
    n: int = option(1000, "number of examples", ge=1)
    seed: int = option(0, "random seed", ge=0)


@dataclass(frozen=True)
class Downloaded:
    """Options of a task that is read from the Hugging Face hub."""

    out: str = option("examples.json", "a new file")
    split: str = option("train", "of the data set", choices=gsm8k.SPLITS)
    revision: str = option("main", "branch, tag or commit of the data set")
    skip_bad_rows: bool = option(False, "drop bad examples and report it")

    def __post_init__(self) -> None:
        validate(self)


def main() -> None:
    """Write the file that sys.argv asks for."""
    name, *argv = sys.argv[1:] or [""]
    if name not in TASKS:
        raise UserError(f"{name!r} is not a task.\nChoose one of {', '.join(TASKS)}, then --help.")
    task = TASKS[name]
    cls = Downloaded
    if task.config_class:
        cls = make_dataclass("Options", [], bases=(Generated, task.config_class), frozen=True)
    config = make_config(cls, parse_cli(cls, argv, task.description)[0])
    if task.config_class:
        examples, source = (
            task.module.generate(config.n, config.seed, config),
            f"seed {config.seed}",
        )
    else:
        skipped: list[str] | None = [] if config.skip_bad_rows else None
        examples, commit = task.module.from_hub(config.split, config.revision, skipped)
        source = f"{config.split}, --revision={commit}"
        if skipped:
            print(skipped_summary(len(examples), skipped))
    write_examples(config.out, examples)
    print(f"{len(examples)} examples in {config.out} ({source})")


if __name__ == "__main__":
    run_main(main)
