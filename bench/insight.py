"""Test whether a model's thoughts do anything; write an HTML page and a result row.

    python bench/insight.py                                  the bundled model: insight.html
    python bench/insight.py --checkpoint out/RUN --against out/PAUSE_RUN --more
    python bench/insight.py --checkpoint out/RUN --data FILE --twins FILE     your own task
    python bench/insight.py --redraw bench/results/insight.jsonl              from a row, no model

Without --data, questions are generated, each with a twin: the same text with another entity asked
about. evaluation/insight.py has the rules for each verdict. The last line of the output is the row,
as JSON, unless it is a terminal.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs without installation

import nanococonut  # isort: skip  # first: sets how OpenMP waits
from bench.accuracy import training_record
from bench.common.results import ResultWriter, read_jsonl
from nanococonut import Engine
from nanococonut.data.generator import TEST_SEED
from nanococonut.evaluation import page
from nanococonut.evaluation.pairs import Pairs, load_pairs
from nanococonut.evaluation.paper import paper_figures
from nanococonut.evaluation.report import Row, measure
from nanococonut.evaluation.view import question_views
from nanococonut.runtime.cli import Options, option
from nanococonut.runtime.errors import UserError, run_main
from nanococonut.weights import checkpoint


@dataclass(frozen=True)
class InsightConfig(Options):
    checkpoint: str | None = option(None, "a run or checkpoint (None: the bundled model)")
    data: str | None = option(None, "a file of examples (None: generated, by number of hops)")
    twins: str | None = option(None, "a file whose example i is the twin of example i of --data")
    rows: int = option(400, "generated examples per number of hops", ge=50)
    seed: int = option(TEST_SEED, "of generated examples", ge=0)
    html: str | None = option(None, "page to write (None: insight.html in the run's folder)")
    against: str | None = option(None, "a control run to draw in grey, such as pause_as_thought's")
    questions: int = option(6, "questions in the interactive view", ge=0, le=20)
    more: bool = option(False, "also draw the paper's figures 5, 7, 8 and 9")
    quick: bool = option(False, "100 examples per number of hops: tests 5 and 7 need more")
    device: str = option("auto", "auto, cpu, cuda, mps")
    out: str | None = option(None, "append the row to this file")
    redraw: str | None = option(None, "a file of rows: only draw its last one")


def load(config: InsightConfig, path: str | None) -> tuple[str, Engine, Pairs | None, Pairs]:
    """Return (name, engine, pairs distributed as in training, pairs to measure) of a checkpoint."""
    # plain steps, as the interventions run without kernels and graphs in any case
    engine = nanococonut.load(path or checkpoint.BUNDLED, config.device, "torch", "off")
    engine.model.float()
    name = Path(path).resolve().name if path else "bundled"
    n = 100 if config.quick else config.rows
    return name, engine, *load_pairs(engine, n, config.seed, config.data, config.twins)


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
    config = InsightConfig.from_cli(__doc__)

    # ---- draw a page from a row, without a model
    if config.redraw:
        target = Path(config.html or "insight.html")
        details = [row["detail"] for row in read_jsonl(Path(config.redraw)) if "detail" in row]
        if not details:
            raise UserError(f"{config.redraw} has no row of insight.py.\nGive a file of --out.")
        checkpoint.replace_text(target, page.render(details[-1]))
        print(f"page: {target}")
        return

    # ---- load the model and its control; refuse what would fail after minutes of work
    began = time.perf_counter()
    paths = [config.checkpoint, *filter(None, [config.against])]
    subjects = [load(config, path) for path in paths]
    target = Path(config.html or Path(config.checkpoint or "") / "insight.html")
    for path in map(Path, filter(None, (target, config.out))):
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise UserError(f"{path} cannot be written.\nGive a file in a folder that exists.")
    about = [f"{e.config.task} with {e.manifest['n_thoughts']} thoughts" for _, e, *_ in subjects]
    if about[0] != about[-1]:
        raise UserError(f"--against is of {about[1]}, not of {about[0]}.\nGive another control.")
    name, engine, _, pairs = subjects[0]
    w = engine.model.wte.weight
    labels = {"method": engine.manifest["method"], "task": engine.config.task, "checkpoint": name}
    results = ResultWriter("insight", config, w.device, w.dtype, **labels)

    # ---- measure
    print("plain torch in float32: interventions use no kernels and CUDA graphs", file=sys.stderr)
    row, *controls = [evaluate(config, *subject) for subject in subjects]
    for control in controls:  # at most one
        row["against"] = {k: control[k] for k in control if k not in ("trained", "view", "paper")}
    origin = {k: results.common[k] for k in ("commit", "device", "command", "date")}
    origin |= {"torch": results.versions["torch"], "rows": len(pairs.examples), "seed": config.seed}
    origin["seconds"] = round(time.perf_counter() - began, 1)
    row["provenance"] = origin | {"trained": training_record(engine.manifest)}

    # ---- write the page, then the row
    trained = row.pop("trained")
    checkpoint.replace_text(target, page.render(row))
    lines = [f"{name}, {about[0]}: {row['verdict']}"]
    if pairs.twinned:
        lines += ["A twin differs from its question in one thing, so another answer is correct."]
    lines += [f"[{x['mark']}] {x['title']} {page.sentence(x)}" for x in row["findings"]]
    print("\n".join([*lines, *row["refused"], *row["warnings"], f"page: {target}"]))
    results.add(
        "accuracy", "nanococonut", [trained["value"]], "fraction", detail=row,
        spread={"ci_low": trained["lo"], "ci_high": trained["hi"]},
        examples=trained["n"], thoughts=row["thoughts"],
    )  # fmt: skip
    results.print_summary()


if __name__ == "__main__":
    run_main(main)
