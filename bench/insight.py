"""Do a model's thoughts do anything? One page that says so, and a result row.

    python bench/insight.py                                  the bundled model: insight.html
    python bench/insight.py --checkpoint out/RUN --against out/PAUSE_RUN --more
    python bench/insight.py --checkpoint out/RUN --data FILE --twins FILE     a task of your own
    python bench/insight.py --redraw bench/results/insight.jsonl              no model: rows again

Without --data, questions are generated, each with its twin: the same text asked about something
else. evaluation/insight.py has the rules. The last line of the output is the row, as JSON.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs without installation

import nanococonut  # isort: skip  # first: sets how OpenMP waits
from bench.common.results import ResultWriter, read_jsonl
from nanococonut import Engine
from nanococonut.data.generator import TEST_SEED
from nanococonut.evaluation import page
from nanococonut.evaluation.pairs import Pairs, load_pairs
from nanococonut.evaluation.paper import paper_figures
from nanococonut.evaluation.report import Row, measure
from nanococonut.evaluation.view import question_views
from nanococonut.runtime.cli import make_config, option, parse_cli, validate
from nanococonut.runtime.errors import UserError, run_main
from nanococonut.weights import checkpoint


@dataclass(frozen=True)
class InsightConfig:
    checkpoint: str | None = option(None, "a run or checkpoint (None: the bundled model)")
    data: str | None = option(None, "a file of examples (None: generated, by hops)")
    twins: str | None = option(None, "a file: example i is the twin of example i of --data")
    rows: int = option(400, "generated examples of each number of hops", ge=50)
    seed: int = option(TEST_SEED, "of generated examples", ge=0)
    html: str | None = option(None, "page to write (None: insight.html in the run's folder)")
    against: str | None = option(None, "a control run, drawn in grey: a pause_as_thought run")
    questions: int = option(6, "questions in the interactive view", ge=0, le=20)
    more: bool = option(False, "also draw the paper's figures 5, 7, 8 and 9")
    quick: bool = option(False, "100 rows of each number of hops")
    device: str = option("auto", "auto, cpu, cuda, mps")
    out: str | None = option(None, "append the row to this file")
    redraw: str | None = option(None, "a file of rows: draw its last one again")

    def __post_init__(self) -> None:
        validate(self)


def load(config: InsightConfig, path: str | None) -> tuple[str, Engine, Pairs | None, Pairs]:
    """Return a checkpoint's name and plain engine, pairs as in training, and pairs to measure."""
    engine = nanococonut.load(path or checkpoint.BUNDLED, config.device, "torch", "off")
    engine.model.float()
    rows = 100 if config.quick else config.rows
    name = Path(path).resolve().name if path else "bundled"
    return name, engine, *load_pairs(engine, rows, config.seed, config.data, config.twins)


def evaluate(
    config: InsightConfig, name: str, engine: Engine, plain: Pairs | None, pairs: Pairs
) -> Row:
    """Return the row of one model."""
    row, figures = measure(engine, name, plain, pairs)
    if "accuracy" in row and pairs.is_prosqa:
        row["view"] = question_views(engine, pairs, figures.right.tolist(), config.questions)
        if config.more and plain is not None:
            row["paper"] = paper_figures(engine, plain.examples)
    return {"schema": 1, "checkpoint": name} | row


def main() -> None:
    overrides, _ = parse_cli(InsightConfig, sys.argv[1:], __doc__.split("\n")[0])
    config = make_config(InsightConfig, overrides)

    # ---- what can be refused before any work
    folder = "" if config.redraw or not config.checkpoint else config.checkpoint
    for run in filter(None, (folder, config.against)):
        checkpoint.resolve(run)
    target = Path(config.html or Path(folder) / "insight.html")
    for path in map(Path, filter(None, (target, config.out))):
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise UserError(f"{path} cannot be written.\nGive a file in a folder that exists.")

    # ---- or drawn without a model
    if config.redraw:
        rows = [r["detail"] for r in read_jsonl(Path(config.redraw)) if "detail" in r]
        if not rows:
            raise UserError(f"{config.redraw} has no row of insight.py.\nGive a file of --out.")
        checkpoint.replace_text(target, page.render(rows[-1]))
        return print(f"page: {target}")

    # ---- load and check the model and its control, then measure
    print("plain torch steps in float32: kernels and graphs cannot be edited", file=sys.stderr)
    began, paths = time.perf_counter(), [config.checkpoint, *filter(None, [config.against])]
    subjects = [load(config, path) for path in paths]
    about = [f"{e.config.task} with {e.manifest['n_thoughts']} thoughts" for _, e, *_ in subjects]
    if about[0] != about[-1]:
        raise UserError(f"--against is of {about[1]}, not of {about[0]}.\nGive another control.")
    name, engine, _, pairs = subjects[0]
    w = engine.model.wte.weight
    labels = {"method": engine.manifest["method"], "task": engine.config.task, "checkpoint": name}
    results = ResultWriter("insight", config, w.device, w.dtype, **labels)
    row, *controls = [evaluate(config, *subject) for subject in subjects]
    for control in controls:  # at most one
        row["against"] = {k: control[k] for k in control if k not in ("trained", "view", "paper")}
    origin = {k: results.common[k] for k in ("commit", "device", "command", "date")}
    origin |= {"torch": results.versions["torch"], "rows": len(pairs.examples)}
    seconds = round(time.perf_counter() - began, 1)
    row["provenance"] = origin | {"seed": config.seed, "seconds": seconds}

    # ---- write the page, then the row
    trained = row.pop("trained")
    checkpoint.replace_text(target, page.render(row))
    lines = [f"[{x['mark']}] {x['title']} {page.sentence(x)}" for x in row["findings"]]
    print("\n".join([*lines, *row["refused"], *row["warnings"], f"page: {target}"]))
    results.add(
        "accuracy", "nanococonut", [trained["value"]], "fraction", detail=row,
        spread={"ci_low": trained["lo"], "ci_high": trained["hi"]},
        examples=trained["n"], thoughts=row["thoughts"],
    )  # fmt: skip
    print(results.summary())


if __name__ == "__main__":
    run_main(main)
