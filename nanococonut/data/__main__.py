"""Write generated or downloaded examples to a file.

python -m nanococonut.data prosqa --n 1000 --seed 0 --out rows.json
python -m nanococonut.data gsm8k --split test --out rows.json
"""

import argparse
from dataclasses import fields
from typing import NoReturn

from nanococonut.data import gsm8k
from nanococonut.data.files import skipped_summary, write_examples
from nanococonut.data.tasks import TASKS
from nanococonut.runtime.errors import UserError, run_main


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # argparse would print the usage
        raise UserError(f"{message}.\nSee --help for the arguments.")


def task_parser() -> _Parser:
    """Return the parser with a command for each task; a generator's settings become flags."""
    parser = _Parser(prog="python -m nanococonut.data", description="Write a file of examples.")
    commands = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for name, task in TASKS.items():
        command = commands.add_parser(name, help=task.description, description=task.description)
        command.add_argument("--out", metavar="FILE", required=True, help="a new file")
        if not task.config_class:
            command.add_argument("--split", choices=gsm8k.SPLITS, default="train")
            command.add_argument("--revision", default="main", help="the copy's commit")
            command.add_argument("--skip_bad_rows", action="store_true", help="drop bad examples")
            continue
        command.add_argument("--n", type=int, default=1000, help="examples [1000]")
        command.add_argument("--seed", type=int, default=0, help="random seed [0]")
        for f in fields(task.config_class):
            kind = {"type": type(f.default)}
            if isinstance(f.default, bool):
                kind = {"action": "store_true"}
            text = f"{f.metadata['help']} [{f.default}]"
            command.add_argument(f"--{f.name}", default=f.default, help=text, **kind)
    return parser


def main() -> None:
    """Run the command in sys.argv."""
    args = task_parser().parse_args()
    task = TASKS[args.task]
    if task.config_class:
        if args.n < 1 or args.seed < 0:
            raise UserError(f"--n {args.n} --seed {args.seed}: too small.\nUse n > 0, seed >= 0.")
        settings = {f.name: getattr(args, f.name) for f in fields(task.config_class)}
        examples = task.module.generate(args.n, args.seed, task.config_class(**settings))
        source = f"seed {args.seed}"
    else:
        skipped: list[str] | None = [] if args.skip_bad_rows else None
        examples, commit = gsm8k.from_hub(args.split, revision=args.revision, skipped=skipped)
        source = f"{gsm8k.HUB} {args.split}, --revision={commit}"
        if skipped:
            print(skipped_summary(len(examples), skipped))
    write_examples(args.out, examples)
    print(f"{len(examples)} examples in {args.out} ({source})")


if __name__ == "__main__":
    run_main(main)
