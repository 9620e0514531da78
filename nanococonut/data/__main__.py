"""Write rows to a file, look at a file's statistics, or turn a file into the JSON form.

python -m nanococonut.data prosqa --n 1000 --seed 0 --out rows.json
python -m nanococonut.data prosqa --stats rows.json
python -m nanococonut.data gsm8k --split test --out rows.json
python -m nanococonut.data gsm8k --from lines.txt --n 1000 --out rows.json
python -m nanococonut.data convert raw.json --out rows.json
"""

import argparse
import sys
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from nanococonut.data import Row, gsm8k
from nanococonut.data.files import read_rows, skipped_line, write_rows
from nanococonut.errors import UserError, main_guard

# measured on the 800 released validation and test rows; heuristics on the 300 of validation
PROSQA_RELEASED = {
    "nodes": 22.8,
    "edges": 36.0,
    "persons": 2.56,
    "hops": 3.77,
    "hops 3": 0.408,
    "hops 4": 0.438,
    "hops 5": 0.131,
    "hops 6": 0.024,
    "shortest paths": 1.59,
    "entity is node 1": 0.636,
    "label 0": 0.034,
    "label 1": 0.390,
    "label 2": 0.517,
    "label 3": 0.060,
    "in-degree 0": 0.027,
    "in-degree 1": 0.480,
    "in-degree 2": 0.305,
    "in-degree 3": 0.133,
    "deeper": 0.925,
    "farthest": 0.945,
    "more ancestors": 0.698,
    "fewer parents": 0.667,
    "random": 0.5,
}


@dataclass(frozen=True)
class Task:
    """A task whose module in nanococonut.data has the entry's name.

    config   the module's class of settings for its generator; None: its rows are GSM8k-Aug's
    n        how many rows where nothing is said; 0: all there are
    """

    help: str
    config: str | None = None
    n: int = 1000


TASKS = {
    "prosqa": Task("which of two concepts does a chain of facts lead to?", "GraphConfig"),
    "prontoqa": Task("does a statement follow from a chain of rules?", "OntologyConfig"),
    "gsm8k": Task("what number answers a question of grade-school mathematics?", n=0),
}


class _Parser(argparse.ArgumentParser):
    def __init__(self, *command: str, **settings: Any) -> None:
        prog = " ".join(["python -m nanococonut.data", *command])
        kind = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, formatter_class=kind, **settings)

    def error(self, message: str) -> NoReturn:  # argparse would print the usage and leave
        raise UserError(f"{message}.\nSee --help for what can be given.")


def task_command(name: str, argv: list[str]) -> None:
    """Write or look at rows of a task."""
    task, module = TASKS[name], import_module(f"nanococonut.data.{name}")
    config = getattr(module, task.config) if task.config else None
    parser = _Parser(name, description=task.help, epilog=config and config.__doc__)
    parser.add_argument("--out", metavar="FILE", help="write rows here (a new file)")
    parser.add_argument("--stats", metavar="FILE", help="print this file's statistics instead")
    parser.add_argument("--n", type=int, default=task.n, help=f"rows [{task.n or 'all'}]")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn [%(default)s]")
    _add_skip(parser)
    if config:
        for field in fields(config):  # the docstring, shown as epilog, says what they are
            kind, flag = type(field.default), f"--{field.name}"
            if kind is bool:
                parser.add_argument(flag, action="store_true", help=f"[{field.default}]")
            elif kind in (int, float, str):
                parser.add_argument(flag, type=kind, default=field.default, help="[%(default)s]")
    else:
        parser.add_argument("--from", dest="file", metavar="FILE", help="rows, such as text lines")
        parser.add_argument("--split", choices=gsm8k.SPLITS, help="of the copy on the hub [train]")
        parser.add_argument("--hub", default=gsm8k.HUB[0], help="which copy [%(default)s]")
        parser.add_argument("--revision", default="main", help="the copy's commit [%(default)s]")
    args = parser.parse_args(argv)

    if (args.stats is None) == (args.out is None):
        raise UserError(
            "give --out FILE to write rows, or --stats FILE to look at some.\n"
            "One of the two, see --help."
        )
    if args.stats:
        show_statistics(module, args.stats, _read(args.stats, args.skip_bad_rows))
        return
    if args.n < bool(config) or args.seed < 0:
        raise UserError(
            f"--n {args.n} --seed {args.seed}: wanted are at least one row and a seed from 0 up.\n"
            "Change them."
        )
    _must_be_new(args.out)
    if config:
        given = {k: v for k, v in vars(args).items() if k in {f.name for f in fields(config)}}
        rows, source = module.generate(args.n, args.seed, config(**given)), f"seed {args.seed}"
    else:
        rows, source = gsm8k_rows(args)
    write_rows(args.out, rows)
    print(f"{len(rows)} rows in {args.out} ({source})")


def gsm8k_rows(args: argparse.Namespace) -> tuple[list[Row], str]:
    """(rows of a file or of the hub, all or n of them drawn by seed; where they are from)."""
    if args.file and args.split:
        raise UserError("--split is of the copy on the hub, --from is a file.\nGive one of them.")
    if args.file:
        rows, source = _read(args.file, args.skip_bad_rows), args.file
    else:
        skipped: list[str] | None = [] if args.skip_bad_rows else None
        split = args.split or "train"
        rows, commit = gsm8k.from_hub(split, args.hub, args.revision, skipped)
        _say_skipped(rows, skipped)
        source = f"{args.hub} {split}, --revision={commit}"
    if args.n > len(rows):
        raise UserError(f"--n {args.n}: {source} has {len(rows)} rows.\nAsk for fewer; 0: all.")
    if args.n:  # more rows begin with the same rows
        rows = [rows[i] for i in np.random.default_rng(args.seed).permutation(len(rows))[: args.n]]
    return rows, source


def show_statistics(module: Any, path: str, rows: list[Row]) -> None:
    released = getattr(module, "RELEASED", PROSQA_RELEASED)
    found = module.statistics(rows)
    if hasattr(module, "heuristics"):
        found |= module.heuristics(rows)
    known = "800 released ones (rules: 300)" if released is PROSQA_RELEASED else "the released ones"
    print(f"{len(rows)} rows of {path}, beside {known}")
    keys = [*released, *(key for key in found if key not in released)]
    width = max(map(len, keys))
    print(f"{'':<{width}}{'file':>10}{'released':>10}")
    for key in keys:
        beside = f"{released[key]:10.3f}" if key in released else ""
        print(f"{key:<{width}}{found.get(key, 0):10.3f}{beside}")


def convert_command(argv: list[str]) -> None:
    """Any readable format -> the JSON form."""
    parser = _Parser("convert", description="Turn a file of rows, in any format, into JSON.")
    parser.add_argument("file", metavar="IN", help="JSON, JSON lines, raw ProntoQA or GSM8k-Aug")
    parser.add_argument("--out", metavar="FILE", required=True, help="write here (a new file)")
    _add_skip(parser)
    args = parser.parse_args(argv)
    _must_be_new(args.out)
    rows = _read(args.file, args.skip_bad_rows)
    write_rows(args.out, rows)
    print(f"{len(rows)} rows in {args.out} ({args.file})")


def _add_skip(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--skip_bad_rows", action="store_true", help="leave them out and say so")


def _read(path: str, skip_bad_rows: bool) -> list[Row]:
    skipped: list[str] | None = [] if skip_bad_rows else None
    rows = read_rows(path, skipped)
    _say_skipped(rows, skipped)
    return rows


def _say_skipped(rows: list[Row], skipped: list[str] | None) -> None:
    if skipped:
        print(skipped_line(len(rows), skipped))


def _must_be_new(path: str) -> None:
    """Said before the work, not after it."""
    if Path(path).exists():
        raise UserError(f"{path} exists already.\nChoose another name or remove it first.")


def main() -> None:
    listed = "\n".join(f"  {name:<10}{task.help}" for name, task in TASKS.items())
    listed += "\n  convert   turn a file of rows, in any format, into JSON"
    parser = _Parser(description=__doc__, epilog=listed, usage="%(prog)s TASK ... (or TASK --help)")
    parser.add_argument("task", choices=[*TASKS, "convert"], metavar="TASK", help="see below")
    # the rest is the task's own: only its module is imported
    task = parser.parse_args(sys.argv[1:2]).task
    if task == "convert":
        convert_command(sys.argv[2:])
    else:
        task_command(task, sys.argv[2:])


if __name__ == "__main__":
    main_guard(main)
