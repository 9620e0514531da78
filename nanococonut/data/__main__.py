"""Write examples to a file, show a file's statistics, or convert a file to JSON.

python -m nanococonut.data prosqa --n 1000 --seed 0 --out rows.json
python -m nanococonut.data prosqa --stats rows.json
python -m nanococonut.data gsm8k --split test --out rows.json
python -m nanococonut.data convert lines.txt --out rows.json
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from nanococonut.data import gsm8k
from nanococonut.data.examples import Example
from nanococonut.data.files import read_examples, skipped_summary, write_examples
from nanococonut.data.tasks import TASKS, Task
from nanococonut.runtime.errors import UserError, run_main


class _Parser(argparse.ArgumentParser):
    def __init__(self, *command: str, **settings: Any) -> None:
        prog = " ".join(["python -m nanococonut.data", *command])
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, formatter_class=formatter, **settings)

    def add_skip_option(self) -> None:
        self.add_argument(
            "--skip_bad_rows", action="store_true", help="drop bad examples and report it"
        )

    def error(self, message: str) -> NoReturn:  # argparse would print the usage
        raise UserError(f"{message}.\nSee --help for the arguments.")


def task_parser(name: str, task: Task) -> _Parser:
    """Return the parser of a task's command; the generator's settings become flags."""
    # the class's docstring explains the flags
    epilog = task.config_class.__doc__ if task.config_class else None
    parser = _Parser(name, description=task.description, epilog=epilog)
    parser.add_argument("--out", metavar="FILE", help="write examples here (a new file)")
    parser.add_argument("--seed", type=int, default=0, help="random seed [%(default)s]")
    parser.add_skip_option()
    if not task.config_class:
        parser.add_argument("--n", type=int, default=0, help="examples, drawn by seed [all]")
        parser.add_argument("--split", choices=gsm8k.SPLITS, default="train", help="[%(default)s]")
        parser.add_argument("--hub", default=gsm8k.HUB[0], help="which copy [%(default)s]")
        parser.add_argument("--revision", default="main", help="the copy's commit [%(default)s]")
        return parser
    parser.add_argument("--n", type=int, default=1000, help="examples [%(default)s]")
    parser.add_argument("--stats", metavar="FILE", help="print this file's statistics instead")
    for f in fields(task.config_class):
        if isinstance(f.default, bool):
            parser.add_argument(f"--{f.name}", action="store_true", help=f"[{f.default}]")
        else:
            options = {"type": type(f.default), "default": f.default}
            parser.add_argument(f"--{f.name}", help="[%(default)s]", **options)
    return parser


def task_command(name: str, argv: list[str]) -> None:
    """Write or describe examples of a task."""
    task = TASKS[name]
    args = task_parser(name, task).parse_args(argv)
    stats_file = getattr(args, "stats", None)
    if (stats_file is None) == (args.out is None):
        raise UserError(
            "expected --out FILE (write examples) or --stats FILE (describe examples).\n"
            "Give one of the two; see --help."
        )
    if stats_file:
        print_statistics(task, stats_file, _read(stats_file, args.skip_bad_rows))
        return
    if args.n < bool(task.config_class) or args.seed < 0:
        raise UserError(
            f"--n {args.n} --seed {args.seed}: expected at least one example and a seed >= 0.\n"
            "Change them."
        )
    _require_new(args.out)
    if task.config_class:
        settings = {f.name: getattr(args, f.name) for f in fields(task.config_class)}
        examples = task.module.generate(args.n, args.seed, task.config_class(**settings))
        source = f"seed {args.seed}"
    else:
        examples, source = gsm8k_examples(args)
    write_examples(args.out, examples)
    print(f"{len(examples)} examples in {args.out} ({source})")


def gsm8k_examples(args: argparse.Namespace) -> tuple[list[Example], str]:
    """Return (examples of the hub, all or a sample of n; their source)."""
    skipped: list[str] | None = [] if args.skip_bad_rows else None
    examples, commit = gsm8k.from_hub(args.split, args.hub, args.revision, skipped)
    _print_skipped(examples, skipped)
    source = f"{args.hub} {args.split}, --revision={commit}"
    if args.n > len(examples):
        raise UserError(
            f"--n {args.n}: {source} has {len(examples)} examples.\nAsk for fewer; 0: all."
        )
    if args.n:  # a larger n begins with the same examples
        order = np.random.default_rng(args.seed).permutation(len(examples))
        examples = [examples[i] for i in order[: args.n]]
    return examples, source


def print_statistics(task: Task, path: str, examples: list[Example]) -> None:
    """Print a table: a file's statistics and shortcuts, and the released ones."""
    stats = task.statistics(examples) | task.shortcuts(examples)
    print(f"{len(examples)} examples of {path}, compared with the released ones")
    keys = [*task.released, *(key for key in stats if key not in task.released)]
    width = max(map(len, keys))
    print(f"{'':<{width}}{'file':>10}{'released':>10}")
    for key in keys:
        released = f"{task.released[key]:10.3f}" if key in task.released else ""
        print(f"{key:<{width}}{stats.get(key, 0):10.3f}{released}")


def convert_command(argv: list[str]) -> None:
    """Convert a file in any readable format to JSON."""
    parser = _Parser("convert", description="Convert a file of examples in any format to JSON.")
    parser.add_argument("file", metavar="IN", help="JSON, JSON lines, raw ProntoQA or GSM8k-Aug")
    parser.add_argument("--out", metavar="FILE", required=True, help="write here (a new file)")
    parser.add_skip_option()
    args = parser.parse_args(argv)
    _require_new(args.out)
    examples = _read(args.file, args.skip_bad_rows)
    write_examples(args.out, examples)
    print(f"{len(examples)} examples in {args.out} ({args.file})")


def _read(path: str, skip_bad_rows: bool) -> list[Example]:
    skipped: list[str] | None = [] if skip_bad_rows else None
    examples = read_examples(path, skipped)
    _print_skipped(examples, skipped)
    return examples


def _print_skipped(examples: list[Example], skipped: list[str] | None) -> None:
    if skipped:
        print(skipped_summary(len(examples), skipped))


def _require_new(path: str) -> None:
    if Path(path).exists():  # checked before the work, not after it
        raise UserError(f"{path} exists already.\nChoose another name or remove it first.")


def main() -> None:
    """Run the command in sys.argv."""
    listed = "\n".join(f"  {name:<10}{task.description}" for name, task in TASKS.items())
    listed += "\n  convert   convert a file of examples, in any format, to JSON"
    parser = _Parser(description=__doc__, epilog=listed, usage="%(prog)s TASK ... (or TASK --help)")
    parser.add_argument("task", choices=[*TASKS, "convert"], metavar="TASK", help="see below")
    command = parser.parse_args(sys.argv[1:2]).task
    if command == "convert":
        convert_command(sys.argv[2:])
    else:
        task_command(command, sys.argv[2:])


if __name__ == "__main__":
    run_main(main)
