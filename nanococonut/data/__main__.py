"""Write rows to a file, or look at a file's statistics.

python -m nanococonut.data prosqa --n 1000 --seed 0 --out rows.json
python -m nanococonut.data prosqa --stats rows.json
"""

import argparse
from pathlib import Path
from typing import NoReturn

from nanococonut.data import prosqa, read_rows, write_rows
from nanococonut.errors import UserError, main_guard

# measured on the 800 released validation and test rows; heuristics on the 300 of validation
RELEASED = {
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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # argparse would print the usage and leave
        raise UserError(f"{message}.\nSee --help for what can be given.")


def prosqa_command(args: argparse.Namespace) -> None:
    if (args.stats is None) == (args.out is None):
        raise UserError(
            "give --out FILE to write rows, or --stats FILE to look at some.\n"
            "One of the two, see --help."
        )
    if args.stats:
        rows = read_rows(args.stats)
        found = prosqa.statistics(rows) | prosqa.heuristics(rows)
        print(f"{len(rows)} rows of {args.stats}, beside the released ones")
        print(f"{'':<18}{'file':>9}{'released':>10}")
        for key in [*RELEASED, *(k for k in found if k not in RELEASED)]:
            released = f"{RELEASED[key]:10.3f}" if key in RELEASED else ""
            print(f"{key:<18}{found.get(key, 0):9.3f}{released}")
        return
    if args.n < 1 or args.seed < 0:
        raise UserError(
            f"--n {args.n} --seed {args.seed}: wanted are at least one row and a seed from 0 up.\n"
            "Change them."
        )
    if Path(args.out).exists():  # said before the work, not after it
        raise UserError(f"{args.out} exists already.\nChoose another name or remove it first.")
    config = prosqa.GraphConfig(
        n_nodes=args.n_nodes,
        min_hops=args.min_hops,
        max_hops=args.max_hops,
        parent_rate=args.parent_rate,
        matched=args.matched,
    )
    write_rows(args.out, prosqa.generate(args.n, args.seed, config))
    print(f"{args.n} rows in {args.out}")


def main() -> None:
    parser = _Parser(
        prog="python -m nanococonut.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tasks = parser.add_subparsers(dest="task", required=True)
    task = tasks.add_parser("prosqa", help="which of two concepts does a chain of facts lead to?")
    task.set_defaults(command=prosqa_command)
    task.add_argument("--out", metavar="FILE", help="write generated rows here (a new file)")
    task.add_argument("--stats", metavar="FILE", help="print this file's statistics instead")
    task.add_argument("--n", type=int, default=1000, help="rows [%(default)s]")
    task.add_argument("--seed", type=int, default=0, help="[%(default)s]")
    default = prosqa.GraphConfig()
    for name, kind, help in (
        ("n_nodes", int, "nodes before those without any edge are taken out"),
        ("min_hops", int, "fewest steps to the answer"),
        ("max_hops", int, "most steps to the answer"),
        ("parent_rate", float, "mean number of parents a node asks for"),
    ):
        value = getattr(default, name)
        task.add_argument(f"--{name}", type=kind, default=value, help=f"{help} [{value}]")
    task.add_argument("--matched", action="store_true", help="both options equally deep")
    args = parser.parse_args()
    args.command(args)


if __name__ == "__main__":
    main_guard(main)
